"""Score a decomposition on data: reconstruction error, activation rates, and each subnetwork's impact per sample."""

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

import l3d_kernels as lk
from l3d.data.arguments import check_fraction
from l3d.data.batch import to_device
from l3d.data.batches import in_order, mix
from l3d.decomposition.costs import Plan
from l3d.decomposition.objective import energy, objective, residual_norms
from l3d.decomposition.objective import n_kept as n_kept_of
from l3d.decomposition.project import project
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.divergence import BY_NAME, REFERENCES, Divergence
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients
from l3d.gradients.fixed import refuse_sharded
from l3d.gradients.model import exact_pattern
from l3d.gradients.precision import own_precision
from l3d.storage.identity import check_identity
from l3d_kernels.splitting import pieces

SELECTIONS = ("batch", "threshold")


class Evaluation(NamedTuple):
    """Scores of a decomposition on data."""

    error: float  # Σ‖g − ĝ‖² / Σ‖g‖² over all samples
    kept_per_sample: float  # mean number of subnetworks kept
    activation_rate: Tensor  # [K] P_act: fraction of samples for which each subnetwork is kept
    dead_fraction: float  # fraction of subnetworks never kept
    n_samples: int  # samples in the data; each counts once, also with several references

    def __repr__(self) -> str:
        """Return the scalar figures, and the number of subnetworks with their median activation rate."""
        return (
            f"Evaluation(error={self.error:.4g}, dead_fraction={self.dead_fraction:.4g}, "
            f"kept_per_sample={self.kept_per_sample:.4g}, n_samples={self.n_samples}; "
            f"{len(self.activation_rate)} subnetworks, median activation_rate {self.activation_rate.median():.4g})"
        )


class TopSamples(NamedTuple):
    """Each subnetwork's samples of largest impact."""

    indices: Tensor  # [K, n] int64, sample numbers in the data's order; padding has no number
    impacts: Tensor  # [K, n], descending

    def __repr__(self) -> str:
        """Return the sizes, and the median and largest impact of the subnetworks' first samples."""
        n_subnetworks, n = self.impacts.shape
        first = self.impacts[:, 0]
        return (
            f"TopSamples({n_subnetworks} subnetworks, {n} samples each; "
            f"largest impact: median {first.median():.4g}, max {first.max():.4g})"
        )


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
    """Score a decomposition on data, with the k, divergence, reference and batch size of its training.

    Args:
        decomposition: a trained decomposition.
        model: the model it belongs to.
        data: a tensor, Dataset or iterable of batches.
        divergence, reference, batch_size, k: replace the trained values. The first two are required if training used a
            callable or a tensor, which are not saved.
        selection: which coefficients are kept. "batch" keeps the k·S·K largest of a batch. "threshold" keeps those of
            magnitude at least `decomposition.threshold`, each sample by itself, and does not use k.
        refit: replace each sample's kept coefficients by least squares, min ‖g_s − Σ c_sk Vout_k‖² over the kept k.
            This measures the choice of subnetworks apart from the encoder's values.
        n_references: how many times references are drawn for each batch; more draws give less noise.
        seed: seed of the draws; default the decomposition's.
        backend: "auto", "torch" or "triton".
        any_weights: accept a model whose weights differ from the decomposed ones; otherwise that raises ValueError.

    Batch top-k selects within each batch, so the batch size changes the figures a little. Raises ValueError for
    arguments out of range, and for data whose gradients are all zero.
    """
    decomposition = _widened(decomposition)
    settings = decomposition.settings
    total_residual = total_norm = 0.0
    n_samples = n_kept = 0
    counts = torch.zeros(decomposition.n_subnetworks, dtype=torch.int64, device="cpu")
    k = check_fraction("k", settings.get("k", 0.1) if k is None else k)
    if selection not in SELECTIONS:
        raise ValueError(f"selection: expected one of {', '.join(SELECTIONS)}, got {selection!r}")
    extractor = extractor_of(decomposition, model, divergence, reference, any_weights)
    seeds = _draws(extractor, n_references, mix(settings.get("seed", 0) if seed is None else seed, 3))
    with torch.no_grad():
        for gradients in _gradients(decomposition, extractor, data, seeds, batch_size):
            gradients, e = gradients.in_range()
            kept, residual = score(gradients, decomposition, k, selection, refit, backend, e)
            total_residual += math.ldexp(float(residual.sum()), -2 * e)
            total_norm += math.ldexp(float(gradients.squared_norm_in_range().sum()), -2 * e)
            counts += kept.column_offsets.diff().cpu()
            n_samples += gradients.n_samples
            n_kept += kept.rows.numel()
    if total_norm == 0:
        raise ValueError("data: every gradient is zero, so there is nothing to reconstruct; check params and data")
    return Evaluation(
        error=total_residual / total_norm,
        kept_per_sample=n_kept / n_samples,
        activation_rate=counts.float() / n_samples,
        dead_fraction=float((counts == 0).float().mean()),
        n_samples=n_samples // len(seeds),
    )


@own_precision()
def score(
    gradients: Gradients, decomposition: Subnetworks, k: float, selection: str, refit: bool, backend: str, e: int = 0
) -> tuple[lk.SparseCoefficients, Tensor]:
    """Return a batch's kept coefficients and each gradient's squared residual norm ‖g_s − ĝ_s‖²: [S].

    e: the gradients are 2^e times what they were extracted as, so that their squares lie in range.
    """
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
        kept = decomposition.above_threshold(coefficients, e)
    if refit:
        kept = kept._replace(values=least_squares(kept, overlaps, decoder.gram()))
    energies = energy(kept, decoder, plan)
    overlap = overlaps[kept.rows, kept.columns]
    return kept, residual_norms(gradients.squared_norm(), kept, overlap, energies)[:, 0]


def least_squares(kept: lk.SparseCoefficients, overlaps: Tensor, gram: Tensor) -> Tensor:
    """Return each sample's least-squares coefficients for its kept subnetworks, in the order of `kept.values`: [N].

    Solves the normal equations M c = o, with M = <Vout_k, Vout_j> and o = <Vout_k, g_s>, in float64. It uses the
    pseudo-inverse, because two directions may be equal. overlaps [S, K], gram [K, K].
    """
    counts = kept.row_offsets.diff()
    values = torch.zeros_like(kept.values)
    cutoff = 1000 * torch.finfo(gram.dtype).eps  # below this share an eigenvalue is rounding of the Gram matrix's dtype
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

    Samples are numbered in the data's order, the positions of a row one after another. If training drew a few
    positions, all positions count here; if it took the last one, only the last counts. Padding is no sample: with an
    `attention_mask`, sample s is the s-th position where the mask is not 0. `divergence` and `reference` replace the
    trained ones, and `any_weights` accepts a model with other weights, as in `evaluate`. Raises ValueError for a
    DataLoader that shuffles, because its samples have no fixed numbers.
    """
    if isinstance(getattr(data, "sampler", None), RandomSampler):
        raise ValueError("data: this DataLoader shuffles, so samples have no numbers; pass one with shuffle=False")
    decomposition = _widened(decomposition)
    positions = "all" if isinstance(decomposition.settings.get("positions"), int) else None
    extractor = extractor_of(decomposition, model, divergence, reference, any_weights, positions)
    seeds = _draws(extractor, n_references, mix(decomposition.settings.get("seed", 0), 4))
    rows: list[Tensor] = []
    for i, gradients in enumerate(_gradients(decomposition, extractor, data, seeds)):
        found = decomposition.encode(gradients).abs()
        if i % len(seeds) == 0:
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
    """Return the decomposition itself if its dtype is at least float32 wide, else a float32 copy."""
    is_narrow = next(decomposition.parameters()).dtype.itemsize < 4
    return copy.deepcopy(decomposition).float() if is_narrow else decomposition


def _draws(extractor: Extractor, n_references: int, seed: int) -> list[int]:
    """Return one seed per repeated draw of a batch's references or positions; a single one if nothing is drawn."""
    if n_references < 1:
        raise ValueError(f"n_references: expected at least 1, got {n_references}")
    reference = extractor.reference
    drawn = isinstance(extractor.positions, int) or (isinstance(reference, str) and reference == "sample")
    return [mix(seed, i) for i in range(n_references if drawn else 1)]


def _gradients(
    decomposition: Subnetworks, extractor: Extractor, data: Any, seeds: list[int], batch_size: int | None = None
) -> Iterator[Gradients]:
    """Yield the gradients of all data, in batches of the trained size if no other: in order, once for every seed."""
    parameter = next(decomposition.parameters())
    batch_size = decomposition.settings.get("batch_size", 16) if batch_size is None else batch_size
    for i, batch in enumerate(in_order(data, batch_size)):
        if i == 1 and extractor.is_per_sample():
            raise ValueError(
                "reference: this tensor has one output per sample of a single batch, but the data are several batches; "
                "raise batch_size to the number of rows, or give one output for all samples"
            )
        inputs = to_device(batch, next(extractor.model.parameters()).device)
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
    """Return the extractor of a decomposition's gradients; its settings fill in arguments that are None.

    Raises ValueError for a setting that was not saved, and if the model's parameters have other shapes or, unless
    `any_weights`, other values than the decomposed ones.
    """
    refuse_sharded(model, "evaluation")
    settings = decomposition.settings
    divergence = settings.get("divergence", "mse") if divergence is None else divergence
    reference = settings.get("reference", "sample") if reference is None else reference
    positions = settings.get("positions", "all") if positions is None else positions
    for name, value, known in (("divergence", divergence, BY_NAME), ("reference", reference, REFERENCES)):
        if isinstance(value, str) and value not in known:
            raise ValueError(f"{name}: the decomposition was trained with {value!r}, which is not saved; pass {name}=")
    params = [exact_pattern(name) for name in decomposition.shapes]
    extractor = Extractor(model, divergence, reference, params, positions)
    for name, p in extractor.parameters.items():
        expected = decomposition.shapes[name]
        if p.shape != expected:
            raise ValueError(f"model: {name!r} has shape {list(p.shape)}, the decomposition's {list(expected)}")
    if not any_weights:
        check_identity(decomposition.base_model, extractor.parameters)
    return extractor
