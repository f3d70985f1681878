"""Run the public ops that change tensors in place: a step of Adam on directions, and their rescaling to unit norm.

The tensors of a call are lists of [K, ...], whose slices k along the first axis are subnetworks. Letters and `backend`
as in `l3d_kernels.ops`. Both raise ValueError where lists, shapes, dtypes or devices do not fit each other, and
RuntimeError under a transform of torch.func or in forward mode, which cannot follow what is written in place. Neither
has a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l3d_kernels import checks, cpu
from l3d_kernels.registry import implementation
from l3d_kernels.transforms import transformed

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.no_grad()
def adam_step(
    parameters: Sequence[Float[Tensor, "K ..."]],
    grads: Sequence[Float[Tensor, "K ..."]],
    first: Sequence[Float[Tensor, "K ..."]],
    second: Sequence[Float[Tensor, "K ..."]],
    scales: Sequence[Float[Tensor, "..."]],
    counts: Float[Tensor, "K"],
    moves: Float[Tensor, "K"],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    grams: int = 0,
    *,
    backend: str = "auto",
) -> list[Float[Tensor, "K R R"]]:
    """Take a step of Adam relative to each tensor's scale, in place; slices that rest keep their bits.

    p ← p − lr · scale · (m / (1 − β₁^c)) / ((v / (1 − β₂^c))^½ + eps), with running means m of the gradient and v of
    its square. Source: Kingma & Ba (arXiv 1412.6980); the scale is l3d's.

    Args:
        parameters, first, second: [K, ...] each, contiguous; written. The last two are m and v.
        grads: [K, ...]; zero where a slice rests.
        scales: [K, 1, ..] or of one element; like the two below float32, or float64 for float64 parameters.
        counts: c, how many steps each slice has taken, with this one.
        moves: 1 for slices that move, 0 for those that rest.
        lr, betas, eps: as in Adam.
        grams: of how many tensors, the first ones, to return the Gram matrices p_k p_kᵀ after the step, with a tensor
            [K, R, ...] read as [K, R, D] and a vector [K, P] as one row. In the dtype of `counts`; where a kernel runs
            zero for slices that rest.

    Torch: `m.lerp_(g, 1 - β₁); v.lerp_(g * g, 1 - β₂); p -= ..` slice by slice
    """
    _refuse_transforms("adam_step")
    tensors = {"parameters": parameters, "grads": grads, "first": first, "second": second, "scales": scales}
    checks.check_slices(tensors, {"counts": counts, "moves": moves})
    run = implementation(cpu.adam_step, backend, parameters[0])
    lists = (list(parameters), list(grads), list(first), list(second), list(scales))
    grams = checks.check_count(grams, len(parameters), f"{len(parameters)} tensors", "grams")
    return run(*lists, counts, moves, lr, betas, eps, grams)


@torch.no_grad()
def rescale(
    parameters: Sequence[Float[Tensor, "K ..."]],
    squared_norms: Float[Tensor, "K"],
    shares: Sequence[int],
    moves: Float[Tensor, "K"] | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Divide directions by their norms in place, the factor spread evenly over the tensors that share it.

    p_k ← squared_norms_k^(−1/2n) p_k for a tensor [K, ...] that is one of n factors of a product: n = `shares`, one
    number per tensor. `squared_norms` are float32, or float64 for float64 tensors, and may be summed over processes.
    Slices whose `moves` are 0 keep their bits; None moves all. A norm of zero counts as the least that the dtype has.

    Torch: `p *= squared_norms.pow(-0.5 / n)[:, None]`

    >>> left = torch.tensor([[3.0, 4.0]])
    >>> rescale([left], torch.tensor([25.0]), [1])
    >>> left
    tensor([[0.6000, 0.8000]])
    """
    _refuse_transforms("rescale")
    vectors = {"squared_norms": squared_norms} | ({} if moves is None else {"moves": moves})
    checks.check_slices({"parameters": parameters}, vectors)
    if (
        not isinstance(shares, (list, tuple))
        or len(shares) != len(parameters)
        or any(checks.integer("shares", n) < 1 for n in shares)
    ):
        raise ValueError(f"shares: expected {len(parameters)} numbers of at least 1, got {shares!r}")
    run = implementation(cpu.rescale, backend, parameters[0])
    run(list(parameters), squared_norms, shares, moves)


def _refuse_transforms(op: str) -> None:
    if transformed():
        raise RuntimeError(f"{op}: cannot run under torch.func or in forward mode, for it changes tensors in place")
