"""Launch kernels and bind them to torch: grids, memory for outputs, operators, gradients.

Every kernel file uses these functions. Sizes of launches come from `launch_table`, functions that run inside a kernel
from `device`.
"""

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from l3d_kernels.kernels.shared.launch_table import Launch, kind_of, lookup, size_class

# Tests add a function here; it is given the name of each kernel that is launched.
WATCHERS: list[Callable[[str], None]] = []

# By name, the function that launches each operator's kernels: to count them, tests call it on tensors without values.
OPERATORS: dict[str, Callable[..., Any]] = {}

# A launch that needs memory between two steps cuts that memory into pieces of about this many elements.
WORKSPACE = 36 << 20

# The most programs that CUDA launches along the second or third axis of a grid; along the first it is 2**31 - 1.
MOST_PROGRAMS = 65_535

# A launch whose sum is long enough to be split should have at least this many programs: twice a large GPU's processors.
PROGRAMS = 264

# The most tensors that one launch serves: a program selects its own, at an instruction for each and each argument.
MOST_TENSORS = 8

# Tests set this to find elements that no kernel wrote: fresh outputs are filled with NaN, or with NOWHERE.
POISON = False
NOWHERE = -(1 << 30)  # no index, count or offset

# --- launch -----------------------------------------------------------------------------------------------------


def precision_of(dtype: torch.dtype, kind: str) -> str:
    """Return the precision of a dot of `dtype` tiles, from torch.get_float32_matmul_precision().

    "highest" means three tf32 products where the device has them: they keep float32's accuracy on the matrix units.
    Elsewhere it means float32 arithmetic. Dtypes other than float32 have one precision only.
    """
    if dtype != torch.float32:
        return "ieee"
    return float32_precision(torch.get_float32_matmul_precision() == "highest", kind)


def float32_precision(highest: bool, kind: str) -> str:
    """Return the precision of a float32 dot: for "highest" one that keeps float32's accuracy, else tf32."""
    if kind.startswith("sm_"):
        return "tf32x3" if highest else "tf32"
    return "tf32" if kind == "gfx942" and not highest else "ieee"


def launch(kernel: Any, grid: Sequence[int], row: Launch, device: torch.device, **arguments: Any) -> None:
    """Run a kernel on the tensors' device, with the blocks, warps and stages of a row of the launch table.

    An empty grid launches nothing. Raises ValueError for a grid that no GPU takes, whatever the device.
    """
    if 0 in grid:
        return
    name = kernel.fn.__name__
    if max(grid[1:], default=0) > MOST_PROGRAMS:
        raise ValueError(
            f"{name}: expected a grid of at most {MOST_PROGRAMS} programs from the second axis on, which is a GPU's "
            f"limit, got {tuple(grid)}; pass backend='torch', or fewer subnetworks at once"
        )
    for watcher in WATCHERS:
        watcher(name)
    if device.type == "meta":
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(grid)](**arguments, **row.blocks, **row.options(kind_of(device)))


def together(kinds: Iterable[Hashable], most: int = MOST_TENSORS) -> list[list[int]]:
    """Return which tensors share a launch: the places of each kind, at most so many of them.

    >>> together("aba")
    [[0, 2], [1]]
    """
    alike: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(i)
    return [own[n : n + most] for own in alike.values() for n in range(0, len(own), most)]


def starts(counts: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Return where each tensor's programs begin along the axis of a grid that tensors share, and how many there are.

    >>> starts([3, 1, 2])
    ((0, 3, 4), 6)
    """
    *begins, total = itertools.accumulate(counts, initial=0)
    return tuple(begins), total


def row_for(kernel: Any, tensor: Tensor, form: str = "") -> Launch:
    """Return the kernel's launch row for a tensor's device and dtype, with the precision of its dots if it has any.

    form: the end of the row's name, where a kernel has several.
    """
    kind = kind_of(tensor.device)
    row = lookup(kernel.fn.__name__ + form, kind, size_class(tensor.dtype))
    if "PRECISION" in kernel.arg_names:
        row = row._replace(blocks=row.blocks | {"PRECISION": precision_of(tensor.dtype, kind)})
    return row


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def split(size: int, block: int, tiles: int) -> tuple[int, int]:
    """Return (share, programs): how a sum over `size` is cut into shares of whole blocks where there are few tiles."""
    steps = ceil_div(size, block)
    share = ceil_div(steps, min(steps, ceil_div(PROGRAMS, max(1, tiles)))) * block
    return share, ceil_div(size, share)


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for a kernel to fill, on the device of `like` and in its dtype unless one is given."""
    out = torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)
    if POISON:
        out.fill_(torch.nan if out.is_floating_point() else NOWHERE)
    return out


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of `dtype` elements are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- binding ----------------------------------------------------------------------------------------------------


def operator(name: str, fake: Callable[..., Any], mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a launch function an operator `l3d::name`, which torch.compile, vmap and autograd functions can call.

    `fake` takes the same arguments and returns outputs of the right shapes and dtypes. Under vmap the launches are made
    one by one; an operator that writes into its arguments, those named in `mutates`, is refused there.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        OPERATORS[name] = function
        bound = torch.library.custom_op(f"l3d::{name}", function, mutates_args=tuple(mutates))
        bound.register_fake(fake)
        if mutates:
            return bound

        def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            def unbound(a: Any, d: Any) -> Sequence[Any]:
                if isinstance(a, (list, tuple)) and d is not None:
                    return list(zip(*(unbound(*own) for own in zip(a, d, strict=True)), strict=True))
                return a.unbind(d) if isinstance(a, Tensor) and d is not None else [a] * info.batch_size

            results = [bound(*own) for own in unbound(args, in_dims)]
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            kind = type(results[0])
            return kind(torch.stack(same) for same in zip(*results, strict=True)), kind([0] * len(results[0]))

        bound.register_vmap(one_by_one)
        return bound

    return decorate


def differentiable(
    function: Callable[..., Any],
    gradients: Callable[..., Sequence[Tensor | None]],
    save: Callable[..., Sequence[Any]] = lambda inputs, output: inputs,
) -> Callable[..., Any]:
    """Return a function that torch can differentiate; of several outputs the first alone is differentiable.

    Args:
        function: calls an operator. It is a plain function with every parameter named, as torch.compile demands.
        gradients: takes (needs, saved, d_out): which inputs need a gradient, the saved tensors and the upstream
            gradient. It returns the gradients of the first inputs; the other inputs have none.
        save: takes (inputs, output) and returns the tensors to save for `gradients`; all inputs unless it is given.

    The result passes gradcheck, torch.compile(fullgraph=True) and vmap of a gradient. Second derivatives raise
    RuntimeError, and so does a gradient to an input that has none.
    """

    def wanted(needs: Sequence[bool], saved: Sequence[Any], d_out: Tensor) -> tuple[Tensor, ...]:
        """Compute the gradients that are needed; there is no silent zero for an input that has none."""
        grads = gradients(needs, saved, d_out)
        own = [grad for grad, need in zip(grads, needs, strict=False) if need]
        if len(own) < sum(needs) or any(grad is None for grad in own):
            raise RuntimeError("Triton kernels have no gradient to one of the inputs; detach it or use backend='torch'")
        return tuple(own)  # type: ignore[arg-type]

    class Once(torch.autograd.Function):
        # torch's once_differentiable sees the upstream gradient only: where that is constant, as that of a sum, a
        # second derivative by the saved tensors would vanish. A function of its own sees them all.
        generate_vmap_rule = True

        @staticmethod
        def forward(needs: Sequence[bool], d_out: Tensor, *saved: Any) -> tuple[Tensor, ...]:
            return wanted(needs, saved, d_out)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError("Triton kernels are once_differentiable; take second derivatives with backend='torch'")

    class Differentiable(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(function)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[1:])
                ctx.set_materialize_grads(False)  # else torch fills zeros for each of them
            ctx.save_for_backward(*save(inputs, output))

        @staticmethod
        def backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            needs, saved = ctx.needs_input_grad, ctx.saved_tensors
            if d_out is None:
                return (None,) * len(needs)
            found = iter(Once.apply(needs, d_out, *saved) if torch.is_grad_enabled() else wanted(needs, saved, d_out))
            return tuple(next(found) if need else None for need in needs)

    return Differentiable.apply


# The most pairs of tensors, as left and right, that one call takes: a backward pass has a launch for all of both.
MOST_PAIRS = MOST_TENSORS // 2


def paired(function: Callable[[list[Tensor], list[Tensor]], Any]) -> Callable[..., Any]:
    """Return a function of MOST_PAIRS pairs of tensors, some of them None, that calls one of two lists.

    `differentiable` takes no lists, and torch.compile demands that it has every parameter named.
    """

    def named(
        a0: Tensor,
        b0: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        a3: Tensor | None,
        b3: Tensor | None,
    ) -> Any:
        pairs = [(a0, b0)] + [(a, b) for a, b in ((a1, b1), (a2, b2), (a3, b3)) if a is not None and b is not None]
        return function([a for a, _ in pairs], [b for _, b in pairs])

    return named


def padded(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """Return the arguments of a function that `paired` has made, packed as `contiguous` packs them."""
    own = contiguous(*(each for pair in pairs for each in pair))
    return [*own, *[None] * (2 * MOST_PAIRS - len(own))]


def lists(*given: Tensor | Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return lists as they are, and a tensor as a list of its own."""
    return [[each] if isinstance(each, Tensor) else each for each in given]


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors packed; under autocast float32 becomes autocast's dtype, as in a matrix product.

    Integers keep their dtype.
    """
    device = tensors[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)
    return tuple(t.contiguous() for t in tensors)
