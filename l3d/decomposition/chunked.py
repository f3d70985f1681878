"""Compute a step's loss and derivatives from a batch in chunks of samples, or shared by several processes.

Batch top-k looks at the whole batch, so there are two passes over it. The first computes the coefficients [S, K]
without autograd and chooses the kept pairs. The second computes, chunk by chunk, the products at the kept pairs and
their derivatives. ‖ĝ‖² needs no gradients, only the kept coefficients: it is differentiated between the passes, by the
coefficients and the decoder, and the derivatives by the coefficients enter the second pass. Loss, kept set and
gradients are those of `l3d.decomposition.objective` up to the order of summation.
"""

from itertools import chain, islice

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d.decomposition.costs import Plan
from l3d.decomposition.directions import Directions, inner_products
from l3d.decomposition.objective import Objective, at_pairs, energy, everywhere, n_kept, relative
from l3d.decomposition.project import project
from l3d.distributed.process_group import ProcessGroup
from l3d.gradients.chunks import Chunks
from l3d_kernels.ops import batch_topk_over_columns
from l3d_kernels.sparse import sparse_coefficients


def objective_in_chunks(
    chunks: Chunks,
    encoder: Directions,
    decoder: Directions,
    k: float,
    plan: Plan = Plan(),
    group: ProcessGroup | None = None,
) -> tuple[Objective, list[Tensor]]:
    """Compute the loss of a batch at the kept fraction k, and its derivatives by every tensor.

    The decoder's come first, then the encoder's, as in a decomposition. With several processes both sides are this
    process's share of the directions, and so are the kept pairs and the derivatives; loss and residual are those of
    all. Nothing of the result is differentiable.
    """
    parameters = [*decoder.parameters(), *encoder.parameters()]
    n_groups, plans = plan.n_groups, list[Plan]()
    coefficients, norms = [], []
    with torch.no_grad():
        for chunk in chunks:
            n = n_kept(k, chunk.n_samples, encoder.n_subnetworks)
            plans.append(plan._replace(small=False).for_batch(chunk, encoder, n))
            coefficients.append(project(chunk, (encoder,), chunk.shapes, plans[-1]))
            norms.append(chunk.squared_norm_in_range(plan.backend))
        chunks.sizes = [len(each) for each in norms]
        kept = _kept(torch.cat(coefficients), k, plan, group)
        squared_norms = torch.cat(norms)
        if group is not None:  # processes may take different paths, but must go on with the same bits
            squared_norms = group.stacked(squared_norms)[0]

    leaf = kept.values.detach().requires_grad_()
    energies, d_leaf, d_decoder = _energy(kept._replace(values=leaf), leaf, decoder, plan, group)
    totals = d_decoder + [torch.zeros_like(p) for p in encoder.parameters()]

    products = torch.zeros_like(leaf)  # c·<Vout, g> at the kept pairs
    start = 0
    for chunk, own_plan in zip(chunks, plans, strict=True):
        entries = slice(*kept.row_offsets[[start, start + chunk.n_samples]].tolist())
        part = _between(kept, start, start + chunk.n_samples, entries)
        start += chunk.n_samples
        sums, sampled = everywhere(chunk, (encoder, decoder), own_plan)
        values, overlap = at_pairs(chunk, (encoder, decoder), sums, part, sampled, own_plan)
        products[entries] = (values * overlap).detach()
        share = (values * d_leaf[entries]).sum() - 2 * (values * overlap).sum()
        if not share.requires_grad:
            continue  # no parameter of the model has a part in these samples
        for total, own in zip(totals, torch.autograd.grad(share, parameters, allow_unused=True), strict=True):
            if own is not None:
                total += own
    explained = kept._replace(values=products).dense().unflatten(1, (n_groups, -1)).sum(2)
    residual = energies - 2 * explained  # [S, groups], of this rank's subnetworks
    if group is not None:
        residual = group.total(residual)
    found = relative(kept, squared_norms[:, None] + residual, squared_norms)
    return found, [total / found.squared_norm for total in totals]


def _kept(coefficients: Tensor, k: float, plan: Plan, group: ProcessGroup | None) -> lk.SparseCoefficients:
    """Choose what is kept of the whole batch: [S, K], or of this rank's columns of it."""
    n_samples, n_columns = coefficients.shape
    if group is None:
        n = n_kept(k, n_samples, n_columns // plan.n_groups)
        return lk.batch_topk(coefficients, n, plan.n_groups, backend=plan.backend)
    n = n_kept(k, n_samples, int(group.total(torch.tensor(n_columns, device=coefficients.device))))
    return batch_topk_over_columns(coefficients, n, group.rank, group.stacked)


def _between(kept: lk.SparseCoefficients, start: int, stop: int, entries: slice) -> lk.SparseCoefficients:
    """Take the kept entries of neighbouring samples."""
    rows, columns = kept.rows[entries] - start, kept.columns[entries]
    return sparse_coefficients(kept.values[entries], rows, columns, kept.threshold, (stop - start, kept.shape[1]))


def _energy(
    kept: lk.SparseCoefficients, leaf: Tensor, decoder: Directions, plan: Plan, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return ‖ĝ_s‖² [S, groups], or this rank's share of it, and the whole's derivatives by `leaf` and the decoder."""
    variables = [leaf, *decoder.parameters()]
    own = energy(kept, decoder, plan)
    totals = _derivatives(own.sum(), variables)
    value = own.detach()
    if group is None:
        return value, totals[0], totals[1:]
    used = kept.columns.unique()
    factors = chain.from_iterable(decoder.factors(used))
    payload = [kept.dense()[:, used].mT, *factors]  # [n, S] coefficients, then the directions' factors
    for coefficients, *visiting in group.visitors([each.detach() for each in payload]):
        if not len(used):
            continue
        remaining, ours = iter(visiting), list(decoder.factors(used))
        theirs = (tuple(islice(remaining, len(each))) for each in ours)
        gram = inner_products(theirs, ours, plan.backend)  # [n, own n]
        cross = ((coefficients.mT @ gram) * kept.dense()[:, used]).sum(1)
        for total, more in zip(totals, _derivatives(2 * cross.sum(), variables), strict=True):
            total += more
        value = value + cross.detach()[:, None]
    return value, totals[0], totals[1:]


def _derivatives(value: Tensor, variables: list[Tensor]) -> list[Tensor]:
    return [each.clone() for each in torch.autograd.grad(value, variables, materialize_grads=True)]
