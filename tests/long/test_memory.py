"""Train for long in a process of its own: it holds at the end what it held after a sixth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from l3d.training.memory import memory_now

import memory_worker

WORKER = Path(memory_worker.__file__)
LONG = {"calls": 300, "mlp": 10_000, "language": 10_000}


@pytest.mark.skipif(not memory_now(), reason="the system does not tell a process's memory")
@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.long)], ids=["short", "long"])
@pytest.mark.parametrize("what", LONG)
def test_memory_does_not_grow(what: str, share: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """300 calls of decompose, or 10,000 steps of one: at most 3 % above what is held after a sixth."""
    path = os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(WORKER), what, str(LONG[what] // share), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    early, end = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{what} {LONG[what] // share}: {early / 2**20:.1f} MiB after a sixth, {end / 2**20:.1f} at the end")
    assert end <= 1.03 * early
