"""Let one process at a time write into a run folder."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import l3d
from l3d.storage.lock import LOCK, check_free, claim, release

ARGUMENTS: dict[str, Any] = {"n_subnetworks": 2, "rank": 1, "steps": 4, "callbacks": []}


def run(folder: Path, **changed: Any) -> None:
    torch.manual_seed(0)
    l3d.decompose(nn.Linear(4, 3), torch.randn(20, 4), out=folder, **(ARGUMENTS | changed))


def held_by(folder: Path, process: int, host: str = platform.node(), **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps({"host": host, "process": process, **more}))


def test_a_folder_that_another_process_writes_into_is_refused(tmp_path: Path) -> None:
    """Whether it is new to us, to be replaced or to be gone on with; what is in it stays."""
    run(tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert LOCK not in before  # ours is gone at the end
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        held_by(tmp_path / "run", other.pid)
        for existing in ("refuse", "overwrite", "resume"):
            with pytest.raises(ValueError, match=rf"out: process {other.pid} is writing into .*run; wait for it"):
                run(tmp_path / "run", existing=existing)
        other.communicate(b"\n")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([*before, LOCK])
    run(tmp_path / "run", existing="resume")  # it has ended since
    assert not (tmp_path / "run" / LOCK).exists()


def test_what_nobody_holds_is_free(tmp_path: Path) -> None:
    """Our own, another machine's, a broken file, none at all."""
    check_free(tmp_path / "nowhere")
    held_by(tmp_path, os.getpid())
    check_free(tmp_path)
    held_by(tmp_path, os.getppid(), host="another machine")
    check_free(tmp_path)
    (tmp_path / LOCK).write_text("not json")
    check_free(tmp_path)
    claim(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    release(tmp_path)
    release(tmp_path)


def test_a_run_that_fails_lets_go(tmp_path: Path) -> None:
    """In its callbacks, and before it has begun."""

    class Failing(l3d.callbacks.Callback):
        def on_step(self, step: int, row: Any) -> None:
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        run(tmp_path / "run", callbacks=[Failing()])
    assert not (tmp_path / "run" / LOCK).exists()

    class Refusing(l3d.callbacks.Callback):
        def on_folder(self, folder: Path) -> None:
            raise RuntimeError("no config")

    with pytest.raises(RuntimeError, match="no config"):
        run(tmp_path / "new", callbacks=[Refusing()])
    assert not list((tmp_path / "new").iterdir())


has_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").is_file(), reason="the system does not tell when a process started"
)


@has_proc
def test_a_lock_is_stale_if_its_process_is_another_by_now(tmp_path: Path) -> None:
    """By the time it started, however a process is called; one that ended and was not waited for holds nothing."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        fields = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19])  # the 22nd field of all: two stand before the state
        assert started > 0
        for known, free in ((started, False), (started + 1, True), (1, True), (None, False), (0, False)):
            held_by(tmp_path / "run", other.pid, started=known)
            if free:
                check_free(tmp_path / "run")
            else:
                with pytest.raises(ValueError, match=f"process {other.pid} is writing"):
                    check_free(tmp_path / "run")
                with pytest.raises(ValueError, match=f"process {other.pid} is writing"):
                    claim(tmp_path / "run")
        held_by(tmp_path / "run", other.pid, started=started + 1)
        claim(tmp_path / "run")
        mine = json.loads((tmp_path / "run" / LOCK).read_text())
        assert mine["process"] == os.getpid()
        own = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        assert mine["started"] == int(own[19])
        other.stdin.close()  # type: ignore[union-attr]
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        held_by(tmp_path / "run", other.pid, started=started)
        check_free(tmp_path / "run")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"host": 3, "process": 1}', '{"process": 1}', '{"host": "here", "process": -1}',
             '{"host": "here", "process": 1e3}', '{"host": "here", "process": 99999999999999999999}', "x" * 10_000]
)  # fmt: skip
def test_a_lock_that_nobody_wrote_holds_nothing(text: str, tmp_path: Path) -> None:
    """Whatever stands in it, it is replaced."""
    (tmp_path / LOCK).write_text(text.replace("here", platform.node()))
    check_free(tmp_path)
    claim(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_only_its_owner_releases_a_lock(tmp_path: Path) -> None:
    """Another process's lock, another machine's and a broken one stay."""
    for process, host in ((os.getppid(), platform.node()), (os.getpid(), "another machine")):
        held_by(tmp_path, process, host)
        release(tmp_path)
        assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text("not json")
    release(tmp_path)
    assert (tmp_path / LOCK).exists()
    claim(tmp_path)
    release(tmp_path)
    assert not (tmp_path / LOCK).exists()


CLAIM = """
import sys, time
from pathlib import Path
from l3d.storage.lock import claim
folder, at = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, at - time.time()))
try:
    claim(folder)
    print("claimed", flush=True)
    input()  # holds it until the others have been answered
except ValueError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("stale", ["no lock", "a stale lock", "a broken lock"])
def test_of_processes_that_start_at_once_one_gets_the_folder(stale: str, tmp_path: Path) -> None:
    """Eight claim at one moment, for a new folder and in a stale lock's place; seven are told who holds it."""
    if stale == "a stale lock":
        done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
        held_by(tmp_path, int(done.stdout))
    elif stale == "a broken lock":
        (tmp_path / LOCK).write_text("not json")
    command = [sys.executable, "-c", CLAIM, str(tmp_path), str(time.time() + 2)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(Path(l3d.__file__).parents[1])}
    started = [subprocess.Popen(command, env=environment, **pipes) for _ in range(8)]
    answers = [process.stdout.readline().strip() for process in started]
    winners = [process.pid for process, answer in zip(started, answers, strict=True) if answer == "claimed"]
    held = json.loads((tmp_path / LOCK).read_text())["process"]
    for process in started:
        process.communicate("\n")
    assert winners == [held]
    assert sum(f"process {held} is writing into" in answer for answer in answers) == 7
