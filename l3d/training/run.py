"""One training run: the loop from a batch's gradients to the next step, and what it carries along.

gradients (read, extracted ahead, or in chunks) ─ loss and derivatives ─► Adam, unit norm ─ record
    ─ revive the dead ─ exchange what others can stand in for
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3d.callbacks import Callback
from l3d.data.arguments import check_whole
from l3d.data.batches import Batches, mix
from l3d.decomposition.choose_ranks import ranks_from_gradients
from l3d.decomposition.chunked import objective_in_chunks
from l3d.decomposition.directions import default_ranks
from l3d.decomposition.flat import flattened, is_small
from l3d.decomposition.objective import Objective, n_kept, objective
from l3d.decomposition.subnetworks import Subnetworks
from l3d.distributed.process_group import ProcessGroup
from l3d.gradients.ahead import Ahead
from l3d.gradients.chunks import Chunks
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients, concatenate
from l3d.gradients.microbatch import Microbatches, in_chunks
from l3d.gradients.model import to_device
from l3d.gradients.precision import own_precision
from l3d.gradients.shuffled import shuffled
from l3d.storage.identity import identity
from l3d.storage.lock import release
from l3d.storage.run_folder import RunFolder
from l3d.training.candidates import ProbeGradients
from l3d.training.checks import NothingToLearnError, check_finite, dtype_of_sums, finite_losses, naming_step
from l3d.training.exchange import Probe, exchange
from l3d.training.gradient_cache import Cache, contents
from l3d.training.history import DEAD_AFTER, Kept, Recorder
from l3d.training.numpy_step import SmallSteps, has_pairs_only
from l3d.training.optimizer import RelativeAdam
from l3d.training.settings import Settings, kept_fraction, learning_rate
from l3d.training.start import draw_samples, set_from_samples


class Update(NamedTuple):
    """A batch's losses, what was kept of it and what was left, before the step."""

    losses: list[float]  # [restarts]
    kept: Kept  # of all processes
    residual: Tensor  # [S] or [S, restarts] ‖g_s − ĝ_s‖²


class Run:
    """One training run: the restarts side by side in one decomposition, its optimiser, and the step it has reached.

    All restarts see the same batches; the first is what a run of one restart would be, unless there are more than an
    exchange looks at (`l3d.training.exchange.AT_ONCE`).
    """

    def __init__(
        self,
        settings: Settings,
        extractor: Extractor,
        data: Any,
        device: torch.device,
        n_restarts: int = 1,
        micro_batch_size: int | None = None,
        recompute: bool = False,
        model_name: str | None = None,
        build: type[Subnetworks] = Subnetworks,
    ) -> None:
        self.settings, self.extractor, self.device, self.n_restarts = settings, extractor, device, n_restarts
        self.micro_batch_size, self.recompute = micro_batch_size, recompute
        self.group = ProcessGroup.current()
        n_subnetworks = settings.n_subnetworks
        if self.group is not None and (n_restarts > 1 or n_subnetworks < self.group.size):
            reason = (
                "n_restarts: expected 1" if n_restarts > 1 else f"n_subnetworks: expected at least {self.group.size}"
            )
            raise ValueError(f"{reason} with {self.group.size} processes, which share the subnetworks of one run")
        if settings.shuffle and (self.group is not None or micro_batch_size is not None):
            raise ValueError("shuffle: a batch is shuffled whole; leave out micro_batch_size, and run in one process")
        self.columns = None if self.group is None else self.group.share(n_subnetworks)  # this process's subnetworks
        self.cache: Cache | None = None
        self.batches = Batches(data, settings.batch_size, settings.seed)
        self.ahead: Ahead | None = None
        if micro_batch_size is None and self.group is None and self.batches.per_epoch is not None:
            self.ahead = Ahead(extractor, self.batches, device, self._generator)
        self.step = 0
        self.seconds = 0.0  # spent training, over interruptions
        self.recorder = Recorder(settings.steps, n_restarts)
        self.probe: Probe | None = None  # not known until a first batch has been seen
        shapes = {name: p.shape for name, p in extractor.parameters.items()}
        if settings.rank is None:
            settings = self.settings = replace(settings, rank=default_ranks(shapes))
        elif settings.rank == "auto":
            self.batches.peek()
            with naming_step(0):
                first = self.extractor(to_device(self.batches[0], device), self._generator(0))
                settings = replace(settings, rank=ranks_from_gradients(first) or 1)
            self.settings = settings
        restarts = []
        for i in range(n_restarts):
            start = torch.Generator().manual_seed(mix(settings.seed + i, 1))
            restarts.append(build(shapes, n_subnetworks, settings.rank, settings.as_dict(), start, self.columns))
        self.decomposition = build.side_by_side(restarts).to(
            device, dtype_of_sums(settings.dtype, extractor.parameters)
        )
        self.decomposition.base_model = identity(extractor.model, extractor.parameters, model_name)
        if settings.start == "data":
            self._start_from_data()
        self.optimizer = RelativeAdam(
            self.decomposition.parameters(), settings.relative_lr, n_restarts, settings.weight_decay, settings.lazy
        )
        self.small: SmallSteps | None = None  # takes the steps on small batches, from the first of them on
        if self.group is not None and settings.relative_lr:
            self.optimizer.scales = self.group.root_mean_squares(self.optimizer.parameters)

    def _held(self, gradients: Gradients) -> Gradients:
        """Hold gradients as asked: on the run's device, in bfloat16 if the decomposition is to be."""
        gradients = gradients.to(self._like())
        return gradients.held_in(torch.bfloat16) if self.settings.dtype == "bfloat16" else gradients

    def is_first(self) -> bool:
        """Tell whether this is the process that writes and shows."""
        return self.group is None or self.group.rank == 0

    def open(
        self, out: str | Path, overwrite: bool, resume: bool, on_start: Callable[[Path], None] | None
    ) -> RunFolder:
        """Open the run folder; of several processes the first does."""

        def opened() -> RunFolder:
            folder = RunFolder.open(out, overwrite, resume)
            try:
                if on_start is not None:
                    on_start(folder.path)
            except BaseException:
                release(folder.path)
                raise
            return folder

        return opened() if self.group is None else self.group.agreed(opened)

    def use_cache(self, path: str | Path, n_references: int, reads: str) -> None:
        """Repeat the batches of the first `n_references` epochs, reading them from a store where that is faster."""
        n_references = check_whole("n_references", n_references)
        own = contents(self.extractor.model, self.extractor, self.batches.data, self.settings, n_references)
        assert self.batches.per_epoch is not None
        seconds = None if self.ahead is None else self.ahead.seconds
        self.cache = Cache(path, own, n_references * self.batches.per_epoch, self.extract, reads, self.group, seconds)

    def gradients(self, step: int) -> Gradients | Chunks:
        """Return the gradients of a step's batch, from the cache where there is one."""
        whole = self.micro_batch_size is None and self.group is None
        if self.cache is None:
            if not whole:
                return in_chunks(self._batch(step), not self.recompute, self._held)
            return self._shuffled(self.extract(step), step)
        gradients = self._held(self.cache[step])  # a stored batch lies on the CPU
        if whole:
            return self._shuffled(gradients, step % self.cache.n_steps)
        size = self.micro_batch_size
        return Chunks.of(gradients, gradients.n_samples if size is None else size * gradients.per_sequence())

    def extract(self, step: int) -> Gradients:
        """Extract the gradients of a step's batch; what is drawn depends on the seed and the step alone."""
        if self.ahead is not None:
            return self._held(self.ahead[step])
        batch = self._batch(step)
        return concatenate([self._held(batch(i)) for i in range(len(batch))])

    def _shuffled(self, gradients: Gradients, step: int) -> Gradients:
        """Tear a batch's samples apart where that is asked for; a cache holds them whole."""
        return shuffled(gradients, self._generator(step, 7)) if self.settings.shuffle else gradients

    def _batch(self, step: int) -> Microbatches:
        inputs = to_device(self.batches[step], self.device)
        return Microbatches(self.extractor, inputs, lambda: self._generator(step), self.micro_batch_size, self.group)

    def _generator(self, step: int, purpose: int = 2) -> torch.Generator:
        return torch.Generator().manual_seed(mix(self.settings.seed, purpose, step))

    def _like(self) -> Tensor:
        return next(self.decomposition.parameters())

    def check(self) -> None:
        """Go through a first step without taking it, to meet bad input before anything is written."""
        self.batches.peek()
        n_samples = 0
        with torch.no_grad():
            for gradients in in_chunks(self._batch(0), False, self._held):
                self.objective(gradients, 1.0)
                n_samples += gradients.n_samples
        if self.extractor.is_per_sample() and self.batches.per_epoch is not None:
            raise ValueError(
                "reference: rows are shuffled in training, and a tensor with an output for every sample does not "
                "follow them; give one output for all, or data of pairs and reference='pair'"
            )
        if self.group is None:  # what others hold cannot be weighed here
            n_entries = sum(p.numel() for p in self.extractor.parameters.values())
            self.probe = Probe(self.settings, n_samples, n_entries)

    @own_precision()
    def objective(self, gradients: Gradients, k: float) -> Objective:
        """Compute every restart's loss of a batch."""
        d = self.decomposition
        return objective(gradients, d.encoder, d.decoder, k, n_groups=self.n_restarts, backend=self.settings.backend)

    def train(self, callbacks: Sequence[Callback], checkpoint_every: int, save: Callable[[], None]) -> None:
        """Train to the last step; after `check`. save: writes a checkpoint."""
        if self.probe is not None:
            for step in self.probe.missed(self.step):
                self.probe.batches.append(self.gradients(step))
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
                save()

    @own_precision()
    def take_step(self, gradients: Gradients | Chunks) -> bool:
        """Take one step on a batch's gradients; tell whether it completed a row of the history."""
        settings = self.settings
        k, rate = kept_fraction(settings, self.step), settings.lr * learning_rate(settings, self.step)
        try:
            update = self._update(gradients, k, rate)
        except NothingToLearnError:
            if self.step == 0:  # most likely all others are like it
                raise
            self.step += 1  # units that are off for a whole batch, or rows that are all the same: it says nothing
            self._exchange(gradients)  # keeps its own time
            return False
        for _ in range(1, settings.updates):  # of one batch, whose extraction is what a step mostly costs
            self._update(gradients, k, rate)
        self.step += 1
        recorded = self.recorder.add(self.step, update.losses, update.kept, rate, k)
        self._revive(gradients, update.residual)
        self._exchange(gradients)
        return recorded

    def _update(self, gradients: Gradients | Chunks, k: float, rate: float) -> Update:
        """Step once against the derivatives of a batch's loss."""
        d, groups, backend = self.decomposition, self.n_restarts, self.settings.backend
        if isinstance(gradients, Gradients) and is_small(gradients, d.encoder, backend) and has_pairs_only(d.encoder):
            if self.small is None:
                self.small = SmallSteps(d, self.optimizer, groups)
            n = n_kept(k, gradients.n_samples, d.encoder.n_subnetworks // groups)
            learned = self.small.learn(flattened(gradients, d.encoder).numpy(), n)
            losses = finite_losses(learned.losses.tolist(), gradients)
            self.small.step(learned, rate)
            return Update(losses, Kept.where(learned.kept, learned.thresholds), torch.from_numpy(learned.residual))
        if isinstance(gradients, Gradients):
            result = self.objective(gradients, k)
            derivatives = list(torch.autograd.grad(result.loss.sum(), self.optimizer.parameters))
        else:
            result, derivatives = objective_in_chunks(
                gradients, d.encoder, d.decoder, k, n_groups=groups, group=self.group, backend=backend
            )
        losses = finite_losses(result.loss.reshape(-1).tolist(), gradients)
        self.optimizer.step(derivatives, rate, result.kept.columns)
        d.normalize_()
        return Update(losses, Kept.of(result.kept, self.group, self._first_column()), result.residual)

    def _start_from_data(self) -> None:
        """Replace the random start by gradients of the first batch, drawn in proportion to their squared norms."""
        each = self.settings.n_subnetworks
        sides = (self.decomposition.encoder, self.decomposition.decoder)
        generator = torch.Generator().manual_seed(mix(self.settings.seed, 6))
        self.batches.peek()
        with naming_step(0):
            gradients = self.gradients(0)
            finite_losses([float(gradients.squared_norm().sum())], gradients)
        for restart in range(self.n_restarts):
            samples = draw_samples(gradients.squared_norm(), each, generator)
            columns = torch.arange(each, device=self.device) + restart * each - self._first_column()
            set_from_samples(sides, columns, gradients, samples, generator)

    def _first_column(self) -> int:
        """Return which of all subnetworks is this process's first."""
        return 0 if self.columns is None else self.columns.start

    def _revive(self, gradients: Gradients | Chunks, residual: Tensor) -> None:
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
                set_from_samples(sides, columns - self._first_column(), gradients, samples, generator)
        own = dead - self._first_column()
        self.optimizer.forget(own[(own >= 0) & (own < self.decomposition.n_subnetworks)])
        self.recorder.revived(step, dead)

    def _exchange(self, gradients: Gradients | Chunks) -> None:
        """Exchange subnetworks that are worth little, every so often."""
        settings, step = self.settings, self.step
        if self.probe is None:
            return
        self.probe.add(step, gradients)
        if not self.probe.due(step):
            return
        samples = ProbeGradients.of(self.probe.take(), self.decomposition.decoder, settings.backend)
        part = self.decomposition.part(0, self.n_restarts)  # one for all restarts: to make it takes a millisecond
        for restart in self.probe.turn(step, self.n_restarts):
            first = restart * settings.n_subnetworks
            with torch.no_grad():
                for own, whole in zip(part.parameters(), self.decomposition.parameters(), strict=True):
                    own.copy_(whole[first : first + settings.n_subnetworks])
            generator = torch.Generator().manual_seed(mix(settings.seed, 8, step))
            changed = first + exchange(samples, part, settings.k, generator)
            with torch.no_grad():
                for whole, own in zip(self.decomposition.parameters(), part.parameters(), strict=True):
                    whole[changed] = own[changed - first]
            self.optimizer.forget(changed)
            self.recorder.revived(step, changed)

    def final_errors(self) -> list[float]:
        """Return each restart's mean error over the last tenth of the history; infinity before there is any."""
        every = [self.recorder.history_of(i)["error"] for i in range(self.n_restarts)]
        last = [errors[-max(1, len(errors) // 10) :] for errors in every]
        return [sum(errors) / len(errors) if errors else math.inf for errors in last]

    def best(self) -> Subnetworks:
        """Return the restart of least final error, with its history."""
        errors = self.final_errors()
        index = errors.index(min(errors))
        if self.group is None:
            best = self.decomposition.part(index, self.n_restarts)
        else:
            best = self.decomposition.gathered(self.group, self.settings.n_subnetworks) or self.decomposition
        if self.settings.dtype == "bfloat16":
            best = best.to(torch.bfloat16)
        best.restart_errors = errors
        best.history = self.recorder.history_of(index)
        best.threshold = self.recorder.thresholds[index]
        best.timing = self.timing()
        return best

    def timing(self) -> dict[str, float]:
        """Return the seconds spent training, and the steps per second."""
        return {"seconds": self.seconds, "steps_per_second": self.step / max(self.seconds, 1e-9)}
