"""`project_dense` as a kernel: value and gradients, patches that do not fit, a sum in parts."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.shared import common

from tools import DTYPES, assert_kernel, assert_same_twice, gradients, launches, normal, strided

LEAVES = ("grad", "left", "right")


class Case(NamedTuple):
    """Sizes of one problem. In the interpreter a tile is 16 x 16, a patch 4 x 8."""

    S: int = 5
    O: int = 7
    I: int = 6
    K: int = 3
    R: int = 2


CASES = {
    "odd": Case(),
    "several tiles": Case(S=18, O=9, I=17, K=19, R=3),
    "many ranks": Case(R=70, O=3, K=2),
    "one of everything": Case(1, 1, 1, 1, 1),
}
EMPTY = {"no samples": Case(S=0), "no subnetworks": Case(K=0), "rank zero": Case(R=0), "no inputs": Case(I=0)}


def make(case: Case) -> dict[str, Any]:
    return {
        "grad": normal(case.S, case.O, case.I, seed=1),
        "left": normal(case.K, case.R, case.O, seed=2),
        "right": normal(case.K, case.R, case.I, seed=3),
    }


def run(i: dict[str, Any], backend: str) -> Tensor:
    return lk.project_dense(i["grad"], i["left"], i["right"], backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """The error is at most twice the twin's, in every dtype."""
    assert_kernel(run, make(CASES[name]), LEAVES, dtype, "project_dense_sum")


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_do(name: str) -> None:
    """Sizes of zero give zeros of the right shape, and zero gradients."""
    case = EMPTY[name]
    value, grads = gradients(run, make(case), LEAVES, "triton")
    assert torch.equal(value, torch.zeros(case.S, case.K, dtype=torch.float64))
    assert all(not grad.any() for grad in grads)


def test_gradcheck() -> None:
    """Gradients agree with differences in float64."""
    inputs = [value.requires_grad_() for value in make(CASES["odd"]).values()]
    torch.autograd.gradcheck(lambda *a: lk.project_dense(*a, backend="triton"), inputs, fast_mode=True)


@pytest.mark.parametrize("programs", [1, 2, 264])
def test_a_sum_in_parts_changes_nothing(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share the rows of O, the value is the twin's; the same bits twice."""
    inputs = make(CASES["several tiles"])
    monkeypatch.setattr(common, "PROGRAMS", programs)
    torch.testing.assert_close(run(inputs, "triton"), run(inputs, "torch"), rtol=1e-12, atol=1e-12)
    assert_same_twice(run, inputs, LEAVES)


def test_workspace_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass one row of O at a time gives the gradients of all at once."""
    inputs = make(CASES["odd"])
    _, whole = gradients(run, inputs, LEAVES, "triton")
    monkeypatch.setattr(common, "WORKSPACE", 1)
    _, pieces = gradients(run, inputs, LEAVES, "triton")
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_strides_do_not_matter() -> None:
    """Inputs with gaps, or transposed, give the bits of packed ones."""
    inputs = make(CASES["odd"])
    for change in (strided, lambda t: t.mT.contiguous().mT):
        assert torch.equal(run({key: change(value) for key, value in inputs.items()}, "triton"), run(inputs, "triton"))


def test_bindings() -> None:
    """The operators keep torch's contract; torch.compile(fullgraph=True) and vmap of a gradient agree with eager."""
    inputs = make(CASES["odd"])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.l3d.project_dense, tuple(inputs.values()), test_utils=tests)
    backward = (normal(5, 3), *inputs.values(), [True] * 3)
    torch.library.opcheck(torch.ops.l3d.project_dense_backward, backward, test_utils=tests)

    compiled = torch.compile(lambda i: run(i, "triton"), fullgraph=True, backend="aot_eager")
    with launches("project_dense_sum"):
        value, grads = gradients(lambda i, _: compiled(i), inputs, LEAVES, "triton")
    plain, plain_grads = gradients(run, inputs, LEAVES, "triton")
    assert all(torch.equal(a, b) for a, b in zip([value, *grads], [plain, *plain_grads], strict=True))

    def loss(left: Tensor) -> Tensor:
        return run(inputs | {"left": left}, "triton").square().sum()

    both = torch.stack([inputs["left"], 2 * inputs["left"] + 1])
    mapped = torch.vmap(torch.func.grad(loss))(both)
    for a, b in zip(mapped, both, strict=True):
        torch.testing.assert_close(a, torch.func.grad(loss)(b))
