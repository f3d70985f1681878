"""`project_tiled` as kernels: value and gradients of `project`'s cases, in pieces of any size."""

from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.shared import common

from project_cases import CASES, EMPTY, make
from tools import DTYPES, assert_kernel, assert_same_twice, gradients, launches

LEAVES = ("left", "right")


def run(i: dict[str, Any], backend: str) -> Tensor:
    return lk.project_tiled(i["x"], i["dy"], i["left"], i["right"], backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["shared", "one sample a sequence", "several tiles", "one position, rank one"])
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """The error is at most twice the twin's, in every dtype."""
    assert_kernel(run, make(CASES[name]), LEAVES, dtype, "project_dense_sum")


def test_pieces_of_any_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of O at a time gives what all at once does, within rounding; the same bits twice."""
    inputs = make(CASES["shared"])
    value, grads = gradients(run, inputs, LEAVES, "triton")
    assert_same_twice(run, inputs, LEAVES)
    monkeypatch.setattr(common, "WORKSPACE", 1)
    with launches() as seen:
        cut, cut_grads = gradients(run, inputs, LEAVES, "triton")
    assert seen["project_dense_sum"] == CASES["shared"].O
    for a, b in zip([cut, *cut_grads], [value, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_do(name: str) -> None:
    """Sizes of zero give zeros of the right shape, and zero gradients."""
    case = EMPTY[name]
    value, grads = gradients(run, make(case), LEAVES, "triton")
    assert torch.equal(value, torch.zeros(case.S, case.K, dtype=torch.float64))
    assert all(not grad.any() for grad in grads)


def test_bindings() -> None:
    """gradcheck and opcheck pass; torch.compile(fullgraph=True) agrees with eager."""
    i = make(CASES["shared"])
    arguments = (i["x"], i["dy"], i["left"], i["right"])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.l3d.project_tiled, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.l3d.project_tiled_backward, (i["dy"][:, 0, :4], *arguments), test_utils=tests)
    compiled = torch.compile(lambda i: run(i, "triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(i), run(i, "triton"))
    free = (i["left"].requires_grad_(), i["right"].requires_grad_())
    torch.autograd.gradcheck(
        lambda left, right: run(i | {"left": left, "right": right}, "triton"), free, fast_mode=True
    )
