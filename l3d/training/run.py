"""Hold one training run: its data, its gradients, its decomposition, and what it does every so often."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l3d.callbacks import Callback
from l3d.data.batch import to_device, without_label
from l3d.data.batches import Batches, mix
from l3d.decomposition.choose_ranks import ranks_from_gradients
from l3d.decomposition.costs import Plan
from l3d.decomposition.directions import FLOAT32_CPU, default_ranks
from l3d.decomposition.subnetworks import Subnetworks, mean_of_last
from l3d.distributed.process_group import ProcessGroup
from l3d.gradients.ahead import Ahead
from l3d.gradients.chunks import Chunks
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients, concatenate
from l3d.gradients.fixed import check_rows_apart
from l3d.gradients.microbatch import Microbatches, in_chunks
from l3d.gradients.shuffled import shuffled
from l3d.storage.identity import identity
from l3d.storage.lock import release
from l3d.storage.run_folder import RunFolder
from l3d.training.candidates import ProbeGradients
from l3d.training.checks import NothingToLearnError, dtype_of_sums, finite_losses, naming_step
from l3d.training.exchange import Probe, exchange
from l3d.training.gradient_cache import Cache, contents
from l3d.training.history import Recorder
from l3d.training.optimizer import RelativeAdam
from l3d.training.options import GradientCache, Memory
from l3d.training.settings import Settings
from l3d.training.start import draw_samples, set_from_samples
from l3d.training.step import Stepper, StepResult


def waits_for(device: torch.device) -> bool:
    """Tell whether every step's losses are read as they come: not from a GPU, for which the host does not wait."""
    return device.type == "cpu"


class Run:
    """One training run: the restarts side by side in one decomposition, its optimiser, and the step it has reached.

    All restarts see the same batches; the first is what a run of one restart would be, unless there are more than one
    replacement looks at (`Replacement.restarts_at_once`).

    Args:
        settings: resolved; rank None or "auto" is settled here.
        extractor: of the model.
        data: to draw batches from.
        device: to train on.
        n_restarts: starts to train side by side.
        memory: micro-batches and recomputation.
        build: the class of the decomposition.
    """

    def __init__(
        self,
        settings: Settings,
        extractor: Extractor,
        data: Any,
        device: torch.device,
        n_restarts: int = 1,
        memory: Memory | None = None,
        build: type[Subnetworks] = Subnetworks,
    ) -> None:
        memory = memory or Memory()
        self.settings, self.extractor, self.device, self.n_restarts = settings, extractor, device, n_restarts
        self.micro_batch_size, self.recompute = memory.micro_batch_size, memory.recompute
        self.group = ProcessGroup.current()
        n_subnetworks = settings.n_subnetworks
        if self.group is not None and (n_restarts > 1 or n_subnetworks < self.group.size):
            size = self.group.size
            reason = "n_restarts: expected 1" if n_restarts > 1 else f"n_subnetworks: expected at least {size}"
            raise ValueError(f"{reason} with {size} processes, which share the subnetworks of one run")
        if settings.gradients.shuffle and (self.group is not None or self.micro_batch_size is not None):
            raise ValueError("shuffle: a batch is shuffled whole; leave out micro_batch_size, and run in one process")
        self.columns = None if self.group is None else self.group.share(n_subnetworks)  # this process's subnetworks
        self._first_column = 0 if self.columns is None else self.columns.start
        self.cache: Cache | None = None
        self.batches = Batches(data, settings.batch_size, settings.seed)
        self.ahead: Ahead | None = None
        if self.micro_batch_size is None and self.group is None and self.batches.per_epoch is not None:
            self.ahead = Ahead(extractor, self.batches, device, self._generator)
        self.step = 0  # steps taken
        self.seconds = 0.0  # spent training, over interruptions
        self.norm = math.nan  # log2 Σ_s ‖g_s‖² of the first batch, once `check` has seen it
        self.seen: dict[str, Any] | None = None  # what a checkpoint tells of the arguments, once asked for
        self.recorder = Recorder(settings.steps, n_restarts, settings.replacement.restart_every)
        self.probe: Probe | None = None  # not known until a first batch has been seen
        self._settle_rank()
        self.decomposition = self._start(build)
        self.decomposition.base_model = identity(extractor.model, extractor.parameters)
        parameters = self.decomposition.parameters()
        self.optimizer = RelativeAdam(parameters, settings.relative_lr, n_restarts, lazy=settings.rest)
        if self.group is not None and settings.relative_lr:
            self.optimizer.scales = self.group.root_mean_squares(self.optimizer.parameters)
        plan = Plan(settings.backend, n_restarts)
        replayable = self.group is None and self.micro_batch_size is None and self.batches.per_epoch is not None
        self.waits = waits_for(device) or not replayable
        self.stepper = Stepper(self.decomposition, self.optimizer, plan, self.group, self._first_column, self.waits)

    def _settle_rank(self) -> None:
        """Choose the ranks where the settings leave them open."""
        if self.settings.rank is None:
            shapes = {name: p.shape for name, p in self.extractor.parameters.items()}
            self.settings = replace(self.settings, rank=default_ranks(shapes))
        elif self.settings.rank == "auto":
            self.batches.peek()
            with naming_step(0):
                first = self.extractor(to_device(self.batches[0], self.device), self._generator(0))
                self.settings = replace(self.settings, rank=ranks_from_gradients(first.in_range()[0]) or 1)

    def _start(self, build: type[Subnetworks]) -> Subnetworks:
        """Draw every restart's directions, and lay them side by side."""
        settings, shapes = self.settings, {name: p.shape for name, p in self.extractor.parameters.items()}
        starts = [torch.Generator().manual_seed(mix(settings.seed + i, 1)) for i in range(self.n_restarts)]
        own = settings.as_dict()
        what = (shapes, settings.n_subnetworks, settings.rank, own)
        restarts = [build(*what, start, self.columns, FLOAT32_CPU) for start in starts]
        dtype = dtype_of_sums(settings.dtype, self.extractor.parameters)
        return build.side_by_side(restarts).to(self.device, dtype)

    def is_first(self) -> bool:
        """Tell whether this is the process that writes and shows."""
        return self.group is None or self.group.rank == 0

    def open(self, out: str | Path, existing: str, callbacks: Sequence[Callback]) -> RunFolder:
        """Open the run folder and tell the callbacks; of several processes the first does."""

        def make() -> RunFolder:
            folder = RunFolder.open(out, existing == "overwrite", existing == "resume")
            try:
                for callback in callbacks:
                    callback.on_folder(folder.path)
            except BaseException:
                release(folder.path)
                raise
            return folder

        return make() if self.group is None else self.group.agreed(make)

    # --- gradients --------------------------------------------------------------------------------------------------

    def use_cache(self, cache: GradientCache) -> None:
        """Repeat the batches of the first epochs, reading them from a store where that is faster."""
        assert cache.folder is not None
        own = contents(self.extractor.model, self.extractor, self.batches.data, self.settings, cache.n_references)
        assert self.batches.per_epoch is not None
        n_steps = cache.n_references * self.batches.per_epoch
        seconds = None if self.ahead is None else self.ahead.seconds
        self.cache = Cache(cache.folder, own, n_steps, self.extract, cache.reads, self.group, seconds)

    def gradients(self, step: int) -> Gradients | Chunks:
        """Return the per-sample gradients of a step's batch, from the cache where there is one."""
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

    def _held(self, gradients: Gradients) -> Gradients:
        """Hold gradients on the run's device, in bfloat16 if the decomposition is to be."""
        gradients = gradients.to(next(self.decomposition.parameters()))
        return gradients.held_in(torch.bfloat16) if self.settings.dtype == "bfloat16" else gradients

    def _shuffled(self, gradients: Gradients, step: int) -> Gradients:
        """Shuffle a batch's gradients over its samples where that is asked for; a cache holds them as they are."""
        return shuffled(gradients, self._generator(step, 7)) if self.settings.gradients.shuffle else gradients

    def _batch(self, step: int) -> Microbatches:
        inputs = to_device(self.batches[step], self.device)
        return Microbatches(self.extractor, inputs, lambda: self._generator(step), self.micro_batch_size, self.group)

    def _generator(self, step: int, purpose: int = 2) -> torch.Generator:
        return torch.Generator().manual_seed(mix(self.settings.seed, purpose, step))

    def check(self) -> None:
        """Go through a first step without taking it, to meet bad input before anything is written."""
        self.batches.peek()
        if self.micro_batch_size is not None or self.group is not None:
            why = "leave out micro_batch_size" if self.group is None else "train it in one process"
            first = without_label(to_device(self.batches[0], self.device))
            check_rows_apart(self.extractor.model, first, why)
        n_samples, total = 0, 0.0
        with torch.no_grad():
            for gradients in in_chunks(self._batch(0), False, self._held):
                if n_samples == 0:  # a factor on all gradients changes no figure
                    gradients, self.extractor.exponent = gradients.in_range()
                self.stepper.objective(gradients, 1.0)
                n_samples += gradients.n_samples
                total += float(gradients.squared_norm_in_range().sum())
        self.norm = math.log2(total) - 2 * self.extractor.exponent if total > 0 else -math.inf
        self.extractor.check_values = self.waits  # from now on the losses tell, when they are read
        if self.settings.divergence is None:  # which the model's first output has decided
            self.settings = replace(self.settings, divergence="kl" if self.extractor.is_kl else "mse")
            self.decomposition.settings["divergence"] = self.settings.divergence
        if self.extractor.is_per_sample() and self.batches.per_epoch is not None:
            raise ValueError(
                "reference: rows are shuffled in training, and a tensor with an output for every sample does not "
                "follow them; give one output for all, or data of pairs and reference='pair'"
            )
        if self.group is None:  # what other processes hold cannot be compared here
            n_entries = sum(p.numel() for p in self.extractor.parameters.values())
            self.probe = Probe(self.settings, n_samples, n_entries)

    # --- steps ------------------------------------------------------------------------------------------------------

    def take_step(self, gradients: Gradients | Chunks) -> StepResult | None:
        """Take one step on a batch's gradients; None, and no step, where all of them are zero."""
        k, lr = self.settings.kept_fraction(self.step), self.settings.learning_rate(self.step)
        result: StepResult | None = None
        try:
            result = self.stepper.step(gradients, k, lr)
        except NothingToLearnError:  # inactive units for a whole batch, or rows that are all the same
            if self.step == 0:  # most likely all other batches are like it
                raise
        self.step += 1
        return result

    def record(self, result: StepResult) -> bool:
        """Take note of the step just taken; tell whether that completed a row of the history."""
        k, lr = self.settings.kept_fraction(self.step - 1), self.settings.learning_rate(self.step - 1)
        return self.recorder.add(self.step, result.losses, result.kept, lr, k, self._replay)

    def settle(self) -> None:
        """Read what earlier steps left on the device, and raise what was wrong in them; before anything is saved."""
        self.recorder.settle(self._replay)

    def _replay(self, step: int) -> None:
        """Extract a batch again whose loss was not finite and raise the reason; return if all gradients are zero."""
        waiting, self.extractor.check_values = self.extractor.check_values, True
        try:
            with naming_step(step):
                ahead = self.ahead if self.cache is None else None
                gradients = self.gradients(step) if ahead is None else self._held(ahead.alone(step))
                finite_losses([math.nan], gradients)
        except NothingToLearnError:
            if step == 0:
                raise
        finally:
            self.extractor.check_values = waiting

    def restart_dead(self, gradients: Gradients | Chunks, residual: Tensor) -> None:
        """Every so often, restart dead subnetworks from badly reconstructed samples; residual [S] or [S, restarts]."""
        settings, step = self.settings, self.step
        if not settings.replaces(step, settings.replacement.restart_every):
            return
        residual = residual.detach().view(gradients.n_samples, self.n_restarts)
        dead = self.recorder.dead(step)
        generator = self._generator(step, 5)
        for restart in range(self.n_restarts):
            columns = dead[dead // settings.n_subnetworks == restart]
            if len(columns):
                samples = draw_samples(residual[:, restart], len(columns), generator)
                sides = (self.decomposition.encoder, self.decomposition.decoder)
                set_from_samples(sides, columns - self._first_column, gradients, samples, generator)
        own = dead - self._first_column
        self.optimizer.forget(own[(own >= 0) & (own < self.decomposition.n_subnetworks)])
        self.recorder.revived(step, dead)

    @torch.no_grad()
    def replace_redundant(self, gradients: Gradients | Chunks) -> None:
        """Every so often, replace redundant subnetworks by directions learned from the residual gradients.

        Not where several processes share the subnetworks.
        """
        settings, step = self.settings, self.step
        if self.probe is None:
            return
        self.probe.add(step, gradients)
        if not self.probe.due(step):
            return
        how = settings.replacement
        samples = ProbeGradients.of(self.probe.take(), self.decomposition.decoder, settings.backend, how.multiplied_out)
        part = self.decomposition.part(0, self.n_restarts)  # one for all restarts: to make it takes a millisecond
        for restart in self.probe.turn(step, self.n_restarts):
            first = restart * settings.n_subnetworks
            for own, whole in zip(part.parameters(), self.decomposition.parameters(), strict=True):
                own.copy_(whole[first : first + settings.n_subnetworks])
            changed = first + exchange(samples, part, settings.k, self._generator(step, 8), how)
            for own, whole in zip(part.parameters(), self.decomposition.parameters(), strict=True):
                whole[changed] = own[changed - first]
            self.optimizer.forget(changed)
            self.recorder.revived(step, changed)

    def fill_probe(self) -> None:
        """Extract the batches that a resumed run's next replacement looks at."""
        if self.probe is not None:
            for step in self.probe.missed(self.step):
                self.probe.batches.append(self.gradients(step))

    # --- the end ----------------------------------------------------------------------------------------------------

    def final_errors(self) -> list[float]:
        """Return each restart's mean error over the last tenth of the history; infinity before there is any."""
        return [mean_of_last(self.recorder.history_of(i)["error"]) for i in range(self.n_restarts)]

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
        best.first_error = self.recorder.first_errors[index] if self.recorder.first_errors else math.nan
        best.threshold = math.ldexp(self.recorder.thresholds[index], -self.extractor.exponent)
        best.timing = self.timing()
        return best

    def timing(self) -> dict[str, float]:
        """Return the seconds spent training, and the steps per second."""
        return {"seconds": self.seconds, "steps_per_second": self.step / max(self.seconds, 1e-9)}
