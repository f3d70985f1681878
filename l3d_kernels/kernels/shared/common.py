"""What the kernels share: small device functions, the launch, the binding to torch, cases to compile ahead of time.

Triton's interpreter (TRITON_INTERPRET=1 when this package is first imported) runs the same kernels on a CPU. Its
bfloat16 arithmetic is wrong without a word, so tiles are widened after the load and rounded by hand before the store,
under a constant that is true in the interpreter only: a GPU keeps its bfloat16 matrix units.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared.launch_table import Launch, kind_of, lookup, size_class

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Tests add a function here that is told the name of each kernel as it is launched.
WATCHERS: list[Callable[[str], None]] = []

# Launches that need memory between two steps cut it into pieces of about this many elements.
WORKSPACE = 1 << 24

# Programs that CUDA launches along the second or third axis of a grid; along the first it is 2**31 - 1.
MOST_PROGRAMS = 65_535

# Tests set this to find elements that no kernel wrote: fresh outputs are filled with NaN, or with NOWHERE.
POISON = False
NOWHERE = -(1 << 30)  # no index, count or offset


# --- device functions -------------------------------------------------------------------------------------------


@triton.jit
def load(pointers, mask):
    """Load a tile, zeros where masked; bfloat16 becomes float32 in the interpreter."""
    tile = tl.load(pointers, mask=mask, other=0)
    if INTERPRETED and tile.dtype == tl.bfloat16:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def bfloat16_bits(tile):
    """Return the bits of a tile rounded to bfloat16, to nearest even, as the low half of an int32."""
    bits = tile.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def store(pointers, tile, mask):
    """Store a tile in the pointers' type, rounded to nearest even; the interpreter would truncate to bfloat16."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, bfloat16_bits(tile).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def feed(tile, pointer):
    """Cast a computed tile to the type of `pointer`'s elements, for a dot with tiles loaded from there."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        return (bfloat16_bits(tile) << 16).to(tl.float32, bitcast=True)  # rounded as on a GPU, but wide
    else:
        return tile.to(pointer.dtype.element_ty)


@triton.jit
def zeros(pointer, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a fresh accumulator [ROWS, COLS] for elements of `pointer`: float32, or float64 for float64."""
    if pointer.dtype.element_ty == tl.float64:
        return tl.zeros([ROWS, COLS], tl.float64)
    else:
        return tl.zeros([ROWS, COLS], tl.float32)


@triton.jit
def round_to_tf32(tile):
    """Round float32 to the 10 bits of mantissa that tf32 keeps, halves away from zero; NaN stays NaN.

    The matrix units drop the other bits, whose mean is half a unit in the last place: a bias that sums do not average
    out, and ‖g − ĝ‖² is a small difference of large sums.
    """
    bits = tile.to(tl.int32, bitcast=True) + 0x1000
    return tl.where(tile == tile, bits.to(tl.float32, bitcast=True), tile)


@triton.jit
def add_dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b, accumulated in acc's type."""
    if PRECISION == "tf32" and not INTERPRETED:  # which multiplies float32 as it is
        a, b = round_to_tf32(a), round_to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def add_row_products(
    acc, a_ptr, starts_a, mask_a, b_ptr, starts_b, mask_b, D, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return acc[a, b] + Σ_d A[a, d] B[b, d], for rows of D elements that begin at `starts` (int64) in memory."""
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


# --- launch -----------------------------------------------------------------------------------------------------


def precision_of(dtype: torch.dtype, kind: str) -> str:
    """Return the precision of a dot of `dtype` tiles, from torch.get_float32_matmul_precision().

    "highest" is three tf32 products where the device has them (they keep float32's accuracy on the matrix units),
    else float32 arithmetic. Types other than float32 have one precision only.
    """
    if dtype != torch.float32:
        return "ieee"
    return float32_precision(torch.get_float32_matmul_precision() == "highest", kind)


def float32_precision(highest: bool, kind: str) -> str:
    """Return the precision of a float32 dot: for "highest" one that keeps float32's accuracy, else tf32."""
    if kind.startswith("sm_"):
        return "tf32x3" if highest else "tf32"
    return "ieee" if highest or kind == "interpreter" else "tf32"


def launch(kernel: Any, grid: Sequence[int], row: Launch, device: torch.device, **arguments: Any) -> None:
    """Run a kernel on the tensors' device with the blocks, warps and stages of a row of the table.

    Raises ValueError for a grid that a GPU does not take, whatever the device.
    """
    if 0 in grid:
        return
    name = kernel.fn.__name__
    if max(grid[1:], default=0) > MOST_PROGRAMS:
        raise ValueError(
            f"{name}: would be a grid of {tuple(grid)} programs, and GPUs take {MOST_PROGRAMS} at most from the second "
            "axis on; pass backend='torch', or fewer subnetworks at once"
        )
    for watcher in WATCHERS:
        watcher(name)
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[tuple(grid)](**arguments, **row.blocks, **row.options(kind_of(device)))


def row_for(kernel: str, tensor: Tensor) -> tuple[Launch, str]:
    """Return the kernel's launch row for a tensor's device and dtype, and the precision of its dots."""
    kind = kind_of(tensor.device)
    return lookup(kernel, kind, size_class(tensor.dtype)), precision_of(tensor.dtype, kind)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for a kernel to fill, on the device and in the dtype of `like`."""
    out = torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)
    if POISON:
        out.fill_(torch.nan if out.is_floating_point() else NOWHERE)
    return out


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of `dtype` elements are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- binding ----------------------------------------------------------------------------------------------------


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a launch function an operator that torch.compile, vmap and autograd functions can call.

    `fake` computes the outputs' shapes from the same arguments. Under vmap the launches are made one by one.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        bound = torch.library.custom_op(f"l3d::{name}", function, mutates_args=())
        bound.register_fake(fake)

        def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            results = []
            for i in range(info.batch_size):
                own = [
                    a if d is None or not isinstance(a, Tensor) else a.select(d, i)
                    for a, d in zip(args, in_dims, strict=True)
                ]
                results.append(bound(*own))
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            return tuple(torch.stack(same) for same in zip(*results, strict=True)), (0,) * len(results[0])

        bound.register_vmap(one_by_one)
        return bound

    return decorate


def autocast_alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast float32 tensors to autocast's dtype where autocast is on, as a matrix product does; make all contiguous."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)
    return tuple(t.contiguous() for t in tensors)


# --- ahead of time ----------------------------------------------------------------------------------------------


class CompileCase(NamedTuple):
    """One kernel with types and constants to compile ahead of time, without a device."""

    kernel: Any  # a @triton.jit function
    dtype: str  # of every pointer not named in `types`: "bf16", "fp16", "fp32"
    constants: dict[str, Any]  # constexprs beside the blocks
    row: Launch
    types: dict[str, str] = {}  # noqa: RUF012  # other arguments' types, such as {"index_ptr": "*i64"}; sizes are i32
    is_matrix: bool = True  # must compile to matrix instructions
    long: bool = False  # compiled by `make test-kernels` only
    divisible: tuple[str, ...] = ("I", "O")  # sizes taken to be multiples of 16

    def name(self) -> str:
        flags = [f"{key}={value}" for key, value in self.constants.items()]
        types = [f"{key}={value}" for key, value in self.types.items() if value not in ("*i64", "i64")]
        return "-".join([self.kernel.fn.__name__, self.dtype, *flags, *types])


def compile_dtypes(kind: str) -> list[tuple[str, str, str, bool]]:
    """Return every form of a matrix kernel: (pointer type, size class, precision, only in the long test)."""
    exact, fast = float32_precision(True, kind), float32_precision(False, kind)
    return [
        ("bf16", "16", "ieee", False),
        ("fp16", "16", "ieee", True),
        ("fp32", "32", exact, False),
        ("fp32", "32", fast, True),
    ]
