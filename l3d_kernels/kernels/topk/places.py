"""Write the entries that a threshold keeps to their places, in order by row and by column.

One pass counts the entries above the threshold and at it, tile by tile, by row and by column. Two scans sum the counts;
the one by row finds the flat index after which ties are no longer kept. One pass writes every kept entry to its place
by row, and writes that place in the order by column. Nothing depends on the order in which programs run.
"""

import torch
import triton
import triton.language as tl

from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, types_of
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch, lookup, size_class
from l3d_kernels.kernels.topk.radix import COMPILED, DIGITS, INFINITIES, load_keys, magnitude_key, narrow


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
    """Compute the threshold; count the entries above it and at it, tile by tile."""
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
    earlier_ptr,  # [] int64: how many entries at the threshold lower ranks hold
    n_tiles,
    n_tiles_k,
    K,
    INFINITY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the row counts in flat order and find the last tie that is kept; one program."""
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
    # Where fewer ties than are wanted lie up to this matrix's end, all of them are kept.
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
    """Sum the column counts along the rows; the tile with the last kept tie is counted again."""
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
    N,  # no entry is written beyond N, also where the counts are wrong
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
    in_range = kept & (place < N)
    tl.store(values_ptr + place, bits, mask=in_range)
    tl.store(rows_ptr + place, offs_s.to(tl.int64)[:, None] + tl.zeros_like(place), mask=in_range)
    tl.store(columns_ptr + place, offs_k.to(tl.int64)[None, :] + tl.zeros_like(place), mask=in_range)

    before = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, tile_k * BLOCK_K, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        before += tl.load(totals_ptr + offs, mask=offs < tile_k * BLOCK_K, other=0)  # [BLOCK]
    totals = tl.load(totals_ptr + offs_k, mask=mask_k, other=0)  # [K]
    column_starts = tl.sum(before, 0) + tl.cumsum(totals, 0) - totals  # [K]
    ranks = tl.load(ranks_ptr + tile_s.to(tl.int64) * K + offs_k, mask=mask_k, other=0)  # [K]
    by_column = (column_starts + ranks)[None, :] + (tl.cumsum(one, 0) - one)  # [S, K]
    tl.store(column_order_ptr + by_column, place, mask=kept & (by_column < N))

    if tile_k == 0:
        tl.store(row_offsets_ptr + offs_s, starts, mask=mask_s)
    if tile_s == 0:
        tl.store(column_offsets_ptr + offs_k, column_starts, mask=mask_k)
    if (tile_s == 0) & (tile_k == 0):
        tl.store(row_offsets_ptr + S, n_kept)
        tl.store(column_offsets_ptr + K, n_kept)
        tl.store(threshold_ptr, threshold.to(threshold_ptr.dtype.element_ty))


# --- launch table and ahead-of-time cases; the launches are in batch_topk.py -------------------------------------

TILE, SMALL_TILE = {"BLOCK_S": 32, "BLOCK_K": 128}, {"BLOCK_S": 16, "BLOCK_K": 32}  # shared by all four kernels
for kernel_name, blocks, small in (
    ("topk_count", TILE, SMALL_TILE),
    ("topk_scan_rows", {"BLOCK_K": TILE["BLOCK_K"], "BLOCK": 4096}, {"BLOCK_K": SMALL_TILE["BLOCK_K"], "BLOCK": 64}),
    ("topk_scan_columns", {**TILE, "BLOCK_TILES": 32}, {**SMALL_TILE, "BLOCK_TILES": 4}),
    ("topk_write", {**TILE, "BLOCK": 1024}, {**SMALL_TILE, "BLOCK": 64}),
):
    TABLE[kernel_name] = {("interpreter", None): Launch(small), (None, None): Launch(blocks, warps=8, stages=1)}


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    cases = []
    for dtype, integer in COMPILED:
        constants = {"INFINITY": INFINITIES[dtype], "PREVIOUS_BITS": DIGITS[dtype.itemsize][-1][1]}
        for kernel in (topk_count, topk_scan_rows, topk_scan_columns, topk_write):
            own = {name: value for name, value in constants.items() if name in kernel.arg_names}
            row, long = lookup(kernel.fn.__name__, kind, size_class(dtype)), dtype == torch.float16
            cases.append(CompileCase(kernel, integer, own, row, types_of(kernel), long))
    return cases
