"""Faults planted in the kernels' source, or in their compiled code, are caught where the code is executed as PTX."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

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
        "    tl.atomic_add(histogram_ptr + tl.arange(0, 1 << BITS), counts.to(tl.int64), mask=counts > 0, sem=\"relaxed\")",
        "    places = histogram_ptr + tl.arange(0, 1 << BITS)\n    tl.store(places, tl.load(places) + counts.to(tl.int64))",
        "project_topk/divisible/float32",
        "two programs, one of them .* touch byte",
    ),
    "the histogram as it was": Planted(
        "topk/radix.py",
        "    digit = tl.ravel(tl.where(mask, digit, -1))\n    counts = tl.histogram(tl.maximum(digit, 0), 1 << BITS, mask=digit >= 0)",
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
