"""Train a decomposition: `turn` is one step and what follows it, `train` the loop, `decompose` prepares and ends a run.

model + batch ─ gradients ─► per-sample gradients ─ project ─► coefficients [S, K] ─ batch top-k ─► kept ─ objective ─►
loss ─ Adam, decoder to unit norm ─► next step;   every so often: restart dead, replace redundant, checkpoint
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from l3d.api import Decomposition
from l3d.callbacks import Callback, ProgressBar
from l3d.data.arguments import check_device, check_whole, warn
from l3d.data.batches import count_rows
from l3d.distributed.signals import Terminated, awaiting
from l3d.gradients.chunks import Chunks
from l3d.gradients.divergence import Divergence, default_note
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients
from l3d.gradients.fixed import NotFiniteRowsError, check_fixed, refuse_sharded
from l3d.gradients.model import Params, check_model
from l3d.storage.files import WriteError
from l3d.storage.lock import release
from l3d.storage.progress import advised
from l3d.training.checkpoints import restore, save
from l3d.training.checks import check_finite, naming_step, not_finite
from l3d.training.options import GradientCache, GradientOptions, Memory, Preset, documented, older_names
from l3d.training.run import Run
from l3d.training.settings import check_kinds, resolve


def turn(run: Run, gradients: Gradients | Chunks) -> bool:
    """Take one step on a batch's gradients and do what is due after it; return whether the history has a new row."""
    result = run.take_step(gradients)  # coefficients, batch top-k, loss, its derivatives, Adam: `l3d.training.step`
    recorded = result is not None and run.record(result)
    if result is not None:  # None: every gradient of the batch is zero
        run.restart_dead(gradients, result.residual)
    run.replace_redundant(gradients)
    return recorded


def train(
    run: Run,
    callbacks: Sequence[Callback] = (),
    checkpoint_every: int = sys.maxsize,
    checkpoint: Callable[[], None] = lambda: None,
) -> None:
    """Train to the last step; `callbacks` are told of each row of the history, `checkpoint` saves the run.

    Ctrl-C and SIGTERM end it after the step being taken, which is saved: raises KeyboardInterrupt or SystemExit.
    """
    settings, started = run.settings, time.perf_counter() - run.seconds
    asked = False
    with awaiting() as stop:
        while run.step < settings.steps and not asked:
            with naming_step(run.step):
                gradients = run.gradients(run.step)  # of the divergence, per sample: as factors, G_s = Σ_t dy ⊗ x
                recorded = turn(run, gradients)
            if recorded:
                for callback in callbacks:
                    callback.on_step(run.step, run.recorder.latest())
            asked = stop.asked(run.group)
            if asked or run.step % checkpoint_every == 0 or run.step == settings.steps:
                run.seconds = time.perf_counter() - started
                run.settle()
                with naming_step(run.step - 1):
                    check_finite(run.decomposition)
                checkpoint()
        if stop.asked(run.group):  # also one that came during the last save; no process leaves before it is done
            raise stop.error()


@older_names
@documented
@torch.inference_mode(False)
@torch.enable_grad()
def decompose(
    model: nn.Module,
    data: Any,
    n_subnetworks: int = 100,
    rank: Any = None,
    k: float = 0.1,
    params: Params = None,
    divergence: str | Divergence | None = None,
    reference: str | Tensor = "sample",
    positions: str | int = "all",
    preset: str | Preset = "default",
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
    cache: GradientCache | str | Path | None = None,
    memory: Memory | None = None,
    callbacks: Sequence[Callback] | None = None,
    existing: str = "refuse",
    gradients: GradientOptions | None = None,
) -> Decomposition:
    """Decompose a model into K sparsely active low-rank subnetworks of its parameters.

    Args:
        model: in evaluation mode; left as it was.
        data: a tensor [n, ...], a mapping of tensors or a Dataset of rows, or an iterable of batches (DataLoader,
            generator function's result, list). Rows of a Dataset may be (input, label): the label is ignored. For
            reference="pair" they are (input, contrasting input). Rows of a tensor or Dataset are shuffled.
        {options}
        out: a run folder to write checkpoints and the result to.
        cache: a folder to keep gradients in, or a `GradientCache`.
        memory: a `Memory`: micro-batches, recomputation.
        callbacks: told of the run as it goes, such as `l3d.callbacks.TensorBoard`; left open. None shows a progress
            bar on a terminal, a list replaces it: [] is silent, and `l3d.callbacks.ProgressBar()` can be in it.
        existing: what to do where `out` holds a run: "refuse" it, "overwrite" it, or "resume" it from its last
            checkpoint, with the same arguments, to the same bits.
        gradients: a `GradientOptions`: which gradients are decomposed.

    Where torch.distributed is initialised with several processes (torchrun), they train one decomposition together,
    each its share of the subnetworks; every process must call this alike, with the same data.

    Returns the trained `Decomposition`; its `history` holds the training curve. Of several processes the first returns
    it, on the CPU, and the others their shares of it.

    Raises ValueError for arguments out of range, with one line that names them; nothing is written then. A NaN or
    infinity met during training raises ValueError naming the tensor and the step; the last checkpoint stays. Ctrl-C and
    SIGTERM finish the step and save it in `out`, then raise KeyboardInterrupt, or SystemExit with status 143; a full
    disk raises OSError. All say in one line how to go on.

    >>> d = decompose(nn.Linear(4, 3), torch.randn(64, 4), 2, rank=1, steps=5, callbacks=[])
    >>> sorted(d.subnetwork(0))
    ['bias', 'weight']
    """
    check_model(model)
    check_kinds(locals())
    settings = resolve(locals(), count_rows(data))
    every = max(1, settings.steps // 10) if checkpoint_every is None else checkpoint_every
    every = check_whole("checkpoint_every", every)
    n_restarts = check_whole("n_restarts", n_restarts)
    cache = GradientCache(cache) if isinstance(cache, (str, Path)) else cache
    check_fixed(model)
    refuse_sharded(model, "decompose")
    home, folder = next(model.parameters()).device, None
    target = home if device is None else check_device(device)
    model.to(target)
    try:
        extractor = Extractor(model, divergence, reference, params, positions)
        run = Run(settings, extractor, data, target, n_restarts, memory, Decomposition)
        run.check()
        if cache is not None and cache.folder is not None:
            run.use_cache(cache)
        with ExitStack() as open_bar:
            shown = callbacks is None and run.is_first()
            told = [open_bar.enter_context(ProgressBar())] if shown else list(callbacks or ()) * run.is_first()
            if out is not None:
                folder = run.open(out, existing, told)
                if existing == "resume":
                    restore(run, folder)
            run.fill_probe()
            for callback in told:
                callback.on_start(run.settings.as_dict())
                if divergence is None:
                    callback.on_note(default_note(str(run.settings.divergence)))
            train(run, told, every, *([partial(save, run, folder)] if folder is not None else []))
            if run.cache is not None:
                for callback in told:
                    callback.on_note(run.cache.choice())
        best = cast(Decomposition, run.best())
        if folder is not None and run.is_first():
            best.save(folder.path)
    except NotFiniteRowsError as error:
        at, _, said = str(error).rpartition("data: ")  # at: "step 3: ", or nothing before the first
        raise ValueError(at + (not_finite(data) or f"data: {said}")) from error
    except (WriteError, KeyboardInterrupt, Terminated) as stop:
        raise (stop if folder is None else advised(stop, folder.path)) from None
    finally:
        model.to(home)
        if folder is not None and run.is_first():
            with suppress(OSError):  # on a disk that turned read-only; other processes see that this one has ended
                release(folder.path)
    if best.diverged and run.is_first():
        warn(f"the run diverged: its error ended at {best.final_error:.3g}, where 1 is that of none; lower lr")
    for callback in told:
        callback.on_end(best.figures())
    return best
