"""Derivatives that the kernels do not have are refused, never dropped: second ones, forward mode, to x and dy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import l3d_kernels as lk

from op_cases import CASES, Inputs, decode_inputs, kept_of, make

INDICES, VALUES, WEIGHT = decode_inputs(5, 3, 11, 7)
RUNS: dict[str, Callable[[Inputs], Tensor]] = {
    "project": lambda i: lk.project(i["x"], i["dy"], i["left"], i["right"], backend="triton"),
    "project_tiled": lambda i: lk.project_tiled(i["x"], i["dy"], i["left"], i["right"], backend="triton"),
    "project_at": lambda i: lk.project_at(i["x"], i["dy"], i["left"], i["right"], kept_of(i), backend="triton"),
    "project_dense": lambda i: lk.project_dense(i["grad"], i["left"], i["right"], backend="triton"),
    "project_topk": lambda i: lk.project_topk(i["x"], i["dy"], i["left"], i["right"], 5, backend="triton").values,
    "gram": lambda i: lk.gram(i["left"], i["right"], backend="triton"),
    "gram_energy": lambda i: lk.gram_energy(kept_of(i), i["left"], i["right"], backend="triton"),
    "gram_energy_coactive": lambda i: lk.gram_energy_coactive(kept_of(i), i["left"], i["right"], backend="triton"),
    "reconstruct": lambda i: lk.reconstruct(kept_of(i), i["left"], i["right"], backend="triton"),
    "squared_residual_norm": lambda i: lk.squared_residual_norm(
        kept_of(i), i["left"], i["right"], i["grad"], backend="triton"
    ),
    "squared_gradient_norm": lambda i: lk.squared_gradient_norm(i["x"], i["dy"], backend="triton"),
    "sparse_decode": lambda i: lk.sparse_decode(
        INDICES % 4, VALUES * i["right"][0, 0, 0], i["left"][:, 0], backend="triton"
    ),
    "batch_topk": lambda i: lk.batch_topk(i["left"][:, 0] * i["right"][:, :1, 0], 4, backend="triton").values,
}
LEAVES = {"squared_gradient_norm": ("x", "dy")}
TWICE = r"Triton kernels are once_differentiable; take second derivatives with backend='torch'"


def split(name: str, case: str = "odd") -> tuple[Inputs, tuple[str, ...]]:
    return make(CASES[case]), LEAVES.get(name, ("left", "right"))


@pytest.mark.parametrize("case", ["odd", "everything kept", "many subnetworks, few kept"])
@pytest.mark.parametrize("name", [name for name in RUNS if name != "batch_topk"])
def test_second_derivatives_raise_whatever_the_path(name: str, case: str) -> None:
    """Under a constant upstream gradient too, which torch's own mark does not see."""
    inputs, keys = split(name, case)
    own = {key: inputs[key].requires_grad_() for key in keys}
    slopes = torch.autograd.grad(RUNS[name](inputs | own).sum(), list(own.values()), create_graph=True)
    for slope in slopes:
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.grad(slope.square().sum(), list(own.values()), retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("name", RUNS)
def test_second_derivatives_raise_under_torch_func(name: str) -> None:
    """grad of grad and grad of vmap of grad; one grad is right without another."""
    inputs, keys = split(name)

    def slope(*own: Tensor) -> Tensor:
        inner = grad(lambda first: RUNS[name](inputs | dict(zip(keys, (first, *own[1:]), strict=True))).square().sum())
        return inner(own[0]).square().sum()

    leaves = [inputs[key] for key in keys]
    plain = [leaves[0].clone().requires_grad_(), leaves[1]]
    value = RUNS[name](inputs | dict(zip(keys, plain, strict=True))).square().sum()
    expected = torch.autograd.grad(value, plain[0])[0].square().sum()
    torch.testing.assert_close(slope(*leaves), expected, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match=TWICE):
        grad(slope)(*leaves)
    with pytest.raises(RuntimeError, match=TWICE):
        grad(lambda every: vmap(slope, in_dims=(0, None))(every, leaves[1]).sum())(torch.stack([leaves[0]] * 2))


@pytest.mark.parametrize("name", RUNS)
def test_forward_mode_is_refused_in_one_line(name: str) -> None:
    """The line names the op and what to do; the definitions take it."""
    inputs, (key, _) = split(name)
    with pytest.raises(RuntimeError, match=rf"^backend='triton': the kernels of {name} have no forward-mode .*$"):
        jvp(lambda leaf: RUNS[name](inputs | {key: leaf}), (inputs[key],), (inputs[key],))


@pytest.mark.parametrize("wrap", [lambda f: f, vmap], ids=["grad", "grad of vmap"])
@pytest.mark.parametrize("name, key", [("project_at", "x"), ("project_tiled", "dy"), ("project_topk", "x")])
def test_gradients_that_there_are_none_of_are_refused(name: str, key: str, wrap: Any) -> None:
    """torch.func hides from the op whether x or dy needs a gradient; it is refused all the same, not zero."""
    inputs, _ = split(name)
    leaf = torch.stack([inputs[key]] * 2) if wrap is vmap else inputs[key]
    with pytest.raises((RuntimeError, ValueError), match=r"ha(s|ve) no gradient"):
        grad(lambda every: wrap(lambda one: RUNS[name](inputs | {key: one}))(every).sum())(leaf)


@pytest.mark.parametrize("wrap", [lambda f: f, vmap], ids=["grad", "grad of vmap"])
def test_softmax_mean_has_no_gradient(wrap: Any) -> None:
    """By kernels it is not differentiable, and says so."""
    hidden = torch.stack([WEIGHT[:3]] * 2) if wrap is vmap else WEIGHT[:3]
    with pytest.raises(RuntimeError, match="Triton kernels have no gradient to one of the inputs"):
        grad(lambda every: wrap(lambda one: lk.softmax_mean(one, WEIGHT, backend="triton"))(every).sum())(hidden)
