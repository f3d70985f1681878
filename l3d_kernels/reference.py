"""Every op in plain torch: the specification of the kernels, and the path that runs on a CPU.

Any floating dtype, any device; exact in float64; nothing here imports triton. (On a CPU numpy selects, ten times as
fast.) Letters: B sequences, S samples (S a multiple of B; sample s reads sequence s // (S // B)), T positions that
share a weight, I inputs, O outputs, K subnetworks, R rank, N kept coefficients. A sample's gradient and a subnetwork's
direction are both sums of outer products:

    G_s = sum_t dy[s, t] (x) x[s // (S // B), t]        [O, I]
    V_k = sum_r left[k, r] (x) right[k, r]              [O, I]

Wherever `x` appears it may also be integers [B, T]: indices that stand for one-hot rows (an embedding's input).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3d_kernels.sparse import SparseCoefficients, from_arrays, sparse_coefficients

# Temporaries are cut into pieces of about this many elements. A step of one block of TinyStories-8M's shape, without
# its extraction, on one CPU core: 957 ms with half of this, 908 ms with this. Loss and gradients of one 256 x 256
# tensor on two: 115 ms with half of this, 172 ms with twice this. At width 64 it makes no difference.
CHUNK = 1 << 23


def pieces(total: int, per_item: int) -> list[slice]:
    """Cut `total` items, each needing `per_item` elements of temporaries, into slices of at most CHUNK elements."""
    step = max(1, CHUNK // max(1, per_item))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def along(side: Tensor, factor: Tensor) -> Tensor:
    """Project rows on every factor: [n, T, D] (or indices [n, T]) with factor [K, R, D] -> [n, T, K*R]."""
    if side.is_floating_point():
        return side @ factor.flatten(0, 1).mT
    return factor[:, :, side].permute(2, 3, 0, 1).flatten(2)


# --- projections ------------------------------------------------------------------------------------------------


def project(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Coefficients <V_k, G_s> of every sample and subnetwork, from the factors: [S, K].

    x [B, T, I] (or integers [B, T]), dy [S, T, O], left [K, R, O], right [K, R, I].
    `einsum("sti,kri,sto,kro->sk", x.repeat_interleave(S // B, 0), right, dy, left)`
    """
    n_subnetworks, rank, _ = left.shape
    n_sequences, n_positions = x.shape[:2]
    if n_sequences == 0:
        return dy.new_zeros(0, n_subnetworks) + 0 * (left.sum() + right.sum())
    share = dy.shape[0] // n_sequences
    if n_positions == 1 and share == 1:
        products = along(x, right)[:, 0] * along(dy, left)[:, 0]
        return products.view(-1, n_subnetworks, rank).sum(2)
    out = []
    for piece in pieces(n_sequences, share * n_positions * n_subnetworks * rank):
        seen = along(x[piece], right)  # [b, T, K*R], once for all samples of a sequence
        returned = along(dy[piece.start * share : piece.stop * share], left)  # [s, T, K*R]
        products = (seen[:, None] * returned.unflatten(0, (len(seen), share))).sum(2)  # [b, p, K*R]
        out.append(products.reshape(-1, n_subnetworks, rank).sum(2))
    return torch.cat(out)


def project_dense(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Coefficients <V_k, G_s> of materialised gradients: [S, K].

    grad [S, O, I], left [K, R, O], right [K, R, I]. `einsum("soi,kro,kri->sk", grad, left, right)`, with V formed
    for a few rows of O at a time, forward and backward, so that [K, O, I] never exists unless it is small.
    """
    if max(grad.shape[0], left.shape[0]) * grad.shape[1] * grad.shape[2] <= CHUNK:  # one piece: autograd does as well
        return (directions(left, right).flatten(1) @ grad.flatten(1).mT).mT.contiguous()
    return _ProjectDense.apply(grad, left, right)


class _ProjectDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(grad, left, right)
        out: Tensor | None = None  # [K, S]: a tenth to a fifth faster than [S, K]
        for piece, rows in _dense_pieces(grad, left):
            v = directions(left[:, :, piece], right).flatten(1)
            out = v @ rows.mT if out is None else out.addmm_(v, rows.mT)
        return grad.new_zeros(grad.shape[0], left.shape[0]) if out is None else out.mT.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        grad, left, right = ctx.saved_tensors
        cut = _dense_pieces(grad, left)
        shares = ((piece, (d_out.mT @ rows).unflatten(1, (-1, grad.shape[2]))) for piece, rows in cut)
        d_grad = torch.empty_like(grad) if ctx.needs_input_grad[0] else None
        if d_grad is not None:
            for piece, _ in cut:
                v = directions(left[:, :, piece], right)
                d_grad[:, piece] = (d_out @ v.flatten(1)).view(-1, v.shape[1], grad.shape[2])
        return d_grad, *_by_factors(shares, left, right)


def _dense_pieces(grad: Tensor, left: Tensor) -> list[tuple[slice, Tensor]]:
    """Cut gradients [S, O, I] along O: pairs of a slice of O and the entries there [S, o * I], which are a view."""
    width, flat = grad.shape[2], grad.flatten(1)
    cut = pieces(grad.shape[1], max(grad.shape[0], left.shape[0]) * width)
    return [(piece, flat[:, piece.start * width : piece.stop * width]) for piece in cut]


def project_tiled(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Coefficients <V_k, G_s> from tiles of the gradients multiplied out: [S, K].

    `project_dense(outer(x, dy), left, right)`, with both G and V formed for a few rows of O at a time, forward and
    backward, so that neither [S, O, I] nor [K, O, I] ever exists. x must be floating; it and dy get no gradient.
    """
    return _ProjectTiled.apply(x, dy, left, right)


class _ProjectTiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, dy, left, right)
        out = dy.new_zeros(left.shape[0], dy.shape[0])  # [K, S], as in project_dense
        for piece in _tiles(dy, left, right):
            grad = outer(x, dy[:, :, piece]).flatten(1)
            out.addmm_(directions(left[:, :, piece], right).flatten(1), grad.mT)
        return out.mT.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, None, Tensor, Tensor]:
        x, dy, left, right = ctx.saved_tensors
        cut = _tiles(dy, left, right)
        grads = (outer(x, dy[:, :, piece]).flatten(1) for piece in cut)
        shares = zip(cut, ((d_out.mT @ grad).unflatten(1, (-1, right.shape[2])) for grad in grads), strict=True)
        return None, None, *_by_factors(shares, left, right)


def _tiles(dy: Tensor, left: Tensor, right: Tensor) -> list[slice]:
    return pieces(left.shape[2], max(dy.shape[0], left.shape[0]) * right.shape[2])


def project_at(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: SparseCoefficients) -> Tensor:
    """Coefficients <V_k, G_s> at the kept pairs only: [N], in the order of `kept`, differentiable.

    Shapes as in `project`. `project(x, dy, left, right)[kept.rows, kept.columns]`, at the cost of the kept pairs:
    samples are gathered by subnetwork, as tokens are by expert.
    """
    n_subnetworks, rank, _ = left.shape
    n_sequences, n_positions = x.shape[:2]
    n_kept = kept.rows.numel()
    if n_kept == 0:
        return dy.new_zeros(0) + 0 * (left.sum() + right.sum())
    share = dy.shape[0] // n_sequences
    # x.right for everything costs B*K, for the kept pairs N: take the cheaper.
    seen_all = along(x, right).unflatten(2, (n_subnetworks, rank)) if n_kept >= n_sequences * n_subnetworks else None
    out, positions = [], []
    for columns, entries, valid in _grouped(kept, n_positions * (dy.shape[2] + rank)):
        rows = kept.rows[entries]  # [k, m] samples that keep subnetwork k, padded by repetition
        returned = dy[rows].flatten(1, 2) @ left[columns].mT  # [k, m*T, R]
        sequences = rows // share
        if seen_all is not None:
            seen = seen_all[sequences, :, columns[:, None]].flatten(1, 2)  # [k, m*T, R]
        elif x.is_floating_point():
            seen = x[sequences].flatten(1, 2) @ right[columns].mT
        else:
            seen = right[columns[:, None, None], :, x[sequences]].flatten(1, 2)
        products = (seen * returned).reshape(*entries.shape, -1).sum(2)  # [k, m]
        out.append(products[valid])
        positions.append(entries[valid])
    values = torch.cat(out)
    return values.new_empty(n_kept).index_put((torch.cat(positions),), values)


def _grouped(kept: SparseCoefficients, per_entry: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Cut the kept entries into groups of subnetworks kept about equally often.

    Returns (columns [k], entries [k, m], valid [k, m]) per group: the row-major positions of each subnetwork's
    entries, padded to the group's longest by repeating its first. Sorting by count keeps the padding small.
    """
    counts = kept.column_offsets.diff()
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[: int((counts > 0).sum())]
    sorted_counts = counts[order].tolist()
    groups, start = [], 0
    while start < len(sorted_counts):
        longest = sorted_counts[start]
        stop = start + 1
        while (
            stop < len(sorted_counts)
            and (stop + 1 - start) * longest * per_entry <= CHUNK
            and 2 * sorted_counts[stop] >= longest
        ):
            stop += 1
        columns = order[start:stop]
        slot = torch.arange(longest, device=columns.device).expand(stop - start, -1)
        valid = slot < counts[columns, None]
        entries = kept.column_order[kept.column_offsets[columns, None] + slot * valid]
        groups.append((columns, entries, valid))
        start = stop
    return groups


# --- top-k ------------------------------------------------------------------------------------------------------


def batch_topk(coefficients: Tensor, n: int, n_groups: int = 1) -> SparseCoefficients:
    """Keep the n entries of largest |c| in the whole batch: exactly n, ties broken by lower flat index.

    coefficients [S, K]; 0 <= n <= S*K. The values keep their autograd history. With several groups the columns are
    that many equal blocks, n entries are kept in each, and the threshold is one per group.
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
    """Tell which entries `batch_topk` keeps, and the least kept magnitude of each group: bool [S, K], [groups]."""
    found = _largest_by_numpy(coefficients, n, n_groups)
    if found is None:
        return _largest_by_torch(coefficients, n, n_groups)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _largest_by_torch(coefficients: Tensor, n: int, n_groups: int) -> tuple[Tensor, Tensor]:
    n_rows, width = coefficients.shape[0], coefficients.shape[1] // n_groups
    magnitude = coefficients.detach().abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)  # NaN is kept: the loss tells
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
        if int(chosen.sum()) > n * n_groups:  # ties at the threshold: the surplus of highest flat index goes
            tied = by_group == thresholds[:, None]
            surplus = chosen.sum(1, keepdim=True) - n
            chosen &= ~(tied & (tied.flip(1).cumsum(1).flip(1) <= surplus))
    chosen = chosen.view(n_groups, n_rows, width).transpose(0, 1)  # [S, groups, columns of a group]
    return chosen.reshape(n_rows, n_groups * width), thresholds


def largest_of_array(coefficients: np.ndarray, n: int, n_groups: int) -> tuple[np.ndarray, np.ndarray] | None:
    """`largest` of an array, n > 0, in a tenth of torch.topk's time; None where there are ties to break, or NaN."""
    n_rows = len(coefficients)
    magnitude = np.abs(coefficients)
    if n_groups > 1:
        magnitude = magnitude.reshape(n_rows, n_groups, -1).swapaxes(0, 1)
    by_group = magnitude.reshape(n_groups, -1)  # [groups, S * columns of a group]
    least = by_group.shape[1] - n
    ordered = np.partition(by_group, least)  # NaN last
    thresholds = ordered[:, least].copy()
    chosen = by_group >= thresholds[:, None]
    # without NaN every group has at least n at its threshold: n each if so many in all
    if np.count_nonzero(chosen) != n * n_groups or np.isnan(ordered[:, least:].max()):
        return None
    if n_groups > 1:
        chosen = chosen.reshape(n_groups, n_rows, -1).swapaxes(0, 1)
    return chosen.reshape(coefficients.shape), thresholds


def _largest_by_numpy(coefficients: Tensor, n: int, n_groups: int) -> tuple[np.ndarray, np.ndarray] | None:
    if not n or coefficients.device.type != "cpu" or coefficients.dtype not in (torch.float32, torch.float64):
        return None
    return largest_of_array(coefficients.detach().numpy(), n, n_groups)


def project_topk(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None = None
) -> SparseCoefficients:
    """Keep the n largest |base + <V_k, G_s>|: `batch_topk(base + project(x, dy, left, right), n)`.

    Shapes as in `project`; base [S, K] or none. The values' gradients are taken at the kept pairs.
    """
    with torch.no_grad():
        coefficients = project(x, dy, left, right)
        kept = batch_topk(coefficients if base is None else coefficients + base, n)
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        own = project_at(x, dy, left, right, kept)
        kept = kept._replace(values=kept.values + (own - own.detach()))  # the value that was selected, own's gradient
    return kept


def batch_topk_over_ranks(
    coefficients: Tensor, n: int, total: Callable[[Tensor], Tensor], earlier: Callable[[Tensor], Tensor]
) -> SparseCoefficients:
    """`batch_topk` of all ranks' rows together, of which this rank returns those of its own: radix selection.

    coefficients [S, K], this rank's rows. total sums an integer tensor over ranks, earlier over the ranks before.
    """
    if n == 0:
        return batch_topk(coefficients, 0)
    shape = (coefficients.shape[0], coefficients.shape[1])
    key, bits, surplus = radix_threshold(coefficients, n, total)
    key = key.flatten()
    tied = key == bits
    rank = earlier(tied.sum()) + tied.cumsum(0)
    index = ((key > bits) | (tied & (rank <= surplus))).nonzero()[:, 0]
    rows = torch.div(index, shape[1], rounding_mode="floor")
    threshold = magnitude_of(bits, coefficients)
    return sparse_coefficients(coefficients.flatten()[index], rows, index - rows * shape[1], threshold, shape)


def radix_threshold(coefficients: Tensor, n: int, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, int, int]:
    """Find the n-th largest magnitude of all ranks' entries, n > 0, by exchanging histograms of digits.

    Returns the entries' magnitudes as integers of the same order, in the shape of `coefficients`; the threshold among
    them; and how many of the entries that equal it are kept.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[coefficients.element_size()]
    magnitude = coefficients.detach().abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    key = magnitude.view(integer).long()  # orders as the magnitudes do
    flat, digits, remaining = key.flatten(), 0, n
    for shift in range(8 * coefficients.element_size() - 8, -1, -8):
        candidates = flat[(flat >> shift >> 8) == digits]
        counts = total(torch.bincount((candidates >> shift) & 255, minlength=256))
        above = counts.sum() - counts.cumsum(0)
        digit = int((above < remaining).nonzero()[0])
        digits, remaining = 256 * digits + digit, remaining - int(above[digit])
    return key, digits, remaining


def magnitude_of(bits: int, like: Tensor) -> Tensor:
    """Read an integer as the magnitude that `radix_threshold` made it of: [] in the dtype of `like`."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[like.element_size()]
    return torch.tensor(bits, device=like.device).to(integer).view(like.dtype)


# --- energies and norms -----------------------------------------------------------------------------------------


def directions(left: Tensor, right: Tensor) -> Tensor:
    """Materialise V_k = sum_r left[k, r] (x) right[k, r]: [K, R, O], [K, R, I] -> [K, O, I]."""
    return left.mT @ right


def _by_factors(shares: Iterable[tuple[slice, Tensor]], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Turn gradients by rows of V, pairs of a slice of O and d_v [K, o, I], into those by left and right."""
    lefts: list[Tensor] = []
    d_right: Tensor | None = None
    for piece, d_v in shares:
        # not made contiguous, which costs a tenth; up to about this rank the transposed product is as fast or faster
        lefts.append(right @ d_v.mT if right.shape[1] < 8 else (d_v @ right.mT).mT)
        own = left[:, :, piece] @ d_v
        d_right = own if d_right is None else d_right.add_(own)
    if d_right is None:
        return torch.zeros_like(left), torch.zeros_like(right)
    return lefts[0] if len(lefts) == 1 else torch.cat(lefts, 2), d_right


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Inner products <V_k, V_j> of all directions: [K, K].

    left [K, R, O], right [K, R, I]. Formed from the factors, K²R²(I+O) multiply-adds, or from tiles of V,
    K(K+R)·I·O, whichever is less.
    """
    n_subnetworks, rank, n_outputs = left.shape
    n_inputs = right.shape[2]
    if rank == 1:
        return (left[:, 0] @ left[:, 0].mT) * (right[:, 0] @ right[:, 0].mT)
    if (n_subnetworks + rank) * n_outputs * n_inputs < n_subnetworks * rank**2 * (n_inputs + n_outputs):
        return gram_by_tiles(left, right)
    return gram_by_factors(left, right)


def gram_by_factors(left: Tensor, right: Tensor) -> Tensor:
    """Gram matrix as sum_rr' (left_kr . left_jr')(right_kr . right_jr'): [K, K]."""
    n_subnetworks, rank, _ = left.shape
    flat_left, flat_right = left.flatten(0, 1), right.flatten(0, 1)
    out = []
    for piece in pieces(n_subnetworks, n_subnetworks * rank * rank):
        products = (left[piece].flatten(0, 1) @ flat_left.mT) * (right[piece].flatten(0, 1) @ flat_right.mT)
        out.append(products.view(-1, rank, n_subnetworks, rank).sum((1, 3)))
    return torch.cat(out)


def gram_by_tiles(left: Tensor, right: Tensor) -> Tensor:
    """Gram matrix as V Vᵀ with V formed for a few rows of O at a time: [K, K]."""
    return _GramByTiles.apply(left, right)


class _GramByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        out = left.new_zeros(left.shape[0], left.shape[0])
        for piece in pieces(left.shape[2], left.shape[0] * right.shape[2]):
            v = directions(left[:, :, piece], right).flatten(1)
            out.addmm_(v, v.mT)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        both = d_out + d_out.mT
        cut = pieces(left.shape[2], left.shape[0] * right.shape[2])
        tiles = (directions(left[:, :, piece], right) for piece in cut)
        return _by_factors(zip(cut, ((both @ v.flatten(1)).view_as(v) for v in tiles), strict=True), left, right)


def energy_from_gram(kept: SparseCoefficients, gram_matrix: Tensor) -> Tensor:
    """Quadratic form c_sᵀ M c_s of every sample's kept coefficients: [S]; gram_matrix [K, K]."""
    coefficients = kept.dense()
    return ((coefficients @ gram_matrix) * coefficients).sum(1)


def gram_energy(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """Squared norm of every sample's reconstruction, ‖Σ_k c_sk V_k‖²: [S].

    left [K, R, O], right [K, R, I]. Over co-active pairs when their number, Σ_s n_s², is below K²/2 (n_s kept in
    sample s); else from the full Gram matrix, or for few samples from tiles of ĝ. See the functions below.
    Differentiable in values and factors.
    """
    co_active = int(kept.row_offsets.diff().square().sum())
    if 2 * co_active < left.shape[0] ** 2:
        return gram_energy_coactive(kept, left, right)
    backward = torch.is_grad_enabled() and any(each.requires_grad for each in (kept.values, left, right))
    by_gram, by_tiles = energy_costs(kept.shape, [(left.shape[1], left.shape[2], right.shape[2])], backward)
    if by_tiles < by_gram:
        return energy_by_tiles(kept.dense(), left, right)
    return energy_from_gram(kept, gram(left, right))


def energy_costs(shape: tuple[int, int], sizes: Iterable[tuple[int, int, int]], backward: bool) -> tuple[float, float]:
    """Count the multiply-adds of ‖ĝ‖² by the Gram matrix, and from tiles of ĝ.

    shape: (S, K) of the coefficients; sizes: (R, O, I) of every tensor; backward: the derivatives counted too.
    """
    n_samples, n_subnetworks = shape
    by_gram, by_tiles = float((3 if backward else 1) * n_samples * n_subnetworks**2), 0.0
    for rank, n_outputs, n_inputs in sizes:
        area = n_outputs * n_inputs
        by_factors = (3 if backward else 1) * n_subnetworks**2 * rank**2 * (n_outputs + n_inputs)
        by_gram += min(by_factors, (2 if backward else 1) * n_subnetworks * (n_subnetworks + rank) * area)
        by_tiles += (4 if backward else 1) * n_subnetworks * (n_samples + rank) * area
    return by_gram, by_tiles


def energy_by_tiles(coefficients: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`gram_energy` from ĝ itself, a few rows of O at a time: [S]; coefficients [S, K]. S·K·I·O multiply-adds."""
    return _EnergyByTiles.apply(coefficients, left, right)


class _EnergyByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, left, right)
        out = left.new_zeros(coefficients.shape[0])
        for piece in pieces(left.shape[2], left.shape[0] * right.shape[2]):
            tile = coefficients @ directions(left[:, :, piece], right).flatten(1)  # [S, o * I] of ĝ
            out += torch.linalg.vector_norm(tile, dim=1).square()
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coefficients, left, right = ctx.saved_tensors
        d_coefficients = torch.zeros_like(coefficients)
        cut = pieces(left.shape[2], left.shape[0] * right.shape[2])

        def shares() -> Iterator[tuple[slice, Tensor]]:
            for piece in cut:
                v = directions(left[:, :, piece], right)
                d_tile = (2 * d_out[:, None] * coefficients) @ v.flatten(1)
                d_coefficients.addmm_(d_tile, v.flatten(1).mT)
                yield piece, (coefficients.mT @ d_tile).view_as(v)

        by_factors = _by_factors(shares(), left, right)
        return d_coefficients, *by_factors


def gram_energy_coactive(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """`gram_energy` over the pairs of subnetworks kept in the same sample: R²(I+O) Σ_s n_s² multiply-adds."""
    n_samples, _ = kept.shape
    rank = left.shape[1]
    counts = kept.row_offsets.diff()
    if kept.rows.numel() == 0:
        return left.new_zeros(n_samples) + 0 * (left.sum() + right.sum())
    longest = int(counts.max())
    slot = torch.arange(longest, device=left.device)
    per_sample = longest * rank * (left.shape[2] + right.shape[2] + 2 * longest * rank)
    chunks = []
    for piece in pieces(n_samples, per_sample):
        valid = slot < counts[piece, None]  # [s, m]
        entries = kept.row_offsets[:-1][piece, None] + slot * valid
        entries = entries.clamp_max(kept.rows.numel() - 1)
        values = torch.where(valid, kept.values[entries], 0)  # [s, m]
        columns = kept.columns[entries]
        # the coefficient rides on the left factor, so that padding contributes exact zeros
        weighted = (left[columns] * values[:, :, None, None]).flatten(1, 2)  # [s, m*R, O]
        other = right[columns].flatten(1, 2)  # [s, m*R, I]
        chunks.append(((weighted @ weighted.mT) * (other @ other.mT)).sum((1, 2)))
    return torch.cat(chunks)


def squared_gradient_norm(x: Tensor, dy: Tensor) -> Tensor:
    """‖G_s‖² = Σ_tt' (x_t . x_t')(dy_st . dy_st'): [S]. x [B, T, I] (or integers [B, T]), dy [S, T, O].

    From the factors, T²(I+O) per sample, or from G, T·I·O, whichever is less.
    """
    n_sequences, n_positions = x.shape[:2]
    if n_sequences == 0:
        return dy.sum((1, 2))
    share = dy.shape[0] // n_sequences
    if n_positions == 1:
        squares = x.square().sum((1, 2)) if x.is_floating_point() else dy.new_ones(n_sequences)
        return squares.repeat_interleave(share) * dy.square().sum((1, 2))
    out = []
    if x.is_floating_point() and x.shape[2] * dy.shape[2] < n_positions * (x.shape[2] + dy.shape[2]):
        for piece in pieces(n_sequences, share * x.shape[2] * dy.shape[2]):
            grad = outer(x[piece], dy[piece.start * share : piece.stop * share])
            out.append(grad.square().sum((1, 2)))
        return torch.cat(out)
    for piece in pieces(n_sequences, share * n_positions * n_positions):
        part = x[piece]
        same = part @ part.mT if x.is_floating_point() else (part[:, :, None] == part[:, None, :]).to(dy.dtype)
        returned = dy[piece.start * share : piece.stop * share]
        out.append((same.repeat_interleave(share, 0) * (returned @ returned.mT)).sum((1, 2)))
    return torch.cat(out)


def outer(x: Tensor, dy: Tensor, n_inputs: int | None = None) -> Tensor:
    """Materialise G_s = Σ_t dy[s, t] (x) x[s // (S // B), t]: [S, O, I].

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


# --- reconstructions --------------------------------------------------------------------------------------------


def reconstruct(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """ĝ_s = Σ_{k kept for s} c_sk V_k: [S, O, I]. left [K, R, O], right [K, R, I]."""
    coefficients = kept.dense()
    # V may take as much as what is returned, which has S rows for its K, and a piece besides
    per_row = right.shape[2] * max(1, left.shape[0] - kept.shape[0])
    out = [
        (coefficients @ directions(left[:, :, piece], right).flatten(1)).unflatten(1, (-1, right.shape[2]))
        for piece in pieces(left.shape[2], per_row)
    ]
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def squared_residual_norm(kept: SparseCoefficients, left: Tensor, right: Tensor, grad: Tensor) -> Tensor:
    """‖G_s − ĝ_s‖² without forming more of ĝ than a few rows of O at a time: [S].

    grad [S, O, I]. The difference is taken before it is squared, so nothing cancels when the error is small.
    """
    coefficients, total = kept.dense(), grad.new_zeros(grad.shape[0])
    for piece, rows in _dense_pieces(grad, left):
        v = directions(left[:, :, piece], right).flatten(1)
        total = total + torch.linalg.vector_norm(torch.addmm(rows, coefficients, v, alpha=-1), dim=1).square()
    return total


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None = None) -> Tensor:
    """Decode sparse codes: Σ_j values[a, j] weight[indices[a, j]] -> [A, D].

    indices, values [A, k] with weight [L, D]; or, with row_offsets [A+1], indices and values [N] where row a owns
    the entries row_offsets[a]:row_offsets[a+1]. Differentiable in values and weight.
    """
    if row_offsets is None:
        n_codes, per_code = indices.shape
        row_offsets = torch.arange(n_codes + 1, device=indices.device) * per_code
        indices, values = indices.flatten(), values.flatten()
    return torch.nn.functional.embedding_bag(
        indices, weight, row_offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def softmax_mean(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ_v softmax(hidden_s . weight_v + bias_v) weight_v: [S, D]. hidden [S, D], weight [V, D], bias [V] or None.

    `softmax(hidden @ weight.mT + bias, -1) @ weight`, the vocabulary a piece at a time: sums so far decay by
    exp(highest before - after) as the highest logit grows. Sums are kept in float32 or wider.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    mean = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    highest, total = mean.new_full((len(hidden), 1), -torch.inf), mean.new_zeros(len(hidden), 1)
    for piece in pieces(len(weight), 8 * len(hidden)):  # few enough to stay in a cache from one line to the next
        part = weight[piece]
        logits = (hidden @ part.mT).to(wide)
        if bias is not None:
            logits += bias[piece]
        above = torch.maximum(highest, logits.amax(1, keepdim=True))
        finite = above.clamp_min(torch.finfo(wide).min)  # all so far may be -inf, of a masked vocabulary
        decay, exponentials = (highest - finite).exp_(), logits.sub_(finite).exp_()
        total = total * decay + exponentials.sum(1, keepdim=True)
        mean = mean * decay + exponentials.to(weight.dtype) @ part
        highest = above
    return (mean / total).to(hidden.dtype)
