"""Batch top-k keeps exactly the n largest magnitudes, ties by lower flat index, and indexes them both ways."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.topk import batch_topk_over_ranks

from helpers import assert_relative


def true_flat(coefficients: Tensor, n: int) -> np.ndarray:
    """Flat indices of the n largest magnitudes, ascending: a stable sort puts ties in flat order."""
    flat = np.abs(coefficients.detach().double().numpy().reshape(-1))
    return np.sort(np.argsort(-flat, kind="stable")[:n])


def flat_of(kept: lk.SparseCoefficients) -> np.ndarray:
    return (kept.rows * kept.shape[1] + kept.columns).numpy()


def assert_consistent(kept: lk.SparseCoefficients) -> None:
    """Hold every field to what its documentation says."""
    (S, K), n = kept.shape, len(kept.values)
    rows, columns = kept.rows.tolist(), kept.columns.tolist()
    assert list(zip(rows, columns, strict=True)) == sorted(set(zip(rows, columns, strict=True)))
    assert all(0 <= row < S for row in rows)
    assert all(0 <= column < K for column in columns)
    assert kept.row_offsets.tolist() == [sum(row < s for row in rows) for s in range(S + 1)]
    assert kept.column_offsets.tolist() == [sum(column < k for column in columns) for k in range(K + 1)]
    walked = [
        sorted(entry for entry in range(n) if columns[entry] == k)  # ascending entries are ascending rows
        for k in range(K)
    ]
    assert kept.column_order.tolist() == [entry for entries in walked for entry in entries]
    for field in ("rows", "columns", "row_offsets", "column_order", "column_offsets"):
        assert getattr(kept, field).dtype == torch.int64
    magnitudes = kept.values.detach().abs()
    assert kept.threshold.shape == ()
    assert kept.threshold == (magnitudes.min() if n else torch.inf)


@st.composite
def problems(draw: Any) -> tuple[Tensor, int]:
    """A matrix with many ties, zeros of both signs and infinities, and how many entries to keep."""
    S, K = draw(st.integers(0, 7)), draw(st.integers(1, 6))
    entries = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.5, 1e-30, float("inf"), -float("inf")])
    values = draw(st.lists(entries | st.floats(-3, 3), min_size=S * K, max_size=S * K))
    return torch.tensor(values, dtype=torch.float64).view(S, K), draw(st.integers(0, S * K))


@given(problems())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_keeps_what_a_stable_sort_keeps(problem: tuple[Tensor, int]) -> None:
    """For any matrix and n, exactly n entries are kept, those a stable sort by magnitude puts first."""
    coefficients, n = problem
    kept = lk.batch_topk(coefficients, n)
    assert flat_of(kept).tolist() == true_flat(coefficients, n).tolist()
    assert torch.equal(kept.values, coefficients.flatten()[torch.from_numpy(true_flat(coefficients, n))])
    assert kept.shape == tuple(coefficients.shape)
    assert_consistent(kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (257, 31), (1, 500), (500, 1)])
def test_large_matrices_of_every_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sizes beyond small-sort shortcuts, and dtypes with thousands of ties, keep the same entries as the truth."""
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(shape, generator=generator).to(dtype)
    for n in {1, shape[0] * shape[1] // 10 or 1, shape[0] * shape[1] - 1 or 1}:
        kept = lk.batch_topk(coefficients, n)
        assert flat_of(kept).tolist() == true_flat(coefficients, n).tolist()
        assert kept.values.dtype == kept.threshold.dtype == dtype
        assert torch.equal(
            kept.dense().bool(), torch.zeros(shape).index_put((kept.rows, kept.columns), torch.ones(n)).bool()
        )


@pytest.mark.parametrize("n", range(13))
def test_ties_go_to_the_lower_flat_index(n: int) -> None:
    """Of entries of one magnitude, whatever their sign, the first n in row-major order are kept."""
    signs = torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1], [1, 1, -1, -1]])
    assert flat_of(lk.batch_topk(2 * signs, n)).tolist() == list(range(n))


def test_only_ties_at_the_threshold_are_cut() -> None:
    """An entry above the threshold is kept although it comes last; of the tied ones the last goes."""
    kept = lk.batch_topk(torch.tensor([[1.0, -1.0, 0.5], [1.0, 0.0, -3.0]]), 3)
    assert flat_of(kept).tolist() == [0, 1, 5]
    assert kept.values.tolist() == [1, -1, -3]
    assert kept.threshold == 1


def test_nothing_and_everything() -> None:
    """n = 0 keeps nothing under an infinite threshold; n = S·K keeps all in order, zeros included."""
    coefficients = torch.tensor([[0.0, -2.0], [3.0, 0.0]])
    nothing = lk.batch_topk(coefficients, 0)
    assert_consistent(nothing)
    assert nothing.threshold == torch.inf
    assert torch.equal(nothing.dense(), torch.zeros(2, 2))
    everything = lk.batch_topk(coefficients, 4)
    assert_consistent(everything)
    assert torch.equal(everything.dense(), coefficients)
    assert everything.threshold == 0


@pytest.mark.parametrize("n", [1, 7, 40])
def test_values_are_differentiable(n: int) -> None:
    """The gradient of the kept values reaches exactly the kept coefficients, through `values` and `dense`."""
    coefficients = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    kept = lk.batch_topk(coefficients, n)
    upstream = torch.arange(1.0, n + 1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(kept.values @ upstream + kept.dense().square().sum(), coefficients)
    expected = torch.zeros(40, dtype=torch.float64)
    flat = torch.from_numpy(true_flat(coefficients, n))
    expected[flat] = upstream + 2 * coefficients.detach().flatten()[flat]
    assert_relative(grad, expected.view(8, 5), 1e-14)
    assert not kept.threshold.requires_grad


def test_strided_and_expanded_matrices() -> None:
    """A transposed or expanded matrix is read by its logical order."""
    coefficients = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    for matrix in (coefficients.mT, coefficients[::2], coefficients[:1].expand(5, 4), coefficients[:, :1].expand(6, 3)):
        for n in (1, 5, matrix.numel() - 1):
            kept = lk.batch_topk(matrix, n)
            assert flat_of(kept).tolist() == true_flat(matrix.contiguous(), n).tolist()
            assert_consistent(kept)


def test_same_bits_twice() -> None:
    """Two calls on the same matrix, ties and all, give the same bits in every field."""
    coefficients = torch.randint(-3, 4, (300, 40), generator=torch.Generator().manual_seed(0)).float()
    first, second = lk.batch_topk(coefficients, 1234), lk.batch_topk(coefficients, 1234)
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))


@pytest.mark.parametrize("n", [-1, 7, 100])
def test_n_out_of_range_is_refused(n: int) -> None:
    """n below zero or above S·K raises, naming n, the limit and what it got."""
    with pytest.raises(ValueError, match=rf"n: expected 0 <= n <= S\*K = 6, got {n}$"):
        lk.batch_topk(torch.zeros(2, 3), n)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), ()])
def test_what_is_not_a_matrix_is_refused(shape: tuple[int, ...]) -> None:
    """Anything but two dimensions raises, naming the argument and its shape."""
    with pytest.raises(ValueError, match=r"coefficients: expected shape \[S, K\], got \["):
        lk.batch_topk(torch.zeros(shape), 0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_nan_is_never_dropped_silently(n: int) -> None:
    """NaN counts as larger than any number, as in torch.topk: exactly n are kept and NaN reaches the loss."""
    coefficients = torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 5.0, float("nan")]])
    kept = lk.batch_topk(coefficients, n)
    assert len(kept.values) == n
    assert kept.values.isnan().sum() == min(n, 2)


class _Waits(Exception):
    """A rank needs the others' tensors to go on."""


def together(parts: list[Tensor], n: int, backend: str) -> list[lk.SparseCoefficients]:
    """Run every rank in one process: each from the start again until it has met all the others."""
    meetings: list[list[Any]] = []

    def rank(i: int) -> Any:
        step = iter(range(99))

        def gathered(own: Tensor) -> Tensor:
            at = next(step)
            if at == len(meetings):
                raise _Waits(own)
            return torch.stack(meetings[at])

        try:
            return batch_topk_over_ranks(
                parts[i], n, lambda t: gathered(t).sum(0), lambda t: gathered(t)[:i].sum(0), backend=backend
            )
        except _Waits as waits:
            return waits.args[0]

    while True:
        results = [rank(i) for i in range(len(parts))]
        if isinstance(results[0], lk.SparseCoefficients):
            return results
        meetings.append(results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_together_keep_what_one_process_keeps(ties: bool, dtype: torch.dtype) -> None:
    """Four ranks, one without rows: their kept entries one after another are the whole's, in bits and in order."""
    whole = torch.randn(30, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    if ties:
        whole = whole.round()
    whole[7, 3], whole[25, 1] = torch.nan, -torch.inf
    parts, starts = [whole[:4], whole[4:4], whole[4:21], whole[21:]], [0, 4, 4, 21]
    for n in (0, 1, 2, 40, 200, 270):
        expected, kept = lk.batch_topk(whole, n), together(parts, n, "torch")
        values = torch.cat([k.values for k in kept])
        assert torch.equal(values.nan_to_num(nan=9e4), expected.values.nan_to_num(nan=9e4))
        assert torch.equal(torch.cat([k.rows + s for k, s in zip(kept, starts, strict=True)]), expected.rows)
        assert torch.equal(torch.cat([k.columns for k in kept]), expected.columns)
        for own in kept:
            assert own.threshold.dtype == dtype
            assert own.threshold == expected.threshold
            values = own.values.nan_to_num(nan=torch.inf)
            smallest = values.abs().min() if len(values) else torch.tensor(torch.inf)
            assert_consistent(own._replace(values=values, threshold=smallest))


def test_ranks_refuse_more_than_all_of_them_hold() -> None:
    """n is held to the number of all ranks' entries; what is not a matrix is refused."""
    with pytest.raises(ValueError, match=r"n: expected 0 <= n <= 12 entries of all ranks, got 13"):
        batch_topk_over_ranks(torch.zeros(2, 3), 13, lambda t: 2 * t, torch.zeros_like)
    with pytest.raises(ValueError, match=r"coefficients: expected shape \[S, K\], got \[6\]"):
        batch_topk_over_ranks(torch.zeros(6), 1, lambda t: t, torch.zeros_like)


def test_ranks_values_are_differentiable() -> None:
    """The gradient of the kept values reaches exactly the kept coefficients."""
    whole = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = batch_topk_over_ranks(whole, 5, lambda t: t, torch.zeros_like)
    (grad,) = torch.autograd.grad(kept.values.sum(), whole)
    assert torch.equal(grad, kept._replace(values=torch.ones(5)).dense())
