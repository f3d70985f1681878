"""A training step's loss and gradients from a batch that is never at hand whole: in chunks of samples, over ranks.

Batch top-k looks at the whole batch, so there are two passes over it: the first for the coefficients [S, K], without
autograd, after which it is known what is kept; the second, chunk by chunk, for the products of the kept pairs and
their derivatives. ‖ĝ‖² needs the kept coefficients alone, no gradients: it is differentiated in between, by the
coefficients and the decoder, and the former flow into the second pass. Loss, kept set and gradients are those of
`l3d.decomposition.objective` up to the order of summation.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d.decomposition.costs import Path, choose_paths
from l3d.decomposition.directions import Directions, Whole
from l3d.decomposition.objective import Objective, at_pairs, energy, everywhere, n_kept
from l3d.decomposition.project import project
from l3d.distributed.process_group import Ranks
from l3d.gradients.factors import Gradients, concatenate
from l3d_kernels.ops import batch_topk_over_columns
from l3d_kernels.sparse import sparse_coefficients


class Chunks:
    """A batch's gradients, some samples at a time; walked over as often as needed.

    Args:
        make: returns a chunk; it may hold it ready or extract it anew each time.
        n_chunks: how many there are.
    """

    def __init__(self, make: Callable[[int], Gradients], n_chunks: int) -> None:
        self.make, self.n_chunks = make, n_chunks
        self.sizes: list[int] = []  # samples in each chunk, known once they have been walked over

    @classmethod
    def of(cls, gradients: Gradients, size: int) -> "Chunks":
        """Cut a batch that is at hand into chunks of so many samples."""
        n = gradients.n_samples
        return cls(lambda i: gradients.between(i * size, min(n, (i + 1) * size)), -(-n // size))

    @classmethod
    def held(cls, chunks: Sequence[Gradients]) -> "Chunks":
        """Take chunks that are at hand."""
        return cls(chunks.__getitem__, len(chunks))

    def __iter__(self) -> Iterator[Gradients]:
        """Walk over the chunks."""
        for i in range(self.n_chunks):
            yield self.make(i)

    @property
    def n_samples(self) -> int:
        """S."""
        if not self.sizes:
            self.sizes = [chunk.n_samples for chunk in self]
        return sum(self.sizes)

    def squared_norm(self) -> Tensor:
        """Return ‖g_s‖²: [S]."""
        return torch.cat([chunk.squared_norm() for chunk in self])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Walk over (parameter name, tensor) of all parts of all chunks."""
        for chunk in self:
            yield from chunk.tensors()

    def select(self, samples: Tensor) -> Gradients:
        """Take some samples [n], in that order."""
        found, places, start = [], [], 0
        for chunk in self:
            mine = ((samples >= start) & (samples < start + chunk.n_samples)).nonzero()[:, 0]
            if len(mine):
                found.append(chunk.select(samples[mine] - start))
                places.append(mine)
            start += chunk.n_samples
        return concatenate(found).select(torch.argsort(torch.cat(places)))


def objective_in_chunks(
    chunks: Chunks,
    encoder: Directions,
    decoder: Directions,
    k: float,
    *,
    n_groups: int = 1,
    ranks: Ranks | None = None,
    backend: str = "auto",
) -> tuple[Objective, list[Tensor]]:
    """Compute the loss of a batch at the kept fraction k, and its derivatives by every tensor.

    The decoder's come first, then the encoder's, as in a decomposition. With ranks, encoder and decoder are this
    rank's share of the directions, and so are what is kept and the derivatives; loss and residual are the whole's.
    Nothing of the result is differentiable.
    """
    parameters = [*decoder.parameters(), *encoder.parameters()]
    paths: list[dict[str, Path]] = []
    coefficients, norms = [], []
    with torch.no_grad():
        for chunk in chunks:
            n = n_kept(k, chunk.n_samples, encoder.n_subnetworks)
            paths.append(choose_paths(chunk, encoder, n))
            coefficients.append(project(chunk, (encoder,), paths[-1], chunk.shapes, backend))
            norms.append(chunk.squared_norm(backend))
        chunks.sizes = [len(each) for each in norms]
        kept = _kept(torch.cat(coefficients), k, n_groups, ranks, backend)
        squared_norms = torch.cat(norms)
        if ranks is not None:  # they may have been computed by different paths, but have to be the same
            squared_norms = ranks.stacked(squared_norms)[0]
    squared_norm = squared_norms.sum()

    leaf = kept.values.detach().requires_grad_()
    energies, d_leaf, d_decoder = _energy(kept._replace(values=leaf), leaf, decoder, n_groups, ranks, backend)
    totals = d_decoder + [torch.zeros_like(p) for p in encoder.parameters()]

    products = torch.zeros_like(leaf)  # c·<Vout, g> at the kept pairs
    start = 0
    for chunk, path in zip(chunks, paths, strict=True):
        entries = slice(*kept.row_offsets[[start, start + chunk.n_samples]].tolist())
        part = _between(kept, start, start + chunk.n_samples, entries)
        start += chunk.n_samples
        sums, sampled = everywhere(chunk, (encoder, decoder), path, backend)
        values, overlap = at_pairs(chunk, (encoder, decoder), sums, part, sampled, backend)
        products[entries] = (values * overlap).detach()
        share = (values * d_leaf[entries]).sum() - 2 * (values * overlap).sum()
        if not share.requires_grad:
            continue  # no parameter of the model has a part in these samples
        for total, own in zip(totals, torch.autograd.grad(share, parameters, allow_unused=True), strict=True):
            if own is not None:
                total += own
    explained = kept._replace(values=products).dense().unflatten(1, (n_groups, -1)).sum(2)
    residual = energies - 2 * explained  # [S, groups], of this rank's subnetworks
    if ranks is not None:
        residual = ranks.total(residual)
    residual = squared_norms[:, None] + residual
    loss = residual.sum(0) / squared_norm
    if n_groups == 1:
        loss, residual = loss[0], residual[:, 0]
    return Objective(loss, kept, squared_norm, residual), [total / squared_norm for total in totals]


def _kept(coefficients: Tensor, k: float, n_groups: int, ranks: Ranks | None, backend: str) -> lk.SparseCoefficients:
    """Choose what is kept of the whole batch: [S, K], or of this rank's columns of it."""
    n_samples, n_columns = coefficients.shape
    if ranks is None:
        return lk.batch_topk(coefficients, n_kept(k, n_samples, n_columns // n_groups), n_groups, backend=backend)
    n = n_kept(k, n_samples, int(ranks.total(torch.tensor(n_columns, device=coefficients.device))))
    return batch_topk_over_columns(coefficients, n, ranks.rank, ranks.stacked)


def _between(kept: lk.SparseCoefficients, start: int, stop: int, entries: slice) -> lk.SparseCoefficients:
    """Take the kept entries of neighbouring samples."""
    rows, columns = kept.rows[entries] - start, kept.columns[entries]
    return sparse_coefficients(kept.values[entries], rows, columns, kept.threshold, (stop - start, kept.shape[1]))


def _energy(
    kept: lk.SparseCoefficients, leaf: Tensor, decoder: Directions, n_groups: int, ranks: Ranks | None, backend: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return ‖ĝ_s‖² [S, groups], or this rank's share of it, and the whole's derivatives by `leaf` and the decoder."""
    variables = [leaf, *decoder.parameters()]
    own = energy(kept, decoder, None, n_groups, backend)
    totals = _derivatives(own.sum(), variables)
    value = own.detach()
    if ranks is None:
        return value, totals[0], totals[1:]
    used = kept.columns.unique()
    payload = [kept.dense().detach()[:, used].mT]  # [n, S] coefficients, then the directions' factors
    for _, piece in decoder.items():
        payload += [piece.vector[used]] if isinstance(piece, Whole) else [each[used] for each in piece.factors()]
    for coefficients, *factors in ranks.visitors([each.detach() for each in payload]):
        if not len(used):
            continue
        gram = _cross_gram(decoder, used, iter(factors), backend)  # [n, own n]
        cross = ((coefficients.mT @ gram) * kept.dense()[:, used]).sum(1)
        for total, more in zip(totals, _derivatives(2 * cross.sum(), variables), strict=True):
            total += more
        value = value + cross.detach()[:, None]
    return value, totals[0], totals[1:]


def _cross_gram(decoder: Directions, used: Tensor, factors: Iterator[Tensor], backend: str) -> Tensor:
    """Return <V_j, V_k> of visiting directions j, given by factors, and own ones k in `used`: [n, own n]."""
    total: Any = 0
    for _, piece in decoder.items():
        if isinstance(piece, Whole):
            total = total + next(factors) @ piece.vector[used].mT
            continue
        left, right = next(factors), next(factors)  # a direction is a gradient whose positions are its ranks
        own_left, own_right = (each[used] for each in piece.factors())
        total = total + lk.project(right, left, own_left, own_right, backend=backend)
    return total


def _derivatives(value: Tensor, variables: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, variables, allow_unused=True)
    return [torch.zeros_like(v) if d is None else d.clone() for v, d in zip(variables, found, strict=True)]
