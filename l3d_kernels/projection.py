"""Project per-sample gradients on low-rank directions: all pairs, the kept pairs, or from materialised gradients.

    c_sk = <V_k, G_s> = Σ_t Σ_r (x[s, t] . right[k, r]) (dy[s, t] . left[k, r])

Shapes and letters as in `l3d_kernels.reference`, whose functions of the same names are the specification.
"""

from torch import Tensor

from l3d_kernels.dispatch import check_dense, check_factors, check_kept, check_rows, check_rows_fit, implementation
from l3d_kernels.sparse import SparseCoefficients


def project(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the coefficients <V_k, G_s> of every sample and subnetwork: [S, K].

    Args:
        x: [B, T, I] what the layer saw, or integers [B, T] that stand for one-hot rows (an embedding).
        dy: [S, T, O] what came back; S is a multiple of B and sample s reads sequence s // (S // B).
        left: [K, R, O].
        right: [K, R, I].
        backend: "auto", "torch" or "triton".

    Summed over T and R, not averaged; exact gradients to `left` and `right`. Raises ValueError on shapes that do
    not belong together. Source: the paper's encoder (arXiv 2504.00194), from the factors of the gradient.

    >>> import torch
    >>> x, dy = torch.ones(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> project(x, dy, left=torch.ones(1, 1, 3), right=torch.ones(1, 1, 2))
    tensor([[12.]])
    """
    check_rows(x, dy)
    check_factors(left, right)
    check_rows_fit(x, dy, left, right)
    return implementation("project", backend, dy)(x, dy, left, right)


def project_topk(
    x: Tensor,
    dy: Tensor,
    left: Tensor,
    right: Tensor,
    n: int,
    base: Tensor | None = None,
    *,
    backend: str = "auto",
) -> SparseCoefficients:
    """Return batch_topk(base + project(x, dy, left, right), n), the selection begun while coefficients are made.

    Arguments as in `project` and `batch_topk`; base [S, K] is what other tensors contributed. The kept values are
    differentiable in `left` and `right`, at the cost of the kept pairs; x, dy and base get no gradient. The kernels
    count the magnitudes' histogram in the projection's epilogue, so that selecting reads the coefficients once less.
    """
    check_rows(x, dy)
    check_factors(left, right)
    check_rows_fit(x, dy, left, right)
    shape = (dy.shape[0], left.shape[0])
    if base is not None and (base.shape != shape or base.dtype != dy.dtype):
        raise ValueError(f"base: expected shape {list(shape)} and {dy.dtype}, got {list(base.shape)} and {base.dtype}")
    if not 0 <= n <= shape[0] * shape[1]:
        raise ValueError(f"n: expected 0 <= n <= S*K = {shape[0] * shape[1]}, got {n}")
    if x.requires_grad or dy.requires_grad or (base is not None and base.requires_grad):
        raise ValueError("x, dy, base: project_topk has no gradient to them; detach them")
    return implementation("project_topk", backend, dy)(x, dy, left, right, n, base)


def project_tiled(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    """Return what `project` returns, from the gradients multiplied out a few rows of O at a time: [S, K].

    Arguments as in `project`, x floating. Cheaper than the factors where R·(I+O) is large beside I·O / T; in memory
    neither [S, O, I] nor [K, O, I] ever exists. Differentiable in `left` and `right`.
    """
    check_rows(x, dy)
    check_factors(left, right)
    check_rows_fit(x, dy, left, right)
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}; use project for indices")
    if x.requires_grad or dy.requires_grad:
        raise ValueError("x, dy: project_tiled has no gradient to them; detach them, or use project")
    return implementation("project_tiled", backend, dy)(x, dy, left, right)


def project_at(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: SparseCoefficients, *, backend: str = "auto"
) -> Tensor:
    """Return the coefficients <V_k, G_s> at the kept pairs only, in their order: [N].

    Arguments as in `project`; `kept` names the pairs (its values are not read). Differentiable in `left` and
    `right`. Costs the kept pairs, not all S·K: what training uses where few coefficients are kept.
    """
    check_rows(x, dy)
    check_factors(left, right)
    check_rows_fit(x, dy, left, right)
    check_kept(kept.shape, dy.shape[0], left)
    return implementation("project_at", backend, dy)(x, dy, left, right, kept)


def project_dense(grad: Tensor, left: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the coefficients <V_k, G_s> of materialised gradients: [S, K].

    grad [S, O, I], left [K, R, O], right [K, R, I]. Directions are formed a few rows at a time, so [K, O, I] never
    exists, in the backward pass neither, unless it is small. Differentiable in all three.
    """
    check_factors(left, right)
    check_dense(grad, left, right)
    return implementation("project_dense", backend, grad)(grad, left, right)
