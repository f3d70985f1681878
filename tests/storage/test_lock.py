"""Let one process at a time write into a run folder."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import l3d
from l3d.storage.lock import LOCK, check_free, claim, release

ARGUMENTS: dict[str, Any] = {"n_subnetworks": 2, "rank": 1, "steps": 4, "progress": False}


def run(folder: Path, **changed: Any) -> None:
    torch.manual_seed(0)
    l3d.decompose(nn.Linear(4, 3), torch.randn(20, 4), out=folder, **(ARGUMENTS | changed))


def held_by(folder: Path, process: int, host: str = platform.node()) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps({"host": host, "process": process}))


def test_a_folder_that_another_process_writes_into_is_refused(tmp_path: Path) -> None:
    """Whether it is new to us, to be replaced or to be gone on with; what is in it stays."""
    run(tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert LOCK not in before  # ours is gone at the end
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        held_by(tmp_path / "run", other.pid)
        for changed in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(ValueError, match=rf"out: process {other.pid} is writing into .*run; wait for it"):
                run(tmp_path / "run", **changed)
        other.communicate(b"\n")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([*before, LOCK])
    run(tmp_path / "run", resume=True)  # it has ended since
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

    def on_start(_: Path) -> None:
        raise RuntimeError("no config")

    with pytest.raises(RuntimeError, match="no config"):
        run(tmp_path / "new", on_start=on_start)
    assert not list((tmp_path / "new").iterdir())
