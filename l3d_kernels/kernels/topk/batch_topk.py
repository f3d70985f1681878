"""Keep the n entries of largest magnitude of a matrix [S, K] by radix selection, in order by row and by column.

    kept = {(s, k): |c_sk| > τ, or |c_sk| = τ and flat index <= limit},   n of them

The bits of |c|, read as an integer, order as |c| does; NaN counts as infinity. Digit by digit from the top, a histogram
of the entries that share the threshold's digits so far gives the next digit of τ. Histograms hold integers, so those
of several processes may be summed (`batch_topk_over_ranks`), and `project` may count the first one while the
coefficients are in registers. Then one pass counts the kept entries per tile, by row and by column, and one pass writes
them to their places.

Specification: `l3d_kernels.reference.batch_topk`. The kernels read the coefficients as integers of their width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase
from l3d_kernels.kernels.topk import places, radix
from l3d_kernels.kernels.topk.places import topk_count, topk_scan_columns, topk_scan_rows, topk_write
from l3d_kernels.kernels.topk.radix import DIGITS, INFINITIES
from l3d_kernels.sparse import SparseCoefficients, sparse_coefficients

# --- launch -----------------------------------------------------------------------------------------------------

Sum = Callable[[Tensor], Tensor]  # over ranks
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the tensors of SparseCoefficients, in order


def parts_for(coefficients: Tensor, n: int) -> Parts:
    """Return memory for the tensors of SparseCoefficients, of n entries of a matrix."""
    S, K = coefficients.shape

    def indices(size: int) -> Tensor:
        return common.empty((size,), coefficients, torch.int64)

    values, threshold = common.empty((n,), coefficients), common.empty((), coefficients)
    return values, indices(n), indices(n), indices(S + 1), indices(n), indices(K + 1), threshold


def _count(coefficients: Tensor, histogram: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the counting pass: (bits, counts by row, counts by column, state with the threshold's key)."""
    S, K = coefficients.shape
    bits, row = radix.as_integers(coefficients), common.row_for(topk_count, coefficients)
    # at least one tile: a rank without rows still computes the threshold
    grid = tiles_s, tiles_k = row.tiles(S=max(1, S), K=K)
    row_counts = common.empty((2, S, tiles_k), bits, torch.int32)
    column_counts = common.empty((2, tiles_s, K), bits, torch.int32)
    state_out = common.empty(state.shape, state)
    outputs = {"row_counts_ptr": row_counts, "column_counts_ptr": column_counts, "state_out_ptr": state_out}
    pointers = {"bits_ptr": bits, "previous_ptr": histogram, "state_ptr": state}
    flags = {"INFINITY": INFINITIES[coefficients.dtype], "PREVIOUS_BITS": DIGITS[coefficients.dtype.itemsize][-1][1]}
    common.launch(topk_count, grid, row, bits.device, **outputs, **pointers, S=S, K=K, **flags)
    return bits, row_counts, column_counts, state_out


def _scan_rows(coefficients: Tensor, bits: Tensor, row_counts: Tensor, state: Tensor, earlier: Tensor) -> Any:
    """Launch the scan by row: (each row tile's first place, [2] where the ties end and how many entries are kept)."""
    starts, limit = common.empty(row_counts.shape[1:], bits, torch.int64), common.empty((2,), bits, torch.int64)
    pointers = {"starts_ptr": starts, "limit_ptr": limit, "row_counts_ptr": row_counts, "bits_ptr": bits}
    pointers |= {"state_ptr": state, "earlier_ptr": earlier}
    sizes = {"n_tiles": starts.numel(), "n_tiles_k": starts.shape[1], "K": coefficients.shape[1]}
    row, sizes["INFINITY"] = common.row_for(topk_scan_rows, coefficients), INFINITIES[coefficients.dtype]
    common.launch(topk_scan_rows, (1,), row, bits.device, **pointers, **sizes)
    return starts, limit


def _write(
    coefficients: Tensor, n: int, bits: Tensor, column_counts: Tensor, starts: Tensor, state: Tensor, limit: Tensor
) -> Parts:
    """Launch the scan by column and the writing pass."""
    S, K = coefficients.shape
    parts = parts_for(coefficients, n)
    ranks, totals = common.empty(column_counts.shape[1:], bits, torch.int64), common.empty((K,), bits, torch.int64)
    shared: dict[str, Any] = {"bits_ptr": bits, "state_ptr": state, "limit_ptr": limit, "ranks_ptr": ranks}
    shared |= {"totals_ptr": totals, "S": S, "K": K, "INFINITY": INFINITIES[coefficients.dtype]}
    row = common.row_for(topk_scan_columns, coefficients)
    own = {"column_counts_ptr": column_counts, "n_tiles_s": len(ranks)}
    common.launch(topk_scan_columns, (starts.shape[1],), row, bits.device, **own, **shared)
    outputs = {f"{name}_ptr": part for name, part in zip(SparseCoefficients._fields, parts, strict=False)}
    outputs |= {"values_ptr": parts[0].view(bits.dtype), "threshold_ptr": parts[-1].view(bits.dtype)}
    row, grid = common.row_for(topk_write, coefficients), (len(ranks), starts.shape[1])
    common.launch(topk_write, grid, row, bits.device, **outputs, starts_ptr=starts, N=n, **shared)
    return parts


def _find(coefficients: Tensor, n: int, histogram: Tensor | None, ranks: tuple[Sum, Sum] | None = None) -> Parts:
    """Launch all kernels: the tensors of SparseCoefficients. ranks: the sums that `batch_topk_over_ranks` takes."""
    if n == 0:
        parts = parts_for(coefficients, 0)
        parts[6].fill_(torch.inf)
        for offsets in (parts[3], parts[5]):
            offsets.zero_()
        return parts
    state = radix.begin(n, coefficients.device)
    for digit in range(len(DIGITS[coefficients.dtype.itemsize])):
        if digit or histogram is None:
            histogram, state = radix.digit_histogram(coefficients, digit, state, histogram)
            histogram = ranks[0](histogram) if ranks else histogram
    assert histogram is not None
    bits, row_counts, column_counts, state = _count(coefficients, histogram, state)
    earlier = ranks[1](row_counts[1].sum()) if ranks else torch.zeros_like(state[:1])
    starts, limit = _scan_rows(coefficients, bits, row_counts, state, earlier)
    return _write(coefficients, int(limit[1]) if ranks else n, bits, column_counts, starts, state, limit)


@common.operator("batch_topk", lambda coefficients, n, histogram: parts_for(coefficients, n))
def select(coefficients: Tensor, n: int, histogram: Tensor | None) -> Parts:
    """Launch the kernels: the tensors of SparseCoefficients. histogram: the first digit's, if it is counted already."""
    return _find(coefficients, n, histogram)


def batch_topk_over_ranks(coefficients: Tensor, n: int, total: Sum, earlier: Sum) -> SparseCoefficients:
    """Run `l3d_kernels.ops.batch_topk_over_ranks` with Triton kernels."""
    own = coefficients.detach()
    kept = _sparse(_find(own, n, None, (total, earlier)), own)
    return kept._replace(values=coefficients.flatten()[kept.rows * own.shape[1] + kept.columns])


def _sparse(parts: Parts, coefficients: Tensor) -> SparseCoefficients:
    return SparseCoefficients(*parts, shape=(coefficients.shape[0], coefficients.shape[1]))


# --- autograd ---------------------------------------------------------------------------------------------------


def _backward(needs: Any, saved: tuple[Tensor, ...], d_values: Tensor) -> list[Tensor]:
    """Put the upstream gradients [N] where the kept coefficients were: [S, K]."""
    rows, columns, row_offsets, column_offsets = saved
    S, K = len(row_offsets) - 1, len(column_offsets) - 1
    return [d_values.new_zeros(S * K).scatter(0, rows * K + columns, d_values).view(S, K)]


_select = common.differentiable(
    lambda coefficients, n, histogram: select(coefficients, n, histogram),
    _backward,
    lambda inputs, output: (*output[1:4], output[5]),
)


def select_one(coefficients: Tensor, n: int, histogram: Tensor | None = None) -> SparseCoefficients:
    """Select in one group of columns; histogram: the first digit's, if `radix.count_magnitudes` has counted it."""
    return _sparse(_select(coefficients, n, histogram), coefficients)


def batch_topk(coefficients: Tensor, n: int, n_groups: int = 1) -> SparseCoefficients:
    """Run `l3d_kernels.reference.batch_topk` with Triton kernels, one group of columns after another."""
    if n_groups == 1:
        return select_one(coefficients, n)
    parts = [select_one(part.contiguous(), n) for part in coefficients.chunk(n_groups, dim=1)]
    n_rows, width = parts[0].shape
    rows = torch.cat([part.rows for part in parts])
    columns = torch.cat([part.columns + i * width for i, part in enumerate(parts)])
    order = torch.argsort(rows * (width * len(parts)) + columns)
    values, threshold = torch.cat([part.values for part in parts])[order], torch.stack([p.threshold for p in parts])
    return sparse_coefficients(values, rows[order], columns[order], threshold, (n_rows, width * len(parts)))


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    return radix.compile_cases(kind) + places.compile_cases(kind)
