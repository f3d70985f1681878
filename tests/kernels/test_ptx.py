"""Every op, compiled for sm_80 and executed as PTX: values and gradients keep the tests' rule, and nothing is at fault.

The ops' own Python runs on CPU tensors with the launcher alone replaced (`ptx_worker.py`); `ptx.py` says what counts as
a fault.
"""

from typing import Any

import pytest

from l3d_kernels import registry
from l3d_kernels.kernels.shared.launch_table import TABLE

from tools import execute

assert registry.load_kernels() == ""

OPS = [
    "project", "project_tiled", "project_at", "project_dense", "project_topk", "batch_topk", "gram", "gram_energy",
    "gram_energy_coactive", "squared_gradient_norm", "reconstruct", "squared_residual_norm", "sparse_decode",
    "softmax_mean", "update",
]  # fmt: skip
KINDS = ("bfloat16", "float16", "float32", "tf32")
# forms that `OPS` at the sizes "odd", "tiles" and "divisible" do not reach: of other kernels, or of other constants
FORMS = [
    f"{op}/{size}"
    for op in ("project", "project_at", "project_topk", "squared_gradient_norm")
    for size in ("alone", "indices", "single")
]
FORMS += ["project_chunked/odd", "project_chunked/tiles", "sparse_decode_flat/odd", "sparse_decode_flat/tiles"]
FORMS += ["softmax_mean_wide/odd", "softmax_mean_wide/tiles"]
FORMS += [f"{op}_several/{size}" for op in ("gram", "energy", "norm") for size in ("odd", "tiles")]


def assert_sound(jobs: list[dict[str, Any]]) -> None:
    bad = {job["job"]: job["error"] for job in jobs if job["error"]}
    assert not bad, "\n".join(f"{name}: {error}" for name, error in bad.items())
    assert all(job["instructions"] for job in jobs), "nothing was executed"


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_size(kind: str) -> None:
    """At sizes that no block divides."""
    assert_sound(execute(*(f"{op}/odd/{kind}" for op in OPS)))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiles", "divisible"])
def test_larger_sizes(size: str) -> None:
    """At sizes of several blocks, and at such that 16 divides, with several entries in each split and loop."""
    assert_sound(execute(*(f"{op}/{size}/bfloat16" for op in OPS)))


@pytest.mark.slow_kernels
@pytest.mark.parametrize("size", ["tiles", "divisible"])
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("op", OPS)
def test_larger_sizes_in_other_dtypes(op: str, kind: str, size: str) -> None:
    """As above, in the dtypes left out there."""
    assert_sound(execute(f"{op}/{size}/{kind}"))


def test_other_forms_and_every_kernel() -> None:
    """One sample a sequence, indices, one position, wide layers; with them each kernel of the table was executed."""
    jobs = execute(*(f"{form}/bfloat16" for form in FORMS), *(f"{op}/odd/bfloat16" for op in OPS))
    assert_sound(jobs)
    assert {kernel for job in jobs for kernel in job["kernels"]} == {name.split()[0] for name in TABLE}


@pytest.mark.slow_kernels
@pytest.mark.parametrize("kind", KINDS[1:])
def test_other_forms_in_other_dtypes(kind: str) -> None:
    """As above, in the dtypes left out there."""
    assert_sound(execute(*(f"{form}/{kind}" for form in FORMS)))
