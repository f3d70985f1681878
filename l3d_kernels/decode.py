"""The decoder of TopK autoencoders: a weighted sum of a few rows of a weight per code."""

from torch import Tensor

from l3d_kernels.dispatch import implementation


def sparse_decode(
    indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return Σ_j values[a, j] weight[indices[a, j]] for every code a: [A, D].

    Args:
        indices: [A, k] int64 rows of `weight`; or [N] with `row_offsets`.
        values: [A, k] their coefficients; or [N].
        weight: [L, D] the dictionary.
        row_offsets: [A+1] int64 for codes of varying length: code a owns entries row_offsets[a]:row_offsets[a+1].

    Differentiable in `values` and `weight`. No size need divide another.

    >>> import torch
    >>> sparse_decode(torch.tensor([[0, 2]]), torch.tensor([[1.0, 10.0]]), torch.eye(3))
    tensor([[ 1.,  0., 10.]])
    """
    dims = 2 if row_offsets is None else 1
    if indices.ndim != dims:
        expected = "[A, k]" if row_offsets is None else "[N] with row_offsets"
        raise ValueError(f"indices: expected shape {expected}, got {list(indices.shape)}")
    if values.shape != indices.shape:
        raise ValueError(f"values: expected shape {list(indices.shape)} to match indices, got {list(values.shape)}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [L, D], got {list(weight.shape)}")
    return implementation("sparse_decode", backend, weight)(indices, values, weight, row_offsets)
