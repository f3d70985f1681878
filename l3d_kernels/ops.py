"""Run the public ops: check the arguments, choose an implementation, call it. Tensors in, tensors out.

Letters: B sequences, S samples (S a multiple of B; sample s belongs to sequence s // (S // B)), T positions that share
a weight, I inputs, O outputs, K subnetworks, R rank, N kept coefficients. A layer's per-sample gradient and a
subnetwork's direction are sums of outer products:

    G_s = Σ_t dy[s, t] ⊗ x[s // (S // B), t]      x [B, T, I] the layer's input, dy [S, T, O] the gradient at its output
    V_k = Σ_r left[k, r] ⊗ right[k, r]            left [K, R, O], right [K, R, I]

Wherever an op takes x it also takes integers [B, T], int64 or int32: indices that stand for one-hot rows (the input of
an embedding). All floating tensors of a call have one dtype and one device. `backend` is "auto", "torch" or "triton".

Every op raises ValueError where shapes, dtypes or devices do not fit each other, and RuntimeError where
backend="triton" cannot be met. The code under "Torch:" is the op's definition, as in `l3d_kernels.reference`.

Derivatives: in plain torch any number of times, but for `sparse_decode` and `softmax_mean`; through Triton kernels
once, and asked twice they raise. Under torch.func's transforms (grad, vmap, jvp) and in forward mode "auto" and "torch"
run the definition, which forms V and G whole. backend="triton" works under vmap and grad and is refused under jvp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l3d_kernels import checks, cpu
from l3d_kernels.registry import implementation
from l3d_kernels.sparse import SparseCoefficients
from l3d_kernels.transforms import transformed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# --- projections: <V_k, G_s> ------------------------------------------------------------------------------------


def project(
    x: Float[Tensor, "B T I"] | Int[Tensor, "B T"],
    dy: Float[Tensor, "S T O"],
    left: Float[Tensor, "K R O"],
    right: Float[Tensor, "K R I"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "S K"]:
    """Project every sample's gradient on every direction: c_sk = <V_k, G_s>, [S, K].

    c_sk = Σ_t Σ_r (x[b, t] . right[k, r]) (dy[s, t] . left[k, r]), b = s // (S // B).
    Summed over T and R, not averaged. Differentiable in x, dy, left and right. Source: the paper's encoder
    (arXiv 2504.00194).

    Torch: `einsum("sti,kri,sto,kro->sk", x.repeat_interleave(S // B, 0), right, dy, left)`

    >>> x, dy = torch.ones(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> project(x, dy, left=torch.ones(1, 1, 3), right=torch.ones(1, 1, 2))
    tensor([[12.]])
    """
    checks.check_projection(x, dy, left, right)
    return implementation(cpu.project, backend, dy)(x, dy, left, right)


def project_tiled(
    x: Float[Tensor, "B T I"],
    dy: Float[Tensor, "S T O"],
    left: Float[Tensor, "K R O"],
    right: Float[Tensor, "K R I"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "S K"]:
    """Project as `project` does, from gradients that are multiplied out a few rows of O at a time: [S, K].

    Cheaper than the factors where R·(I+O) is large beside I·O / T; neither [S, O, I] nor [K, O, I] ever exists.
    Differentiable in left and right. Raises ValueError for an x of integers, and where x or dy needs a gradient.

    Torch: `project_dense(G, left, right)` with G [S, O, I]
    """
    checks.check_projection(x, dy, left, right)
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}; use project for indices")
    if (x.requires_grad or dy.requires_grad) and not transformed():
        raise ValueError("x, dy: project_tiled has no gradient to them; detach them, or use project")
    return implementation(cpu.project_tiled, backend, dy)(x, dy, left, right)


def project_at(
    x: Float[Tensor, "B T I"] | Int[Tensor, "B T"],
    dy: Float[Tensor, "S T O"],
    left: Float[Tensor, "K R O"],
    right: Float[Tensor, "K R I"],
    kept: SparseCoefficients,
    *,
    backend: str = "auto",
) -> Float[Tensor, "N"]:
    """Project at the kept pairs (s, k) only, in their order: [N]. Training uses it where few coefficients are kept.

    The values of `kept` are not read. The cost is that of N pairs, not of S·K. Differentiable in left and right, on
    the torch path in x and dy too; the kernels raise ValueError where x or dy needs a gradient.

    Torch: `project(x, dy, left, right)[kept.rows, kept.columns]`
    """
    checks.check_projection(x, dy, left, right)
    checks.check_kept(kept, left, dy.shape[0], values=False)
    return implementation(cpu.project_at, backend, dy)(x, dy, left, right, kept)


def project_dense(
    grad: Float[Tensor, "S O I"], left: Float[Tensor, "K R O"], right: Float[Tensor, "K R I"], *, backend: str = "auto"
) -> Float[Tensor, "S K"]:
    """Project materialised gradients: c_sk = <V_k, grad_s> = Σ_o Σ_i grad[s, o, i] V_k[o, i], [S, K].

    V is formed for a few rows of O at a time, forward and backward, so that [K, O, I] exists only where it is small.
    Differentiable in all three tensors.

    Torch: `einsum("soi,kro,kri->sk", grad, left, right)`
    """
    checks.check_dense(grad, left, right)
    return implementation(cpu.project_dense, backend, grad)(grad, left, right)


def project_topk(
    x: Float[Tensor, "B T I"] | Int[Tensor, "B T"],
    dy: Float[Tensor, "S T O"],
    left: Float[Tensor, "K R O"],
    right: Float[Tensor, "K R I"],
    n: int,
    base: Float[Tensor, "S K"] | None = None,
    *,
    backend: str = "auto",
) -> SparseCoefficients:
    """Project, add `base` (the sum over other weight tensors) and keep the n entries of largest magnitude.

    The kernels count the first histogram of magnitudes while they project, so that selecting reads the coefficients
    once less. The kept values are differentiable in left and right, at the cost of the kept pairs. Raises ValueError
    unless 0 <= n <= S*K, and where x, dy or base needs a gradient.

    Torch: `batch_topk(base + project(x, dy, left, right), n)`
    """
    checks.check_projection(x, dy, left, right)
    if base is not None:
        checks.check_base(base, dy, left)
    size = dy.shape[0] * left.shape[0]
    n = checks.check_count(n, size, f"S*K = {size}")
    if (x.requires_grad or dy.requires_grad or (base is not None and base.requires_grad)) and not transformed():
        raise ValueError("x, dy, base: project_topk has no gradient to them; detach them")
    return implementation(cpu.project_topk, backend, dy)(x, dy, left, right, n, base)


# --- batch top-k ------------------------------------------------------------------------------------------------


def batch_topk(
    coefficients: Float[Tensor, "S K"], n: int, n_groups: int = 1, *, backend: str = "auto"
) -> SparseCoefficients:
    """Keep the n entries of largest magnitude in a whole batch of coefficients: exactly n, in row-major order.

    Ties go to the lower flat index; NaN counts as infinitely large. With n_groups > 1 the K columns are that many equal
    blocks of neighbours (decompositions side by side), each keeps its own n entries, and `threshold` is [n_groups].
    The kept values are differentiable in `coefficients`. Raises ValueError unless 0 <= n <= S*K / n_groups.
    Source: Bussmann et al., BatchTopK (arXiv 2412.06410), as the paper applies it.

    Torch: `coefficients.abs().flatten().argsort(descending=True, stable=True)[:n].sort()`

    >>> kept = batch_topk(torch.tensor([[3.0, -1.0], [0.5, -4.0]]), 2)
    >>> kept.values, kept.rows, kept.columns, kept.threshold
    (tensor([ 3., -4.]), tensor([0, 1]), tensor([0, 1]), tensor(3.))
    """
    checks.check_matrix(coefficients)
    n_groups = checks.integer("n_groups", n_groups)
    if n_groups < 1 or coefficients.shape[1] % n_groups:
        raise ValueError(f"n_groups: expected a divisor of the {coefficients.shape[1]} columns, got {n_groups}")
    size = coefficients.numel() // n_groups
    n = checks.check_count(n, size, f"S*K = {size}")
    return implementation(cpu.batch_topk, backend, coefficients)(coefficients, n, n_groups)


def batch_topk_over_ranks(
    coefficients: Float[Tensor, "S K"],
    n: int,
    total: Callable[[Tensor], Tensor],
    earlier: Callable[[Tensor], Tensor],
    *,
    backend: str = "auto",
) -> SparseCoefficients:
    """Keep the n entries of largest magnitude of a matrix whose rows are split over processes; return this rank's.

    Args:
        coefficients: this rank's rows; ranks hold consecutive rows, any number each, also none.
        n: how many entries to keep over all ranks, 0 <= n <= the number of all ranks' entries.
        total: sums an int64 tensor over all ranks: `lambda t: (torch.distributed.all_reduce(t), t)[1]`.
        earlier: sums it over the ranks before this one; returns zeros on the first rank.
        backend: the same on every rank.

    Every rank must call it. Only histograms of magnitudes are exchanged. Ties go to the lower rank, then to the lower
    flat index; `threshold` is that of all ranks together. The values are differentiable in `coefficients`.
    """
    checks.check_matrix(coefficients)
    checks.check_functions(total=total, earlier=earlier)
    run = implementation(cpu.batch_topk_over_ranks, backend, coefficients)
    size = int(total(torch.tensor(coefficients.numel(), device=coefficients.device)))
    n = checks.check_count(n, size, f"{size} entries of all ranks")
    return run(coefficients, n, total, earlier)


def batch_topk_over_columns(
    coefficients: Float[Tensor, "S K"], n: int, rank: int, gather: Callable[[Tensor], Tensor]
) -> SparseCoefficients:
    """Keep the n entries of largest magnitude of a matrix whose columns are split over processes; return this rank's.

    Args:
        coefficients: this rank's columns; ranks hold neighbouring columns, any number each, of the same rows.
        n: how many entries to keep over all ranks, 0 <= n <= the number of all ranks' entries.
        rank: this rank's number.
        gather: stacks an int64 tensor [m] of every rank: [ranks, m].

    Every rank must call it. Only histograms of magnitudes are exchanged. Ties go to the lower flat index of the whole
    matrix, as in `batch_topk`; `threshold` is that of all ranks together. The values are differentiable in
    `coefficients`. It runs in plain torch on every device.
    """
    checks.check_matrix(coefficients)
    checks.check_functions(gather=gather)
    run = implementation(cpu.batch_topk_over_columns, "torch", coefficients)
    sizes = gather(torch.tensor([coefficients.numel()], device=coefficients.device))
    rank, size = checks.integer("rank", rank), int(sizes.sum())
    if not 0 <= rank < len(sizes):
        raise ValueError(f"rank: expected 0 <= rank < {len(sizes)}, got {rank}")
    n = checks.check_count(n, size, f"{size} entries of all ranks")
    return run(coefficients, n, rank, gather)


# --- energies and reconstructions -------------------------------------------------------------------------------


def gram(
    left: Float[Tensor, "K R O"] | Sequence[Float[Tensor, "K _ _"]],
    right: Float[Tensor, "K R I"] | Sequence[Float[Tensor, "K _ _"]],
    *,
    backend: str = "auto",
) -> Float[Tensor, "K K"]:
    """Compute the inner products of all directions: M_kj = <V_k, V_j>, [K, K].

    M_kj = Σ_rr' (left_kr . left_jr') (right_kr . right_jr'), summed over both ranks; of lists, one left and right for
    each tensor, the sum over tensors, of which kernels take those of equal R together. Differentiable in all tensors.

    Torch: `einsum("koi,joi->kj", V, V)` with V [K, O, I]
    """
    first = checks.check_pairs(checks.check_factors, "left", left=left, right=right)
    return implementation(cpu.gram, backend, first)(left, right)


def gram_energy(
    kept: SparseCoefficients, left: Float[Tensor, "K R O"], right: Float[Tensor, "K R I"], *, backend: str = "auto"
) -> Float[Tensor, "S"]:
    """Compute the squared norm of every sample's reconstruction: ‖ĝ_s‖² = c_sᵀ M c_s with M = gram(left, right), [S].

    Summed over O and I, not averaged. From co-active pairs or from the full M, whichever costs less. Differentiable in
    the kept values, left and right.

    Torch: `reconstruct(kept, left, right).square().sum((1, 2))`
    """
    checks.check_factors(left, right)
    checks.check_kept(kept, left)
    return implementation(cpu.gram_energy, backend, left)(kept, left, right)


def gram_energy_coactive(
    kept: SparseCoefficients,
    left: Float[Tensor, "K R O"] | Sequence[Float[Tensor, "K _ _"]],
    right: Float[Tensor, "K R I"] | Sequence[Float[Tensor, "K _ _"]],
    *,
    backend: str = "auto",
) -> Float[Tensor, "S"]:
    """Compute `gram_energy` over the pairs of subnetworks kept in the same sample, whatever their number: [S].

    Of lists, one left and right for each tensor that the subnetworks have factors for, the sum over tensors; kernels
    take those of equal R together. R²(I+O) Σ_s n_s² multiply-adds, n_s kept in sample s. Differentiable in the kept
    values, left and right.

    Torch: `reconstruct(kept, left, right).square().sum((1, 2))`
    """
    first = checks.check_pairs(checks.check_factors, "left", left=left, right=right)
    checks.check_kept(kept, first)
    return implementation(cpu.gram_energy_coactive, backend, first)(kept, left, right)


def squared_gradient_norm(
    x: Float[Tensor, "B T I"] | Int[Tensor, "B T"] | Sequence[Float[Tensor, "_ _ _"] | Int[Tensor, "_ _"]],
    dy: Float[Tensor, "S T O"] | Sequence[Float[Tensor, "S _ _"]],
    *,
    backend: str = "auto",
) -> Float[Tensor, "S"]:
    """Compute the squared norm of every sample's gradient: ‖G_s‖² = Σ_tt' (x_t . x_t') (dy_st . dy_st'), [S].

    Summed over O and I, not averaged; of lists, one x and dy for each parameter, the sum over them. Kernels take those
    of equal T together. G [S, O, I] is not formed. Differentiable in x and dy.

    Torch: `einsum("sti,sto->soi", x.repeat_interleave(S // B, 0), dy).square().sum((1, 2))`
    """
    first = checks.check_pairs(checks.check_rows, "dy", x=x, dy=dy)
    return implementation(cpu.squared_gradient_norm, backend, first)(x, dy)


def reconstruct(
    kept: SparseCoefficients, left: Float[Tensor, "K R O"], right: Float[Tensor, "K R I"], *, backend: str = "auto"
) -> Float[Tensor, "S O I"]:
    """Reconstruct every sample's gradient from its kept coefficients: ĝ_s = Σ_k c_sk V_k, [S, O, I].

    Training never forms them. Differentiable in the kept values, left and right.

    Torch: `einsum("sk,kro,kri->soi", kept.dense(), left, right)`
    """
    checks.check_factors(left, right)
    checks.check_kept(kept, left)
    return implementation(cpu.reconstruct, backend, left)(kept, left, right)


def squared_residual_norm(
    kept: SparseCoefficients,
    left: Float[Tensor, "K R O"],
    right: Float[Tensor, "K R I"],
    grad: Float[Tensor, "S O I"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "S"]:
    """Compute the squared norm of every sample's residual: ‖grad_s − ĝ_s‖², [S], without forming ĝ whole.

    Summed over O and I, not averaged. The difference is taken before it is squared, so that nothing cancels where the
    residual is small. Differentiable in the kept values, left, right and grad.

    Torch: `(grad - reconstruct(kept, left, right)).square().sum((1, 2))`
    """
    checks.check_dense(grad, left, right)
    checks.check_kept(kept, left, grad.shape[0])
    return implementation(cpu.squared_residual_norm, backend, grad)(kept, left, right, grad)


# --- decoding ---------------------------------------------------------------------------------------------------


def sparse_decode(
    indices: Int[Tensor, "A k"] | Int[Tensor, "N"],
    values: Float[Tensor, "A k"] | Float[Tensor, "N"],
    weight: Float[Tensor, "L D"],
    row_offsets: Int[Tensor, "offsets"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "A D"]:
    """Decode sparse codes, the decoder of TopK autoencoders: Σ_j values[a, j] weight[indices[a, j]] for every code a.

    `indices` are rows of `weight`. Codes of varying length are given flat, [N], with row_offsets [A+1]: code a owns the
    entries row_offsets[a]:row_offsets[a+1]. Differentiable in values and weight.

    Torch: `einsum("ak,akd->ad", values, weight[indices])`

    >>> sparse_decode(torch.tensor([[0, 2]]), torch.tensor([[1.0, 10.0]]), torch.eye(3))
    tensor([[ 1.,  0., 10.]])
    """
    checks.check_codes(indices, values, weight, row_offsets)
    return implementation(cpu.sparse_decode, backend, weight)(indices, values, weight, row_offsets)


def softmax_mean(
    hidden: Float[Tensor, "S D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "S D"]:
    """Average the rows of a linear head under its softmax: μ_s = Σ_v softmax_v(hidden_s . weight_v + bias_v) weight_v.

    The gradient of KL(softmax(reference) ‖ softmax(logits)) at the head's input is μ less the reference's μ. One pass
    over the vocabulary; no [S, V] array is formed. Raises ValueError where a tensor needs a gradient.

    Torch: `(hidden @ weight.mT + bias).softmax(-1) @ weight`

    >>> softmax_mean(torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[0.5000, 1.5000]])
    """
    checks.check_head(hidden, weight, bias)
    run = implementation(cpu.softmax_mean, backend, hidden)
    if transformed():  # by its definition it is differentiable
        return run(hidden, weight, bias)
    if torch.is_grad_enabled():
        for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name}: softmax_mean is not differentiable; detach it")
    with torch.no_grad():
        return run(hidden, weight, bias)
