"""Sparse decoding: both forms, values and gradients, any sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.decode import sparse_decode_weight

from tools import DTYPES, assert_kernel, assert_same_twice, normal, strided

FORWARD, BACKWARD = "decode_codes", ("decode_d_values", "decode_d_weight")


def make(A: int, k: int, L: int, D: int, lengths: list[int] | None = None) -> dict[str, Any]:
    """Draw a problem: A codes of k entries, or of the given lengths; indices repeat."""
    n = A * k if lengths is None else sum(lengths)
    indices = torch.randint(L, (n,), generator=torch.Generator().manual_seed(n))
    shape = (A, k) if lengths is None else (n,)
    offsets = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    values = normal(*shape, seed=1)
    return {"indices": indices.view(shape), "values": values, "weight": normal(L, D, seed=2), "offsets": offsets}


def run(i: dict[str, Any], backend: str) -> Tensor:
    return lk.sparse_decode(i["indices"], i["values"], i["weight"], i["offsets"], backend=backend)


CASES = {
    "odd": make(5, 3, 11, 7),
    "wide": make(3, 5, 4, 70),
    "single of everything": make(1, 1, 1, 1),
    "offsets": make(0, 0, 5, 19, [2, 0, 7, 1, 0]),
    "offsets, all empty": make(0, 0, 5, 19, [0, 0]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_decodes_as_the_twin(case: str, dtype: torch.dtype) -> None:
    """Values and gradients are as good as the twin's; rows that no code uses get a gradient of zero."""
    assert_kernel(run, CASES[case], ("values", "weight"), dtype, FORWARD, *BACKWARD)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 2), (3, 0, 5, 2)], ids=str)
def test_no_codes_or_no_entries(sizes: tuple[int, int, int, int]) -> None:
    """Nothing to decode gives zeros, and zero gradients."""
    assert_kernel(run, make(*sizes), ("values", "weight"), torch.float32)


def test_strides_do_not_matter() -> None:
    """Inputs with gaps, transposed or expanded, give what packed ones do."""
    inputs = CASES["odd"]
    for restride in (strided, lambda t: t.mT.contiguous().mT, lambda t: t[:1].expand(len(t), -1)):
        changed = {name: restride(inputs[name]) for name in ("indices", "values", "weight")} | {"offsets": None}
        assert_kernel(run, changed, ("values", "weight"), torch.float64, FORWARD, *BACKWARD)


def test_int32_indices() -> None:
    """Indices of either width are row numbers."""
    inputs = CASES["odd"] | {"indices": CASES["odd"]["indices"].int()}
    assert torch.equal(run(inputs, "triton"), run(CASES["odd"], "triton"))


@pytest.mark.parametrize("case", ["odd", "offsets"])
def test_gradcheck(case: str) -> None:
    """Analytic gradients agree with finite differences."""
    inputs = CASES[case]
    leaves = tuple(inputs[name].clone().requires_grad_() for name in ("values", "weight"))
    torch.autograd.gradcheck(lambda v, w: run(inputs | {"values": v, "weight": w}, "triton"), leaves, fast_mode=True)


@pytest.mark.parametrize("case", ["wide", "offsets"])
def test_same_bits_twice(case: str) -> None:
    """Two runs give the same bits, and both forms of a problem do."""
    inputs = CASES[case] | {"values": CASES[case]["values"].float(), "weight": CASES[case]["weight"].float()}
    assert_same_twice(run, inputs, ("values", "weight"))


def test_both_forms_give_the_same_bits() -> None:
    """A fixed number of entries, and offsets that say the same."""
    inputs = CASES["wide"]
    flat = {"indices": inputs["indices"].flatten(), "values": inputs["values"].flatten()}
    ragged = inputs | flat | {"offsets": torch.arange(4) * 5}
    assert torch.equal(run(inputs, "triton"), run(ragged, "triton"))


@pytest.mark.parametrize("stretch", [1, 2, 3, 7])
@pytest.mark.parametrize("case", ["wide", "offsets", "few rows"])
def test_rows_that_many_codes_use_are_shared_out(case: str, stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stretches of few entries the gradient to the weight is the same, wherever a row's entries begin."""
    monkeypatch.setattr(sparse_decode_weight, "STRETCH", stretch)
    inputs = make(9, 4, 3, 5) if case == "few rows" else CASES[case]
    assert_kernel(run, inputs, ("weight",), torch.float64, "decode_d_weight_stretch", "decode_d_weight")
    assert_same_twice(run, inputs, ("weight",))


def test_only_the_gradient_asked_for_is_computed() -> None:
    """A gradient of one input alone launches one kernel."""
    for leaf, kernel, other in (("values", *BACKWARD), ("weight", *BACKWARD[::-1])):
        from tools import gradients, launches

        with launches(kernel) as seen:
            gradients(run, CASES["odd"], (leaf,), "triton")
        assert other not in seen


def test_compiles_in_one_graph_and_maps_over_a_batch() -> None:
    """torch.compile makes no graph break; vmap of the gradient is the gradient of each."""
    i = CASES["odd"]

    def loss(values: Tensor, weight: Tensor) -> Tensor:
        return run(i | {"values": values, "weight": weight}, "triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(i["values"], i["weight"]), loss(i["values"], i["weight"]))
    batch = normal(2, *i["values"].shape, seed=5)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(batch, i["weight"])
    for values, grad in zip(batch, grads, strict=True):
        assert torch.equal(grad, torch.func.grad(loss)(values, i["weight"]))
