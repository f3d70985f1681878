"""Gram matrix and energies of reconstructions: values and gradients against the twin and the materialised truth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk

from op_cases import CASES as SHARED
from op_cases import Case, kept_of, make
from tools import DTYPES, Run, assert_kernel, assert_same_twice, launches, normal, strided

# sizes of their own: several tiles of samples, rows, ranks and features in the interpreter's blocks of 16
CASES = {
    "odd": SHARED["odd"],
    "many tiles": Case(B=3, S=3, K=11, R=5, I=19, O=33, kept=19),
    "rank beyond a tile": Case(B=2, S=2, K=3, R=35, I=5, O=4, kept=5),
    "rank one": SHARED["rank one"],
    "lopsided": SHARED["lopsided"],
    "everything kept": SHARED["everything kept"],
    "one kept": SHARED["one kept"],
    "one subnetwork": SHARED["one subnetwork"],
    "single of everything": SHARED["single of everything"],
}
EMPTY = {"nothing kept": SHARED["nothing kept"], "no samples": SHARED["no samples"]}
LEAVES = ("values", "left", "right")
COACTIVE = ("coactive_energy", "coactive_backward")


def run(i: dict[str, Any], backend: str) -> Tensor:
    return lk.gram_energy_coactive(kept_of(i), i["left"], i["right"], backend=backend)


def run_gram(i: dict[str, Any], backend: str) -> Tensor:
    return lk.gram(i["left"], i["right"], backend=backend)


def run_either(i: dict[str, Any], backend: str) -> Tensor:
    return lk.gram_energy(kept_of(i), i["left"], i["right"], backend=backend)


@pytest.mark.parametrize("case", CASES)
def test_as_the_twin_in_float64(case: str) -> None:
    """The energy over co-active pairs, the Gram matrix, and all gradients."""
    inputs = make(CASES[case])
    assert_kernel(run, inputs, LEAVES, torch.float64, *COACTIVE)
    assert_kernel(run_gram, inputs, LEAVES[1:], torch.float64, "gram_tile")


def several(case: str) -> dict[str, Any]:
    """Return inputs with three tensors of one rank and other widths, and one of another rank, in one dictionary."""
    inputs, own = make(CASES[case]), CASES[case]
    for n, (rank, outputs, wide) in enumerate([(own.R, 3, 21), (own.R, 21, 3), (own.R + 1, 4, 6)]):
        inputs[f"left{n}"] = normal(own.K, rank, outputs, seed=20 + n)
        inputs[f"right{n}"] = normal(own.K, rank, wide, seed=30 + n)
    return inputs


SIDES = [[f"{side}{n}" for n in ("", 0, 1, 2)] for side in ("left", "right")]


def run_several(i: dict[str, Any], backend: str) -> Tensor:
    lefts, rights = ([i[name] for name in names] for names in SIDES)
    return lk.gram_energy_coactive(kept_of(i), lefts, rights, backend=backend)


def run_grams(i: dict[str, Any], backend: str) -> Tensor:
    return lk.gram(*([i[name] for name in names] for names in SIDES), backend=backend)


@pytest.mark.parametrize("case", ["odd", "many tiles"])
def test_several_tensors_in_one_launch(case: str) -> None:
    """The sum over tensors, and all gradients; tensors of one rank share a launch, forward and backward."""
    inputs = several(case)
    assert_kernel(run_several, inputs, ("values", *SIDES[0], *SIDES[1]), torch.float64, *COACTIVE)
    assert_kernel(run_several, inputs, ("values", *SIDES[0], *SIDES[1]), torch.float32, *COACTIVE)
    assert_kernel(run_several, inputs, ("right0", "left1"), torch.float32, *COACTIVE)
    with launches(*COACTIVE) as seen:
        leaves = [inputs[name].requires_grad_() for name in (*SIDES[0], *SIDES[1])]
        together = run_several(inputs, "triton")
        torch.autograd.grad(together.sum(), leaves)
    assert [seen[kernel] for kernel in COACTIVE] == [2, 2]
    for dtype in DTYPES[:2]:
        assert_kernel(run_grams, inputs, (*SIDES[0], *SIDES[1]), dtype, "gram_tile")
    assert_kernel(run_grams, inputs, ("right0", "left1"), torch.float32, "gram_tile")
    with launches("gram_tile") as seen:
        run_grams(inputs, "triton")
    assert seen["gram_tile"] == 2
    alone = [
        lk.gram_energy_coactive(kept_of(inputs), inputs[left], inputs[right], backend="torch")
        for left, right in zip(*SIDES, strict=True)
    ]
    torch.testing.assert_close(together, sum(alone), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["many tiles", "lopsided"])
def test_as_good_as_the_twin_in_every_dtype(case: str, dtype: torch.dtype) -> None:
    """In narrow dtypes no error is more than twice the twin's."""
    inputs = make(CASES[case])
    assert_kernel(run, inputs, LEAVES, dtype, *COACTIVE)
    assert_kernel(run_gram, inputs, LEAVES[1:], dtype, "gram_tile")
    assert_kernel(run_either, inputs, LEAVES, dtype, "gram_tile")


@pytest.mark.parametrize("case", EMPTY)
def test_nothing_to_sum(case: str) -> None:
    """Without kept entries or samples the energy is zero, and so are the gradients."""
    assert_kernel(run, make(EMPTY[case]), LEAVES, torch.float32, "coactive_backward")
    assert_kernel(run_either, make(EMPTY[case]), LEAVES, torch.float32, "coactive_backward")


@pytest.mark.parametrize("kept, kernel", [(4, "coactive_energy"), (20, "gram_tile")])
def test_the_energy_takes_the_cheaper_route(kept: int, kernel: str) -> None:
    """Few co-active pairs are walked one by one, many are met by the Gram matrix."""
    with launches(kernel) as seen:
        assert_kernel(run_either, make(Case(B=3, S=3, K=9, kept=kept)), LEAVES, torch.float64)
    assert not {"coactive_energy", "gram_tile"} - {kernel} & set(seen)


@pytest.mark.parametrize("function", [run, run_gram])
def test_gradcheck(function: Run) -> None:
    """Analytic gradients agree with finite differences."""
    inputs = make(CASES["odd"])
    names = LEAVES if function is run else LEAVES[1:]
    leaves = [inputs[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(
        lambda *tensors: function(inputs | dict(zip(names, tensors, strict=True)), "triton"), leaves, fast_mode=True
    )


@pytest.mark.parametrize("restride", [strided, lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0)])
def test_strides_do_not_matter(restride: Callable[[Tensor], Tensor]) -> None:
    """Inputs with gaps, or transposed in memory, give what packed ones do."""
    inputs = make(CASES["odd"])
    changed = inputs | {name: restride(inputs[name]) for name in LEAVES}
    changed["right"] = inputs["right"][:1].expand_as(inputs["right"])
    assert_kernel(run, changed, LEAVES, torch.float64, *COACTIVE)
    assert_kernel(run_gram, changed, LEAVES[1:], torch.float64, "gram_tile")


def test_same_bits_twice() -> None:
    """Two runs give the same bits, value and gradients."""
    inputs = make(CASES["lopsided"], dtype=torch.float32)
    assert_same_twice(run, inputs, LEAVES)
    assert_same_twice(run_gram, inputs, LEAVES[1:])
    assert torch.equal(run_gram(inputs, "triton"), run_gram(inputs, "triton").mT), "not symmetric"


def test_the_gradient_of_the_gram_matrix_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget for one subnetwork at a time the gradients are the same."""
    from l3d_kernels.kernels.energy import gram

    monkeypatch.setattr(gram, "CHUNK", 1)
    assert_kernel(run_gram, make(CASES["odd"]), LEAVES[1:], torch.float64, "gram_tile")


def test_compiles_in_one_graph_and_maps_over_a_batch() -> None:
    """torch.compile makes no graph break; vmap of the gradient is the gradient of each."""
    inputs = make(CASES["odd"])
    kept = kept_of(inputs)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        energy = lk.gram_energy_coactive(kept, left, right, backend="triton")
        return energy.square().sum() + lk.gram(left, right, backend="triton").sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs["left"], inputs["right"]), loss(inputs["left"], inputs["right"]))
    batch = torch.stack([inputs["left"], 2 * inputs["left"]])
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(batch, inputs["right"])
    for left, grad in zip(batch, grads, strict=True):
        assert torch.equal(grad, torch.func.grad(loss)(left, inputs["right"]))
