"""Cut large temporaries into pieces, form per-sample gradients, and count what an energy costs on either path.

`l3d`, the CPU path and the kernels all use these functions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

# Elements of one piece of a temporary. Measured: a training step of one block of TinyStories-8M's shape, without the
# extraction of its gradients, on one CPU core takes 957 ms with half of this and 908 ms with this. Loss and gradients
# of one 256 x 256 tensor on two cores take 115 ms with half of this and 172 ms with twice this. At width 64 the number
# makes no difference.
CHUNK = 1 << 23


def pieces(total: int, per_item: int, most: int | None = None) -> list[slice]:
    """Cut `total` items, each of which needs `per_item` elements of memory, into slices of at most `most` elements.

    `most` is CHUNK if it is None. A slice holds at least one item, even where that item alone needs more.
    """
    step = max(1, (CHUNK if most is None else most) // max(1, per_item))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def outer(x: Tensor, dy: Tensor, n_inputs: int | None = None) -> Tensor:
    """Materialise the per-sample gradients G_s = Σ_t dy[s, t] ⊗ x[s // (S // B), t]: [S, O, I].

    x [B, T, I], or integers [B, T] below `n_inputs`, which is then required; dy [S, T, O].
    """
    share = dy.shape[0] // x.shape[0] if x.shape[0] else 1
    if x.is_floating_point():
        by_sequence = dy.unflatten(0, (len(x), share))  # [B, P, T, O]
        return (by_sequence.mT @ x[:, None]).flatten(0, 1)
    if n_inputs is None:
        raise ValueError("n_inputs: required where x holds indices, got None")
    one_hot = torch.zeros(*x.shape, n_inputs, dtype=dy.dtype, device=dy.device).scatter_(2, x[..., None], 1)
    return outer(one_hot, dy)


def energy_costs(shape: tuple[int, int], sizes: Iterable[tuple[int, int, int]], backward: bool) -> tuple[float, float]:
    """Count the multiply-adds of ‖ĝ‖² from the Gram matrix, and from tiles of ĝ: (by Gram matrix, by tiles).

    shape: (S, K) of the coefficients; sizes: (R, O, I) of every tensor; backward: whether to count the derivatives too.
    """
    n_samples, n_subnetworks = shape
    by_gram, by_tiles = float((3 if backward else 1) * n_samples * n_subnetworks**2), 0.0
    for rank, n_outputs, n_inputs in sizes:
        area = n_outputs * n_inputs
        by_factors = (3 if backward else 1) * n_subnetworks**2 * rank**2 * (n_outputs + n_inputs)
        by_gram += min(by_factors, (2 if backward else 1) * n_subnetworks * (n_subnetworks + rank) * area)
        by_tiles += (4 if backward else 1) * n_subnetworks * (n_samples + rank) * area
    return by_gram, by_tiles


def as_rows(tensor: Tensor) -> Tensor:
    """Slices of the first axis as matrices: [K, R, D], a vector as one row."""
    return tensor.flatten(2) if tensor.ndim > 2 else tensor.reshape(len(tensor), 1, tensor[:1].numel())
