"""The definitions: each op of `l3d_kernels.reference` against truths of its own, and that none is missing."""

from pathlib import Path

import pytest
import torch

import l3d_kernels as lk
from l3d_kernels import cpu, reference

from helpers import assert_relative
from op_cases import CASES, DEFINED, FITTING, IN_PLACE, OPS, assert_true, calls, combinations, decode_inputs, make

PAIRS = [pair for pair in combinations(CASES) if pair.values[0] in DEFINED]


@pytest.mark.parametrize("name, case", PAIRS)
def test_definitions_are_the_materialised_truth(name: str, case: str) -> None:
    """Each definition agrees with einsums over V and G, value to 1e-12 and gradients to 1e-10."""
    assert_true(name, make(CASES[case]), reference)


def test_every_public_op_is_defined_and_held_to_a_truth() -> None:
    """No public op lacks a definition or a CPU path; top-k, decoding and the softmax have truths of their own."""
    ops = set(lk.__all__) - {"SparseCoefficients"}
    alone = {"batch_topk", "project_topk", "softmax_mean", "sparse_decode"}
    assert ops - set(IN_PLACE) == {*DEFINED, *alone} == set(calls())
    for module in (reference, cpu):
        assert all(callable(getattr(module, name)) for name in ops)


def test_the_definitions_fit_on_two_screens() -> None:
    """A specification that a reader checks against formulas stays under 150 lines."""
    assert len(Path(reference.__file__).read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("n_groups", [1, 2])
def test_batch_topk_by_a_loop(n_groups: int) -> None:
    """Entries taken one by one, the largest left first and the lowest flat index first among ties."""
    coefficients = torch.randint(-4, 5, (7, 6), generator=torch.Generator().manual_seed(0)).double()
    kept = reference.batch_topk(coefficients, 9, n_groups)
    expected = []
    for g in range(n_groups):
        width = 6 // n_groups
        left = [(s, k) for s in range(7) for k in range(g * width, (g + 1) * width)]
        for _ in range(9):
            best = max(left, key=lambda pair: abs(float(coefficients[pair])))  # the first of the largest
            expected.append(best)
            left.remove(best)
    assert list(zip(kept.rows.tolist(), kept.columns.tolist(), strict=True)) == sorted(expected)
    assert torch.equal(kept.values, coefficients[kept.rows, kept.columns])


def test_decoding_by_a_loop() -> None:
    """Codes summed entry by entry, in both forms, and the softmax by its formula."""
    indices, values, weight = decode_inputs(5, 3, 11, 7)
    rows = [sum(values[a, j] * weight[indices[a, j]] for j in range(3)) for a in range(5)]
    assert_relative(reference.sparse_decode(indices, values, weight), torch.stack(rows), 1e-12)
    flat = reference.sparse_decode(indices.flatten(), values.flatten(), weight, torch.arange(0, 16, 3))
    assert_relative(flat, torch.stack(rows), 1e-12)
    hidden = values @ weight[:3]
    exponentials = (hidden @ weight.mT).exp()
    expected = (exponentials @ weight) / exponentials.sum(1, keepdim=True)
    assert_relative(reference.softmax_mean(hidden, weight), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DEFINED)
def test_definitions_take_any_dtype(name: str, dtype: torch.dtype) -> None:
    """The result has the inputs' dtype."""
    inputs = FITTING | {key: FITTING[key].to(dtype) for key in ("x", "dy", "left", "right", "grad", "values")}
    assert OPS[name].run(reference, inputs).dtype == dtype
