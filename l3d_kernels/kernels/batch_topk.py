"""Keep the n entries of largest |c| of a matrix [S, K] by radix selection, in order by row and by column.

    kept = {(s, k): |c_sk| > τ, or |c_sk| = τ and flat index <= limit},   n of them

The bits of |c|, read as an integer, order as |c| does; NaN counts as infinity. Digit by digit from the top, a
histogram of the entries that share the digits chosen so far tells the next digit of τ. Histograms are integers, so
those of several processes may be summed (`over_ranks`), and `project` may count the first one while the coefficients
are in registers. Then one pass counts kept entries per tile, by row and by column, and one writes them in place.

Torch equivalent: `l3d_kernels.reference.batch_topk`. The kernels see the coefficients as integers of their width.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.dispatch import TRITON
from l3d_kernels.kernels import common, radix
from l3d_kernels.kernels.common import ceil_div
from l3d_kernels.kernels.radix import DIGITS, INFINITIES, load_keys, magnitude_key, narrow
from l3d_kernels.kernels.table import KINDS, TABLE, Launch, lookup
from l3d_kernels.sparse import SparseCoefficients


@triton.jit
def topk_count(
    row_counts_ptr,  # [2, S, tiles of K] int32: entries above the threshold, and at it, in each tile by row
    column_counts_ptr,  # [2, tiles of S, K] int32: the same by column
    state_out_ptr,  # [2] int64: the threshold's key, how many entries at it are kept
    bits_ptr,  # [S, K]
    previous_ptr,  # [2^PREVIOUS_BITS] int64, histogram of the last digit
    state_ptr,  # [2] int64
    S,
    K,
    INFINITY: tl.constexpr,
    PREVIOUS_BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Settle the threshold; count what is above it and at it, tile by tile."""
    tile_s, tile_k = tl.program_id(0), tl.program_id(1)
    threshold, ties = narrow(previous_ptr, state_ptr, PREVIOUS_BITS)
    offs_s, offs_k = tile_s * BLOCK_S + tl.arange(0, BLOCK_S), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    key, _, _ = load_keys(bits_ptr, offs_s, offs_k, S, K, INFINITY)  # [S, K]
    above, tied = (key > threshold.to(key.dtype)).to(tl.int32), (key == threshold.to(key.dtype)).to(tl.int32)
    n_tiles_s, n_tiles_k = tl.num_programs(0).to(tl.int64), tl.num_programs(1).to(tl.int64)
    places_s = row_counts_ptr + offs_s * n_tiles_k + tile_k
    tl.store(places_s, tl.sum(above, 1), mask=offs_s < S)
    tl.store(places_s + S * n_tiles_k, tl.sum(tied, 1), mask=offs_s < S)
    places_k = column_counts_ptr + tile_s.to(tl.int64) * K + offs_k
    tl.store(places_k, tl.sum(above, 0), mask=offs_k < K)
    tl.store(places_k + n_tiles_s * K, tl.sum(tied, 0), mask=offs_k < K)
    if (tile_s == 0) & (tile_k == 0):
        tl.store(state_out_ptr, threshold)
        tl.store(state_out_ptr + 1, ties)


@triton.jit
def topk_scan_rows(
    starts_ptr,  # [S, tiles of K] int64: position of each tile's first kept entry of a row
    limit_ptr,  # [2] int64: flat index of the last kept entry at the threshold, or -1; how many entries are kept
    row_counts_ptr,  # [2, S, tiles of K] int32
    bits_ptr,  # [S, K]
    state_ptr,  # [2] int64: the threshold's key, how many entries at it are kept
    earlier_ptr,  # [] int64: how many entries at it come before this matrix (are held by lower ranks)
    n_tiles,
    n_tiles_k,
    K,
    INFINITY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the row counts up in flat order and find where the ties end; one program."""
    threshold, ties = tl.load(state_ptr), tl.load(state_ptr + 1)
    tied_before = tl.load(earlier_ptr)
    kept_before = tied_before * 0
    last_tile, last_rank = tied_before * 0 - 1, tied_before * 0
    for start in range(0, n_tiles, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n_tiles
        above = tl.load(row_counts_ptr + offs, mask=mask, other=0).to(tl.int64)  # [BLOCK]
        tied = tl.load(row_counts_ptr + n_tiles + offs, mask=mask, other=0).to(tl.int64)  # [BLOCK]
        rank = tied_before + tl.cumsum(tied, 0) - tied  # of a tile's first tie among all
        kept = above + tl.minimum(tl.maximum(ties - rank, 0), tied)
        tl.store(starts_ptr + offs, kept_before + tl.cumsum(kept, 0) - kept, mask=mask)
        is_last = (rank < ties) & (ties <= rank + tied)
        last_tile += tl.sum(tl.where(is_last, offs + 1, 0).to(tl.int64), 0)
        last_rank += tl.sum(tl.where(is_last, ties - rank, 0), 0)
        tied_before += tl.sum(tied, 0)
        kept_before += tl.sum(kept, 0)
    # ties that all belong to this matrix or to lower ranks: every tie up to the matrix's end is kept
    limit = tl.where(tied_before < ties, 0x7FFFFFFFFFFFFFFF, -1)
    if last_tile >= 0:
        offs_k = (last_tile % n_tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
        flat = (last_tile // n_tiles_k) * K + offs_k
        bits = tl.load(bits_ptr + flat, mask=offs_k < K, other=0)  # [BLOCK_K]
        tied = ((magnitude_key(bits, INFINITY).to(tl.int64) == threshold) & (offs_k < K)).to(tl.int64)
        limit = tl.sum(tl.where((tied > 0) & (tl.cumsum(tied, 0) == last_rank), flat, 0), 0)
    tl.store(limit_ptr, limit)
    tl.store(limit_ptr + 1, kept_before)


@triton.jit
def topk_scan_columns(
    ranks_ptr,  # [tiles of S, K] int64: how many entries a column keeps in the tiles before
    totals_ptr,  # [K] int64: how many it keeps
    column_counts_ptr,  # [2, tiles of S, K] int32
    bits_ptr,  # [S, K]
    state_ptr,  # [2] int64: the threshold's key
    limit_ptr,  # [2] int64: flat index of the last kept entry at the threshold
    S,
    K,
    n_tiles_s,
    INFINITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Sum the column counts up along the rows; the tile in which the ties end is counted again."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    threshold, limit = tl.load(state_ptr), tl.load(limit_ptr)
    last_tile = tl.where(limit < 0, -1, tl.minimum(limit // K // BLOCK_S, n_tiles_s))
    offs_s = (tl.maximum(last_tile, 0) * BLOCK_S).to(tl.int32) + tl.arange(0, BLOCK_S)
    key, flat, _ = load_keys(bits_ptr, offs_s, offs_k, S, K, INFINITY)  # [S, K]
    tied_in_last = tl.sum(((key == threshold.to(key.dtype)) & (flat <= limit)).to(tl.int32), 0)  # [K]
    total = tl.zeros([BLOCK_K], dtype=tl.int64)
    for start in range(0, n_tiles_s, BLOCK_TILES):
        offs_tile = start + tl.arange(0, BLOCK_TILES)
        mask = (offs_tile < n_tiles_s)[:, None] & mask_k[None, :]
        places = offs_tile.to(tl.int64)[:, None] * K + offs_k[None, :]
        tied_places = (n_tiles_s + offs_tile).to(tl.int64)[:, None] * K + offs_k[None, :]
        above = tl.load(column_counts_ptr + places, mask=mask, other=0)  # [TILES, K]
        tied = tl.load(column_counts_ptr + tied_places, mask=mask, other=0)  # [TILES, K]
        tied = tl.where((offs_tile == last_tile)[:, None], tied_in_last[None, :], tied)
        kept = above + tl.where((offs_tile <= last_tile)[:, None] & mask, tied, 0)
        tl.store(ranks_ptr + places, total[None, :] + (tl.cumsum(kept, 0) - kept), mask=mask)
        total += tl.sum(kept, 0)
    tl.store(totals_ptr + offs_k, total, mask=mask_k)


@triton.jit
def topk_write(
    values_ptr,  # [N] bits of the kept coefficients
    rows_ptr,  # [N] int64
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    column_order_ptr,  # [N] int64
    column_offsets_ptr,  # [K+1] int64
    threshold_ptr,  # [] bits of the threshold
    bits_ptr,  # [S, K]
    starts_ptr,  # [S, tiles of K] int64
    ranks_ptr,  # [tiles of S, K] int64
    totals_ptr,  # [K] int64
    state_ptr,  # [2] int64: the threshold's key
    limit_ptr,  # [2] int64: flat index of the last kept entry at the threshold; how many entries are kept
    S,
    K,
    INFINITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the kept entries of a tile to their places by row, and those places by column."""
    tile_s, tile_k = tl.program_id(0), tl.program_id(1)
    threshold, limit, n_kept = tl.load(state_ptr), tl.load(limit_ptr), tl.load(limit_ptr + 1)
    offs_s, offs_k = tile_s * BLOCK_S + tl.arange(0, BLOCK_S), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_s, mask_k = offs_s < S, offs_k < K
    key, flat, bits = load_keys(bits_ptr, offs_s, offs_k, S, K, INFINITY)  # [S, K]
    kept = (key > threshold.to(key.dtype)) | ((key == threshold.to(key.dtype)) & (flat <= limit))
    one = kept.to(tl.int32)

    starts = tl.load(starts_ptr + offs_s.to(tl.int64) * tl.num_programs(1) + tile_k, mask=mask_s, other=0)  # [S]
    place = starts[:, None] + (tl.cumsum(one, 1) - one)  # [S, K]
    tl.store(values_ptr + place, bits, mask=kept)
    tl.store(rows_ptr + place, offs_s.to(tl.int64)[:, None] + tl.zeros_like(place), mask=kept)
    tl.store(columns_ptr + place, offs_k.to(tl.int64)[None, :] + tl.zeros_like(place), mask=kept)

    before = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, tile_k * BLOCK_K, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        before += tl.load(totals_ptr + offs, mask=offs < tile_k * BLOCK_K, other=0)  # [BLOCK]
    totals = tl.load(totals_ptr + offs_k, mask=mask_k, other=0)  # [K]
    column_starts = tl.sum(before, 0) + tl.cumsum(totals, 0) - totals  # [K]
    ranks = tl.load(ranks_ptr + tile_s.to(tl.int64) * K + offs_k, mask=mask_k, other=0)  # [K]
    by_column = (column_starts + ranks)[None, :] + (tl.cumsum(one, 0) - one)  # [S, K]
    tl.store(column_order_ptr + by_column, place, mask=kept)

    if tile_k == 0:
        tl.store(row_offsets_ptr + offs_s, starts, mask=mask_s)
    if tile_s == 0:
        tl.store(column_offsets_ptr + offs_k, column_starts, mask=mask_k)
    if (tile_s == 0) & (tile_k == 0):
        tl.store(row_offsets_ptr + S, n_kept)
        tl.store(column_offsets_ptr + K, n_kept)
        tl.store(threshold_ptr, threshold.to(threshold_ptr.dtype.element_ty))


# --- launch -----------------------------------------------------------------------------------------------------

TILE, SMALL_TILE = {"BLOCK_S": 32, "BLOCK_K": 128}, {"BLOCK_S": 16, "BLOCK_K": 32}  # shared by all four kernels
for kernel_name, blocks, small in (
    ("topk_count", TILE, SMALL_TILE),
    ("topk_scan_rows", {"BLOCK_K": TILE["BLOCK_K"], "BLOCK": 4096}, {"BLOCK_K": SMALL_TILE["BLOCK_K"], "BLOCK": 64}),
    ("topk_scan_columns", {**TILE, "BLOCK_TILES": 32}, {**SMALL_TILE, "BLOCK_TILES": 4}),
    ("topk_write", {**TILE, "BLOCK": 1024}, {**SMALL_TILE, "BLOCK": 64}),
):
    TABLE[kernel_name] = {("interpreter", None): Launch(small), (None, None): Launch(blocks, warps=8, stages=1)}

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _parts(coefficients: Tensor, n: int) -> Parts:
    """Return memory for the tensors of SparseCoefficients, in its order."""
    S, K = coefficients.shape

    def indices(size: int) -> Tensor:
        return coefficients.new_empty(size, dtype=torch.int64)

    values, threshold = common.empty((n,), coefficients), common.empty((), coefficients)
    return values, indices(n), indices(n), indices(S + 1), indices(n), indices(K + 1), threshold


def _count(coefficients: Tensor, histogram: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the counting pass: (bits, counts by row, counts by column, state with the threshold's key)."""
    S, K = coefficients.shape
    bits = radix.as_integers(coefficients)
    row = _row("topk_count", coefficients)
    # at least one tile: a rank without rows still settles the threshold
    tiles_s, tiles_k = max(1, ceil_div(S, row.blocks["BLOCK_S"])), ceil_div(K, row.blocks["BLOCK_K"])
    row_counts = bits.new_empty(2, S, tiles_k, dtype=torch.int32)
    column_counts = bits.new_empty(2, tiles_s, K, dtype=torch.int32)
    state_out = torch.empty_like(state)
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
    starts = bits.new_empty(row_counts.shape[1:], dtype=torch.int64)
    limit = bits.new_empty(2, dtype=torch.int64)
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
    ranks = bits.new_empty(column_counts.shape[1:], dtype=torch.int64)
    totals = bits.new_empty(K, dtype=torch.int64)
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


def over_ranks(
    coefficients: Tensor, n: int, total: Callable[[Tensor], Tensor], earlier: Callable[[Tensor], Tensor]
) -> SparseCoefficients:
    """Keep the n entries of largest |c| of all ranks' rows together; return those of this rank's rows.

    coefficients: [S, K] this rank's rows; ranks hold consecutive rows, so ties go to lower ranks first.
    total: sums an int64 tensor over ranks (an all-reduce). earlier: sums it over the ranks below (an exclusive scan).
    Every rank must call it. `threshold` is that of all ranks together. No gradient flows.
    """
    if n == 0:
        return _sparse(_nothing(coefficients), coefficients)
    state, histogram = radix.begin(n, coefficients.device), None
    for digit in range(len(DIGITS[coefficients.dtype.itemsize])):
        own, state = radix.digit_histogram(coefficients, digit, state, histogram)
        histogram = total(own)
    assert histogram is not None
    bits, row_counts, column_counts, state = _count(coefficients, histogram, state)
    starts, limit = _scan_rows(coefficients, bits, row_counts, state, earlier(row_counts[1].sum()))
    return _sparse(_write(coefficients, int(limit[1]), bits, column_counts, starts, state, limit), coefficients)


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


def compile_cases(kind: str) -> list[common.CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    assert kind in KINDS
    cases = radix.compile_cases(kind)
    for dtype, integer in ((torch.bfloat16, "i16"), (torch.float16, "i16"), (torch.float32, "i32")):
        form: dict[str, Any] = {"is_matrix": False, "divisible": (), "long": dtype == torch.float16}
        for kernel in (topk_count, topk_scan_rows, topk_scan_columns, topk_write):
            name = kernel.fn.__name__
            constants: dict[str, Any] = {"INFINITY": INFINITIES[dtype]}
            if kernel is topk_count:
                constants["PREVIOUS_BITS"] = DIGITS[dtype.itemsize][-1][1]
            types = {
                argument: "*i32" if "counts" in argument else "*i64"
                for argument in kernel.arg_names
                if argument.endswith("_ptr") and argument not in ("bits_ptr", "values_ptr", "threshold_ptr")
            }
            row = lookup(name, kind, common.size_class(dtype))
            cases.append(common.CompileCase(kernel, integer, constants, row, types, **form))
    return cases
