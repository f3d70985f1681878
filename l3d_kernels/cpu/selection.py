"""Select the coefficients of largest magnitude in a batch: batch top-k, in one process or over several ranks.

On a CPU numpy selects, in a tenth of torch.topk's time. Over ranks the threshold is found by radix selection: ranks
exchange histograms of digits, never coefficients.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from l3d_kernels.cpu.projection import project, project_at
from l3d_kernels.sparse import SparseCoefficients, from_arrays, kept_where, sparse_coefficients

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by an element's bytes


def batch_topk(coefficients: Tensor, n: int, n_groups: int = 1) -> SparseCoefficients:
    """Keep the n entries of largest |c| of a matrix [S, K], in each of `n_groups` equal blocks of its columns.

    Ties go to the lower flat index. The values keep their autograd history.
    """
    shape = (coefficients.shape[0], coefficients.shape[1])
    found = _largest_by_numpy(coefficients, n, n_groups)
    if found is None:
        chosen, thresholds = _largest_by_torch(coefficients, n, n_groups)
        flat = chosen.flatten().nonzero()[:, 0]
        rows = torch.div(flat, max(1, shape[1]), rounding_mode="floor")
        threshold = thresholds[0] if n_groups == 1 else thresholds
        values = coefficients.reshape(-1).index_select(0, flat)
        return sparse_coefficients(values, rows, flat - rows * shape[1], threshold, shape)
    mask, bounds = found
    places = mask.reshape(-1).nonzero()[0]
    in_rows = places // shape[1]
    values = coefficients.reshape(-1).index_select(0, torch.from_numpy(places))
    threshold = torch.from_numpy(bounds.reshape(()) if n_groups == 1 else bounds)
    return from_arrays(values, in_rows, places - in_rows * shape[1], threshold, shape)


def largest(coefficients: Tensor, n: int, n_groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return which entries `batch_topk` keeps, and the smallest kept magnitude of each group: bool [S, K], [groups]."""
    found = _largest_by_numpy(coefficients, n, n_groups)
    if found is None:
        return _largest_by_torch(coefficients, n, n_groups)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _largest_by_torch(coefficients: Tensor, n: int, n_groups: int) -> tuple[Tensor, Tensor]:
    """Select by torch.topk, for any dtype, device and ties; NaN counts as infinity, so that it reaches the loss."""
    n_rows, width = coefficients.shape[0], coefficients.shape[1] // n_groups
    magnitude = coefficients.detach().abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    if n_groups > 1:
        magnitude = magnitude.view(n_rows, n_groups, width).transpose(0, 1)
    by_group = magnitude.reshape(n_groups, n_rows * width)  # [groups, S * columns of a group]
    if n == 0:
        thresholds = magnitude.new_full((n_groups,), torch.inf)
        chosen = torch.zeros_like(by_group, dtype=torch.bool)
    elif n == by_group.shape[1]:
        thresholds = by_group.amin(1)
        chosen = torch.ones_like(by_group, dtype=torch.bool)
    else:
        thresholds = torch.topk(by_group, n, sorted=False).values.amin(1)
        chosen = by_group >= thresholds[:, None]
        if int(chosen.sum()) > n * n_groups:  # of the ties at the threshold those of highest flat index are dropped
            tied = by_group == thresholds[:, None]
            surplus = chosen.sum(1, keepdim=True) - n
            chosen &= ~(tied & (tied.flip(1).cumsum(1).flip(1) <= surplus))
    chosen = chosen.view(n_groups, n_rows, width).transpose(0, 1)  # [S, groups, columns of a group]
    return chosen.reshape(n_rows, n_groups * width), thresholds


def largest_of_array(coefficients: np.ndarray, n: int, n_groups: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Select as `largest` does, from array to array, n > 0; return None where there is a tie to break, or NaN."""
    n_rows = len(coefficients)
    magnitude = np.abs(coefficients)
    if n_groups > 1:
        magnitude = magnitude.reshape(n_rows, n_groups, -1).swapaxes(0, 1)
    by_group = magnitude.reshape(n_groups, -1)  # [groups, S * columns of a group]
    least = by_group.shape[1] - n
    ordered = np.partition(by_group, least)  # NaN last
    thresholds = ordered[:, least].copy()
    chosen = by_group >= thresholds[:, None]
    # Without NaN every group has at least n entries at its threshold or above: n in each if there are so many in all.
    if np.count_nonzero(chosen) != n * n_groups or np.isnan(ordered[:, least:].max()):
        return None
    if n_groups > 1:
        chosen = chosen.reshape(n_groups, n_rows, -1).swapaxes(0, 1)
    return chosen.reshape(coefficients.shape), thresholds


def _largest_by_numpy(coefficients: Tensor, n: int, n_groups: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Select by numpy where it can: on a CPU, in float32 and float64."""
    if not n or coefficients.device.type != "cpu" or coefficients.dtype not in (torch.float32, torch.float64):
        return None
    return largest_of_array(coefficients.detach().numpy(), n, n_groups)


def project_topk(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None = None
) -> SparseCoefficients:
    """Keep the n largest |base + <V_k, G_s>|; the values' gradients are taken at the kept pairs only."""
    with torch.no_grad():
        coefficients = project(x, dy, left, right)
        kept = batch_topk(coefficients if base is None else coefficients + base, n)
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        own = project_at(x, dy, left, right, kept)
        # the value that was selected, with the gradient of `own`
        kept = kept._replace(values=kept.values + (own - own.detach()))
    return kept


# --- several ranks ----------------------------------------------------------------------------------------------


def batch_topk_over_ranks(
    coefficients: Tensor, n: int, total: Callable[[Tensor], Tensor], earlier: Callable[[Tensor], Tensor]
) -> SparseCoefficients:
    """Select among all ranks' rows together and return this rank's; letters as in `l3d_kernels.ops`."""
    if n == 0:
        return batch_topk(coefficients, 0)
    key, bits, surplus = radix_threshold(coefficients, n, total)
    tied = key == bits  # [S, K]
    rank = earlier(tied.sum()) + tied.flatten().cumsum(0).view_as(tied)
    return _kept_where((key > bits) | (tied & (rank <= surplus)), coefficients, bits)


def batch_topk_over_columns(
    coefficients: Tensor, n: int, rank: int, gather: Callable[[Tensor], Tensor]
) -> SparseCoefficients:
    """Select in a matrix whose columns are split over ranks and return this rank's entries."""
    if n == 0:
        return batch_topk(coefficients, 0)
    key, bits, surplus = radix_threshold(coefficients, n, lambda counts: gather(counts).sum(0))
    tied = key == bits  # [S, K]
    counts = gather(tied.sum(1))  # [ranks, S]
    before = counts.sum(0).cumsum(0) - counts[rank:].sum(0)  # ties in rows above, and in this row on lower ranks
    kept = (key > bits) | (tied & (before[:, None] + tied.cumsum(1) <= surplus))
    return _kept_where(kept, coefficients, bits)


def _kept_where(mask: Tensor, coefficients: Tensor, bits: int) -> SparseCoefficients:
    """Return the entries where `mask` is true; `bits` is the threshold's magnitude as an integer."""
    integer = INTEGERS[coefficients.element_size()]
    threshold = torch.tensor(bits, device=coefficients.device).to(integer).view(coefficients.dtype)
    return kept_where(mask, coefficients, threshold)


def radix_threshold(coefficients: Tensor, n: int, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, int, int]:
    """Find the n-th largest magnitude of all ranks' entries, n > 0, by exchanging histograms of digits.

    Returns the magnitudes as integers of the same order, [S, K]; the threshold as such an integer; and how many of the
    entries that equal it are kept.
    """
    magnitude = coefficients.detach().abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    key = magnitude.view(INTEGERS[coefficients.element_size()]).long()  # orders as the magnitudes do
    flat, digits, remaining = key.flatten(), 0, n
    for shift in range(8 * coefficients.element_size() - 8, -1, -8):
        candidates = flat[(flat >> shift >> 8) == digits]
        counts = total(torch.bincount((candidates >> shift) & 255, minlength=256))
        above = counts.sum() - counts.cumsum(0)
        digit = int((above < remaining).nonzero()[0])
        digits, remaining = 256 * digits + digit, remaining - int(above[digit])
    return key, digits, remaining
