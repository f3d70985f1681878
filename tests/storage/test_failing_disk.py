"""Let every operation on files fail: one line names the file, the reason and how to go on; checkpoints stay whole."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import l3d
from l3d.cli.main import main
from l3d.storage import manifest
from l3d.storage.files import WriteError
from l3d.storage.run_folder import RunFolder

from command_line import refusal
from training_runs import assert_same_bits, train

ERRORS = {"ENOSPC": "No space left on device", "EIO": "Input/output error", "EROFS": "Read-only file system"}
RUN: dict[str, Any] = {"steps": 6, "checkpoint_every": 3}


class Disk:
    """Count the operations that change files, and let the i-th fail; with `stays`, all after it too."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, name: str, stays: bool) -> None:
        self.calls, self.at, self.stays = 0, at, stays
        self.error = OSError(getattr(errno, name), ERRORS[name])
        removing = ["unlink", "rmdir"] if name == "EROFS" else []  # a full disk lets files be deleted
        for of, names in ((os, ["replace", "rename", *removing]), (Path, ["mkdir", "write_bytes", "write_text"])):
            for each in names:
                patch.setattr(of, each, self.wrapped(each, getattr(of, each)))
        patch.setattr(os, "fsync", self.wrapped("fsync", lambda descriptor: None))  # real ones take milliseconds

    def wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.at or (self.stays and self.calls > self.at):
                if name.startswith("write_"):  # the disk fills half way
                    with open(given[0], "wb") as file:
                        file.write(b"half")
                raise self.error
            return original(*given, **options)

        return call


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", ERRORS)
def test_every_operation_may_fail(name: str, stays: bool, tmp_path: Path) -> None:
    """The error names a file and the reason; what is resumed, or started again, ends in the same bits."""
    whole, at, failed = train(**RUN), 0, 0
    while True:
        at += 1 if stays == (name == "ENOSPC") else 3  # two of the six forms go through all, the others a third
        run = tmp_path / f"run{at}"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, name, stays)
            try:
                train(out=run, **RUN)
            except OSError as error:
                line, kind = str(error), type(error)
            else:
                line, kind = "", OSError
        last = RunFolder(run).checkpoints()
        assert all(manifest.check(path) is None for path in last)
        if disk.calls < at:
            break
        if line:
            failed += 1
            assert kind is WriteError
            assert "\n" not in line
            assert line.startswith(str(run))
            assert f": cannot be written: {ERRORS[name]}" in line
            if last:
                how = f"; last checkpoint: {last[-1]}; resume with: l3d.decompose(.., out='{run}', existing='resume')"
                assert line.endswith(how)
        if line and not (run / "checkpoints").exists():
            d = train(out=run, **RUN)
        else:
            d = train(out=run, existing="resume", **RUN)
        assert_same_bits(d, whole)
        assert_same_bits(l3d.load(run), whole)
        names = {path.name for path in run.iterdir()}
        assert names == {"checkpoints", "decomposition.safetensors", "decomposition.json", "manifest.json", "README.md"}
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step000000003", "step000000006"]
        shutil.rmtree(run)
    assert at > 50
    assert failed > 0.6 * (at if stays == (name == "ENOSPC") else at / 3)  # some failures do no harm
    print(f"{name}, {'from then on' if stays else 'once'}: {failed} failures")


def test_a_run_folder_that_vanished_is_named(tmp_path: Path) -> None:
    """It is not made again: what it held is gone, or on a disk that is."""

    class Remove(l3d.callbacks.Callback):
        def on_step(self, step: int, figures: Any) -> None:
            if step == 8:
                shutil.rmtree(tmp_path / "run")

    with pytest.raises(WriteError, match=r"run: cannot be written: the run folder has vanished; before the first"):
        train(out=tmp_path / "run", checkpoint_every=3, callbacks=[Remove()])
    assert not (tmp_path / "run").exists()


def test_what_a_command_writes_at_its_end_may_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After training too, the line says how to go on, and that works."""
    run = tmp_path / "run"
    command = ["toy", "tms", "--steps", "20", "--describe", "0", "--out", str(run)]
    with pytest.MonkeyPatch.context() as patch:
        replace = os.replace

        def full(source: Any, target: Any) -> None:
            if Path(target).name in ("metrics.json", "report.html"):
                raise OSError(errno.ENOSPC, ERRORS["ENOSPC"])
            replace(source, target)

        patch.setattr(os, "replace", full)
        line = refusal(capsys, command)
    last = run / "checkpoints" / "step000000020"
    how = f"last checkpoint: {last}; resume with: l3d resume {run}"
    assert line == f"{run / 'metrics.json'}: cannot be written: {ERRORS['ENOSPC']}; {how}"
    assert main(["resume", str(run)]) == 0
    assert (run / "report.html").is_file()


def test_half_a_copy_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that did not fit leaves nothing, and the run as it was."""
    from l3d.storage.run_folder import copy_run

    train(out=tmp_path / "run", **RUN)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))

    def full(source: str, target: str, **_: Any) -> None:
        raise OSError(errno.ENOSPC, ERRORS["ENOSPC"])

    monkeypatch.setattr(shutil, "copystat", full)
    with pytest.raises(WriteError, match=r"copy: cannot be written: .*No space left on device"):
        copy_run(tmp_path / "run", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


CHILD = """
import resource, sys
from l3d.cli.main import main

for limit in map(int, sys.argv[1:]):
    command = ["toy", "tms", "--steps", "300", "--checkpoint_every", "20", "--describe", "0", "--out", f"run{limit}"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    status = main(command)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    import pathlib
    run = pathlib.Path(f"run{limit}")
    begun = any(run.glob("checkpoints/step*[0-9]"))
    again = main(["resume", str(run)] if begun else [*command, "--overwrite"])
    print("statuses", status, again, begun, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX'")
def test_files_may_not_grow(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops a write half way: of the configuration, of the first checkpoint, and of a later one."""
    limits = ["100", "1000", "7000", "30000"]
    path = os.pathsep.join([str(Path(l3d.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *limits],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    statuses = [line for line in done.stdout.splitlines() if line.startswith("statuses")]
    lines = [line for line in done.stderr.splitlines() if line.startswith("l3d: error: ")]
    assert all("statuses 2 0" in line for line in statuses), done.stdout + done.stderr
    assert len(lines) == len(limits)
    assert {line.endswith("True") for line in statuses} == {False, True}, statuses
    for limit, line, status in zip(limits, lines, statuses, strict=True):
        assert f"run{limit}/" in line
        assert "cannot be written: File too large" in line
        if status.endswith("True"):
            assert line.endswith(f"resume with: l3d resume run{limit}")
