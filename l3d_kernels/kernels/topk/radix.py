"""Find the threshold of a top-k by radix selection: one histogram of the digits of |c| gives one digit of it.

The bits of |c|, read as an integer, order as |c| does; NaN counts as infinity. Histograms hold integers, so the order
in which programs or ranks add them is free. `project` counts the first digit's histogram while the coefficients are in
registers. All kernels here read coefficients as integers of their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.cpu.selection import INTEGERS
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, types_of
from l3d_kernels.kernels.shared.device import INTERPRETED, bfloat16_bits
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch, lookup, size_class

# (shift, bits) of each digit of a magnitude, the highest first, by the dtype's bytes. The first of float32 is the
# exponent and three bits of the mantissa: coefficients spread over a hundred bins or so.
DIGITS = {
    2: ((7, 8), (0, 7)),
    4: ((20, 11), (10, 10), (0, 10)),
    8: ((52, 11), (41, 11), (30, 11), (20, 10), (10, 10), (0, 10)),
}
INFINITIES = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
COMPILED = ((torch.bfloat16, "i16"), (torch.float16, "i16"), (torch.float32, "i32"))  # (dtype, pointer type)
PROGRAMS = 512  # that count a histogram: enough to fill a GPU, few enough that adding their counts is cheap


# --- device functions -------------------------------------------------------------------------------------------


@triton.jit
def magnitude_key(bits, INFINITY: tl.constexpr):
    """Return the integer that orders as |c| does, from the bits of c; that of NaN is infinity's."""
    if bits.dtype == tl.int64:
        return tl.minimum(bits & 0x7FFFFFFFFFFFFFFF, INFINITY)
    elif bits.dtype == tl.int32:
        return tl.minimum(bits & 0x7FFFFFFF, INFINITY)
    else:
        return tl.minimum(bits.to(tl.int32) & 0x7FFF, INFINITY)


@triton.jit
def bits_of(tile, pointer):
    """Return the bits that `device.store` writes for a floating tile where `pointer` points."""
    if pointer.dtype.element_ty == tl.float64:
        return tile.to(tl.int64, bitcast=True)
    elif pointer.dtype.element_ty == tl.float32:
        return tile.to(tl.float32).to(tl.int32, bitcast=True)
    elif INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        return bfloat16_bits(tile).to(tl.int16)
    else:
        return tile.to(pointer.dtype.element_ty).to(tl.int16, bitcast=True)


@triton.constexpr_function
def first_digit(element):
    """Return (infinity's key, shift, bits) of the first digit of magnitudes, for an element type of Triton."""
    dtype = getattr(torch, {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[element.name])
    return INFINITIES[dtype], *DIGITS[dtype.itemsize][0]


@triton.jit
def count_magnitudes(histogram_ptr, tile, mask, out_ptr):
    """Add a tile's entries to the histogram [2^bits] int64 of the first digit, as they are stored at `out_ptr`.

    For an epilogue that has the coefficients in registers; the sums are of integers, so their order is free.
    """
    DIGIT: tl.constexpr = first_digit(out_ptr.dtype.element_ty)
    INFINITY: tl.constexpr = DIGIT[0]
    SHIFT: tl.constexpr = DIGIT[1]
    BITS: tl.constexpr = DIGIT[2]
    digit = (magnitude_key(bits_of(tile, out_ptr), INFINITY) >> SHIFT).to(tl.int32)
    # Triton (3.6 to 3.9) lets each reshape before a histogram reorder its elements, and reorders a tile and its mask
    # differently where their layouts differ. So the mask is part of the digit and both go through one reshape.
    digit = tl.ravel(tl.where(mask, digit, -1))
    counts = tl.histogram(tl.maximum(digit, 0), 1 << BITS, mask=digit >= 0)
    tl.atomic_add(histogram_ptr + tl.arange(0, 1 << BITS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def narrow(histogram_ptr, state_ptr, BITS: tl.constexpr):
    """Return (the threshold's digits so far, how many of the entries that share them are still to be kept).

    state_ptr: both numbers before the histogram [2^BITS] is worked in. BITS = 0: there is no histogram to work in.
    """
    digits, remaining = tl.load(state_ptr), tl.load(state_ptr + 1)
    if BITS > 0:
        offs_bin = tl.arange(0, 1 << BITS)
        counts = tl.load(histogram_ptr + offs_bin)  # [2^BITS]
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # [2^BITS] entries of a higher digit
        is_digit = (above < remaining) & (remaining <= above + counts)
        digits = (digits << BITS) + tl.sum(tl.where(is_digit, offs_bin, 0), 0)
        remaining -= tl.sum(tl.where(is_digit, above, 0), 0)
    return digits, remaining


@triton.jit
def load_keys(bits_ptr, offs_s, offs_k, S, K, INFINITY: tl.constexpr):
    """Return keys [S, K] (-1 outside the matrix), flat indices and bits of a tile."""
    mask = (offs_s < S)[:, None] & (offs_k < K)[None, :]
    flat = offs_s.to(tl.int64)[:, None] * K + offs_k[None, :]
    bits = tl.load(bits_ptr + flat, mask=mask, other=0)  # [S, K]
    return tl.where(mask, magnitude_key(bits, INFINITY), -1), flat, bits


# --- kernel -----------------------------------------------------------------------------------------------------


@triton.jit
def topk_histogram(
    histogram_ptr,  # [2^BITS] int64, zeros before
    state_out_ptr,  # [2] int64: `state` with `previous` worked in
    bits_ptr,  # [size]
    previous_ptr,  # [2^PREVIOUS_BITS] int64, histogram of the digit before
    state_ptr,  # [2] int64
    size,
    n_tiles,
    INFINITY: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    PREVIOUS_BITS: tl.constexpr,  # 0: this is the first digit
    BLOCK: tl.constexpr,
):
    """Count one digit of the entries that share the threshold's digits so far."""
    digits, remaining = narrow(previous_ptr, state_ptr, PREVIOUS_BITS)
    counts = tl.zeros([1 << BITS], dtype=tl.int32)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        offs = tile * tl.full([BLOCK], BLOCK, tl.int64) + tl.arange(0, BLOCK)
        mask = offs < size
        key = magnitude_key(tl.load(bits_ptr + offs, mask=mask, other=0), INFINITY) >> SHIFT  # [BLOCK]
        is_candidate = mask & ((key >> BITS).to(tl.int64) == digits)
        counts += tl.histogram((key & ((1 << BITS) - 1)).to(tl.int32), 1 << BITS, mask=is_candidate)
    places = histogram_ptr + tl.arange(0, 1 << BITS)
    tl.atomic_add(places, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if tl.program_id(0) == 0:
        tl.store(state_out_ptr, digits)
        tl.store(state_out_ptr + 1, remaining)


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["topk_histogram"] = {("interpreter", None): Launch({"BLOCK": 256}), (None, None): Launch({"BLOCK": 4096}, 8, 1)}


def as_integers(coefficients: Tensor) -> Tensor:
    """Return the same memory, packed, as integers of its width."""
    return coefficients.contiguous().view(INTEGERS[coefficients.dtype.itemsize])


def begin(n: int, device: torch.device) -> Tensor:
    """Return the state before the first digit, [2] int64: no digits known, n > 0 entries to be kept."""
    return torch.arange(0, n + 1, n, device=device)  # [0, n] without a copy from the host


def first_histogram(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros [2^bits] int64, the first digit's histogram that another kernel's epilogue is to count."""
    return torch.zeros(1 << DIGITS[dtype.itemsize][0][1], dtype=torch.int64, device=device)


def digit_histogram(
    coefficients: Tensor, digit: int, state: Tensor, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Count digit number `digit` (0: the highest) of the entries that share the threshold's digits so far.

    state [2] int64 and previous, the histogram of the digit before, are what the last call returned; with several
    ranks the histogram is summed over them. Returns (histogram, state with `previous` worked in).
    """
    bits, digits = as_integers(coefficients), DIGITS[coefficients.dtype.itemsize]
    shift, width = digits[digit]
    histogram = torch.zeros(1 << width, dtype=torch.int64, device=bits.device)
    state_out = common.empty(state.shape, state)
    row = common.row_for(topk_histogram, coefficients)
    n_tiles = common.ceil_div(bits.numel(), row.blocks["BLOCK"])
    pointers = {"histogram_ptr": histogram, "state_out_ptr": state_out, "bits_ptr": bits, "state_ptr": state}
    pointers["previous_ptr"] = histogram if previous is None else previous
    flags = {"INFINITY": INFINITIES[coefficients.dtype], "SHIFT": shift, "BITS": width}
    flags["PREVIOUS_BITS"] = digits[digit - 1][1] if digit else 0
    grid = (max(1, min(n_tiles, PROGRAMS)),)  # also without entries: the state is still worked out
    common.launch(topk_histogram, grid, row, bits.device, size=bits.numel(), n_tiles=n_tiles, **pointers, **flags)
    return histogram, state_out


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device."""
    cases, types = [], types_of(topk_histogram)
    for dtype, integer in COMPILED:
        digits, row = DIGITS[dtype.itemsize], lookup("topk_histogram", kind, size_class(dtype))
        for (shift, width), (_, previous) in zip(digits, ((0, 0), *digits), strict=False):
            constants = {"INFINITY": INFINITIES[dtype], "SHIFT": shift, "BITS": width, "PREVIOUS_BITS": previous}
            cases.append(CompileCase(topk_histogram, integer, constants, row, types, dtype == torch.float16))
    return cases
