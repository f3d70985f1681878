"""Kill runs again and again, at random moments and at operations on files: resumed, they end in the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kill_worker

WORKER = Path(kill_worker.__file__)


@pytest.mark.parametrize(
    "processes, kills",
    [(1, 5), (2, 1), pytest.param(1, 30, marks=pytest.mark.long), pytest.param(2, 10, marks=pytest.mark.long)],
)
def test_killed_runs_end_in_the_same_bits(processes: int, kills: int, tmp_path: Path) -> None:
    """The short form kills 5 times in one process and once in two, the long one 30 and 10 times."""
    path = os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), str(processes), str(kills), str(processes * kills)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(f"{processes} processes: {counts}")
    assert counts["kills"] >= kills
    assert counts["runs compared"] >= 1
