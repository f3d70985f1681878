"""Keep the n entries of largest |c| of a matrix [S, K] by radix selection, in order by row and by column.

    kept = {(s, k): |c_sk| > τ, or |c_sk| = τ and flat index <= limit},   n of them

The bits of |c|, read as an integer, order as |c| does; NaN counts as infinity. Digit by digit from the top, a
histogram of the entries that share the digits chosen so far tells the next digit of τ. Histograms are integers, so
those of several processes may be summed (`batch_topk_over_ranks`), and `project` may count the first one while the
coefficients are in registers. Then one pass counts kept entries per tile, by row and by column, and one writes them in
place.

Torch equivalent: `l3d_kernels.reference.batch_topk`. The kernels see the coefficients as integers of their width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l3d_kernels.dispatch import TRITON
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.common import ceil_div
from l3d_kernels.kernels.shared.launch_table import Launch, lookup
from l3d_kernels.kernels.topk import places, radix
from l3d_kernels.kernels.topk.places import topk_count, topk_scan_columns, topk_scan_rows, topk_write
from l3d_kernels.kernels.topk.radix import DIGITS, INFINITIES
from l3d_kernels.sparse import SparseCoefficients

# --- launch -----------------------------------------------------------------------------------------------------

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _parts(coefficients: Tensor, n: int) -> Parts:
    """Return memory for the tensors of SparseCoefficients, in its order."""
    S, K = coefficients.shape

    def indices(size: int) -> Tensor:
        return common.empty((size,), coefficients, torch.int64)

    values, threshold = common.empty((n,), coefficients), common.empty((), coefficients)
    return values, indices(n), indices(n), indices(S + 1), indices(n), indices(K + 1), threshold


def _count(coefficients: Tensor, histogram: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the counting pass: (bits, counts by row, counts by column, state with the threshold's key)."""
    S, K = coefficients.shape
    bits = radix.as_integers(coefficients)
    row = _row("topk_count", coefficients)
    # at least one tile: a rank without rows still settles the threshold
    tiles_s, tiles_k = max(1, ceil_div(S, row.blocks["BLOCK_S"])), ceil_div(K, row.blocks["BLOCK_K"])
    row_counts = common.empty((2, S, tiles_k), bits, torch.int32)
    column_counts = common.empty((2, tiles_s, K), bits, torch.int32)
    state_out = common.empty(state.shape, state)
    common.launch(
        topk_count,
        (tiles_s, tiles_k),
        row,
        bits.device,
        row_counts_ptr=row_counts,
        column_counts_ptr=column_counts,
        state_out_ptr=state_out,
        bits_ptr=bits,
        previous_ptr=histogram,
        state_ptr=state,
        S=S,
        K=K,
        INFINITY=INFINITIES[coefficients.dtype],
        PREVIOUS_BITS=DIGITS[coefficients.dtype.itemsize][-1][1],
    )
    return bits, row_counts, column_counts, state_out


def _scan_rows(coefficients: Tensor, bits: Tensor, row_counts: Tensor, state: Tensor, earlier: Tensor) -> Any:
    """Launch the scan by row: (each row tile's first place, [2] where the ties end and how many entries are kept)."""
    starts = common.empty(row_counts.shape[1:], bits, torch.int64)
    limit = common.empty((2,), bits, torch.int64)
    common.launch(
        topk_scan_rows,
        (1,),
        _row("topk_scan_rows", coefficients),
        bits.device,
        starts_ptr=starts,
        limit_ptr=limit,
        row_counts_ptr=row_counts,
        bits_ptr=bits,
        state_ptr=state,
        earlier_ptr=earlier,
        n_tiles=starts.numel(),
        n_tiles_k=starts.shape[1],
        K=coefficients.shape[1],
        INFINITY=INFINITIES[coefficients.dtype],
    )
    return starts, limit


def _write(
    coefficients: Tensor, n: int, bits: Tensor, column_counts: Tensor, starts: Tensor, state: Tensor, limit: Tensor
) -> Parts:
    """Launch the scan by column and the writing pass."""
    S, K = coefficients.shape
    parts = values, rows, columns, row_offsets, column_order, column_offsets, threshold = _parts(coefficients, n)
    ranks = common.empty(column_counts.shape[1:], bits, torch.int64)
    totals = common.empty((K,), bits, torch.int64)
    shared: dict[str, Any] = {
        "bits_ptr": bits,
        "state_ptr": state,
        "limit_ptr": limit,
        "ranks_ptr": ranks,
        "totals_ptr": totals,
    }
    shared |= {"S": S, "K": K, "INFINITY": INFINITIES[coefficients.dtype]}
    common.launch(
        topk_scan_columns,
        (starts.shape[1],),
        _row("topk_scan_columns", coefficients),
        bits.device,
        column_counts_ptr=column_counts,
        n_tiles_s=len(ranks),
        **shared,
    )
    common.launch(
        topk_write,
        (len(ranks), starts.shape[1]),
        _row("topk_write", coefficients),
        bits.device,
        values_ptr=values.view(bits.dtype),
        rows_ptr=rows,
        columns_ptr=columns,
        row_offsets_ptr=row_offsets,
        column_order_ptr=column_order,
        column_offsets_ptr=column_offsets,
        threshold_ptr=threshold.view(bits.dtype),
        starts_ptr=starts,
        N=n,
        **shared,
    )
    return parts


def _row(kernel: str, coefficients: Tensor) -> Launch:
    return lookup(kernel, common.kind_of(coefficients.device), common.size_class(coefficients.dtype))


def _nothing(coefficients: Tensor) -> Parts:
    """Return the parts where nothing is kept."""
    values, rows, columns, row_offsets, column_order, column_offsets, threshold = _parts(coefficients, 0)
    return values, rows, columns, row_offsets.zero_(), column_order, column_offsets.zero_(), threshold.fill_(torch.inf)


def _no_launch(coefficients: Tensor, n: int, histogram: Tensor | None) -> Parts:
    return _parts(coefficients, n)


@common.operator("batch_topk", _no_launch)
def select(coefficients: Tensor, n: int, histogram: Tensor | None) -> Parts:
    """Launch the kernels: the tensors of SparseCoefficients. histogram: the first digit's, if it is counted already."""
    if n == 0:
        return _nothing(coefficients)
    state = radix.begin(n, coefficients.device)
    for digit in range(len(DIGITS[coefficients.dtype.itemsize])):
        if digit or histogram is None:
            histogram, state = radix.digit_histogram(coefficients, digit, state, histogram)
    assert histogram is not None
    bits, row_counts, column_counts, state = _count(coefficients, histogram, state)
    starts, limit = _scan_rows(coefficients, bits, row_counts, state, torch.zeros_like(state[:1]))
    return _write(coefficients, n, bits, column_counts, starts, state, limit)


def batch_topk_over_ranks(
    coefficients: Tensor, n: int, total: Callable[[Tensor], Tensor], earlier: Callable[[Tensor], Tensor]
) -> SparseCoefficients:
    """Run `l3d_kernels.reference.batch_topk_over_ranks` with Triton kernels."""
    own = coefficients.detach()
    if n == 0:
        kept = _sparse(_nothing(own), own)
    else:
        state, histogram = radix.begin(n, own.device), None
        for digit in range(len(DIGITS[own.dtype.itemsize])):
            counts, state = radix.digit_histogram(own, digit, state, histogram)
            histogram = total(counts)
        assert histogram is not None
        bits, row_counts, column_counts, state = _count(own, histogram, state)
        starts, limit = _scan_rows(own, bits, row_counts, state, earlier(row_counts[1].sum()))
        kept = _sparse(_write(own, int(limit[1]), bits, column_counts, starts, state, limit), own)
    return kept._replace(values=coefficients.flatten()[kept.rows * own.shape[1] + kept.columns])


def _sparse(parts: Parts, coefficients: Tensor) -> SparseCoefficients:
    return SparseCoefficients(*parts, shape=(coefficients.shape[0], coefficients.shape[1]))


# --- autograd ---------------------------------------------------------------------------------------------------


class _BatchTopk(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(coefficients: Tensor, n: int, histogram: Tensor | None) -> Parts:
        return select(coefficients, n, histogram)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[1], output[2])
        ctx.shape = inputs[0].shape

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_values: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        S, K = ctx.shape
        d_flat = d_values.new_zeros(S * K).scatter(0, rows * K + columns, d_values)
        return d_flat.view(S, K), None, None


def batch_topk(coefficients: Tensor, n: int, histogram: Tensor | None = None) -> SparseCoefficients:
    """Run `l3d_kernels.reference.batch_topk` with Triton kernels.

    histogram: that of the first digit (`radix.count_magnitudes`), if a kernel before has counted it.
    """
    return _sparse(_BatchTopk.apply(coefficients, n, histogram), coefficients)


TRITON["batch_topk"] = batch_topk
TRITON["batch_topk_over_ranks"] = batch_topk_over_ranks


def compile_cases(kind: str) -> list[common.CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    return radix.compile_cases(kind) + places.compile_cases(kind)
