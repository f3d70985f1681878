"""Estimate a run's cost before it starts: memory in bytes, the path of every tensor, and the time per step."""

import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from l3d.api import Decomposition
from l3d.data.arguments import check_device, check_whole
from l3d.data.batches import count_rows
from l3d.decomposition.costs import Path, choose_paths
from l3d.decomposition.directions import resolve_ranks
from l3d.decomposition.objective import n_kept
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.chunks import Chunks
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients
from l3d.gradients.model import check_model
from l3d.storage.formats import duration, size
from l3d.train import decompose, turn
from l3d.training.checks import dtype_of_sums
from l3d.training.memory import memory_now, peak_memory
from l3d.training.run import Run
from l3d.training.settings import Settings, check_kinds, resolve

N_STEPS = 3  # timed steps, after one untimed step that warms up


class TensorEstimate(NamedTuple):
    """Sizes of one decomposed tensor."""

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]  # () for a vector, which is stored whole
    path: Path  # how its gradients are projected onto the directions, at the final k
    parameters: int  # trained numbers in encoder and decoder
    factor_bytes: int  # bytes of a batch's gradient factors


class Estimate(NamedTuple):
    """Cost of one run, for one of its processes."""

    tensors: list[TensorEstimate]
    n_samples: int  # samples in a batch
    n_kept: int  # coefficients kept in a batch, at the final k
    parameter_bytes: int  # encoder and decoder
    optimizer_bytes: int  # Adam's moments and the temporaries of a step
    factor_bytes: int  # a batch's gradient factors, in the held dtype; tensors that layers share count once
    peak_bytes: int  # predicted: the process's memory before the run, plus the three above
    measured_peak_bytes: int  # of the process, or of the GPU's memory, over the timed steps
    seconds_per_step: float  # at the final k
    seconds_per_warm_step: float  # at the warm start's first step, where all coefficients are kept
    seconds: float  # the whole run

    def __repr__(self) -> str:
        """Return the sizes, the peak memory and the times."""
        return (
            f"Estimate({len(self.tensors)} tensors; n_samples={self.n_samples}, n_kept={self.n_kept}; "
            f"peak {size(self.peak_bytes)}, measured {size(self.measured_peak_bytes)}; "
            f"{duration(self.seconds_per_step)} a step, {duration(self.seconds)} in all)"
        )


def checked(model: nn.Module, data: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Settings, Extractor]:
    """Check arguments of `decompose` without running the model: kinds, ranges, ranks that the tensors allow.

    Returns all arguments, the settings and an extractor of the model. Raises ValueError naming the argument, and
    TypeError for one that `decompose` does not have.
    """
    signature = inspect.signature(decompose)
    signature.bind(model, data, **arguments)
    check_model(model)
    chosen = {name: each.default for name, each in signature.parameters.items()} | dict(arguments)
    check_kinds(chosen)
    if chosen["device"] is not None:
        check_device(chosen["device"])
    settings = resolve(chosen, count_rows(data))
    check_whole("n_restarts", chosen["n_restarts"])
    extractor = Extractor(model, *(chosen[name] for name in ("divergence", "reference", "params", "positions")))
    dtype_of_sums(settings.dtype, extractor.parameters)
    if settings.rank not in (None, "auto"):
        resolve_ranks(settings.rank, {name: p.shape for name, p in extractor.parameters.items()})
    return chosen, settings, extractor


def plan(model: nn.Module, data: Any, **arguments: Any) -> Run:
    """Return the run that `decompose` would train with these arguments, before its first step."""
    chosen, settings, extractor = checked(model, data, arguments)
    device = next(model.parameters()).device
    return Run(settings, extractor, data, device, chosen["n_restarts"], chosen["memory"], Decomposition)


def estimate(model: nn.Module, data: Any, **arguments: Any) -> Estimate:
    """Take a few steps of the run that `decompose` would train with these arguments, and return its cost.

    Raises ValueError for invalid arguments, as `decompose` does.
    """
    checked(model, data, arguments)
    home, device = next(model.parameters()).device, arguments.get("device")
    model.to(home if device is None else device)
    try:
        return _measured(plan(model, data, **arguments))
    finally:
        model.to(home)


def _measured(run: Run) -> Estimate:
    run.check()
    before = memory_now() if run.device.type == "cpu" else torch.cuda.memory_allocated(run.device)
    before -= sum(p.nbytes for p in run.decomposition.parameters()) * 3  # parameters and moments exist already
    settings = run.settings
    timed: dict[bool, list[float]] = {True: [], False: []}  # seconds of steps, those of the warm start apart
    for step in range(min(settings.steps, 2 * N_STEPS + 1)):
        is_warm = settings.warm_start > 0 and step <= N_STEPS
        run.step = 0 if is_warm else settings.warm_start
        together = 1 if run.ahead is None else run.ahead.width  # number of batches extracted together; a step uses one
        started = time.perf_counter()
        gradients = run.gradients(step * together)
        extracted = time.perf_counter()
        turn(run, gradients)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        if step > 0:
            seconds = (extracted - started) / together + time.perf_counter() - extracted
            timed[is_warm].append(seconds)
    per_step = statistics.median(timed[False] or timed[True] or [float("nan")])
    per_warm = statistics.median(timed[True] or timed[False] or [float("nan")])
    # the kept fraction falls geometrically, so the mean of both ends is an upper bound
    seconds = settings.warm_start * (per_warm + per_step) / 2 + (settings.steps - settings.warm_start) * per_step
    first = next(iter(gradients)) if isinstance(gradients, Chunks) else gradients
    factor_bytes = _factor_bytes(gradients)
    parameter_bytes = sum(p.nbytes for p in run.decomposition.parameters())
    optimizer_bytes = 5 * parameter_bytes  # two moments, the gradients and two temporaries of a step
    return Estimate(
        tensors=tensor_estimates(run.decomposition, first, settings, gradients.n_samples),
        n_samples=gradients.n_samples,
        n_kept=n_kept(settings.k, gradients.n_samples, settings.n_subnetworks),
        parameter_bytes=parameter_bytes,
        optimizer_bytes=optimizer_bytes,
        factor_bytes=factor_bytes,
        peak_bytes=before + parameter_bytes + optimizer_bytes + factor_bytes,
        measured_peak_bytes=peak_memory(run.device),
        seconds_per_step=per_step,
        seconds_per_warm_step=per_warm,
        seconds=seconds,
    )


def tensor_estimates(
    decomposition: Subnetworks, gradients: Gradients, settings: Settings, n_samples: int
) -> list[TensorEstimate]:
    """Describe every tensor; `gradients` are those of a batch of `n_samples`, or of a chunk of it."""
    kept = n_kept(settings.kept_fraction(settings.steps), gradients.n_samples, decomposition.n_subnetworks)
    paths = choose_paths(gradients, decomposition.encoder, kept)
    parts = n_samples / gradients.n_samples
    found = []
    for name, piece in decomposition.encoder.items():
        held = sum(tensor.nbytes for owner, tensor in gradients.tensors() if owner == name)
        count = 2 * sum(p.numel() for p in piece.parameters())
        shape, ranks = tuple(decomposition.shapes[name]), tuple(decomposition.ranks[name])
        found.append(TensorEstimate(name, shape, ranks, paths[name], count, round(parts * held)))
    return found


def path_name(estimated: TensorEstimate) -> str:
    """Return in words how a tensor's gradients are projected onto the directions."""
    if not estimated.ranks:
        return "whole"
    how = "materialised" if estimated.path.materialised else "factored"
    return f"{how}, {'sampled' if estimated.path.sampled else 'dense'}"


def _factor_bytes(gradients: Gradients | Chunks) -> int:
    chunks: Sequence[Gradients] = list(gradients) if isinstance(gradients, Chunks) else [gradients]
    return sum(sum({tensor.data_ptr(): tensor.nbytes for _, tensor in chunk.tensors()}.values()) for chunk in chunks)
