"""Exchange subnetworks that others can stand in for by ones that what is left over asks for.

Descent does not leave some poor places: two subnetworks share one circuit, or one is a mixture of two, while a
weaker circuit is reconstructed by nothing and, being orthogonal to all there is, pulls at nothing. So every so often
the subnetwork that is worth least is weighed against directions learned from the residuals r_s = g_s − ĝ_s:

    worth of k   Σ_s ‖r_s + c_sk V_k‖² − ‖r_s‖² − max_j <r_s + c_sk V_k, V_j>²      over the samples that keep k
    gain of u    Σ_s <r_s + c_sk V_k, u>²        over as many samples as one is kept for on average, the best of them

If the gain is larger, u takes k's place, and the next pair is looked at. All of it is read off <V, g>, <u, g>,
<V, V> and <V, u>; no gradient is reconstructed, but where that is the faster way in a small network.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import l3d_kernels as lk
from l3d.chunks import Chunks
from l3d.costs import choose_paths
from l3d.decomposition import Decomposition
from l3d.directions import Directions
from l3d.factors import Gradients
from l3d.flat import flattened, is_small, multiplied_out
from l3d.objective import n_kept
from l3d.optimizer import RelativeAdam
from l3d.project import project
from l3d.settings import Settings
from l3d.start import draw_samples, set_from_samples
from l3d_kernels.reference import pieces

EVERY = 100  # steps from one exchange to the next
AT_ONCE = 4  # restarts that are looked at in one; more take turns, or exchanges would cost more than training
ENOUGH, MOST = 32, 512  # samples of a subnetwork that should be looked at, and of all that are, but for a last batch
BATCHES = 20  # they come from, at most
CANDIDATES, LEARNED_FROM = 16, 256  # directions that are learned at a time, and the samples they are learned from
STEPS, LR = 30, 0.5  # of their ascent
FLAT = 1 << 24  # multiply-adds of R Uᵀ up to which residuals are multiplied out to learn from
MARGIN = 1.1  # what a new direction must gain, relative to what the old one is worth


class Probe:
    """The last batches before each exchange: a small one holds too few samples of a subnetwork to judge it by.

    Args:
        settings: of the run. As with revivals, there are exchanges while k is at its value and until the last fifth.
        n_samples: in the first batch.
    """

    def __init__(self, settings: Settings, n_samples: int) -> None:
        self.first = settings.warm_start + EVERY if settings.revive else math.inf
        self.last = 0.8 * settings.steps
        self.length = min(BATCHES, math.ceil(min(MOST, ENOUGH / settings.k) / n_samples))
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
        """Return the batches in pieces, and forget them."""
        taken, self.batches = self.batches, []
        makers = []
        for batch in taken:
            chunks = Chunks.held([batch]) if isinstance(batch, Gradients) else batch
            makers += [partial(chunks.make, i) for i in range(chunks.n_chunks)]
        return Chunks(lambda i: makers[i](), len(makers))


class Code(NamedTuple):
    """Samples in terms of K directions and n candidates."""

    values: Tensor  # [S, K + n] coefficients; 0 where not kept
    overlaps: Tensor  # [S, K + n] <V, g_s>
    gram: Tensor  # [K + n, K + n] <V, V>

    def left(self) -> Tensor:
        """Return <V, r_s>: [S, K + n]."""
        return self.overlaps - self.values @ self.gram


@torch.no_grad()
def exchange(
    probe: Chunks, decomposition: Decomposition, k: float, generator: torch.Generator, backend: str = "auto"
) -> Tensor:
    """Set subnetworks anew that are worth less than what can take their place; encoder and decoder alike.

    probe: gradients, in the decomposition's dtype and on its device. Returns which have changed: [n] int64.
    """
    encoder, decoder = decomposition.encoder, decomposition.decoder
    coefficients, overlaps = _projected(probe, encoder, backend), _projected(probe, decoder, backend)
    values = lk.batch_topk(coefficients, n_kept(k, *coefficients.shape), backend=backend).dense()
    gram = decoder.gram()
    residual = probe.squared_norm() + ((values @ gram - 2 * overlaps) * values).sum(1)

    samples = draw_samples(residual, min(LEARNED_FROM, len(residual)), generator).to(residual.device)
    new = learn(probe.select(samples), values[samples], decoder, k, generator, backend)
    between = decoder.inner(new)
    code = Code(
        nn.functional.pad(values, (0, new.n_subnetworks)),
        torch.cat([overlaps, _projected(probe, new, backend)], 1),
        torch.cat([torch.cat([gram, between], 1), torch.cat([between.mT, new.gram()], 1)]),
    )
    unseen = torch.ones(len(values), dtype=torch.bool, device=values.device)
    unseen[samples] = False
    judged = unseen if int(unseen.sum()) >= LEARNED_FROM else torch.ones_like(unseen)
    code = Code(code.values[judged], code.overlaps[judged], code.gram)
    pairs = confirmed(choose(code, decoder.n_subnetworks), code, coefficients[judged], k)
    for side in (encoder, decoder):
        for parameter, found in zip(side.parameters(), new.parameters(), strict=True):
            for old, taken in pairs:
                parameter[old] = found[taken]
    return torch.tensor([old for old, _ in pairs], dtype=torch.int64, device=values.device)


@torch.enable_grad()
def learn(
    gradients: Gradients, values: Tensor, decoder: Directions, k: float, generator: torch.Generator, backend: str
) -> Directions:
    """Learn directions u, each for a few of the samples, that what the code leaves of their gradients has in common.

    Each starts as a sample's gradient and ascends Σ_s <r_s, u>² / ‖g_s‖² over the share k of the samples where that is
    largest: relative to each sample's own, or a direction would be that of the one or two of largest gradient.
    values [S, K]: the samples' code.
    """
    n_samples = gradients.n_samples
    n = min(CANDIDATES, decoder.n_subnetworks, n_samples)
    new = Directions(decoder.shapes, decoder.ranks(), n, generator).to(values)
    set_from_samples([new], torch.arange(n, device=values.device), gradients, torch.arange(n), generator)
    optimizer = RelativeAdam(new.parameters())
    norms = gradients.squared_norm().sqrt().clamp_min(torch.finfo(values.dtype).tiny)[:, None].to(values)
    flat = None
    if n_samples * n * sum(shape.numel() for shape in decoder.shapes.values()) <= FLAT:
        flat = (flattened(gradients, decoder) - values @ multiplied_out(decoder)).detach()
    for step in range(STEPS):
        if flat is not None:
            left = flat @ multiplied_out(new).mT
        else:
            left = _projected(Chunks.held([gradients]), new, backend) - values @ decoder.inner(new)
        gain = (left / norms).square().topk(max(1, round(k * n_samples)), dim=0).values.sum()
        optimizer.step(torch.autograd.grad(-gain, optimizer.parameters), LR * (1 - step / STEPS))
        new.normalize_()
    return new


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

    coefficients [S, K]: of the encoder; a candidate's are its overlaps. What it gains may be what others lose, which
    are no longer among the largest of the batch.
    """
    n_subnetworks = coefficients.shape[1]
    held = list(range(n_subnetworks))
    n = n_kept(k, *coefficients.shape)

    def left(columns: list[int], found: Tensor) -> Tensor:
        values = lk.batch_topk(found, n, backend="torch").dense()
        return (((values @ code.gram[columns][:, columns]) - 2 * code.overlaps[:, columns]) * values).sum()

    best, good = left(held, coefficients), []
    for old, taken in pairs:
        columns, found = held.copy(), coefficients.clone()
        columns[old] = n_subnetworks + taken
        found[:, old] = code.overlaps[:, columns[old]]
        now = left(columns, found)
        if now < best:
            best, held, coefficients = now, columns, found
            good.append((old, taken))
    return good


def worths(code: Code, left: Tensor, members: Tensor) -> Tensor:
    """Return by how much the residuals grow without each member, its samples left to the best other one: [K + n].

    left [S, K + n] is the code's; infinity for what is no member [K + n] bool.
    """
    rows, columns = code.values.nonzero(as_tuple=True)
    total = torch.zeros_like(code.gram[0])
    for piece in pieces(len(rows), len(total)):
        row, column = rows[piece], columns[piece]
        c = code.values[row, column]
        freed = left[row] + c[:, None] * code.gram[column]  # <V_j, r_s + c V_k>
        others = members.expand(len(row), -1).scatter(1, column[:, None], False)
        best = freed.square().masked_fill(~others, 0).amax(1)
        total.index_add_(0, column, c * (2 * left[row, column] + c * code.gram[column, column]) - best)
    return total.masked_fill(~members, math.inf)


def _projected(probe: Chunks, directions: Directions, backend: str) -> Tensor:
    """Return <V, g_s> of all samples: [S, K]."""
    chunks = list(probe)
    if all(is_small(each, directions, backend) for each in chunks):
        return torch.cat([flattened(each, directions) for each in chunks]) @ multiplied_out(directions).mT
    return torch.cat(
        [
            project(each, (directions,), choose_paths(each, directions, each.n_samples), each.shapes, backend)
            for each in chunks
        ]
    )
