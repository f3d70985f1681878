"""Batch top-k keeps exactly the n largest magnitudes, ties by lower flat index, and indexes them both ways."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.ops import batch_topk_over_columns, batch_topk_over_ranks
from l3d_kernels.sparse import above

from helpers import assert_relative
from topk_cases import together


def true_flat(coefficients: Tensor, n: int) -> np.ndarray:
    """Flat indices of the n largest magnitudes, ascending: a stable sort puts ties in flat order."""
    flat = np.abs(coefficients.detach().double().numpy().reshape(-1))
    return np.sort(np.argsort(-flat, kind="stable")[:n])


def flat_of(kept: lk.SparseCoefficients) -> np.ndarray:
    return (kept.rows * kept.shape[1] + kept.columns).numpy()


def assert_indexed(kept: lk.SparseCoefficients) -> None:
    """Hold the entries and both ways to walk them to what their documentation says."""
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


def assert_consistent(kept: lk.SparseCoefficients) -> None:
    """Hold every field to what its documentation says."""
    assert_indexed(kept)
    assert kept.threshold.shape == ()
    assert kept.threshold == (kept.values.detach().abs().min() if len(kept.values) else torch.inf)


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


# --- groups of columns ------------------------------------------------------------------------------------------


def one_by_one(coefficients: Tensor, n: int, n_groups: int) -> list[tuple[int, int]]:
    """Pairs (row, column) kept by one call per block of columns, each on a copy of its own, in row-major order."""
    width = coefficients.shape[1] // n_groups
    pairs = []
    for g in range(n_groups):
        kept = lk.batch_topk(coefficients[:, g * width : (g + 1) * width].clone(), n)
        pairs += list(zip(kept.rows.tolist(), (kept.columns + g * width).tolist(), strict=True))
    return sorted(pairs)


@st.composite
def grouped_problems(draw: Any) -> tuple[Tensor, int, int]:
    """A matrix of several blocks of columns with many ties, infinities and NaN, and how many entries each keeps."""
    S, width, n_groups = draw(st.integers(0, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = S * width * n_groups
    entries = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-30, float("inf"), -float("inf"), float("nan")])
    values = draw(st.lists(entries | st.floats(-3, 3), min_size=size, max_size=size))
    matrix = torch.tensor(values, dtype=torch.float64).view(S, width * n_groups)
    return matrix, draw(st.integers(0, S * width)), n_groups


@given(grouped_problems())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_groups_keep_what_each_would_keep_alone(problem: tuple[Tensor, int, int]) -> None:
    """One call for several blocks of columns keeps n entries in each, those that a call on the block alone keeps."""
    coefficients, n, n_groups = problem
    kept = lk.batch_topk(coefficients, n, n_groups)
    pairs = one_by_one(coefficients, n, n_groups)
    assert len(pairs) == n * n_groups
    assert list(zip(kept.rows.tolist(), kept.columns.tolist(), strict=True)) == pairs
    assert torch.equal(kept.values.nan_to_num(nan=7.5), coefficients[kept.rows, kept.columns].nan_to_num(nan=7.5))
    assert kept.shape == tuple(coefficients.shape)
    assert_indexed(kept)
    magnitudes = np.nan_to_num(np.abs(coefficients.numpy()), nan=np.inf, posinf=np.inf)
    blocks = np.split(magnitudes, n_groups, axis=1)
    thresholds = [float(np.sort(block, axis=None)[-n]) if n else np.inf for block in blocks]
    assert kept.threshold.tolist() == (thresholds[0] if n_groups == 1 else thresholds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_groups", [2, 5, 30])
def test_large_matrices_in_groups(n_groups: int, dtype: torch.dtype) -> None:
    """Sizes beyond small-sort shortcuts, with thousands of ties in bfloat16, keep the same entries group by group."""
    coefficients = torch.randn(101, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = coefficients.numel() // n_groups
    for n in {1, size // 10, size - 1}:
        kept = lk.batch_topk(coefficients, n, n_groups)
        assert list(zip(kept.rows.tolist(), kept.columns.tolist(), strict=True)) == one_by_one(
            coefficients, n, n_groups
        )
        assert kept.threshold.shape == (n_groups,)
        assert kept.values.dtype == kept.threshold.dtype == dtype


def test_a_small_group_is_not_starved_by_a_large_one() -> None:
    """Each group keeps its own n however small its entries; ties are broken within the group, by lower flat index."""
    coefficients = torch.tensor([[100.0, 90.0, 1e-3, -1e-3], [80.0, 70.0, 1e-3, 0.0]])
    kept = lk.batch_topk(coefficients, 2, 2)
    assert list(zip(kept.rows.tolist(), kept.columns.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert_relative(kept.threshold, [90.0, 1e-3], 1e-7)


def test_nothing_and_everything_in_groups() -> None:
    """n = 0 keeps nothing, with one infinite threshold per group; n of everything keeps all, in row-major order."""
    coefficients = torch.tensor([[0.0, -2.0, 5.0, 1.0], [3.0, 0.0, -4.0, 2.0]])
    nothing = lk.batch_topk(coefficients, 0, 2)
    assert nothing.threshold.tolist() == [torch.inf] * 2
    assert torch.equal(nothing.dense(), torch.zeros(2, 4))
    assert_indexed(nothing)
    everything = lk.batch_topk(coefficients, 4, 2)
    assert everything.threshold.tolist() == [0, 1]
    assert torch.equal(everything.dense(), coefficients)
    assert flat_of(everything).tolist() == list(range(8))
    assert_indexed(everything)


def test_strided_and_expanded_matrices_in_groups() -> None:
    """A transposed, strided or expanded matrix falls into groups by its logical columns."""
    coefficients = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    for matrix in (coefficients.mT, coefficients[::2, :4], coefficients[:1].expand(5, 6), coefficients[:, ::3]):
        for n in (1, 3, matrix.numel() // 2 - 1, matrix.numel() // 2):
            kept = lk.batch_topk(matrix, n, 2)
            pairs = list(zip(kept.rows.tolist(), kept.columns.tolist(), strict=True))
            assert pairs == one_by_one(matrix.contiguous(), n, 2)
            assert torch.equal(kept.values, matrix[kept.rows, kept.columns])
            assert_indexed(kept)


def test_values_in_groups_are_differentiable() -> None:
    """The gradient reaches exactly the kept coefficients of every group."""
    coefficients = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    kept = lk.batch_topk(coefficients, 5, 3)
    upstream = torch.arange(1.0, 16, dtype=torch.float64)
    (grad,) = torch.autograd.grad(kept.values @ upstream, coefficients)
    expected = torch.zeros(7, 6, dtype=torch.float64)
    for (row, column), value in zip(one_by_one(coefficients.detach(), 5, 3), upstream.tolist(), strict=True):
        expected[row, column] = value
    assert torch.equal(grad, expected)
    assert not kept.threshold.requires_grad


@pytest.mark.parametrize("n_groups", [0, -1, 4, 12])
def test_groups_that_do_not_divide_the_columns_are_refused(n_groups: int) -> None:
    """The number of groups must divide the columns; the error names both."""
    with pytest.raises(ValueError, match=rf"n_groups: expected a divisor of the 6 columns, got {n_groups}$"):
        lk.batch_topk(torch.zeros(2, 6), 0, n_groups)


@pytest.mark.parametrize("n", [-1, 5, 12])
def test_n_out_of_a_group_s_range_is_refused(n: int) -> None:
    """The limit is a group's number of entries, not the matrix's."""
    with pytest.raises(ValueError, match=rf"n: expected 0 <= n <= .* = 4, got {n}$"):
        lk.batch_topk(torch.zeros(2, 6), n, 3)


@pytest.mark.parametrize("n_groups", [1, 2, 3, 6])
@pytest.mark.parametrize("n", [0, 1, 5, 8])
def test_by_group_gives_every_group_rows_of_its_own(n: int, n_groups: int) -> None:
    """Row s * groups + g holds sample s's entries in block g, where they were; nothing else moves."""
    coefficients = torch.randn(8, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    kept = lk.batch_topk(coefficients, n, n_groups)
    split = kept.by_group(n_groups)
    assert split.shape == (8 * n_groups, 6)
    assert_indexed(split)
    for field in ("values", "columns", "column_order", "column_offsets", "threshold"):
        assert getattr(split, field) is getattr(kept, field)
    dense, whole = split.dense().view(8, n_groups, 6), kept.dense()
    for g, block in enumerate(range(0, 6, 6 // n_groups)):
        own = slice(block, block + 6 // n_groups)
        assert torch.equal(dense[:, g, own], whole[:, own])
    assert int(dense.count_nonzero()) == n * n_groups  # and nothing outside the blocks


# --- a threshold instead of a number ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.25, 100.0, float("inf")])
def test_above_keeps_what_reaches_the_threshold(threshold: float, dtype: torch.dtype) -> None:
    """Kept are magnitudes at least the threshold, infinities and NaN always, in row-major order, with their signs."""
    coefficients = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    coefficients[1, 2], coefficients[3, 4], coefficients[4, 4] = float("nan"), -float("inf"), float("inf")
    coefficients[5, 5], coefficients[5, 6], coefficients[6, 0] = 1.25, -1.25, -0.5  # exactly at a threshold
    kept = above(coefficients, threshold)
    numbers = coefficients.double().numpy()
    expected = [
        (s, k) for s in range(9) for k in range(7) if np.isnan(numbers[s, k]) or abs(numbers[s, k]) >= threshold
    ]
    assert list(zip(kept.rows.tolist(), kept.columns.tolist(), strict=True)) == expected
    assert torch.equal(kept.values.nan_to_num(nan=9.5), coefficients[kept.rows, kept.columns].nan_to_num(nan=9.5))
    assert kept.shape == (9, 7)
    assert kept.values.dtype == kept.threshold.dtype == dtype
    assert float(kept.threshold) == threshold
    assert_indexed(kept)


def test_above_at_the_threshold_of_a_top_k_keeps_the_same() -> None:
    """Without ties, the threshold that batch top-k reports selects exactly what it kept."""
    coefficients = torch.randn(20, 9, generator=torch.Generator().manual_seed(3))
    for n in (1, 17, 180):
        kept = lk.batch_topk(coefficients, n)
        again = above(coefficients, float(kept.threshold))
        assert all(torch.equal(a, b) for a, b in zip(kept[:-1], again[:-1], strict=True))


def test_above_is_every_sample_by_itself() -> None:
    """What is kept of a row does not depend on the other rows, and none at all may be kept."""
    coefficients = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    whole = above(coefficients, 1.0)
    for s in range(6):
        alone = above(coefficients[s : s + 1], 1.0)
        assert torch.equal(alone.columns, whole.columns[whole.row_offsets[s] : whole.row_offsets[s + 1]])
    assert above(coefficients, 99.0).values.shape == (0,)
    assert_indexed(above(torch.zeros(0, 3), 1.0))


def test_above_is_differentiable_in_what_it_keeps() -> None:
    """The gradient of the kept values is one at the kept coefficients and zero elsewhere."""
    coefficients = torch.randn(6, 5, generator=torch.Generator().manual_seed(5), requires_grad=True)
    kept = above(coefficients, 0.7)
    (grad,) = torch.autograd.grad(kept.values.sum(), coefficients)
    assert torch.equal(grad, (coefficients.detach().abs() >= 0.7).float())
    assert 0 < int(grad.sum()) < 30
    assert not kept.threshold.requires_grad


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_of_columns_keep_what_one_process_keeps(ties: bool, dtype: torch.dtype) -> None:
    """Four ranks that share the columns, one with none: each keeps the whole's entries of its own columns, in order."""
    whole = torch.randn(30, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    if ties:
        whole = whole.round()
    whole[7, 3], whole[25, 1] = torch.nan, -torch.inf
    edges = [0, 4, 4, 6, 9]
    parts = [whole[:, a:b] for a, b in itertools.pairwise(edges)]
    for n in (0, 1, 2, 40, 200, 270):
        expected = lk.batch_topk(whole, n)
        for start, stop, own in zip(edges, edges[1:], together(parts, n, "torch", columns=True), strict=False):
            mine = (expected.columns >= start) & (expected.columns < stop)
            assert torch.equal(own.rows, expected.rows[mine])
            assert torch.equal(own.columns + start, expected.columns[mine])
            assert torch.equal(own.values.nan_to_num(nan=9e4), expected.values[mine].nan_to_num(nan=9e4))
            assert (own.threshold, own.threshold.dtype) == (expected.threshold, dtype)
    with pytest.raises(ValueError, match=r"n: expected 0 <= n <= 12 entries of all ranks, got 13"):
        batch_topk_over_columns(torch.zeros(2, 3), 13, 0, lambda t: torch.stack([t, t]))


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
