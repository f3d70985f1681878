"""Batch top-k: keep the largest coefficients of the whole batch, however many each sample gets."""

from torch import Tensor

from l3d_kernels.dispatch import implementation
from l3d_kernels.sparse import SparseCoefficients


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
    return implementation("batch_topk", backend, coefficients)(coefficients, n, n_groups)
