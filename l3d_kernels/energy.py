"""Squared norms without the arrays they are norms of: of gradients, reconstructions and residuals."""

from torch import Tensor

from l3d_kernels.dispatch import check_dense, check_factors, check_kept, check_rows, implementation
from l3d_kernels.sparse import SparseCoefficients


def squared_gradient_norm(x: Tensor, dy: Tensor, *, backend: str = "auto") -> Tensor:
    """Return ‖G_s‖² = Σ_tt' (x_t . x_t')(dy_st . dy_st') of every sample: [S].

    x [B, T, I] or integers [B, T]; dy [S, T, O], S a multiple of B.
    """
    check_rows(x, dy)
    return implementation("squared_gradient_norm", backend, dy)(x, dy)


def gram_energy(kept: SparseCoefficients, left: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    """Return ‖ĝ_s‖² = c_sᵀ M c_s of every sample's reconstruction, M[k, j] = <V_k, V_j>: [S].

    left [K, R, O], right [K, R, I]. Over co-active pairs or from the full M, whichever is less. Differentiable in
    the kept values and both factors.
    """
    check_factors(left, right)
    check_kept(kept.shape, None, left)
    return implementation("gram_energy", backend, left)(kept, left, right)


def gram_energy_coactive(kept: SparseCoefficients, left: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    """Return what `gram_energy` returns, over co-active pairs whatever their number: [S]."""
    check_factors(left, right)
    check_kept(kept.shape, None, left)
    return implementation("gram_energy_coactive", backend, left)(kept, left, right)


def gram(left: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the inner products <V_k, V_j> of all directions: [K, K]; left [K, R, O], right [K, R, I]."""
    check_factors(left, right)
    return implementation("gram", backend, left)(left, right)


def reconstruct(kept: SparseCoefficients, left: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the reconstructions ĝ_s = Σ_{k kept for s} c_sk V_k: [S, O, I]. Training never forms them."""
    check_factors(left, right)
    check_kept(kept.shape, None, left)
    return implementation("reconstruct", backend, left)(kept, left, right)


def squared_residual_norm(
    kept: SparseCoefficients, left: Tensor, right: Tensor, grad: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Return ‖G_s − ĝ_s‖² of materialised gradients grad [S, O, I] without forming ĝ whole: [S].

    Differences are taken before squaring, so small errors do not cancel.
    """
    check_factors(left, right)
    check_dense(grad, left, right)
    check_kept(kept.shape, grad.shape[0], left)
    return implementation("squared_residual_norm", backend, grad)(kept, left, right, grad)
