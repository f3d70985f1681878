"""Compute inside a kernel: device functions that the kernels share, to load, store, round, multiply and sum tiles.

Triton's interpreter (TRITON_INTERPRET=1 when this package is first imported) runs the same kernels on a CPU. Its
bfloat16 arithmetic is silently wrong. So tiles are widened after the load and rounded by hand before the store, under a
constant that is true in the interpreter only: a GPU keeps its bfloat16 matrix units.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def nth(items, n):
    """Return the n-th item of a tuple, n a number that the program computes."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        item = tl.where(n >= i, items[i], item)
    return item


@triton.jit
def chosen(items, start_of, place):
    """Return the item of the tensor whose programs `place` is among, where tensor i's begin at `start_of[i]`."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        item = tl.where(place >= start_of[i], items[i], item)
    return item


@triton.jit
def load(pointers, mask):
    """Load a tile, with zeros where `mask` is false; bfloat16 becomes float32 in the interpreter."""
    tile = tl.load(pointers, mask=mask, other=0)
    if INTERPRETED and tile.dtype == tl.bfloat16:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def bfloat16_bits(tile):
    """Round a tile to bfloat16, to nearest even; return its bits as the low half of an int32."""
    bits = tile.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def store(pointers, tile, mask):
    """Store a tile in the pointers' type, rounded to nearest even; the interpreter alone would truncate to bfloat16."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, bfloat16_bits(tile).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def feed(tile, pointer):
    """Cast a computed tile to the type of `pointer`'s elements, for a dot with tiles loaded from that tensor."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        return (bfloat16_bits(tile) << 16).to(tl.float32, bitcast=True)  # rounded as on a GPU, kept as float32
    else:
        return tile.to(pointer.dtype.element_ty)


@triton.jit
def zeros(pointer, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a fresh accumulator [ROWS, COLS] for elements of `pointer`: float32, or float64 for float64."""
    return tl.zeros([ROWS, COLS], tl.float64 if pointer.dtype.element_ty == tl.float64 else tl.float32)


@triton.jit
def round_to_tf32(tile):
    """Round float32 to the 10 mantissa bits that tf32 keeps, halves away from zero; NaN stays NaN.

    The matrix units drop the other bits. Dropping them biases every number toward zero, by half a unit in the last
    place on average; sums do not average that bias out, and ‖G − ĝ‖² is a small difference of large sums.
    """
    bits = tile.to(tl.int32, bitcast=True) + 0x1000
    return tl.where(tile == tile, bits.to(tl.float32, bitcast=True), tile)


@triton.jit
def add_dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b, accumulated in acc's type."""
    if PRECISION == "tf32" and not INTERPRETED:  # the interpreter multiplies float32 exactly
        a, b = round_to_tf32(a), round_to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def row_products(a_ptr, starts_a, mask_a, b_ptr, starts_b, mask_b, D, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return Σ_d A[a, d] B[b, d] for rows of D elements; `starts` (int64) is where each row begins: [A, B]."""
    acc = zeros(a_ptr, starts_a.shape[0], starts_b.shape[0])
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        a = load(a_ptr + starts_a[:, None] + offs_d[None, :], mask_a[:, None] & mask_d[None, :])  # [A, D]
        b = load(b_ptr + starts_b[None, :] + offs_d[:, None], mask_b[None, :] & mask_d[:, None])  # [D, B]
        acc = add_dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def sum_groups(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum a tile over groups of ROWS x COLS neighbours: [A, B] -> [A // ROWS, B // COLS]; powers of two."""
    if COLS > 1:
        tile = tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // COLS, COLS]), 2)
    if ROWS > 1:
        tile = tl.sum(tl.reshape(tile, [tile.shape[0] // ROWS, ROWS, tile.shape[1]]), 1)
    return tile
