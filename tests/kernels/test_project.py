"""`project` as kernels: value and gradients against the twin's, every shape of a tile, bits, bindings."""

from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk

from op_cases import Case
from project_cases import CASES, EMPTY, leaves, make
from tools import DTYPES, assert_kernel, assert_same_twice, gradients, launches, normal, strided

FORWARD = {"project_pair", "project_seen"}


def run(inputs: dict[str, Any], backend: str) -> Tensor:
    return lk.project(inputs["x"], inputs["dy"], inputs["left"], inputs["right"], backend=backend)


def expected(case: Case) -> tuple[str, ...]:
    forward = "project_pair" if case.B == case.S and not case.indices else "project_seen"
    return (forward, "project_returned", "project_weighted")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """The error is at most twice the twin's, in every dtype, for every way a tile is dealt."""
    case = CASES[name]
    assert_kernel(run, make(case), leaves(case), dtype, *expected(case))


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_do(name: str) -> None:
    """Sizes of zero give zeros of the right shape, and zero gradients."""
    case = EMPTY[name]
    value, grads = gradients(run, make(case), leaves(case), "triton")
    assert torch.equal(value, torch.zeros(case.S, case.K, dtype=torch.float64))
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["shared", "one sample a sequence", "indices"])
def test_gradcheck(name: str) -> None:
    """Gradients agree with differences in float64."""
    case = CASES[name]
    inputs = make(case)
    free = [inputs[key].requires_grad_() for key in leaves(case)]
    torch.autograd.gradcheck(
        lambda *a: run(inputs | dict(zip(leaves(case), a, strict=True)), "triton"), free, fast_mode=True
    )


@pytest.mark.parametrize("name", ["shared", "one sample a sequence"])
def test_only_wanted_gradients_are_computed(name: str) -> None:
    """A gradient that nobody asked for is None; the others do not change."""
    inputs, both = make(CASES[name]), ("left", "right")
    _, (left, right) = gradients(run, inputs, both, "triton")
    assert torch.equal(gradients(run, inputs, ("left",), "triton")[1][0], left)
    assert torch.equal(gradients(run, inputs, ("right",), "triton")[1][0], right)
    with launches() as seen:
        gradients(run, inputs, ("left",), "triton")
    assert "project_returned" not in seen


@pytest.mark.parametrize("name", ["several tiles", "several tiles, one sample a sequence", "indices that repeat"])
def test_same_bits_twice(name: str) -> None:
    assert_same_twice(run, make(CASES[name]), leaves(CASES[name]))


@pytest.mark.parametrize("name", ["shared", "one sample a sequence", "indices"])
def test_strides_do_not_matter(name: str) -> None:
    """Inputs with gaps, transposed or expanded give the bits of packed ones."""
    inputs = make(CASES[name])
    with_gaps = {key: strided(value) for key, value in inputs.items()}
    turned = {key: value.mT.contiguous().mT for key, value in inputs.items()}
    for other in (with_gaps, turned):
        assert not other["dy"].is_contiguous()
        assert torch.equal(run(other, "triton"), run(inputs, "triton"))
    wide = inputs | {"left": inputs["left"][:, :, :1].expand_as(inputs["left"])}
    assert torch.equal(run(wide, "triton"), run(wide | {"left": wide["left"].contiguous()}, "triton"))


def test_workspace_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass in pieces of one subnetwork gives the gradients of one piece."""
    from l3d_kernels.kernels.shared import common

    for name in ("shared", "several tiles, one sample a sequence", "indices"):
        inputs, wanted = make(CASES[name]), leaves(CASES[name])
        _, whole = gradients(run, inputs, wanted, "triton")
        monkeypatch.setattr(common, "WORKSPACE", 1)
        with launches() as seen:
            _, pieces = gradients(run, inputs, wanted, "triton")
        monkeypatch.undo()
        assert seen["project_returned"] == CASES[name].K
        for a, b in zip(pieces, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_opcheck() -> None:
    """The operators keep torch's contract: schema, shapes without data, no aliasing."""
    inputs = make(CASES["shared"])
    arguments = (inputs["x"], inputs["dy"], inputs["left"], inputs["right"])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.l3d.project, (*arguments, None), test_utils=tests)
    upstream = normal(6, 4)
    torch.library.opcheck(torch.ops.l3d.project_backward, (upstream, *arguments, [True] * 4), test_utils=tests)


@pytest.mark.parametrize("dims", [(0, 0, None, None), (None, None, 0, 0), (0, 0, 0, 0), (None, 1, None, 2)])
def test_vmap_and_its_gradient(dims: tuple[int | None, ...]) -> None:
    """vmap over any argument, and over a gradient, agrees with a loop."""
    inputs = list(make(CASES["shared"]).values())
    stacked = [t if d is None else torch.stack([t, 2 * t + 1], d) for t, d in zip(inputs, dims, strict=True)]

    def value(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return lk.project(x, dy, left, right, backend="triton").square().sum()

    grad = torch.func.grad(value, argnums=(2, 3))
    mapped = torch.vmap(grad, in_dims=dims)(*stacked)
    for i in range(2):
        own = [t if d is None else t.select(d, i) for t, d in zip(stacked, dims, strict=True)]
        for a, b in zip(mapped, grad(*own), strict=True):
            torch.testing.assert_close(a[i], b)


def test_compiles_without_a_break() -> None:
    """torch.compile(fullgraph=True) traces value and gradients."""
    inputs = make(CASES["shared"])
    compiled = torch.compile(lambda i: run(i, "triton"), fullgraph=True, backend="aot_eager")
    with launches("project_seen", "project_returned"):
        value, grads = gradients(lambda i, _: compiled(i), inputs, leaves(CASES["shared"]), "triton")
    plain, plain_grads = gradients(run, inputs, leaves(CASES["shared"]), "triton")
    assert torch.equal(value, plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))


def test_autocast() -> None:
    """Under autocast float32 inputs are taken in autocast's dtype; gradients come back in float32."""
    inputs = {key: value.float() for key, value in make(CASES["shared"]).items()}
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = gradients(run, inputs, leaves(CASES["shared"]), "triton")
    assert value.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads} == {torch.float32}
    half = {key: t.bfloat16() for key, t in inputs.items()}
    assert torch.equal(value, run(half, "triton"))
