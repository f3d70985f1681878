"""Project per-sample gradients on low-rank directions: from the layer's x and dy, at kept pairs, or from gradients.

    c[s, k] = <V_k, G_s> = Σ_t Σ_r (x[b, t] . right[k, r]) (dy[s, t] . left[k, r]),   b = s // (S // B)

Letters as in `l3d_kernels.reference`. The gradient may be kept as factors (x, dy) or be multiplied out; which costs
less depends on T, R, I and O, so that each function here is the cheapest somewhere.
"""

from typing import Any

import torch
from torch import Tensor

from l3d_kernels import splitting
from l3d_kernels.cpu.directions import dense_pieces, directions, tiles_of, to_factors
from l3d_kernels.sparse import SparseCoefficients
from l3d_kernels.splitting import outer, pieces


def along(side: Tensor, factor: Tensor) -> Tensor:
    """Multiply rows with every factor: [n, T, D] (or indices [n, T]) with factor [K, R, D] -> [n, T, K*R]."""
    if side.is_floating_point():
        return side @ factor.flatten(0, 1).mT
    return factor[:, :, side].permute(2, 3, 0, 1).flatten(2)


def project(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the coefficients of every sample and subnetwork, from the factors of the gradients: [S, K].

    x·right is computed once for all samples of a sequence. Sequences are taken a piece at a time.
    """
    n_subnetworks, rank, _ = left.shape
    n_sequences, n_positions = x.shape[:2]
    if n_sequences == 0:
        return dy.new_zeros(0, n_subnetworks) + 0 * (left.sum() + right.sum())
    share = dy.shape[0] // n_sequences
    if n_positions == 1 and share == 1:
        products = along(x, right)[:, 0] * along(dy, left)[:, 0]
        return products.view(n_sequences, n_subnetworks, rank).sum(2)
    out = []
    for piece in pieces(n_sequences, share * n_positions * n_subnetworks * rank):
        x_right = along(x[piece], right)  # [b, T, K*R]
        dy_left = along(dy[piece.start * share : piece.stop * share], left)  # [s, T, K*R]
        products = (x_right[:, None] * dy_left.unflatten(0, (len(x_right), share))).sum(2)  # [b, p, K*R]
        out.append(products.reshape(len(x_right) * share, n_subnetworks, rank).sum(2))
    return torch.cat(out)


def project_dense(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the coefficients of materialised gradients: [S, K].

    V is formed for a few rows of O at a time, forward and backward; in one piece autograd's own backward is as fast.
    """
    if max(grad.shape[0], left.shape[0]) * grad.shape[1] * grad.shape[2] <= splitting.CHUNK:
        return (directions(left, right).flatten(1) @ grad.flatten(1).mT).mT.contiguous()
    return _ProjectDense.apply(grad, left, right)


def _rows_of(flat: Tensor, piece: slice, like: Tensor) -> Tensor:
    """View [K, o * I] as [K, o, I], with the I of `like`; torch cannot batch unflatten."""
    return flat.view(flat.shape[0], piece.stop - piece.start, like.shape[2])


class _ProjectDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(grad, left, right)
        out: Tensor | None = None  # [K, S]: a tenth to a fifth faster than [S, K]
        for piece, rows in dense_pieces(grad, left):
            v = directions(left[:, :, piece], right).flatten(1)
            out = v @ rows.mT if out is None else out.addmm_(v, rows.mT)
        return grad.new_zeros(grad.shape[0], left.shape[0]) if out is None else out.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        grad, left, right = ctx.saved_tensors
        cut = dense_pieces(grad, left)
        d_grad = d_out.new_empty(grad.shape) if ctx.needs_input_grad[0] else None  # batched where d_out is
        if d_grad is not None:
            for piece, _ in cut:
                v = directions(left[:, :, piece], right)
                d_grad[:, piece] = (d_out @ v.flatten(1)).view(-1, v.shape[1], grad.shape[2])
        d_v = ((piece, _rows_of(d_out.mT @ rows, piece, grad)) for piece, rows in cut)
        return d_grad, *to_factors(d_v, left, right)


def project_tiled(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the coefficients from tiles of the gradients: `project_dense(outer(x, dy), left, right)`, [S, K].

    Both G and V are formed for a few rows of O at a time, forward and backward. x must be floating; x and dy get no
    gradient.
    """
    return _ProjectTiled.apply(x, dy, left, right)


class _ProjectTiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, dy, left, right)
        out = dy.new_zeros(left.shape[0], dy.shape[0])  # [K, S], as in project_dense
        for piece in tiles_of(left, right, dy.shape[0]):
            grad = outer(x, dy[:, :, piece]).flatten(1)
            out.addmm_(directions(left[:, :, piece], right).flatten(1), grad.mT)
        return out.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, None, Tensor, Tensor]:
        x, dy, left, right = ctx.saved_tensors
        grads = ((piece, outer(x, dy[:, :, piece]).flatten(1)) for piece in tiles_of(left, right, dy.shape[0]))
        d_v = ((piece, _rows_of(d_out.mT @ grad, piece, right)) for piece, grad in grads)
        return None, None, *to_factors(d_v, left, right)


def project_at(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: SparseCoefficients) -> Tensor:
    """Return the coefficients at the kept pairs only, in their order: [N].

    The cost is that of the kept pairs: samples are gathered by subnetwork, as tokens are by expert. x·right of
    everything costs B·K rows, of the kept pairs N; the cheaper is taken.
    """
    n_subnetworks, rank, _ = left.shape
    n_sequences, n_positions = x.shape[:2]
    n_kept = kept.rows.numel()
    if n_kept == 0:
        return dy.new_zeros(0) + 0 * (left.sum() + right.sum())
    share = dy.shape[0] // n_sequences
    every = along(x, right).unflatten(2, (n_subnetworks, rank)) if n_kept >= n_sequences * n_subnetworks else None
    out, positions = [], []
    for columns, entries, valid in _grouped(kept, n_positions * (dy.shape[2] + rank)):
        rows = kept.rows[entries]  # [k, m] samples that keep subnetwork k, padded by repetition
        dy_left = dy[rows].flatten(1, 2) @ left[columns].mT  # [k, m*T, R]
        sequences = rows // share
        if every is not None:
            x_right = every[sequences, :, columns[:, None]].flatten(1, 2)  # [k, m*T, R]
        elif x.is_floating_point():
            x_right = x[sequences].flatten(1, 2) @ right[columns].mT
        else:
            x_right = right[columns[:, None, None], :, x[sequences]].flatten(1, 2)
        products = (x_right * dy_left).reshape(*entries.shape, -1).sum(2)  # [k, m]
        out.append(products[valid])
        positions.append(entries[valid])
    values = torch.cat(out)
    return values.new_empty(n_kept).index_put((torch.cat(positions),), values)


def _grouped(kept: SparseCoefficients, per_entry: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Group subnetworks that are kept about equally often, so that each group is one batched product.

    Returns (columns [k], entries [k, m], valid [k, m]) for each group: the row-major positions of each subnetwork's
    entries, padded to the longest of the group by repeating the first. Sorting by count keeps the padding small.
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
            and (stop + 1 - start) * longest * per_entry <= splitting.CHUNK
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
