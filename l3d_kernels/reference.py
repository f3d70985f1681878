"""Define every op by its formula, in a few einsums that a reader can check against it: the specification.

The kernels and `l3d_kernels.cpu` compute the same values and gradients; tests hold both to these functions in float64.
Under torch.func's transforms and in forward mode these functions run.
Any floating dtype and any device; V [K, O, I] and G [S, O, I] are formed whole, so sizes must be small. Letters as in
`l3d_kernels.ops`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, einsum

from l3d_kernels.sparse import SparseCoefficients, sparse_coefficients
from l3d_kernels.splitting import as_rows

Sides = Tensor | Sequence[Tensor]


def gradients(x: Tensor, dy: Tensor, n_inputs: int) -> Tensor:
    """G_s = Σ_t dy[s, t] ⊗ x[s // (S // B), t]: [S, O, I]. Integers x [B, T] stand for one-hot rows."""
    if not x.is_floating_point():
        x = torch.nn.functional.one_hot(x.long(), n_inputs).to(dy.dtype)
    return einsum("sti,sto->soi", x.repeat_interleave(len(dy) // max(1, len(x)), 0), dy)


def directions(left: Tensor, right: Tensor) -> Tensor:
    """V_k = Σ_r left[k, r] ⊗ right[k, r]: [K, O, I]."""
    return einsum("kro,kri->koi", left, right)


# --- projections ------------------------------------------------------------------------------------------------


def project(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """c_sk = <V_k, G_s>: [S, K]."""
    return project_dense(gradients(x, dy, right.shape[2]), left, right)


def project_tiled(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """c_sk = <V_k, G_s>: [S, K]."""
    return project(x, dy, left, right)


def project_dense(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """c_sk = <V_k, G_s> = Σ_o Σ_i V_k[o, i] grad_s[o, i]: [S, K]."""
    return einsum("soi,koi->sk", grad, directions(left, right))


def project_at(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: SparseCoefficients) -> Tensor:
    """c_sk of the kept pairs (s, k): [N]."""
    return project(x, dy, left, right)[kept.rows, kept.columns]


def project_topk(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None = None
) -> SparseCoefficients:
    """The n entries of largest |base_sk + c_sk|."""
    coefficients = project(x, dy, left, right)
    return batch_topk(coefficients if base is None else base + coefficients, n)


def batch_topk(coefficients: Tensor, n: int, n_groups: int = 1) -> SparseCoefficients:
    """The n entries of largest |c| of each of `n_groups` blocks of columns; ties go to the lower flat index."""
    (S, K), kept, thresholds = coefficients.shape, [], []
    magnitude = coefficients.detach().abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    flat_index = torch.arange(S * K, device=coefficients.device).view(S, K)
    for block, index in zip(magnitude.chunk(n_groups, 1), flat_index.chunk(n_groups, 1), strict=True):
        order = block.flatten().argsort(descending=True, stable=True)[:n]
        kept.append(index.flatten()[order])
        thresholds.append(block.flatten()[order][-1] if n else block.new_tensor(torch.inf))
    flat = torch.cat(kept).sort().values
    rows, columns = flat // max(1, K), flat % max(1, K)
    threshold = thresholds[0] if n_groups == 1 else torch.stack(thresholds)
    return sparse_coefficients(coefficients.flatten()[flat], rows, columns, threshold, (S, K))


def gram(left: Sides, right: Sides) -> Tensor:
    """M_kj = <V_k, V_j>, summed over the tensors of a list: [K, K]."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return torch.stack([gram(*own) for own in zip(left, right, strict=True)]).sum(0)
    v = directions(left, right)
    return einsum("koi,joi->kj", v, v)


def gram_energy(kept: SparseCoefficients, left: Sides, right: Sides) -> Tensor:
    """‖ĝ_s‖² = c_sᵀ M c_s: [S]."""
    c = kept.dense()
    return einsum("sk,kj,sj->s", c, gram(left, right), c)


def gram_energy_coactive(kept: SparseCoefficients, left: Sides, right: Sides) -> Tensor:
    """‖ĝ_s‖² = c_sᵀ M c_s, summed over the tensors of a list: [S]."""
    return gram_energy(kept, left, right)


def squared_gradient_norm(x: Sides, dy: Sides) -> Tensor:
    """‖G_s‖² = Σ_tt' (x_t . x_t') (dy_st . dy_st') = Σ_o Σ_i G_s[o, i]², summed over a list: [S]."""
    if not (isinstance(x, Tensor) and isinstance(dy, Tensor)):
        return torch.stack([squared_gradient_norm(*own) for own in zip(x, dy, strict=True)]).sum(0)
    same = x @ x.mT if x.is_floating_point() else (x[:, :, None] == x[:, None, :]).to(dy.dtype)
    return einsum("stu,sto,suo->s", same.repeat_interleave(len(dy) // max(1, len(x)), 0), dy, dy)


def reconstruct(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """ĝ_s = Σ_k c_sk V_k: [S, O, I]."""
    return einsum("sk,koi->soi", kept.dense(), directions(left, right))


def squared_residual_norm(kept: SparseCoefficients, left: Tensor, right: Tensor, grad: Tensor) -> Tensor:
    """‖grad_s − ĝ_s‖²: [S]."""
    return (grad - reconstruct(kept, left, right)).square().sum((1, 2))


# --- decoding, and updates in place -----------------------------------------------------------------------------


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None = None) -> Tensor:
    """out_a = Σ_j values[a, j] weight[indices[a, j]]: [A, D]; by row_offsets, code a owns offsets[a]:offsets[a + 1]."""
    if row_offsets is None:
        return einsum("ak,akd->ad", values, weight[indices])
    code = torch.searchsorted(row_offsets, torch.arange(len(indices), device=weight.device), right=True) - 1  # [N]
    rows = values[:, None] * weight[indices]
    return weight.new_zeros(len(row_offsets) - 1, weight.shape[1]).index_add(0, code, rows)


def softmax_mean(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """μ_s = Σ_v softmax_v(hidden_s . weight_v + bias_v) weight_v: [S, D]."""
    logits = hidden @ weight.mT
    return (logits if bias is None else logits + bias).softmax(-1) @ weight


def adam_step(parameters, grads, first, second, scales, counts, moves, lr, betas=(0.9, 0.999), eps=1e-8, grams=0):  # type: ignore[no-untyped-def]
    """p_k -= lr·scale·m̂_k / (v̂_k^½ + eps) where k moves, with m, v the running means of g, g²; p_k p_kᵀ: [K, R, R]."""
    for p, g, m, v, scale in zip(parameters, grads, first, second, scales, strict=True):
        for k in moves.nonzero()[:, 0].tolist():
            m[k], v[k] = betas[0] * m[k] + (1 - betas[0]) * g[k], betas[1] * v[k] + (1 - betas[1]) * g[k] ** 2
            means = m[k] / (1 - betas[0] ** counts[k]), v[k] / (1 - betas[1] ** counts[k])
            p[k] -= lr * scale.expand(len(p), *scale.shape[1:])[k] * means[0] / (means[1] ** 0.5 + eps)
    return [einsum("krd,ksd->krs", each, each) for each in map(as_rows, parameters[:grams])]


def rescale(
    parameters: Sequence[Tensor], squared_norms: Tensor, shares: Sequence[int], moves: Tensor | None = None
) -> None:
    """p_k *= squared_norms_k^(−1/2n) where k moves, for tensors of n factors that share a norm."""
    for k in range(len(squared_norms)) if moves is None else moves.nonzero()[:, 0].tolist():
        for each, n in zip(parameters, shares, strict=True):
            each[k] *= squared_norms[k] ** (-0.5 / n)
