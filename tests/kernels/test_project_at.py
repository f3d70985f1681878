"""`project_at` as kernels: value and gradients at the kept pairs, however the subnetworks share them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.shared import common

from op_cases import Case, kept_of
from op_cases import make as make_all
from tools import DTYPES, assert_kernel, assert_same_twice, gradients, launches, normal, strided

LEAVES = ("left", "right")


CASES = {
    "few pairs": Case(B=3, S=3, K=9, kept=5),
    "shared, many kept": Case(),
    "shared, few kept": Case(B=4, S=8, K=6, kept=11),
    "everything kept": Case(B=5, S=5, kept=20),
    "several tiles": Case(B=3, S=6, T=11, I=35, O=33, K=3, R=19, kept=12),
    "many positions": Case(B=2, S=2, T=37, K=2, kept=3),
    "lopsided": Case(B=19, S=38, T=1, K=4, kept=41, lopsided=True),
    "indices": Case(I=4, T=6, indices=True),
    "one of everything": Case(B=1, S=1, T=1, I=1, O=1, K=1, R=1, kept=1),
}
NOTHING = {"nothing kept": Case(kept=0), "no samples": Case(S=0, kept=0), "no sequences": Case(B=0, S=0, kept=0)}


def make(case: Case) -> dict[str, Any]:
    inputs = make_all(case)
    return {name: inputs[name] for name in ("x", "dy", "left", "right")} | {"kept": kept_of(inputs)}


def run(i: dict[str, Any], backend: str) -> Tensor:
    return lk.project_at(i["x"], i["dy"], i["left"], i["right"], i["kept"], backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """The error is at most twice the twin's, in every dtype; subnetworks without pairs get zero gradients."""
    assert_kernel(run, make(CASES[name]), LEAVES, dtype, "project_at_values", "project_at_rows", "project_at_outer")


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_do(name: str) -> None:
    """Without pairs there are no coefficients, and the gradients are zero."""
    value, grads = gradients(run, make(NOTHING[name]), LEAVES, "triton")
    assert value.shape == (0,)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["few pairs", "shared, many kept", "indices"])
def test_gradcheck(name: str) -> None:
    """Gradients agree with differences in float64."""
    inputs = make(CASES[name])
    free = [inputs[key].requires_grad_() for key in LEAVES]
    torch.autograd.gradcheck(
        lambda left, right: run(inputs | {"left": left, "right": right}, "triton"), free, fast_mode=True
    )


@pytest.mark.parametrize("name", ["several tiles", "lopsided", "indices"])
def test_same_bits_twice(name: str) -> None:
    assert_same_twice(run, make(CASES[name]), LEAVES)


def test_strides_do_not_matter() -> None:
    """Inputs with gaps give the bits of packed ones."""
    inputs = make(CASES["few pairs"])
    with_gaps = {key: value if key == "kept" else strided(value) for key, value in inputs.items()}
    assert torch.equal(run(with_gaps, "triton"), run(inputs, "triton"))


@pytest.mark.parametrize("name", ["shared, few kept", "lopsided", "indices"])
def test_workspace_in_pieces_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass one subnetwork at a time gives the bits of all at once."""
    inputs = make(CASES[name])
    _, whole = gradients(run, inputs, LEAVES, "triton")
    monkeypatch.setattr(common, "WORKSPACE", 1)
    with launches() as seen:
        _, pieces = gradients(run, inputs, LEAVES, "triton")
    assert seen["project_at_rows"] == int((inputs["kept"].column_offsets.diff() > 0).sum())
    assert all(torch.equal(a, b) for a, b in zip(pieces, whole, strict=True))


def test_gradients_to_rows_are_refused() -> None:
    """A gradient that the kernels do not compute is refused, not left out."""
    inputs = make(CASES["few pairs"])
    inputs["dy"].requires_grad_()
    with pytest.raises(ValueError, match="x, dy: the kernels of project_at have no gradient"):
        run(inputs, "triton")


def test_bindings() -> None:
    """The operators keep torch's contract; torch.compile(fullgraph=True) and vmap of a gradient agree with eager."""
    i = make(CASES["shared, many kept"])
    arguments = (
        i["x"],
        i["dy"],
        i["left"],
        i["right"],
        i["kept"].column_order,
        i["kept"].column_offsets,
        i["kept"].rows,
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.l3d.project_at, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.l3d.project_at_backward, (normal(9), *arguments), test_utils=tests)

    compiled = torch.compile(lambda i: run(i, "triton"), fullgraph=True, backend="aot_eager")
    value, grads = gradients(lambda i, _: compiled(i), i, LEAVES, "triton")
    plain, plain_grads = gradients(run, i, LEAVES, "triton")
    assert all(torch.equal(a, b) for a, b in zip([value, *grads], [plain, *plain_grads], strict=True))

    def loss(left: Tensor) -> Tensor:
        return run(i | {"left": left}, "triton").square().sum()

    both = torch.stack([i["left"], 2 * i["left"] + 1])
    mapped = torch.vmap(torch.func.grad(loss))(both)
    for a, b in zip(mapped, both, strict=True):
        torch.testing.assert_close(a, torch.func.grad(loss)(b))
