"""Ranks chosen from data: how many rank-1 terms single gradients need, tensor by tensor."""

import torch
from torch import Tensor

from l3d.data.arguments import check_fraction, check_whole
from l3d.decomposition.low_rank import singular
from l3d.gradients.factors import Gradients
from l3d.gradients.model import exact_pattern

SHARE = 0.9  # of the gradients' squared norm that rank="auto" asks the ranks to hold
MOST = 16  # the largest rank that rank="auto" gives
SAMPLES = 64  # gradients looked at


@torch.no_grad()
def ranks_from_gradients(gradients: Gradients, share: float = SHARE, most: int = MOST) -> dict[str, int | list[int]]:
    """Return, as `decompose` takes them, the least ranks that hold a share of single gradients' squared norm.

    For a matrix: the least r for which the best rank-r approximations of the samples' gradients, each by itself, hold
    Σ_s Σ_{i<=r} σ_si² >= share · Σ_s ‖G_s‖². For a tensor of higher order: the same of each mode's unfolding. No rank
    is above `most`. Of many samples, `SAMPLES` evenly spaced ones are looked at.

    It is what single gradients need, not what all of them span together: a subnetwork is one direction, shared by the
    few samples it acts on. With one position per sample (an MLP on vectors) every gradient is of rank 1.

    >>> from l3d import extract_gradients
    >>> ranks_from_gradients(extract_gradients(torch.nn.Linear(5, 3), torch.randn(8, 5)))
    {'weight': 1}
    """
    check_fraction("share", share)
    check_whole("most", most)
    count = min(SAMPLES, gradients.n_samples)
    some = gradients.select(torch.arange(count, device="cpu") * gradients.n_samples // count)
    some = some.to(torch.empty(0, dtype=torch.promote_types(some.dtype, torch.float32), device=some.device))
    ranks: dict[str, int | list[int]] = {}
    for name, shape in some.shapes.items():
        if len(shape) == 2:
            ranks[exact_pattern(name)] = _least(singular(some, name)[1], share, min(most, *shape))
        elif len(shape) > 2:
            whole = some.matrix(name).reshape(-1, *shape)
            ranks[exact_pattern(name)] = [
                _least(torch.linalg.svdvals(whole.movedim(axis, 1).flatten(2)), share, min(most, size))
                for axis, size in enumerate(shape, 1)
            ]
    return ranks


def _least(values: Tensor, share: float, most: int) -> int:
    """Return the least rank that holds a share of the energy of singular values [S, m], at most `most`."""
    energy = values.double().square().sum(0)
    held = energy.cumsum(0) / energy.sum().clamp_min(1e-300)
    enough = (held >= share * (1 - 1e-6)).nonzero()  # what rounding takes away is no rank
    return min(most, int(enough[0]) + 1) if len(enough) else 1
