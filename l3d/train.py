"""Train a decomposition: the whole flow on one screen.

model + batch ─ extract ─► per-sample gradients ─ project ─► coefficients ─ batch top-k ─► kept ─ objective ─►
loss ─ Adam, unit norm ─► decomposition
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l3d import store
from l3d.callbacks import Callback, ProgressBar
from l3d.data import Batches, count_rows, mix
from l3d.decomposition import Decomposition
from l3d.divergence import Divergence
from l3d.extract import Extractor
from l3d.factors import Gradients
from l3d.model import Params, to_device
from l3d.objective import Objective, objective
from l3d.optimizer import RelativeAdam
from l3d.progress import DEAD_AFTER, Recorder
from l3d.settings import Settings, kept_fraction, learning_rate, resolve
from l3d.start import draw_samples, set_from_samples


def decompose(
    model: nn.Module,
    data: Any,
    n_subnetworks: int = 100,
    rank: Any = 8,
    k: float = 0.1,
    params: Params = None,
    divergence: str | Divergence = "mse",
    reference: str | Tensor = "sample",
    positions: str | int = "all",
    preset: str = "default",
    steps: int | None = None,
    batch_size: int = 16,
    lr: float | None = None,
    warm_start: int | None = None,
    n_restarts: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    out: str | Path | None = None,
    checkpoint_every: int | None = None,
    *,
    weight_decay: float = 0.0,
    updates: int = 1,
    start: str = "random",
    revive: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    on_start: Callable[[Path], None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Decomposition:
    """Decompose a model into K sparsely active low-rank subnetworks of its parameters.

    Args:
        model: in evaluation mode; left as it was.
        data: a tensor [n, ...] or Dataset of rows, or an iterable of batches (DataLoader, generator function's
            result, list). Rows of a Dataset may be (input, label): the label is ignored. For reference="pair" they are
            (input, contrasting input).
        n_subnetworks: K.
        rank: of every matrix, or {glob: rank or one rank per mode}.
        k: fraction of the S·K coefficients of a batch that is kept, in (0, 1].
        params: glob, list of globs, or None for all parameters.
        divergence, reference, positions: what is differentiated; see `extract_gradients`.
        preset: "default", or "published" for the paper's recipe.
        steps: optimiser steps; default 2000, or 1000 epochs for "published".
        batch_size: rows of data (texts, images) per step.
        lr: Adam's step size; "default" takes it relative to the typical entry of each factor (default .05),
            "published" as it is (default .01).
        warm_start: steps over which more than k is kept; default a tenth.
        n_restarts: starts to train side by side on the same batches; the one of lowest final error is kept. Each costs
            the memory and the products of its own factors; the gradients are extracted once.
        seed: decides everything random; the same seed on the same machine gives the same bits.
        device: where to train; the model is moved there for the run. Default: where the model is.
        dtype: of the decomposition; default the model's, at least float32.
        backend: "auto", "torch" or "triton".
        out: a run folder to write the result and checkpoints to; refused if not empty unless `overwrite`.
        checkpoint_every: steps between checkpoints, which `resume` continues from. Default: ten per run.
        weight_decay: makes Adam AdamW.
        updates: optimiser steps per batch, on the same gradients: worth it where extracting them is what a step costs.
        start: "random", or "data": the subnetworks start as low-rank parts of single samples' gradients.
        revive: every 200 steps, as long as k is at its value and the last fifth of the run has not begun, start
            subnetworks anew that none of these steps has kept, from samples that are reconstructed badly. Default:
            True, False for "published".
        overwrite: replace an existing run folder.
        resume: continue the run in `out` from its last checkpoint, with the same arguments.
        progress: show a progress bar (on a terminal) with error, kept per sample, dead fraction and samples/s.
        on_start: called with the run folder once everything has been checked and before training starts.
        callbacks: told of the run as it goes, such as `l3d.callbacks.TensorBoard`; left open.

    Returns the trained `Decomposition`; its `history` holds the training curve.

    Raises ValueError for arguments out of range, with one line that names them; nothing is written then. A NaN or
    infinity met during training raises ValueError naming the tensor and the step; the last checkpoint stays.

    >>> d = decompose(nn.Linear(4, 3), torch.randn(64, 4), 2, rank=1, steps=5, progress=False)
    >>> sorted(d.subnetwork(0))
    ['bias', 'weight']
    """
    settings = resolve(
        preset,
        count_rows(data),
        n_subnetworks=n_subnetworks,
        rank=rank,
        k=k,
        params=params,
        divergence=divergence if isinstance(divergence, str) else "callable",
        reference=reference if isinstance(reference, str) else "tensor",
        positions=positions,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warm_start=warm_start,
        weight_decay=weight_decay,
        updates=updates,
        start=start,
        revive=revive,
        seed=seed,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        backend=backend,
    )
    every = max(1, settings.steps // 10) if checkpoint_every is None else checkpoint_every
    for name, value in (("n_restarts", n_restarts), ("checkpoint_every", every)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
    if resume and (out is None or overwrite):
        raise ValueError("resume: expected the run folder as out, and no overwrite")
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError("model: has no parameters to decompose")
    home = first.device
    target = home if device is None else torch.device(device)
    model.to(target)
    try:
        extractor = Extractor(model, divergence, reference, params, positions)
        run = Run(settings, extractor, data, target, n_restarts)
        run.check()
        folder = store.RunFolder.open(out, overwrite, resume) if out is not None else None
        if folder is not None and on_start is not None:
            on_start(folder.path)
        if folder is not None and resume:
            run.restore(folder)
        label = f"{n_restarts} restarts" if n_restarts > 1 else "decompose"
        with ProgressBar(label) if progress else Callback() as bar:
            run.train((bar, *callbacks), folder, every)
    finally:
        model.to(home)
    best = run.best()
    if folder is not None:
        best.save(folder.path)
    for callback in callbacks:
        callback.on_end({name: values[-1] for name, values in best.history.items() if values})
    return best


class Run:
    """One training run: the restarts side by side in one decomposition, its optimiser, and the step it has reached.

    All restarts see the same batches; the first is what a run of one restart would be.
    """

    def __init__(
        self, settings: Settings, extractor: Extractor, data: Any, device: torch.device, n_restarts: int = 1
    ) -> None:
        self.settings, self.extractor, self.device, self.n_restarts = settings, extractor, device, n_restarts
        self.batches = Batches(data, settings.batch_size, settings.seed)
        self.step = 0
        self.seconds = 0.0  # spent training, over interruptions
        self.recorder = Recorder(settings.steps, n_restarts)
        shapes = {name: p.shape for name, p in extractor.parameters.items()}
        restarts = []
        for i in range(n_restarts):
            start = torch.Generator().manual_seed(mix(settings.seed + i, 1))
            restarts.append(Decomposition(shapes, settings.n_subnetworks, settings.rank, settings.as_dict(), start))
        self.decomposition = Decomposition.side_by_side(restarts).to(device, self._dtype())
        if settings.start == "data":
            self._start_from_data()
        self.optimizer = RelativeAdam(
            self.decomposition.parameters(), settings.relative_lr, n_restarts, settings.weight_decay
        )

    def _dtype(self) -> torch.dtype:
        if self.settings.dtype is None:
            return torch.promote_types(next(iter(self.extractor.parameters.values())).dtype, torch.float32)
        dtype = getattr(torch, self.settings.dtype, None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: expected a floating dtype such as 'float32', got {self.settings.dtype!r}")
        if dtype == torch.float16:
            raise ValueError("dtype: float16 cannot hold the optimiser's moments; use float32 or bfloat16")
        return dtype

    def gradients(self, step: int) -> Gradients:
        """Extract the gradients of a step's batch; what is drawn depends on the seed and the step alone."""
        generator = torch.Generator().manual_seed(mix(self.settings.seed, 2, step))
        gradients = self.extractor(to_device(self.batches[step], self.device), generator)
        return gradients.to(next(self.decomposition.parameters()))

    def check(self) -> None:
        """Go through a first step without taking it, to meet bad input before anything is written."""
        self.batches.peek()
        with torch.no_grad():
            self.objective(self.gradients(0), 1.0)

    def objective(self, gradients: Gradients, k: float) -> Objective:
        """Compute every restart's loss of a batch."""
        d = self.decomposition
        return objective(gradients, d.encoder, d.decoder, k, n_groups=self.n_restarts, backend=self.settings.backend)

    def train(self, callbacks: Sequence[Callback], folder: store.RunFolder | None, checkpoint_every: int) -> None:
        """Train to the last step."""
        for callback in callbacks:
            callback.on_start(self.settings.as_dict())
        started = time.perf_counter() - self.seconds
        while self.step < self.settings.steps:
            with naming_step(self.step):
                recorded = self.take_step(self.gradients(self.step))
            if recorded:
                for callback in callbacks:
                    callback.on_step(self.step, self.recorder.latest())
            if self.step % checkpoint_every == 0 or self.step == self.settings.steps:
                self.seconds = time.perf_counter() - started
                with naming_step(self.step - 1):
                    check_finite(self.decomposition)
                if folder is not None:
                    self._save(folder)

    def take_step(self, gradients: Gradients) -> bool:
        """Take one step on a batch's gradients; tell whether it completed a row of the history."""
        settings, optimizer = self.settings, self.optimizer
        k, rate = kept_fraction(settings, self.step), settings.lr * learning_rate(settings, self.step)
        for update in range(settings.updates):  # of one batch, whose extraction is what a step mostly costs
            result = self.objective(gradients, k)
            losses = finite_losses(result.loss, gradients)
            if update == 0:  # what is recorded is the error of a batch before it was learned from
                errors, kept = losses, result.kept
            optimizer.step(torch.autograd.grad(result.loss.sum(), optimizer.parameters), rate)
            self.decomposition.normalize_()
        self.step += 1
        recorded = self.recorder.add(self.step, errors, kept, rate, k)
        self._revive(gradients, result.residual)
        return recorded

    def _start_from_data(self) -> None:
        """Replace the random start by gradients of the first batch, drawn in proportion to their squared norms."""
        each = self.settings.n_subnetworks
        sides = (self.decomposition.encoder, self.decomposition.decoder)
        generator = torch.Generator().manual_seed(mix(self.settings.seed, 6))
        self.batches.peek()
        with naming_step(0):
            gradients = self.gradients(0)
            finite_losses(gradients.squared_norm().sum(), gradients)
        for restart in range(self.n_restarts):
            samples = draw_samples(gradients.squared_norm(), each, generator)
            columns = torch.arange(each, device=self.device) + restart * each
            set_from_samples(sides, columns, gradients, samples, generator)

    def _revive(self, gradients: Gradients, residual: Tensor) -> None:
        """Start dead subnetworks anew, every so often; `residual` is the batch's, [S] or [S, restarts]."""
        settings, step = self.settings, self.step
        in_time = settings.warm_start + DEAD_AFTER <= step <= 0.8 * settings.steps
        if not settings.revive or step % DEAD_AFTER or not in_time:
            return
        residual = residual.detach().view(gradients.n_samples, self.n_restarts)
        dead = self.recorder.dead(step)
        generator = torch.Generator().manual_seed(mix(settings.seed, 5, step))
        for restart in range(self.n_restarts):
            columns = dead[dead // settings.n_subnetworks == restart]
            if len(columns):
                samples = draw_samples(residual[:, restart], len(columns), generator)
                sides = (self.decomposition.encoder, self.decomposition.decoder)
                set_from_samples(sides, columns, gradients, samples, generator)
        self.optimizer.forget(dead)
        self.recorder.revived(step, dead)

    def final_errors(self) -> list[float]:
        """Return each restart's mean error over the last tenth of the history; infinity before there is any."""
        every = [self.recorder.history_of(i)["error"] for i in range(self.n_restarts)]
        last = [errors[-max(1, len(errors) // 10) :] for errors in every]
        return [sum(errors) / len(errors) if errors else math.inf for errors in last]

    def best(self) -> Decomposition:
        """Return the restart of least final error, with its history."""
        errors = self.final_errors()
        index = errors.index(min(errors))
        best = self.decomposition.part(index, self.n_restarts)
        best.restart_errors = errors
        best.history = self.recorder.history_of(index)
        best.threshold = self.recorder.thresholds[index]
        best.timing = self._timing()
        return best

    def _timing(self) -> dict[str, float]:
        return {"seconds": self.seconds, "steps_per_second": self.step / max(self.seconds, 1e-9)}

    def _save(self, folder: store.RunFolder) -> None:
        tensors, values = self.optimizer.state()
        state = {"optimizer": values, "recorder": self.recorder.state()}
        self.decomposition.history = self.recorder.history
        self.decomposition.timing = self._timing()
        self.decomposition.threshold = self.recorder.thresholds[0]  # that of a lone restart
        folder.save_checkpoint(self.step, self.decomposition, tensors, state)

    def restore(self, folder: store.RunFolder) -> None:
        """Continue from the last checkpoint, if there is one."""
        found = folder.load_checkpoint()
        if found is None:
            return
        decomposition, tensors, state = found
        changed = [
            name
            for name, value in self.decomposition.settings.items()
            if json.dumps(value) != json.dumps(decomposition.settings.get(name))
        ]
        if decomposition.n_subnetworks != self.decomposition.n_subnetworks and "n_subnetworks" not in changed:
            changed.append("n_restarts")
        if changed:
            raise ValueError(f"resume: {', '.join(changed)} differ from the interrupted run's; pass the same arguments")
        if decomposition.shapes != self.decomposition.shapes or decomposition.ranks != self.decomposition.ranks:
            raise ValueError("resume: the interrupted run decomposed other parameters; pass the same model")
        self.decomposition.load_state_dict(decomposition.state_dict())
        self.optimizer.load_state(tensors, state["optimizer"])
        self.recorder.load_state(state["recorder"], decomposition.history)
        self.step = state["step"]
        self.seconds = decomposition.timing["seconds"]


@contextmanager
def naming_step(step: int) -> Iterator[None]:
    """Say at which step an error was met."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"step {step}: {error}") from error


def check_finite(decomposition: Decomposition) -> None:
    """Refuse a decomposition that the last steps have blown up; the last checkpoint stays."""
    for name, parameter in decomposition.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"decomposition: NaN or infinity in {name!r}; lower lr. The last checkpoint stays")


def finite_losses(loss: Tensor, gradients: Gradients) -> list[float]:
    """Return every restart's loss as a number; raises ValueError naming the tensor whose gradient is not finite."""
    values = loss.reshape(-1).tolist()
    if all(map(math.isfinite, values)):
        return values
    for name, tensor in gradients.tensors():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"gradients: NaN or infinity in those of {name!r}; the last checkpoint stays")
    if not gradients.squared_norm().any():
        raise ValueError("gradients: all zero in this batch, so there is nothing to reconstruct; check params and data")
    raise ValueError("loss: not finite although the gradients are; lower lr")
