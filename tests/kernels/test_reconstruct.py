"""Reconstructions and residual norms: values and gradients against the twin and the materialised truth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.shared import common

from op_cases import CASES as SHARED
from op_cases import Case, kept_of, make, true_reconstruction
from tools import DTYPES, assert_kernel, assert_same_twice, strided

CASES = {
    "odd": SHARED["odd"],
    "many tiles": Case(B=3, S=3, K=9, R=5, I=19, O=33, kept=15),
    "rank beyond a tile": Case(B=2, S=2, K=3, R=35, I=5, O=4, kept=5),
    "rank one": SHARED["rank one"],
    "lopsided": SHARED["lopsided"],
    "everything kept": SHARED["everything kept"],
    "one subnetwork": SHARED["one subnetwork"],
    "single of everything": SHARED["single of everything"],
}
LEAVES = ("values", "left", "right")
BACKWARD = "reconstruct_backward"
NORM = ("residual_norm_tile", "residual_tile", BACKWARD)


def run(i: dict[str, Any], backend: str) -> Tensor:
    return lk.reconstruct(kept_of(i), i["left"], i["right"], backend=backend)


def run_norm(i: dict[str, Any], backend: str) -> Tensor:
    return lk.squared_residual_norm(kept_of(i), i["left"], i["right"], i["grad"], backend=backend)


@pytest.mark.parametrize("case", CASES)
def test_as_the_twin_in_float64(case: str) -> None:
    """Reconstructions, residual norms, and all gradients."""
    inputs = make(CASES[case])
    assert_kernel(run, inputs, LEAVES, torch.float64, "reconstruct_tile", BACKWARD)
    assert_kernel(run_norm, inputs, (*LEAVES, "grad"), torch.float64, *NORM)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["many tiles", "lopsided"])
def test_as_good_as_the_twin_in_every_dtype(case: str, dtype: torch.dtype) -> None:
    """In narrow dtypes no error is more than twice the twin's."""
    inputs = make(CASES[case])
    assert_kernel(run, inputs, LEAVES, dtype, "reconstruct_tile", BACKWARD)
    assert_kernel(run_norm, inputs, (*LEAVES, "grad"), dtype, *NORM)


@pytest.mark.parametrize("case", ["nothing kept", "no samples"])
def test_nothing_to_sum(case: str) -> None:
    """Without kept entries the reconstruction is zero and the residual the gradient; without samples nothing is."""
    inputs = make(SHARED[case])
    assert_kernel(run, inputs, LEAVES, torch.float32, BACKWARD)
    assert_kernel(run_norm, inputs, (*LEAVES, "grad"), torch.float32, BACKWARD)


def test_gradcheck() -> None:
    """Analytic gradients agree with finite differences."""
    inputs = make(CASES["odd"])
    for function, names in ((run, LEAVES), (run_norm, (*LEAVES, "grad"))):
        leaves = [inputs[name].clone().requires_grad_() for name in names]
        torch.autograd.gradcheck(
            lambda *t, f=function, n=names: f(inputs | dict(zip(n, t, strict=True)), "triton"), leaves, fast_mode=True
        )


@pytest.mark.parametrize("restride", [strided, lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0)])
def test_strides_do_not_matter(restride: Callable[[Tensor], Tensor]) -> None:
    """Inputs with gaps, transposed in memory or expanded give what packed ones do."""
    inputs = make(CASES["odd"])
    changed = inputs | {name: restride(inputs[name]) for name in (*LEAVES, "grad")}
    changed["right"] = inputs["right"][:1].expand_as(inputs["right"])
    assert_kernel(run, changed, LEAVES, torch.float64, "reconstruct_tile", BACKWARD)
    assert_kernel(run_norm, changed, (*LEAVES, "grad"), torch.float64, *NORM)


def test_same_bits_twice() -> None:
    """Two runs give the same bits, value and gradients."""
    inputs = make(CASES["lopsided"], dtype=torch.float32)
    assert_same_twice(run, inputs, LEAVES)
    assert_same_twice(run_norm, inputs, (*LEAVES, "grad"))


def test_the_gradient_of_the_norm_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget of one row of O at a time the gradients are the same."""
    monkeypatch.setattr(common, "WORKSPACE", 1)
    assert_kernel(run_norm, make(CASES["odd"]), (*LEAVES, "grad"), torch.float64, *NORM)


def test_small_residuals_do_not_cancel() -> None:
    """In float32 a relative residual of 1e-5 is as good as the twin's, where a sum of norms would be all rounding."""
    inputs = make(CASES["everything kept"], dtype=torch.float32)
    inputs["grad"] = true_reconstruction(inputs) * (1 + 1e-5)
    assert_kernel(run_norm, inputs, (), torch.float32, NORM[0])


@pytest.mark.parametrize("needed", ["values", "left", "right", "grad"])
def test_one_gradient_alone(needed: str) -> None:
    """A gradient asked of one input alone is the one it has among all."""
    inputs = make(CASES["odd"])
    assert_kernel(run_norm, inputs, (needed,), torch.float64, *NORM[:2])
    if needed != "grad":
        assert_kernel(run, inputs, (needed,), torch.float64, "reconstruct_tile", BACKWARD)


def test_compiles_in_one_graph_and_maps_over_a_batch() -> None:
    """torch.compile makes no graph break; vmap of the gradient is the gradient of each."""
    inputs = make(CASES["odd"])

    kept = kept_of(inputs)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        norm = lk.squared_residual_norm(kept, left, right, inputs["grad"], backend="triton").sum()
        return norm + lk.reconstruct(kept, left, right, backend="triton").sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs["left"], inputs["right"]), loss(inputs["left"], inputs["right"]))
    batch = torch.stack([inputs["left"], 2 * inputs["left"]])
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(batch, inputs["right"])
    for left, grad in zip(batch, grads, strict=True):
        assert torch.equal(grad, torch.func.grad(loss)(left, inputs["right"]))
