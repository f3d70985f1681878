"""Average the rows of a linear head under its softmax: the gradient of a KL divergence at the head's input.

    out[s] = Σ_v softmax_v(hidden[s] . weight[v] + bias[v]) weight[v]      [S, D]

    hidden [S, D], weight [V, D], bias [V] or none      softmax(hidden @ weight.mT + bias, -1) @ weight

One pass over the vocabulary keeps a running maximum m, the sum of exponentials and the weighted sum of rows; both sums
decay by exp(m before − m after) as the maximum grows. Up to 512 bytes a row the sums stay in registers (`widest`), and
a tile of samples reads each row of `weight` once; several programs share the vocabulary, and their sums are joined at
the end.
Wider heads take the vocabulary in pieces: logits [S, piece] of at most common.WORKSPACE elements, their exponentials,
then a library product. Specification: `l3d_kernels.reference.softmax_mean`.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, Forms, cases_of_kernel
from l3d_kernels.kernels.shared.device import add_dot, feed, load, row_products, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch, kind_of
from l3d_kernels.splitting import pieces

WIDEST = 512  # bytes of a row up to which the sums stay in registers


def widest(kind: str) -> int:
    """Return WIDEST for a kind of device, or half of it where each half of a warp holds a product's operands."""
    return WIDEST // 2 if kind == "gfx1100" else WIDEST


# --- kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def softmax_mean_narrow(
    mean_ptr,  # [splits, S, D] Σ exp(logit - highest) weight
    highest_ptr,  # [splits, S]
    total_ptr,  # [splits, S] Σ exp(logit - highest)
    hidden_ptr,  # [S, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], read where BIASED
    S,
    V,
    D,
    rows_split,  # rows of the vocabulary that one program sums over
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Keep the running sums of a tile of samples over a part of the vocabulary."""
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_s, mask_d = offs_s < S, offs_d < D
    mask = mask_s[:, None] & mask_d[None, :]
    hidden = load((hidden_ptr + offs_s.to(tl.int64) * D)[:, None] + offs_d[None, :], mask)  # [S, D]
    mean = zeros(weight_ptr, BLOCK_S, BLOCK_D)
    total = tl.sum(zeros(weight_ptr, BLOCK_S, 1), 1)
    highest = total - float("inf")
    first = tl.program_id(1) * rows_split
    stop = tl.minimum(first + rows_split, V)
    for start in range(first, stop, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < stop
        places = (weight_ptr + offs_v.to(tl.int64) * D)[:, None] + offs_d[None, :]
        weight = load(places, mask_v[:, None] & mask_d[None, :])  # [V, D]
        logits = add_dot(hidden, tl.trans(weight), zeros(weight_ptr, BLOCK_S, BLOCK_V), PRECISION)
        if BIASED:
            logits += load(bias_ptr + offs_v, mask_v)[None, :]
        logits = tl.where(mask_v[None, :], logits, float("-inf"))
        above = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(above == float("-inf"), 0.0, above)  # all logits so far may be masked
        decay, exponentials = tl.exp(highest - finite), tl.exp(logits - finite[:, None])
        total = total * decay + tl.sum(exponentials, 1)
        mean = add_dot(feed(exponentials, weight_ptr), weight, mean * decay[:, None], PRECISION)
        highest = above
    lines = tl.program_id(1).to(tl.int64) * S + offs_s
    store((mean_ptr + lines * D)[:, None] + offs_d[None, :], mean, mask)
    store(highest_ptr + lines, highest, mask_s)
    store(total_ptr + lines, total, mask_s)


@triton.jit
def softmax_logits(
    logits_ptr,  # [S, V] in the accumulator's type
    hidden_ptr,  # [S, D]
    weight_ptr,  # [V, D]
    S,
    V,
    D,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute a tile of logits, not rounded to the inputs' type: the exponential would magnify the rounding."""
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_s, mask_v = offs_s < S, offs_v < V
    logits = row_products(hidden_ptr, offs_s * D, mask_s, weight_ptr, offs_v * D, mask_v, D, PRECISION, BLOCK_D)
    store((logits_ptr + offs_s * V)[:, None] + offs_v[None, :], logits, mask_s[:, None] & mask_v[None, :])


@triton.jit
def softmax_exponentials(
    out_ptr,  # [S, V] exp(logit - highest), in the weight's type
    decay_ptr,  # [S] exp(highest before - after)
    highest_ptr,  # [S], read and updated
    total_ptr,  # [S], read and updated
    logits_ptr,  # [S, V]
    bias_ptr,  # [V], read where BIASED
    V,
    BIASED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute one sample's exponentials of a piece of the vocabulary; update its running maximum and sum."""
    s = tl.program_id(0).to(tl.int64)
    before = tl.load(highest_ptr + s)
    largest = tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty) - float("inf")
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + s * V + offs_v, mask=offs_v < V, other=float("-inf"))  # [V]
        if BIASED:
            logits += load(bias_ptr + offs_v, offs_v < V)
        largest = tl.maximum(largest, logits)
    highest = tl.maximum(before, tl.max(largest, 0))
    finite = tl.where(highest == float("-inf"), 0.0, highest)  # all logits so far may be masked
    totals = tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + s * V + offs_v, mask=offs_v < V, other=float("-inf"))  # [V]
        if BIASED:
            logits += load(bias_ptr + offs_v, offs_v < V)
        exponentials = tl.exp(logits - finite)
        totals += exponentials
        store(out_ptr + s * V + offs_v, exponentials, offs_v < V)
    decay = tl.exp(before - finite)
    tl.store(decay_ptr + s, decay)
    tl.store(total_ptr + s, tl.load(total_ptr + s) * decay + tl.sum(totals, 0))
    tl.store(highest_ptr + s, highest)


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["softmax_mean_narrow"] = {
    ("interpreter", None): Launch({"BLOCK_S": 16, "BLOCK_V": 16}),
    ("gfx942", None): Launch({"BLOCK_S": 32, "BLOCK_V": 32}, 4, 1),
    ("gfx1100", None): Launch({"BLOCK_S": 16, "BLOCK_V": 16}, 8, 1),
    (None, "16"): Launch({"BLOCK_S": 64, "BLOCK_V": 64}, 8, 2),
    (None, "32"): Launch({"BLOCK_S": 16, "BLOCK_V": 64}, 8, 1),
}
TABLE["softmax_logits"] = {
    ("interpreter", None): Launch({"BLOCK_S": 16, "BLOCK_V": 16, "BLOCK_D": 32}),
    ("gfx942", None): Launch({"BLOCK_S": 128, "BLOCK_V": 64, "BLOCK_D": 32}, 8, 2),
    ("gfx1100", "16"): Launch({"BLOCK_S": 64, "BLOCK_V": 64, "BLOCK_D": 32}, 8, 2),
    ("gfx1100", "32"): Launch({"BLOCK_S": 64, "BLOCK_V": 64, "BLOCK_D": 16}, 8, 2),
    (None, "16"): Launch({"BLOCK_S": 128, "BLOCK_V": 128, "BLOCK_D": 64}, 8, 3),
    (None, "32"): Launch({"BLOCK_S": 128, "BLOCK_V": 64, "BLOCK_D": 32}, 8, 3),
    ("sm_80", "16"): Launch({"BLOCK_S": 128, "BLOCK_V": 64, "BLOCK_D": 64}, 8, 3),
    ("sm_80", "32"): Launch({"BLOCK_S": 64, "BLOCK_V": 64, "BLOCK_D": 32}, 8, 3),
}
TABLE["softmax_exponentials"] = {
    ("interpreter", None): Launch({"BLOCK_V": 16}),
    (None, None): Launch({"BLOCK_V": 2048}, 8),
}


def narrow(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the pass with sums in registers, and join the programs' sums."""
    (S, D), V = hidden.shape, len(weight)
    row = common.row_for(softmax_mean_narrow, hidden)
    (tiles,) = row.tiles(S=S)
    rows_split, splits = common.split(V, row.blocks["BLOCK_V"], tiles)
    mean = common.empty((splits, S, D), hidden, common.wide(hidden.dtype))
    highest, total = (common.empty((splits, S), mean) for _ in range(2))
    outputs = {"mean_ptr": mean, "highest_ptr": highest, "total_ptr": total}
    inputs = {"hidden_ptr": hidden, "weight_ptr": weight, "bias_ptr": weight if bias is None else bias}
    sizes = {"S": S, "V": V, "D": D, "rows_split": rows_split}
    flags = {"BIASED": bias is not None, "BLOCK_D": common.power_of_two(D, 16)}
    common.launch(softmax_mean_narrow, (tiles, splits), row, hidden.device, **outputs, **inputs, **sizes, **flags)
    share = torch.exp(highest - highest.amax(0))  # [splits, S]; 0 for a split whose whole vocabulary is masked
    return (mean * share[..., None]).sum(0) / (total * share).sum(0)[:, None]


def in_pieces(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the pass a piece of the vocabulary at a time."""
    (S, D), V = hidden.shape, len(weight)
    mean = torch.zeros((S, D), dtype=common.wide(hidden.dtype), device=hidden.device)
    highest, total = mean.new_full((S,), -torch.inf), mean.new_zeros(S)
    row, line = common.row_for(softmax_logits, hidden), common.row_for(softmax_exponentials, mean)
    for piece in pieces(V, S, common.WORKSPACE):
        part = weight[piece]
        logits, out = (common.empty((S, len(part)), like) for like in (mean, weight))
        decay, shared = common.empty((S,), mean), {"logits_ptr": logits, "V": len(part)}
        own = {"hidden_ptr": hidden, "weight_ptr": part, "S": S, "D": D}
        common.launch(softmax_logits, row.tiles(S=S, V=len(part)), row, hidden.device, **own, **shared)
        own = {"out_ptr": out, "decay_ptr": decay, "highest_ptr": highest, "total_ptr": total}
        own |= {"bias_ptr": part if bias is None else bias[piece], "BIASED": bias is not None}
        common.launch(softmax_exponentials, (S,), line, hidden.device, **own, **shared)
        mean = mean * decay[:, None] + out @ part
    return mean / total[:, None]


@common.operator("softmax_mean", lambda hidden, weight, bias: torch.empty_like(hidden))
def softmax_mean_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the pass for this width: sums in registers, or the vocabulary in pieces; [S, D]."""
    if hidden.numel() == 0:
        return torch.zeros_like(hidden)
    width = hidden.shape[1] * hidden.element_size()
    run = narrow if width <= widest(kind_of(hidden.device)) else in_pieces
    return run(hidden, weight, bias).to(hidden.dtype)


_softmax_mean = common.differentiable(
    lambda hidden, weight, bias: softmax_mean_forward(hidden, weight, bias),
    lambda needs, saved, d_out: [],  # there are no gradients: a transform that asks for one is told so
)


def softmax_mean(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run `l3d_kernels.reference.softmax_mean` with Triton kernels."""
    hidden, weight = common.contiguous(hidden, weight)
    if bias is not None:
        bias = bias.to(hidden.dtype).contiguous()
    return _softmax_mean(hidden, weight, bias)


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""

    def narrow_forms(row: Launch, size: int) -> Forms:
        widths = itertools.product((widest(kind) // size, 32), (False, True))
        return [({"BIASED": biased, "BLOCK_D": width}, not biased or width == 32) for width, biased in widths]

    biases = [({"BIASED": biased}, not biased) for biased in (False, True)]
    cases = cases_of_kernel(softmax_mean_narrow, kind, narrow_forms) + cases_of_kernel(softmax_logits, kind)
    return cases + cases_of_kernel(softmax_exponentials, kind, biases)
