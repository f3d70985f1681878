"""Exchange subnetworks that others can stand in for by ones that what is left over asks for.

Descent does not leave some poor places: two subnetworks share one circuit, or one is a mixture of two, while a
weaker circuit is reconstructed by nothing and, being orthogonal to all there is, pulls at nothing. So every so often
the subnetwork that is worth least is weighed against directions learned from the residuals r_s = g_s − ĝ_s:

    worth of k   Σ_s ‖r_s + c_sk V_k‖² − ‖r_s‖² − max_j <r_s + c_sk V_k, V_j>²      over the samples that keep k
    gain of u    Σ_s <r_s + c_sk V_k, u>²        over as many samples as one is kept for on average, the best of them

If the gain is larger, u shall take k's place, and the next pair is looked at. That is a screening. What counts is
whether u in k's place leaves less of samples that nothing was learned from or chosen by, each coded by the batch's
largest coefficients with their values fitted anew: of a circuit that two subnetworks shared, the one that stays has yet
to learn the whole. All of it is read off <V, g>, <u, g>, <V, V> and <V, u>; no gradient is reconstructed, but where
that is the faster way in a small network.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from l3d.decomposition.chunked import Chunks
from l3d.decomposition.objective import n_kept
from l3d.decomposition.subnetworks import Decomposition
from l3d.gradients.factors import Gradients
from l3d.training.candidates import FLAT, ProbeGradients, Residuals, learn
from l3d.training.settings import Settings
from l3d_kernels import cpu
from l3d_kernels.splitting import pieces

EVERY = 100  # steps from one exchange to the next
AT_ONCE = 4  # restarts that are looked at in one; more take turns, so that what exchanges cost has a bound
ENOUGH = 64  # samples of a subnetwork that should be looked at, half of them learned from
MOST, BATCHES = 512, 20  # samples that are, but for a last batch, and batches they come from, at most
CHEAP = 1024  # samples, from up to EVERY batches, where there are so few parameters that this is nothing
REFITS, FLATTEST = 4, 1e-4  # steps in which kept values are fitted anew, and the curvature that is one to them
SURE = 1.0  # standard errors, over the samples, by which what is left must become less
MARGIN = 1.1  # what a new direction must gain, relative to what the old one is worth


class Probe:
    """The last batches before each exchange: a small one holds too few samples of a subnetwork to judge it by.

    Args:
        settings: of the run. As with revivals, there are exchanges while k is at its value and until the last fifth.
        n_samples: in the first batch.
        n_entries: of all parameters.
    """

    def __init__(self, settings: Settings, n_samples: int, n_entries: int) -> None:
        self.first = settings.warm_start + EVERY if settings.revive else math.inf
        self.last = 0.8 * settings.steps
        wanted, batches = min(MOST, ENOUGH / settings.k), BATCHES
        if CHEAP * n_entries <= FLAT // 2:
            wanted, batches = CHEAP, EVERY
        self.length = min(batches, math.ceil(wanted / n_samples))
        self.batches: list[Gradients | Chunks] = []

    def due(self, step: int) -> bool:
        """Tell whether there is an exchange after so many steps."""
        return step % EVERY == 0 and self.first <= step <= self.last

    def turn(self, step: int, n_restarts: int) -> list[int]:
        """List the restarts that an exchange after so many steps looks at."""
        first = step // EVERY * AT_ONCE
        return sorted({(first + i) % n_restarts for i in range(min(AT_ONCE, n_restarts))})

    def missed(self, step: int) -> range:
        """List the batches, counted from 0, that a run which goes on after so many steps should have at hand."""
        coming = (step // EVERY + 1) * EVERY
        return range(coming - self.length, step) if self.due(coming) else range(0)

    def add(self, step: int, gradients: Gradients | Chunks) -> None:
        """Remember the batch of a step, counted from 1, if the next exchange will want it."""
        coming = -(-step // EVERY) * EVERY
        if self.due(coming) and step > coming - self.length:
            self.batches.append(gradients)

    def take(self) -> Chunks:
        """Return the batches in pieces, held or extracted anew as they are, and forget them."""
        taken = [Chunks.held([batch]) if isinstance(batch, Gradients) else batch for batch in self.batches]
        self.batches = []
        makers = [partial(chunks.make, i) for chunks in taken for i in range(chunks.n_chunks)]
        probe = Chunks(lambda i: makers[i](), len(makers))
        if all(chunks.sizes for chunks in taken):
            probe.sizes = [size for chunks in taken for size in chunks.sizes]
        return probe


class Code(NamedTuple):
    """Samples in terms of K directions and n candidates."""

    values: Tensor  # [S, K + n] coefficients; 0 where not kept
    overlaps: Tensor  # [S, K + n] <V, g_s>
    gram: Tensor  # [K + n, K + n] <V, V>

    def left(self) -> Tensor:
        """Return <V, r_s>: [S, K + n]."""
        return self.overlaps - self.values @ self.gram

    def of(self, samples: Tensor) -> "Code":
        """Take some of the samples [n]."""
        return Code(self.values[samples], self.overlaps[samples], self.gram)


@torch.no_grad()
def exchange(samples: ProbeGradients, decomposition: Decomposition, k: float, generator: torch.Generator) -> Tensor:
    """Set subnetworks anew that are worth less than what can take their place; encoder and decoder alike.

    Half of the samples, drawn at random, are learned from and chosen by; the other half confirms. The gradients are on
    the decomposition's device. Returns which have changed: [n] int64.
    """
    encoder, decoder = decomposition.encoder, decomposition.decoder
    coefficients, overlaps = samples.project(encoder), samples.project(decoder)
    values = coefficients * cpu.largest(coefficients, n_kept(k, *coefficients.shape))[0]
    gram = decoder.gram()
    residual = samples.squared_norm() + ((values @ gram - 2 * overlaps) * values).sum(1)

    order = torch.randperm(len(values), generator=generator).to(values.device)
    seen, unseen = order.tensor_split(2)
    left = Residuals.of(samples.select(seen), values[seen], decoder)
    new = learn(left, residual[seen], k, generator)
    between = decoder.inner(new)
    code = Code(
        nn.functional.pad(values, (0, new.n_subnetworks)),
        torch.cat([overlaps, samples.project(new)], 1),
        torch.cat([torch.cat([gram, between], 1), torch.cat([between.mT, new.gram()], 1)]),
    )
    pairs = choose(code.of(seen), decoder.n_subnetworks)
    pairs = confirmed(pairs, code.of(unseen), coefficients[unseen], k)
    for side in (encoder, decoder):
        for parameter, found in zip(side.parameters(), new.parameters(), strict=True):
            for old, taken in pairs:
                parameter[old] = found[taken]
    return torch.tensor([old for old, _ in pairs], dtype=torch.int64, device=values.device)


def choose(code: Code, n_subnetworks: int) -> list[tuple[int, int]]:
    """Return pairs (subnetwork, candidate that takes its place), each of which lowers what is left of the samples.

    A screening: samples are left to whichever direction suits them best, not to the batch's largest coefficients. What
    those make of a pair is for `confirmed` to say.
    """
    values, overlaps, gram = code
    n_candidates = len(gram) - n_subnetworks
    members = torch.arange(len(gram), device=gram.device) < n_subnetworks
    pairs: list[tuple[int, int]] = []
    n_active = max(1, round(float((values != 0).sum()) / n_subnetworks))
    for _ in range(n_candidates):
        code = Code(values, overlaps, gram)
        left = code.left()
        worth = worths(code, left, members)
        old = int(worth[:n_subnetworks].argmin())
        freed = left[:, n_subnetworks:] + values[:, old, None] * gram[old, n_subnetworks:]  # <u, r_s + c V_old>
        most = freed.square().topk(n_active, dim=0)
        gains = most.values.sum(0).masked_fill(members[n_subnetworks:], -math.inf)
        taken = int(gains.argmax())
        if not gains[taken] > MARGIN * worth[old]:
            break
        rows, new = most.indices[:, taken], n_subnetworks + taken
        values = values.clone()
        values[:, old] = 0
        values[rows, new] = freed[rows, taken]
        members[old], members[new] = False, True
        pairs.append((old, taken))
    return pairs


def confirmed(pairs: list[tuple[int, int]], code: Code, coefficients: Tensor, k: float) -> list[tuple[int, int]]:
    """Return those pairs, one after another, with which what the best k coefficients leave is indeed less.

    That is, Σ_s d_s > SURE (Σ_s d_s²)^½ for what is left less of each sample. coefficients [S, K]: of the encoder; a
    candidate's are its overlaps. What it gains may be what others lose, which are no longer among the largest of the
    batch.
    """
    n_subnetworks = coefficients.shape[1]
    held = list(range(n_subnetworks))
    n = n_kept(k, *coefficients.shape)

    def left(columns: list[int], found: Tensor) -> Tensor:
        gram, overlaps = code.gram[columns][:, columns], code.overlaps[:, columns]
        kept = cpu.largest(found, n)[0]
        values = refitted(found * kept, kept, overlaps, gram)
        return ((values @ gram - 2 * overlaps) * values).sum(1)

    before, good = left(held, coefficients), []
    for old, taken in pairs:
        columns, found = held.copy(), coefficients.clone()
        columns[old] = n_subnetworks + taken
        found[:, old] = code.overlaps[:, columns[old]]
        after = left(columns, found)
        less = before - after
        if less.sum() > SURE * less.square().sum().sqrt():
            before, held, coefficients = after, columns, found
            good.append((old, taken))
    return good


def refitted(values: Tensor, kept: Tensor, overlaps: Tensor, gram: Tensor) -> Tensor:
    """Take kept values [S, K] most of the way to those of least squares, by conjugate gradients."""
    left = (overlaps - values @ gram) * kept
    along, square = left, left.square().sum(1, keepdim=True)
    for _ in range(REFITS):
        back = (along @ gram) * kept
        curvature = (along * back).sum(1, keepdim=True)
        flat = curvature <= FLATTEST * along.square().sum(1, keepdim=True)  # rounding is all that is left
        step = (square / curvature).masked_fill(flat, 0)
        values, left = values + step * along, left - step * back
        before, square = square, left.square().sum(1, keepdim=True)
        along = left + (square / before).masked_fill(flat, 0) * along
    return values


def worths(code: Code, left: Tensor, members: Tensor) -> Tensor:
    """Return by how much the residuals grow without each member, its samples left to the best other one: [K + n].

    left [S, K + n] is the code's; infinity for what is no member [K + n] bool.
    """
    rows, columns = code.values.nonzero(as_tuple=True)
    grows = torch.zeros_like(code.values)
    for piece in pieces(len(rows), len(members)):
        row, column = rows[piece], columns[piece]
        c = code.values[row, column]
        freed = left[row] + c[:, None] * code.gram[column]  # <V_j, r_s + c V_k>
        others = members.expand(len(row), -1).scatter(1, column[:, None], False)
        best = freed.square().masked_fill(~others, 0).amax(1)
        grows[row, column] = c * (2 * left[row, column] + c * code.gram[column, column]) - best
    return grows.sum(0).masked_fill(~members, math.inf)
