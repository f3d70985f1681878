"""Faults planted in the kernels' source, or in their compiled code, are caught where the code is executed as PTX."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton

from tools import execute

KERNELS = Path(__file__).parents[2] / "l3d_kernels"


class Planted(NamedTuple):
    """A text of a source file and what replaces it, the job that meets it, and what is said about it."""

    file: str
    old: str
    new: str
    job: str
    found: str


FAULTS = {
    "a load's mask dropped": Planted(
        "decode/sparse_decode.py",
        "d_out = load(d_out_ptr + code * D + offs_d, offs_d < D)",
        "d_out = load(d_out_ptr + code * D + offs_d, offs_d >= 0)",
        "sparse_decode/odd/float32",
        "outside tensor",
    ),
    "a store's mask dropped": Planted(
        "energy/gram.py",
        "mask = (offs_b < K) & (offs_a <= offs_b)",
        "mask = offs_a <= offs_b",
        "gram/odd/bfloat16",
        "outside tensor",
    ),
    "a bound off by one": Planted(
        "shared/device.py", "mask_d = offs_d < D", "mask_d = offs_d <= D", "gram/odd/float32", "outside tensor"
    ),
    "an accumulation that is not atomic": Planted(
        "topk/radix.py",
        'tl.atomic_add(histogram_ptr + tl.arange(0, 1 << BITS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")',
        "places = histogram_ptr + tl.arange(0, 1 << BITS)\n    tl.store(places, tl.load(places) + counts.to(tl.int64))",
        "project_topk/divisible/float32",
        "two programs, one of them .* touch byte",
    ),
    "the histogram as it was": Planted(
        "topk/radix.py",
        "    digit = tl.ravel(tl.where(mask, digit, -1))\n"
        "    counts = tl.histogram(tl.maximum(digit, 0), 1 << BITS, mask=digit >= 0)",
        "    counts = tl.histogram(tl.ravel(digit), 1 << BITS, mask=tl.ravel(mask))",
        "project_topk/odd/bfloat16",
        "another selection",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name: str, tmp_path: Path) -> None:
    """A copy of the package with one fault in its source fails, and says where."""
    fault = FAULTS[name]
    shutil.copytree(KERNELS, tmp_path / "l3d_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "l3d_kernels" / "kernels" / fault.file
    source = file.read_text()
    assert source.count(fault.old) == 1, f"{fault.file} has changed"
    file.write_text(source.replace(fault.old, fault.new))
    (job,) = execute(fault.job, root=tmp_path)
    assert re.search(fault.found, job["error"]), job["error"]


# Barriers that triton 3.7.1 makes and these runs do not need, by kernel: the compiler guards whole buffers of shared
# memory, also where a warp reads back its own bytes, where the bytes reused are others, and where another barrier
# follows before they are. Those of `tl.debug_barrier` are among them: the dots of a round bring barriers of their own.
REDUNDANT = {
    "project_returned": 1, "project_dense_sum": 2, "topk_scan_rows": 1, "coactive_backward": 3, "residual_tile": 1,
    "softmax_logits": 1,
}  # fmt: skip
LOOPS = [
    "project", "project_chunked", "project_at", "project_dense", "project_topk", "gram", "gram_energy_coactive",
    "squared_gradient_norm", "reconstruct", "squared_residual_norm", "sparse_decode", "softmax_mean",
    "softmax_mean_wide", "update",
]  # fmt: skip


def redundant(jobs: list[dict[str, Any]]) -> dict[str, str]:
    """Return the barriers and waits that nothing was noticed without, and why."""
    assert not [job["error"] for job in jobs if job["error"]]
    places = {place: what for job in jobs for place, what in job["deleted"].items()}
    silent = {place: what for place, what in places.items() if what.startswith("redundant")}
    for place, what in silent.items():
        print(f"{place}: {what}")
    print(f"noticed: {len(places) - len(silent)} of {len(places)}")
    assert not [place for place in silent if "wait_group" in place], "a wait for copies was left out unnoticed"
    return silent


def assert_listed(silent: dict[str, str]) -> None:
    """No more barriers are redundant than are listed; of another triton's, which may make more, a number of each."""
    counts = Counter(place.split()[0] for place in silent)
    slack = 0 if triton.__version__ == "3.7.1" else 3
    assert not {kernel: n for kernel, n in counts.items() if n > REDUNDANT.get(kernel, 0) + slack}


def test_each_barrier_and_wait_is_missed() -> None:
    """Without one of its barriers, or of its waits for copies, a kernel is at fault, or the barrier is listed."""
    jobs = execute("gram/loops/bfloat16", "reconstruct/loops/bfloat16", "project/loops/bfloat16", "--delete")
    assert_listed(redundant(jobs))


@pytest.mark.slow_kernels
def test_each_barrier_and_wait_of_every_kernel_is_missed() -> None:
    """As above, for every kernel."""
    assert_listed(redundant(execute(*(f"{op}/loops/bfloat16" for op in LOOPS), "--delete")))


# the same in float32, by op; the three products of tf32x3 stage their tiles in buffers that one barrier would guard
REDUNDANT_FLOAT32 = {
    "project": 3, "project_chunked": 2, "project_at": 2, "project_dense": 1, "project_topk": 5, "gram": 3,
    "gram_energy_coactive": 12, "squared_gradient_norm": 3, "reconstruct": 2, "squared_residual_norm": 2,
    "softmax_mean_wide": 1,
}  # fmt: skip


@pytest.mark.slow_kernels
@pytest.mark.parametrize("op", LOOPS)
def test_each_barrier_and_wait_is_missed_in_float32(op: str) -> None:
    """As above, in float32."""
    slack = 0 if triton.__version__ == "3.7.1" else 3
    assert len(redundant(execute(f"{op}/loops/float32", "--delete"))) <= REDUNDANT_FLOAT32.get(op, 0) + slack


def test_debug_barrier_is_missed() -> None:
    """A kernel without the barrier that `tl.debug_barrier` makes is at fault where threads load what others stored.

    The two of `coactive_backward` are listed as redundant: compiled for sm_80, each warp loads what it stored itself.
    """
    (job,) = execute("mirror/tiles/float32", "--delete")
    assert not job["error"]
    noticed = {place: what for place, what in job["deleted"].items() if "bar.sync" in place}
    assert len(noticed) == 1
    assert all("another warp" in what for what in noticed.values()), noticed


def test_a_sum_in_memory_needs_barriers() -> None:
    """Without barriers, warps of the coactive backward pass meet in the sums that it keeps in global memory.

    The barrier of `tl.debug_barrier` alone is not missed on sm_80: the dots of the next round bring their own.
    """
    (job,) = execute("gram_energy_coactive/narrow/bfloat16", "--unordered")
    assert re.search("coactive_backward.*: tensor .: another warp .* the same bytes", job["error"]), job["error"]
