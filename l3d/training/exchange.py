"""Replace redundant subnetworks by new ones learned from the residual gradients.

Gradient descent does not leave some poor optima: two subnetworks share one circuit, or one is a mixture of two, while a
weaker circuit is reconstructed by none and, being orthogonal to all directions, gives none of them a gradient. So every
so often the subnetwork that is worth least is compared with directions learned from the residuals r_s = g_s − ĝ_s:

    worth of k   Σ_s ‖r_s + c_sk V_k‖² − ‖r_s‖² − max_j <r_s + c_sk V_k, V_j>²      over the samples that keep k
    gain of u    Σ_s <r_s + c_sk V_k, u>²        over as many samples as one is kept for on average, the best of them

If the gain is larger, u is a candidate for k's place, and the next pair is compared. That is a screening. A pair is
confirmed on held-out samples: with u in k's place the squared residual must fall, each sample coded by the batch's
largest coefficients with their values refitted, because of a circuit that two subnetworks shared the one that stays has
yet to learn the whole. Everything is computed from <V, g>, <u, g>, <V, V> and <V, u>; gradients are multiplied out only
in small networks, where that is faster.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from l3d.decomposition.objective import n_kept
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.chunks import Chunks
from l3d.gradients.factors import Gradients
from l3d.training.candidates import ProbeGradients, Residuals, learn
from l3d.training.options import Replacement
from l3d.training.settings import Settings
from l3d_kernels import cpu
from l3d_kernels.splitting import pieces


class Probe:
    """Collects the last batches before each replacement: one small batch holds too few samples of a subnetwork.

    Args:
        settings: of the run; `Settings.replaces` says when.
        n_samples: in the first batch.
        n_entries: of all parameters.
    """

    def __init__(self, settings: Settings, n_samples: int, n_entries: int) -> None:
        how = settings.replacement
        self.settings, self.every, self.at_once = settings, how.replace_every, how.restarts_at_once
        wanted, batches = min(how.most_samples, how.samples_per_subnetwork / settings.k), how.most_batches
        if how.samples_of_small_models * n_entries <= how.multiplied_out // 2:
            wanted, batches = how.samples_of_small_models, how.replace_every
        self.length = min(batches, math.ceil(wanted / n_samples))
        self.batches: list[Gradients | Chunks] = []

    def due(self, step: int) -> bool:
        """Tell whether subnetworks are replaced after this many steps."""
        return self.settings.replaces(step, self.every)

    def turn(self, step: int, n_restarts: int) -> list[int]:
        """List the restarts that the replacement after this many steps looks at."""
        first = step // self.every * self.at_once
        return sorted({(first + i) % n_restarts for i in range(min(self.at_once, n_restarts))})

    def missed(self, step: int) -> range:
        """List the batches, counted from 0, that a run resumed after this many steps has to extract again."""
        coming = (step // self.every + 1) * self.every
        return range(coming - self.length, step) if self.due(coming) else range(0)

    def add(self, step: int, gradients: Gradients | Chunks) -> None:
        """Keep the batch of a step, counted from 1, if the next replacement will look at it."""
        coming = -(-step // self.every) * self.every
        if self.due(coming) and step > coming - self.length:
            self.batches.append(gradients)

    def take(self) -> Chunks:
        """Return the collected batches as chunks, and start collecting anew."""
        taken = [Chunks.held([batch]) if isinstance(batch, Gradients) else batch for batch in self.batches]
        self.batches = []
        makers = [partial(chunks.make, i) for chunks in taken for i in range(chunks.n_chunks)]
        probe = Chunks(lambda i: makers[i](), len(makers))
        if all(chunks.sizes for chunks in taken):
            probe.sizes = [size for chunks in taken for size in chunks.sizes]
        return probe


class Code(NamedTuple):
    """Samples as coefficients of K directions and n candidates."""

    values: Tensor  # [S, K + n] coefficients; 0 where not kept
    overlaps: Tensor  # [S, K + n] <V, g_s>
    gram: Tensor  # [K + n, K + n] <V, V>

    def residual_overlaps(self) -> Tensor:
        """Return <V, r_s>: [S, K + n]."""
        return self.overlaps - self.values @ self.gram

    def of(self, samples: Tensor) -> "Code":
        """Take some of the samples [n]."""
        return Code(self.values[samples], self.overlaps[samples], self.gram)


@torch.no_grad()
def exchange(
    samples: ProbeGradients,
    decomposition: Subnetworks,
    k: float,
    generator: torch.Generator,
    how: Replacement = Replacement(),
) -> Tensor:
    """Replace redundant subnetworks, in encoder and decoder alike.

    Half of the samples, drawn at random, serve to learn and choose candidates; the other half confirms them. The
    gradients are on the decomposition's device. Returns which have changed: [n] int64.
    """
    encoder, decoder = decomposition.encoder, decomposition.decoder
    coefficients, overlaps = samples.project(encoder), samples.project(decoder)
    values = coefficients * cpu.largest(coefficients, n_kept(k, *coefficients.shape))[0]
    gram = decoder.gram()
    residual = samples.squared_norm() + ((values @ gram - 2 * overlaps) * values).sum(1)

    order = torch.randperm(len(values), generator=generator, device="cpu").to(values.device)
    seen, unseen = order.tensor_split(2)
    left = Residuals.of(samples.select(seen), values[seen], decoder)
    new = learn(left, residual[seen], k, generator, how)
    between = decoder.inner(new)
    code = Code(
        nn.functional.pad(values, (0, new.n_subnetworks)),
        torch.cat([overlaps, samples.project(new)], 1),
        torch.cat([torch.cat([gram, between], 1), torch.cat([between.mT, new.gram()], 1)]),
    )
    pairs = choose(code.of(seen), decoder.n_subnetworks, how.margin)
    pairs = confirmed(pairs, code.of(unseen), coefficients[unseen], k, how)
    for side in (encoder, decoder):
        for parameter, found in zip(side.parameters(), new.parameters(), strict=True):
            for old, taken in pairs:
                parameter[old] = found[taken]
    return torch.tensor([old for old, _ in pairs], dtype=torch.int64, device=values.device)


def choose(code: Code, n_subnetworks: int, margin: float = Replacement.margin) -> list[tuple[int, int]]:
    """Return pairs (subnetwork, candidate for its place), each of which lowers the samples' squared residual.

    A screening: each sample goes to the direction that suits it best, not to the batch's largest coefficients, which
    `confirmed` then uses.
    """
    values, overlaps, gram = code
    n_candidates = len(gram) - n_subnetworks
    members = torch.arange(len(gram), device=gram.device) < n_subnetworks
    pairs: list[tuple[int, int]] = []
    n_active = max(1, round(float((values != 0).sum()) / n_subnetworks))
    for _ in range(n_candidates):
        code = Code(values, overlaps, gram)
        left = code.residual_overlaps()
        worth = worths(code, left, members)
        old = int(worth[:n_subnetworks].argmin())
        freed = left[:, n_subnetworks:] + values[:, old, None] * gram[old, n_subnetworks:]  # <u, r_s + c V_old>
        most = freed.square().topk(n_active, dim=0)
        gains = most.values.sum(0).masked_fill(members[n_subnetworks:], -math.inf)
        taken = int(gains.argmax())
        if not gains[taken] > margin * worth[old]:
            break
        rows, new = most.indices[:, taken], n_subnetworks + taken
        values = values.clone()
        values[:, old] = 0
        values[rows, new] = freed[rows, taken]
        members[old], members[new] = False, True
        pairs.append((old, taken))
    return pairs


def confirmed(
    pairs: list[tuple[int, int]], code: Code, coefficients: Tensor, k: float, how: Replacement = Replacement()
) -> list[tuple[int, int]]:
    """Return the pairs that lower the squared residual of samples which nothing was learned from or chosen by.

    Pairs are tried one after another. One is confirmed where the sum of the samples' decreases d_s exceeds
    standard_errors · (Σ_s d_s²)^½. coefficients [S, K] are the encoder's; a candidate's are its overlaps. A candidate's
    gain may be others' loss, which are then no longer among the batch's largest coefficients.
    """
    n_subnetworks = coefficients.shape[1]
    held = list(range(n_subnetworks))
    n = n_kept(k, *coefficients.shape)

    def left(columns: list[int], found: Tensor) -> Tensor:
        gram, overlaps = code.gram[columns][:, columns], code.overlaps[:, columns]
        kept = cpu.largest(found, n)[0]
        values = refitted(found * kept, kept, overlaps, gram, how)
        return ((values @ gram - 2 * overlaps) * values).sum(1)

    before, good = left(held, coefficients), []
    for old, taken in pairs:
        columns, found = held.copy(), coefficients.clone()
        columns[old] = n_subnetworks + taken
        found[:, old] = code.overlaps[:, columns[old]]
        after = left(columns, found)
        less = before - after
        if less.sum() > how.standard_errors * less.square().sum().sqrt():
            before, held, coefficients = after, columns, found
            good.append((old, taken))
    return good


def refitted(values: Tensor, kept: Tensor, overlaps: Tensor, gram: Tensor, how: Replacement = Replacement()) -> Tensor:
    """Move kept values [S, K] most of the way to least squares, by a few steps of conjugate gradients."""
    left = (overlaps - values @ gram) * kept
    along, square = left, left.square().sum(1, keepdim=True)
    for _ in range(how.refit_steps):
        back = (along @ gram) * kept
        curvature = (along * back).sum(1, keepdim=True)
        flat = curvature <= how.least_curvature * along.square().sum(1, keepdim=True)  # only rounding errors remain
        step = (square / curvature).masked_fill(flat, 0)
        values, left = values + step * along, left - step * back
        before, square = square, left.square().sum(1, keepdim=True)
        along = left + (square / before).masked_fill(flat, 0) * along
    return values


def worths(code: Code, left: Tensor, members: Tensor) -> Tensor:
    """Return by how much the squared residuals grow without each member, its samples coded by the best other: [K + n].

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
