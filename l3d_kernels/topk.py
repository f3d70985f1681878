"""Batch top-k: keep the largest coefficients of the whole batch, however many each sample gets."""

from collections.abc import Callable

import torch
from torch import Tensor

from l3d_kernels import reference
from l3d_kernels.dispatch import implementation
from l3d_kernels.sparse import SparseCoefficients, sparse_coefficients


def batch_topk(coefficients: Tensor, n: int, n_groups: int = 1, *, backend: str = "auto") -> SparseCoefficients:
    """Return the n entries of largest magnitude in a coefficient matrix [S, K]: exactly n, row-major.

    Ties go to the lower flat index. The kept values stay differentiable in `coefficients`. With n_groups > 1 the K
    columns are so many equal blocks of neighbours, each of which keeps its own n (decompositions side by side), and
    `threshold` is [n_groups]. Raises ValueError unless 0 <= n <= S*K / n_groups. Source: Bussmann et al., BatchTopK
    (arXiv 2412.06410), as the paper applies it.

    >>> import torch
    >>> kept = batch_topk(torch.tensor([[3.0, -1.0], [0.5, -4.0]]), 2)
    >>> kept.values, kept.rows, kept.columns, kept.threshold
    (tensor([ 3., -4.]), tensor([0, 1]), tensor([0, 1]), tensor(3.))
    """
    if coefficients.ndim != 2:
        raise ValueError(f"coefficients: expected shape [S, K], got {list(coefficients.shape)}")
    if n_groups < 1 or coefficients.shape[1] % n_groups:
        raise ValueError(f"n_groups: expected a divisor of the {coefficients.shape[1]} columns, got {n_groups}")
    if not 0 <= n <= coefficients.numel() // n_groups:
        raise ValueError(f"n: expected 0 <= n <= S*K = {coefficients.numel() // n_groups}, got {n}")
    run = implementation("batch_topk", backend, coefficients)
    if run is reference.batch_topk:
        return run(coefficients, n, n_groups)
    if n_groups == 1:
        return run(coefficients, n)
    return _side_by_side([run(part.contiguous(), n) for part in coefficients.chunk(n_groups, dim=1)])


def _side_by_side(parts: list[SparseCoefficients]) -> SparseCoefficients:
    """Join what was kept in neighbouring blocks of columns, of equal width, into one row-major whole."""
    n_rows, width = parts[0].shape
    rows = torch.cat([part.rows for part in parts])
    columns = torch.cat([part.columns + i * width for i, part in enumerate(parts)])
    order = torch.argsort(rows * (width * len(parts)) + columns)
    return sparse_coefficients(
        torch.cat([part.values for part in parts])[order],
        rows[order],
        columns[order],
        torch.stack([part.threshold for part in parts]),
        (n_rows, width * len(parts)),
    )


def batch_topk_over_ranks(
    coefficients: Tensor,
    n: int,
    total: Callable[[Tensor], Tensor],
    earlier: Callable[[Tensor], Tensor],
    *,
    backend: str = "auto",
) -> SparseCoefficients:
    """Return this rank's share of the n entries of largest magnitude among all ranks' rows.

    Args:
        coefficients: [S, K] this rank's rows; ranks hold consecutive rows, any number each, none included.
        n: how many entries to keep over all ranks.
        total: sums an int64 tensor over all ranks: `lambda t: (torch.distributed.all_reduce(t), t)[1]`.
        earlier: sums it over the ranks before this one; zeros on the first.
        backend: "auto", "torch" or "triton", the same on every rank.

    Only histograms of magnitudes are exchanged. Ties go to the lower rank, then to the lower flat index; `threshold`
    is that of all ranks together. Every rank must call it. The values stay differentiable in `coefficients`.
    Raises ValueError unless 0 <= n <= the number of all ranks' entries.
    """
    if coefficients.ndim != 2:
        raise ValueError(f"coefficients: expected shape [S, K], got {list(coefficients.shape)}")
    size = int(total(torch.tensor(coefficients.numel(), device=coefficients.device)))
    if not 0 <= n <= size:
        raise ValueError(f"n: expected 0 <= n <= {size} entries of all ranks, got {n}")
    return implementation("batch_topk_over_ranks", backend, coefficients)(coefficients, n, total, earlier)


def batch_topk_over_columns(
    coefficients: Tensor, n: int, rank: int, gather: Callable[[Tensor], Tensor]
) -> SparseCoefficients:
    """Return this rank's share of the n entries of largest magnitude of a matrix whose columns are split over ranks.

    Args:
        coefficients: [S, K] this rank's columns; ranks hold neighbouring columns, any number each, of the same rows.
        n: how many entries to keep over all ranks.
        rank: this rank's number.
        gather: stacks an int64 tensor [m] of every rank: [ranks, m].

    Only histograms of magnitudes are exchanged. Ties go to the lower flat index of the whole matrix, as in
    `batch_topk`; `threshold` is that of all ranks together. Every rank must call it. The values stay differentiable in
    `coefficients`. Raises ValueError unless 0 <= n <= the number of all ranks' entries.
    """
    if coefficients.ndim != 2:
        raise ValueError(f"coefficients: expected shape [S, K], got {list(coefficients.shape)}")
    size = int(gather(torch.tensor([coefficients.numel()], device=coefficients.device)).sum())
    if not 0 <= n <= size:
        raise ValueError(f"n: expected 0 <= n <= {size} entries of all ranks, got {n}")
    if n == 0:
        return reference.batch_topk(coefficients, 0)
    key, bits, surplus = reference.radix_threshold(coefficients, n, lambda counts: gather(counts).sum(0))
    tied = key == bits  # [S, K]
    counts = gather(tied.sum(1))  # [ranks, S]
    before = counts.sum(0).cumsum(0) - counts[rank:].sum(0)  # in rows above, and in this row on lower ranks
    kept = (key > bits) | (tied & (before[:, None] + tied.cumsum(1) <= surplus))
    rows, columns = kept.nonzero(as_tuple=True)
    threshold = reference.magnitude_of(bits, coefficients)
    return sparse_coefficients(coefficients[rows, columns], rows, columns, threshold, (key.shape[0], key.shape[1]))
