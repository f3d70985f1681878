"""What a decomposition is worth: its error on data, how often each subnetwork acts, and on what."""

import copy
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

import l3d_kernels as lk
from l3d.data.arguments import check_fraction
from l3d.data.batches import in_order, mix
from l3d.decomposition.costs import Plan
from l3d.decomposition.objective import energy, objective, residual_norms
from l3d.decomposition.objective import n_kept as n_kept_of
from l3d.decomposition.project import project
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.divergence import BY_NAME, REFERENCES, Divergence
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients
from l3d.gradients.model import exact_pattern, to_device
from l3d.gradients.precision import own_precision
from l3d.storage.identity import check_identity
from l3d_kernels.reference import pieces

SELECTIONS = ("batch", "threshold")


class Evaluation(NamedTuple):
    """A decomposition scored on data."""

    error: float  # Σ‖g − ĝ‖² / Σ‖g‖² over all samples
    kept_per_sample: float  # mean number of subnetworks kept
    activation_rate: Tensor  # [K] P_act: fraction of samples for which each subnetwork is kept
    dead_fraction: float  # fraction of subnetworks never kept
    n_samples: int  # in the data, however many references each was compared with


class TopSamples(NamedTuple):
    """The samples on which each subnetwork has the largest impact."""

    indices: Tensor  # [K, n] int64, sample numbers in the order of the data, in which padding is not counted
    impacts: Tensor  # [K, n]


def evaluate(
    decomposition: Subnetworks,
    model: nn.Module,
    data: Any,
    *,
    divergence: str | Divergence | None = None,
    reference: str | Tensor | None = None,
    batch_size: int | None = None,
    k: float | None = None,
    selection: str = "batch",
    refit: bool = False,
    n_references: int = 1,
    seed: int | None = None,
    backend: str = "auto",
    any_weights: bool = False,
) -> Evaluation:
    """Score a decomposition on data, as it was trained: its k, divergence, reference and size of batch.

    Args:
        decomposition: a trained decomposition.
        model: the model it belongs to.
        data: a tensor, Dataset or iterable of batches.
        divergence, reference, batch_size, k: to score it otherwise; the first two are needed where it was trained
            with a callable or a tensor, which are not saved.
        selection: which coefficients are kept: "batch" for the k·S·K largest of a batch, "threshold" for those of
            magnitude at least `decomposition.threshold`, each sample by itself; k is then not used.
        refit: replace each sample's kept coefficients by those of least squares, min ‖g_s − Σ c_sk Vout_k‖² over the
            kept k: what the choice of subnetworks is worth apart from the encoder's values.
        n_references: how many times to draw references for each batch: more for less noise.
        seed: of the draws; default the decomposition's.
        backend: "auto", "torch" or "triton".
        any_weights: go on where the model's weights are others than those decomposed, which is refused otherwise.

    Batch top-k runs within each batch, so the size of the batch matters a little.
    """
    decomposition = _widened(decomposition)
    k = decomposition.settings.get("k", 0.1) if k is None else k
    residual = norm = 0.0
    n_samples = n_kept = 0
    counts = torch.zeros(decomposition.n_subnetworks, dtype=torch.int64)
    k = check_fraction("k", k)
    if selection not in SELECTIONS:
        raise ValueError(f"selection: expected one of {', '.join(SELECTIONS)}, got {selection!r}")
    seed = decomposition.settings.get("seed", 0) if seed is None else seed
    seeds = _draws(decomposition, n_references, mix(seed, 3), reference)
    with torch.no_grad():
        for gradients in _gradients(decomposition, model, data, divergence, reference, batch_size, seeds, any_weights):
            kept, left = score(gradients, decomposition, k, selection, refit, backend)
            residual += float(left.sum())
            norm += float(gradients.squared_norm().sum())
            counts += kept.column_offsets.diff().cpu()
            n_samples += gradients.n_samples
            n_kept += kept.rows.numel()
    if norm == 0:
        raise ValueError("data: every gradient is zero, so there is nothing to reconstruct; check params and data")
    return Evaluation(
        error=residual / norm,
        kept_per_sample=n_kept / n_samples,
        activation_rate=counts / n_samples,
        dead_fraction=float((counts == 0).float().mean()),
        n_samples=n_samples // len(seeds),
    )


@own_precision()
def score(
    gradients: Gradients, decomposition: Subnetworks, k: float, selection: str, refit: bool, backend: str
) -> tuple[lk.SparseCoefficients, Tensor]:
    """Return a batch's kept coefficients and what they leave of each gradient, ‖g_s − ĝ_s‖²: [S]."""
    encoder, decoder = decomposition.encoder, decomposition.decoder
    if selection == "batch" and not refit:
        result = objective(gradients, encoder, decoder, k, Plan(backend))
        return result.kept, result.residual
    plan = Plan(backend, small=False).for_batch(gradients, encoder, gradients.n_samples * decomposition.n_subnetworks)
    both = project(gradients, (encoder, decoder), decomposition.shapes, plan)
    coefficients, overlaps = both.split(decomposition.n_subnetworks, dim=1)
    if selection == "batch":
        kept = lk.batch_topk(coefficients, n_kept_of(k, *coefficients.shape), backend=backend)
    else:
        kept = decomposition.above_threshold(coefficients)
    if refit:
        kept = kept._replace(values=least_squares(kept, overlaps, decoder.gram()))
    energies = energy(kept, decoder, plan)
    overlap = overlaps[kept.rows, kept.columns]
    return kept, residual_norms(gradients.squared_norm(), kept, overlap, energies)[:, 0]


def least_squares(kept: lk.SparseCoefficients, overlaps: Tensor, gram: Tensor) -> Tensor:
    """Return, in the place of the kept values, each sample's least-squares coefficients: [N].

    The normal equations of the kept subnetworks, M c = o with M = <Vout_k, Vout_j> and o = <Vout_k, g_s>, by the
    pseudo-inverse, since two directions may be the same. overlaps [S, K], gram [K, K].
    """
    counts = kept.row_offsets.diff()
    values = torch.zeros_like(kept.values)
    cutoff = 1000 * torch.finfo(gram.dtype).eps  # what of the Gram matrix is rounding, its own dtype tells
    for size in counts.unique().tolist():
        if size == 0:
            continue
        rows = (counts == size).nonzero()[:, 0]
        entries = kept.row_offsets[rows, None] + torch.arange(size, device=rows.device)  # [s, size]
        for piece in pieces(len(rows), size * size):
            columns = kept.columns[entries[piece]]
            within = gram[columns[:, :, None], columns[:, None, :]].double()
            wanted = overlaps[rows[piece, None], columns, None].double()
            found = torch.linalg.pinv(within, rtol=cutoff, hermitian=True) @ wanted
            values[entries[piece]] = found[..., 0].to(values)
    return values


@torch.no_grad()
def impact(
    decomposition: Subnetworks,
    model: nn.Module,
    data: Any,
    n_references: int = 10,
    *,
    divergence: str | Divergence | None = None,
    reference: str | Tensor | None = None,
    any_weights: bool = False,
) -> Tensor:
    """Return every subnetwork's impact on every sample, the mean of |<Vin_k, g_s>| over drawn references: [n, K].

    Samples are numbered in the order of the data, positions of a row one after another: all of them, also where
    training drew a few, or the last where it took the last. Padding is no sample and has no number: with an
    `attention_mask`, number s is the s-th of the positions where the mask is not 0. `divergence` and `reference`
    replace the trained ones, and `any_weights` takes a model of other weights, as in `evaluate`. Raises ValueError for
    a DataLoader that shuffles, whose samples have no order to be numbered in.
    """
    if isinstance(getattr(data, "sampler", None), RandomSampler):
        raise ValueError("data: this DataLoader shuffles, so that samples have no numbers; pass one with shuffle=False")
    decomposition = _widened(decomposition)
    positions = "all" if isinstance(decomposition.settings.get("positions"), int) else None
    seeds = _draws(decomposition, n_references, mix(decomposition.settings.get("seed", 0), 4), reference, positions)
    every = _gradients(decomposition, model, data, divergence, reference, None, seeds, any_weights, positions)
    rows: list[Tensor] = []
    for draw, gradients in zip(cycle(range(len(seeds))), every, strict=False):
        found = decomposition.encode(gradients).abs()
        if draw == 0:
            rows.append(found)
        else:
            rows[-1] += found
    return torch.cat(rows) / len(seeds)


def top_samples(
    decomposition: Subnetworks,
    model: nn.Module,
    data: Any,
    n: int = 10,
    n_references: int = 10,
    *,
    divergence: str | Divergence | None = None,
    reference: str | Tensor | None = None,
    any_weights: bool = False,
) -> TopSamples:
    """Return the n samples of largest impact for every subnetwork; arguments as in `impact`."""
    impacts = impact(
        decomposition, model, data, n_references, divergence=divergence, reference=reference, any_weights=any_weights
    )
    if not 1 <= n <= len(impacts):
        raise ValueError(f"n: expected between 1 and the {len(impacts)} samples, got {n}")
    best = impacts.topk(n, dim=0)
    return TopSamples(best.indices.mT, best.values.mT)


def _widened(decomposition: Subnetworks) -> Subnetworks:
    """Return a decomposition whose sums are at least float32: itself, or a wider copy."""
    if next(decomposition.parameters()).dtype.itemsize >= 4:
        return decomposition
    return copy.deepcopy(decomposition).float()


def _draws(
    decomposition: Subnetworks,
    n_references: int,
    seed: int,
    reference: str | Tensor | None,
    positions: str | None = None,
) -> list[int]:
    """Return the seeds of each batch's repeated draws; one where nothing is drawn."""
    if n_references < 1:
        raise ValueError(f"n_references: expected at least 1, got {n_references}")
    reference = decomposition.settings.get("reference", "sample") if reference is None else reference
    drawn = isinstance(reference, str) and reference == "sample"
    drawn = drawn or (positions is None and isinstance(decomposition.settings.get("positions", "all"), int))
    return [mix(seed, i) for i in range(n_references if drawn else 1)]


def _gradients(
    decomposition: Subnetworks,
    model: nn.Module,
    data: Any,
    divergence: str | Divergence | None,
    reference: str | Tensor | None,
    batch_size: int | None,
    seeds: list[int],
    any_weights: bool = False,
    positions: str | None = None,
) -> Iterator[Gradients]:
    """Extract the gradients of all of the data by the decomposition's settings: each batch in order, for every seed."""
    settings = decomposition.settings
    extractor = extractor_of(decomposition, model, divergence, reference, any_weights, positions)
    parameter = next(decomposition.parameters())
    for i, batch in enumerate(in_order(data, settings.get("batch_size", 16) if batch_size is None else batch_size)):
        if i == 1 and extractor.is_per_sample():
            raise ValueError(
                "reference: a tensor with an output for every sample stands for one batch, and the data are more; "
                "raise batch_size to all rows, or give one output for all"
            )
        inputs = to_device(batch, next(model.parameters()).device)
        for seed in seeds:
            yield extractor(inputs, torch.Generator().manual_seed(mix(seed, i))).to(parameter)


def extractor_of(
    decomposition: Subnetworks,
    model: nn.Module,
    divergence: str | Divergence | None = None,
    reference: str | Tensor | None = None,
    any_weights: bool = False,
    positions: str | int | None = None,
) -> Extractor:
    """Return the extractor of a decomposition's gradients, by its settings where nothing else is given.

    Raises ValueError for a setting that was not saved, and where the model's parameters are of other shapes or, unless
    `any_weights`, have other values than those decomposed.
    """
    settings = decomposition.settings
    chosen: dict[str, Any] = {}
    for name, value, default, known in (
        ("divergence", divergence, "mse", BY_NAME),
        ("reference", reference, "sample", REFERENCES),
    ):
        value = settings.get(name, default) if value is None else value
        if isinstance(value, str) and value not in known:
            raise ValueError(f"{name}: the decomposition was trained with {value!r}, which is not saved; pass {name}=")
        chosen[name] = value
    extractor = Extractor(
        model,
        params=[exact_pattern(name) for name in decomposition.shapes],
        positions=settings.get("positions", "all") if positions is None else positions,
        **chosen,
    )
    for name, p in extractor.parameters.items():
        if p.shape != decomposition.shapes[name]:
            raise ValueError(
                f"model: {name!r} has shape {list(p.shape)}, the decomposition's {list(decomposition.shapes[name])}"
            )
    if not any_weights:
        check_identity(decomposition.base_model, extractor.parameters)
    return extractor
