"""Learn candidates for a subnetwork's place from the residual gradients of some samples.

A candidate u ascends  J(u) = Σ_s <r_s, u>² / ‖g_s‖²,  r_s = g_s − ĝ_s,  over the share k of the samples where that is
largest. J is relative to each sample's own, or u would be that of the one or two of largest gradient. It is convex, so
no step size is needed: its derivative is 2 D with D = Σ_s <r_s, u> r_s / ‖g_s‖², and the unit direction that has most
of D is nowhere worse than u. Of V = Σ_r left_r (x) right_r that is left = D right where right is orthonormal, and the
other way round: each step sets one of the two, of all tensors. (Thirty steps of Adam ended at a quarter of this J.)
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from l3d.decomposition.costs import Plan
from l3d.decomposition.directions import FLOAT32_CPU, Directions, LowRank, Tucker, Whole
from l3d.decomposition.flat import by_factors, flattened, multiplied_out
from l3d.decomposition.project import project
from l3d.gradients.chunks import Chunks
from l3d.gradients.factors import matrix_shape
from l3d.training.options import Replacement
from l3d.training.start import NOISE, draw_samples, truncated

NO_CHUNKS = Chunks.held([])  # where gradients are multiplied out


class ProbeGradients:
    """Gradients that are projected often: multiplied out once if they are few and small."""

    def __init__(self, chunks: Chunks, flat: Tensor | None, backend: str) -> None:
        self.chunks, self.flat, self.backend = chunks, flat, backend

    @classmethod
    def of(
        cls, probe: Chunks, directions: Directions, backend: str, multiplied_out: int = Replacement.multiplied_out
    ) -> "ProbeGradients":
        """Take all samples of some batches; multiplied_out: entries up to which they are."""
        n_entries = sum(shape.numel() for shape in directions.shapes.values())
        if probe.n_samples * n_entries > multiplied_out:
            return cls(probe, None, backend)
        flat = torch.cat([flattened(chunk, directions) for chunk in probe])
        return cls(NO_CHUNKS, flat.to(next(directions.parameters())), backend)

    def squared_norm(self) -> Tensor:
        """Return ‖g_s‖²: [S]."""
        return self.chunks.squared_norm() if self.flat is None else self.flat.square().sum(1)

    def project(self, directions: Directions) -> Tensor:
        """Return <V_k, g_s>: [S, K]; differentiable."""
        if self.flat is not None:
            return self.flat @ multiplied_out(directions).mT
        found = []
        for each in self.chunks:
            plan = Plan(self.backend, small=False).for_batch(each, directions, each.n_samples)
            found.append(project(each, (directions,), each.shapes, plan))
        return torch.cat(found)

    def select(self, chosen: Tensor) -> "ProbeGradients":
        """Take some of them [n], in that order."""
        if self.flat is not None:
            return ProbeGradients(self.chunks, self.flat[chosen], self.backend)
        return ProbeGradients(Chunks.held([self.chunks.select(chosen)]), None, self.backend)


class Residuals(NamedTuple):
    """The residuals of samples under a code: r_s = g_s − Σ_k values_sk V_k."""

    samples: ProbeGradients
    values: Tensor  # [S, K] the code
    decoder: Directions
    flat: Tensor | None  # [S, P] the residuals multiplied out, if the samples are

    @classmethod
    def of(cls, samples: ProbeGradients, values: Tensor, decoder: Directions) -> "Residuals":
        """Take samples and their code."""
        flat = None if samples.flat is None else samples.flat - values @ multiplied_out(decoder)
        return cls(samples, values, decoder, flat)

    def along(self, directions: Directions) -> Tensor:
        """Return <u, r_s>: [S, n]."""
        if self.flat is not None:
            return self.flat @ multiplied_out(directions).mT
        return self.samples.project(directions) - self.values @ self.decoder.inner(directions)

    def derivatives(self, weights: Tensor, directions: Directions) -> list[Tensor]:
        """Return the derivatives of Σ weights <u, r_s> [S, n] by the directions' parameters: those of D."""
        if self.flat is not None:
            return by_factors(weights.mT @ self.flat, directions)
        with torch.enable_grad():
            parameters = list(directions.parameters())
            found = torch.autograd.grad((weights * self.along(directions)).sum(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if d is None else d for p, d in zip(parameters, found, strict=True)]


@torch.no_grad()
def learn(
    left: Residuals, weights: Tensor, k: float, generator: torch.Generator, how: Replacement = Replacement()
) -> Directions:
    """Learn candidates of the decoder's shapes and ranks from residuals, each for a share k of the samples.

    They start from single samples' residuals, drawn with probability proportional to weights [S].
    A tensor of order three or more is learned as a matrix, and its Tucker product is the truncation of that.
    """
    decoder, n_samples = left.decoder, len(left.values)
    inverse = left.samples.squared_norm().to(left.values)[:, None]
    inverse = inverse.clamp_min(torch.finfo(inverse.dtype).tiny).reciprocal()
    n, n_active = min(how.candidates, decoder.n_subnetworks, n_samples), max(1, round(k * n_samples))
    matrices = {name: torch.Size(matrix_shape(s)) if len(s) > 2 else s for name, s in decoder.shapes.items()}
    # a Tucker product may have a larger first rank than its matrix has columns
    ranks = {name: tuple(min(r, *matrices[name]) for r in each[:1]) for name, each in decoder.ranks().items()}
    new = Directions(matrices, ranks, n, generator, factory=FLOAT32_CPU).to(inverse)
    drawn = draw_samples(weights, n, generator).to(inverse.device)
    alone = nn.functional.one_hot(drawn, n_samples).mT.to(inverse)
    _set(new, list(new.parameters()), 1)
    for step in range(how.steps):
        if step < how.steps_alone:
            taken = alone
        else:
            along = left.along(new)
            share = along * inverse
            most = (along * share).topk(n_active, dim=0).indices
            taken = torch.zeros_like(share).scatter_(0, most, share.gather(0, most))
        _set(new, left.derivatives(taken, new), step % 2)
    return _finished(new, decoder, generator)


def _set(directions: Directions, derivatives: list[Tensor], side: int) -> None:
    """Set all vectors, and each matrix's left (side 0) or right (1), to the derivatives, and norms to one.

    That side is then made orthonormal and the other one multiplied to match, so that V does not change. If the
    derivatives span less than the rank, the side is completed arbitrarily, with weight zero.
    """
    rest = iter(derivatives)
    others, squares = [], []
    for _, piece in directions.items():
        if isinstance(piece, Whole):
            other = piece.vector.copy_(next(rest))
        else:
            factors = piece.factors()
            q, t = torch.linalg.qr((next(rest), next(rest))[side].mT)
            factors[side].copy_(q.mT)
            other = factors[1 - side].copy_(t @ factors[1 - side])
        others.append(other)
        squares.append(other.flatten(1).square().sum(1))
    total = torch.stack(squares).sum(0).clamp_min(torch.finfo(squares[0].dtype).tiny).rsqrt()
    for other in others:
        other.mul_(total.view(-1, *[1] * (other.ndim - 1)))


def _finished(found: Directions, decoder: Directions, generator: torch.Generator) -> Directions:
    """Bring directions, whose tensors are all matrices or vectors, into a decoder's form, evenly over the factors."""
    for _, piece in found.items():
        if isinstance(piece, LowRank):  # neither side may be zero: it would have no gradient and stay zero
            norms = [factor.flatten(1).norm(dim=1).clamp_min(NOISE)[:, None, None] for factor in piece.factors()]
            piece.left.mul_((norms[1] / norms[0]).sqrt())
            piece.right.mul_((norms[0] / norms[1]).sqrt())
    if found.shapes != decoder.shapes:
        shapes, ranks = decoder.shapes, decoder.ranks()
        new = Directions(shapes, ranks, found.n_subnetworks, generator, factory=FLOAT32_CPU)
        new = new.to(next(found.parameters()))
        for (name, piece), (_, own) in zip(new.items(), found.items(), strict=True):
            parts: list[Tensor] = list(own.parameters())
            if isinstance(piece, Tucker):
                whole = (parts[0].mT @ parts[1]).reshape(-1, *decoder.shapes[name])
                parts = truncated(whole, piece.core.shape[1:])
            for parameter, part in zip(piece.parameters(), parts, strict=True):
                parameter.copy_(part)
        found = new
    found.normalize_()
    return found
