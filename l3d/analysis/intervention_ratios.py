"""Measure intervention ratios: how much more a subnetwork moves the samples it is active for than the other samples.

pool of rows ─ gradients ─ batch top-k ─► each subnetwork's active samples ─ W0 + δ V ─► output changes on some active
and some inactive samples, along the subnetwork and along a random direction of the same ranks and norms (the control)
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import l3d_kernels as lk
from l3d.analysis.evaluation import extractor_of
from l3d.analysis.intervention import decomposed, shifted
from l3d.data.arguments import check_whole
from l3d.data.batch import join, to_device, without_label
from l3d.data.batches import count_rows, in_order, mix, take
from l3d.decomposition.directions import FLOAT32_CPU, Directions
from l3d.decomposition.objective import n_kept
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.divergence import Divergence, kl, mse
from l3d.gradients.extract import Extractor
from l3d.gradients.fixed import check_fixed
from l3d.gradients.model import Params, check_model, model_output
from l3d.gradients.samples import Samples, padding_mask

# Default δ, as fractions of the norm of the decomposed weights. They are small because a decomposition is local. On
# stories260k the largest changes outputs by 0.3 nats; 0.01 would by 2 nats, as much as replacing the text.
SWEEP = (-0.003, -0.001, -0.0003, 0.0003, 0.001, 0.003)


class InterventionRatios(NamedTuple):
    """Output changes under interventions, for n live subnetworks and D distances δ."""

    deltas: Tensor  # [D]
    subnetworks: Tensor  # [n] int64: indices of those with enough active and enough inactive samples
    activation_rate: Tensor  # [n] fraction of the pool's samples that each is active for
    active: Tensor  # [n, D] mean output change on active samples
    rest: Tensor  # [n, D] mean output change on inactive samples
    random_active: Tensor  # [n, D] as `active`, moved along a random direction
    random_rest: Tensor  # [n, D] as `rest`, moved along the same random direction

    def __repr__(self) -> str:
        """Return the sizes, the median ratios and the share above random."""
        return (
            f"InterventionRatios({len(self.subnetworks)} subnetworks, {len(self.deltas)} deltas; "
            f"median ratio {self.ratio.median():.4g}, random {self.random_ratio.median():.4g}; "
            f"share_above_random {self.share_above_random:.4g})"
        )

    @property
    def ratio(self) -> Tensor:
        """Geometric mean of active / rest over the distances: [n]."""
        return _geometric_mean(self.active, self.rest)

    @property
    def random_ratio(self) -> Tensor:
        """Geometric mean of random_active / random_rest over the distances: [n]."""
        return _geometric_mean(self.random_active, self.random_rest)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as lists for json; values that are not finite become None."""
        fields = {name: _plain(value) for name, value in self._asdict().items()}
        ratios = {"ratio": _plain(self.ratio), "random_ratio": _plain(self.random_ratio)}
        return {"share_above_random": self.share_above_random, **ratios, **fields}

    @property
    def share_above_random(self) -> float:
        """Fraction of the live subnetworks with a ratio above their random direction's."""
        return float((self.ratio > self.random_ratio).double().mean())


class Pool(NamedTuple):
    """Rows of data, their samples' positions in the model's output, and the subnetworks kept for each sample."""

    rows: Any  # the model's inputs, rows first
    row: Tensor  # [S] the row of each sample
    position: Tensor | None  # [S] its position in the row's output; None if a row is a sample
    kept: Tensor  # [S, K] bool: the subnetwork is active for the sample


@torch.no_grad()
def intervention_ratios(
    decomposition: Subnetworks,
    model: nn.Module,
    data: Any,
    *,
    deltas: Sequence[float] | None = None,
    n_rows: int = 256,
    n_samples: int = 32,
    min_active: int = 8,
    params: Params = None,
    divergence: str | Divergence | None = None,
    reference: str | Tensor | None = None,
    seed: int | None = None,
    any_weights: bool = False,
) -> InterventionRatios:
    """Measure how much more an intervention changes a subnetwork's active samples than its inactive ones.

    The output change is the divergence between the moved and the unmoved model's outputs: KL if the decomposition used
    KL, else the mean squared difference. It is averaged over samples, for every distance δ. The control is a random
    direction of the same low ranks and the same norm in each tensor, measured on the same samples.

    Args:
        decomposition: a trained decomposition.
        model: the model it belongs to; its weights are restored bit by bit.
        data: a tensor, Dataset or iterable of batches of rows that all have one shape.
        deltas: distances to move by; default `SWEEP` times the norm of the decomposed weights.
        n_rows: number of rows, evenly spaced in the data, that make up the pool of samples.
        n_samples: number of active samples, and of inactive ones, to average over per subnetwork.
        min_active: a subnetwork is measured if at least this many of the pool's samples are active, and at least as
            many inactive; a mean over fewer is too noisy.
        params: glob or globs of the parameters to move; None moves all decomposed parameters.
        divergence, reference: replace the trained ones when active samples are selected.
        seed: seed of references, samples and random directions; default the decomposition's.
        any_weights: accept a model whose weights differ from the decomposed ones.

    Cost: a forward pass of at most 2·n_samples rows per subnetwork, δ and direction. Warns for a model in bfloat16 or
    float16, where rounding leaves most weights unchanged by a small step.
    Raises ValueError if no subnetwork can be measured, and for arguments out of range.
    """
    check_model(model)
    for name, value in (("n_rows", n_rows), ("n_samples", n_samples), ("min_active", min_active)):
        check_whole(name, value)
    narrow = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if narrow:
        warnings.warn(
            f"intervention_ratios: the model holds {', '.join(sorted(narrow))}, which rounds such small steps away; "
            "measure on model.float() with any_weights=True",
            stacklevel=2,
        )
    seed = decomposition.settings.get("seed", 0) if seed is None else seed
    extractor = extractor_of(decomposition, model, divergence, reference, any_weights)
    chosen = decomposed(decomposition, model, params)
    if deltas is None:
        norm = float(torch.stack([p.double().square().sum() for p in extractor.parameters.values()]).sum().sqrt())
        deltas = [share * norm for share in SWEEP]
    if not deltas or 0 in deltas:
        raise ValueError(f"deltas: expected distances other than 0, got {list(deltas)}")

    pool = fill_pool(decomposition, extractor, data, n_rows, seed)
    counts = pool.kept.sum(0)
    live = ((counts >= min_active) & (counts <= len(pool.kept) - min_active)).nonzero()[:, 0]
    if not len(live):
        raise ValueError(
            f"data: no subnetwork is active for {min_active} of its {len(pool.kept)} samples and inactive for as many; "
            "raise n_rows, or lower min_active"
        )
    change = Change(model, pool, kl if extractor.is_kl else mse)
    results = torch.zeros(4, len(live), len(deltas), dtype=torch.float64, device="cpu")
    for i, index in enumerate(live.tolist()):
        generator = torch.Generator().manual_seed(mix(seed, 8, index))
        kept = pool.kept[:, index]
        every = (where.nonzero()[:, 0] for where in (kept, ~kept))
        active, rest = (
            each[torch.randperm(len(each), generator=generator, device="cpu")[:n_samples]] for each in every
        )
        change.select(torch.cat([active, rest]))
        own = {name: v for name, v in decomposition.subnetwork(index).items() if name in chosen}
        for j, direction in enumerate((own, alike(own, decomposition, generator))):
            for column, delta in enumerate(deltas):
                changes = change.by({name: delta * v for name, v in direction.items()})
                results[2 * j, i, column] = changes[: len(active)].mean()
                results[2 * j + 1, i, column] = changes[len(active) :].mean()
    rates = counts[live].double() / len(pool.kept)
    return InterventionRatios(torch.tensor(list(deltas), dtype=torch.float64, device="cpu"), live, rates, *results)


@torch.no_grad()
def alike(direction: Mapping[str, Tensor], decomposition: Subnetworks, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a random direction of the decomposition's ranks, with `direction`'s norm in each of its tensors."""
    shapes = {name: decomposition.shapes[name] for name in direction}
    wide = torch.promote_types(next(iter(direction.values())).dtype, torch.float32)  # rounding would add ranks
    drawn = Directions(shapes, decomposition.ranks, 1, generator, factory=FLOAT32_CPU).to(wide).tensors(0)
    return {name: v.to(direction[name]) * (direction[name].norm() / v.norm()) for name, v in drawn.items()}


def fill_pool(decomposition: Subnetworks, extractor: Extractor, data: Any, n_rows: int, seed: int) -> Pool:
    """Find the subnetworks active for each sample of at most `n_rows` rows, in batches of the trained size."""
    count = count_rows(data)
    batch_size = decomposition.settings.get("batch_size", 16)
    if count is not None:
        n_rows = min(n_rows, count)
        spaced = [i * count // n_rows for i in range(n_rows)]
        data = [take(data, spaced[start : start + batch_size]) for start in range(0, n_rows, batch_size)]
        if len(data) > 1 and n_rows % batch_size == 1:
            data.pop()  # a batch of one row has no other sample as reference
    k = decomposition.settings.get("k", 0.1)
    model, like = extractor.model, next(decomposition.parameters())
    device = next(model.parameters()).device
    found: list[Pool] = []
    filled = 0
    for i, batch in enumerate(in_order(data, batch_size)):
        batch = to_device(batch, device)
        gradients = extractor(batch, torch.Generator().manual_seed(mix(seed, 7, i))).to(like)
        coefficients = decomposition.encode(gradients)
        entries = lk.batch_topk(coefficients, n_kept(k, *coefficients.shape))
        kept = torch.zeros(coefficients.shape, dtype=torch.bool, device="cpu")
        kept[entries.rows.cpu(), entries.columns.cpu()] = True
        rows = without_label(batch)
        output = model_output(model, rows)
        drawn = torch.Generator().manual_seed(mix(seed, 7, i))  # draws positions first, the same as above
        samples = Samples(output, extractor.positions, extractor.is_kl, drawn, padding_mask(rows, model))
        row = torch.arange(samples.n_rows, device=device).repeat_interleave(samples.per_row)
        row = samples.of(row).cpu() + filled
        position = None if samples.positions is None else samples.of(samples.positions.flatten()).cpu()
        found.append(Pool(rows, row, position, kept))
        filled += samples.n_rows
        if filled >= n_rows:
            break
    rows, numbers, positions, active = zip(*found, strict=True)
    joined = join(rows)
    if joined is None:
        raise ValueError("data: expected rows of one shape in all batches; pad them or cut them to one length")
    return Pool(joined, torch.cat(numbers), None if positions[0] is None else torch.cat(positions), torch.cat(active))


class Change:
    """Output changes of selected samples under moves of the weights."""

    def __init__(self, model: nn.Module, pool: Pool, divergence: Divergence) -> None:
        check_fixed(model)
        self.model, self.pool, self.divergence = model, pool, divergence

    def select(self, samples: Tensor) -> None:
        """Select samples [n] of the pool, and compute their outputs under the unmoved weights."""
        rows, self._row = self.pool.row[samples].unique(return_inverse=True)
        self._position = None if self.pool.position is None else self.pool.position[samples]
        self._inputs = take(self.pool.rows, rows)
        self._before = self._outputs()

    def by(self, moves: Mapping[str, Tensor]) -> Tensor:
        """Return each selected sample's output change under moves of the weights: [n]."""
        with shifted(self.model, moves):
            return self.divergence(self._outputs(), self._before).cpu()

    def _outputs(self) -> Tensor:
        output = model_output(self.model, self._inputs)
        if self._position is None:
            return output[self._row].double()
        width = output.shape[-1:] if self.divergence is kl else output.shape[2:]
        return output.reshape(len(output), -1, *width)[self._row, self._position].double()


def _geometric_mean(active: Tensor, rest: Tensor) -> Tensor:
    """Return the geometric mean of active / rest over the distances: infinite for rest 0, 1 where both are 0."""
    logs = active.clamp_min(0).log() - rest.clamp_min(0).log()
    return logs.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).mean(1).exp()


def _plain(values: Tensor) -> Any:
    """Turn a tensor into nested lists, with None for values that are not finite."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [value if math.isfinite(value) else None for value in values.tolist()]
