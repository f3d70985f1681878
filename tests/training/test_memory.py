"""Measure a process's memory, in processes that hold a known amount."""

import platform
import subprocess
import sys

import pytest

from l3d.training import memory

CODE = """
from l3d.training.memory import memory_now, peak_memory
before = memory_now()
held = bytearray(b"x") * (300 << 20)
held = None
print(before, memory_now(), peak_memory())
"""


@pytest.mark.skipif(not memory.memory_now(), reason="the system does not tell a process's memory")
def test_the_peak_is_this_process_s_own() -> None:
    """300 MiB held and given back are in the peak and not in what is held now; what the parent held is in neither."""
    of_the_parent = bytearray(b"x") * (900 << 20)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, now, peak = (int(number) / 2**20 for number in done.stdout.split())
    assert len(of_the_parent) == 900 << 20
    assert now - before < 100
    assert 290 < peak - before < 700
    assert peak < 900


FAULTS = """
import resource
import sys
from l3d.training.memory import keep_freed_memory
kept = "keep" in sys.argv and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(b"x") * (40 << 20)
before = faults()
for _ in range(10):
    bytearray(b"x") * (40 << 20)
print(int(kept), faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="not glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """40 MiB asked for ten times over are fetched from the system anew each time, or only the first time."""
    found = []
    for argument in ("leave", "keep"):
        done = subprocess.run([sys.executable, "-c", FAULTS, argument], capture_output=True, text=True, check=True)
        found.append([int(number) for number in done.stdout.split()])
    (left, many), (kept, few) = found
    assert (left, kept) == (0, 1)
    assert few < many / 10


def test_without_the_system_s_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is not there, what is held now is 0, unknown, and the peak is getrusage's."""
    monkeypatch.setattr(memory, "_STATUS", memory.Path("/nonexistent"))
    assert memory.memory_now() == 0
    assert memory.peak_memory() > 10 << 20
