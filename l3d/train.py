"""Train a decomposition: what the caller chooses, and the run that it makes (`l3d.training.run` holds the loop).

model + batch ─ extract ─► per-sample gradients ─ project ─► coefficients ─ batch top-k ─► kept ─ objective ─►
loss ─ Adam, unit norm ─► decomposition
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from l3d.api import Decomposition
from l3d.callbacks import Callback, ProgressBar
from l3d.data.arguments import check_whole
from l3d.data.batches import count_rows
from l3d.gradients.divergence import Divergence
from l3d.gradients.extract import Extractor
from l3d.gradients.model import Params
from l3d.storage.lock import release
from l3d.training.checkpoints import restore, save
from l3d.training.run import Run
from l3d.training.settings import resolve


@torch.inference_mode(False)
@torch.enable_grad()
def decompose(
    model: nn.Module,
    data: Any,
    n_subnetworks: int = 100,
    rank: Any = None,
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
    shuffle: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    cache: str | Path | None = None,
    cache_reads: str = "auto",
    n_references: int = 1,
    micro_batch_size: int | None = None,
    recompute: bool = False,
    on_start: Callable[[Path], None] | None = None,
    model_name: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Decomposition:
    """Decompose a model into K sparsely active low-rank subnetworks of its parameters.

    Args:
        model: in evaluation mode; left as it was.
        data: a tensor [n, ...], a mapping of tensors or a Dataset of rows, or an iterable of batches (DataLoader,
            generator function's result, list). Rows of a Dataset may be (input, label): the label is ignored. For
            reference="pair" they are (input, contrasting input).
        n_subnetworks: K.
        rank: of every matrix, or {glob: rank or one rank per mode}; or "auto": for each tensor the least that holds
            nine tenths of single gradients' squared norm, at most 16 (`ranks_from_gradients`). Default: 8, or
            as much as a smaller tensor allows; a rank that is asked for and not allowed is refused.
        k: fraction of the S·K coefficients of a batch that is kept, in (0, 1].
        params: glob, list of globs, or None for all parameters.
        divergence, reference, positions: what is differentiated; see `extract_gradients`. Rows of a tensor or Dataset
            are shuffled, so that a tensor as reference is then one output for all.
        preset: "default", or "published" for the paper's recipe.
        steps: optimiser steps; default 2000, or 1000 epochs for "published".
        batch_size: rows of data (texts, images) per step.
        lr: Adam's step size; "default" takes it relative to the typical entry of each factor (default .1),
            "published" as it is (default .01).
        warm_start: steps over which more than k is kept; default a tenth.
        n_restarts: starts to train side by side on the same batches; the one of lowest final error is kept. Each costs
            the memory and the products of its own factors; the gradients are extracted once.
        seed: decides everything random; the same seed on the same machine gives the same bits.
        device: where to train; the model is moved there for the run. Default: where the model is.
        dtype: of the decomposition; default the model's, at least float32. "bfloat16" also holds the gradients' factors
            so, for half of their memory; sums, directions and moments are float32 until the end.
        backend: "auto", "torch" or "triton".
        out: a run folder to write the result and checkpoints to; refused if not empty unless `overwrite`.
        checkpoint_every: steps between checkpoints, which `resume` continues from. Default: ten per run.
        weight_decay: makes Adam AdamW.
        updates: optimiser steps per batch, on the same gradients: worth it where extracting them is what a step costs.
        start: "random", or "data": the subnetworks start as low-rank parts of single samples' gradients.
        revive: every 200 steps, as long as k is at its value and the last fifth of the run has not begun, start
            subnetworks anew that none of these steps has kept, from samples that are reconstructed badly; and every 100
            steps exchange those that are worth less than what their place could hold (`exchange`; not where several
            processes share the subnetworks). Default: True, False for "published".
        shuffle: learn from gradients whose parts are dealt out anew over a batch's samples, tensor by tensor: a control
            that has learned no sample's gradient (`l3d.analysis.controls.shuffled`).
        overwrite: replace an existing run folder.
        resume: continue the run in `out` from its last checkpoint, with the same arguments.
        progress: show a progress bar (on a terminal) with error, kept per sample, dead fraction and samples/s.
        cache: a folder to keep gradients in, for this run and others on the same data. The batches of the
            first `n_references` epochs, their references included, then come again and again.
        cache_reads: "auto" reads stored gradients where that is measured to be faster than extracting them again, "on"
            always, "off" never; the result is the same to the bit.
        n_references: with a cache, how many epochs of different batches and references repeat.
        micro_batch_size: rows that are extracted and projected at a time, for less memory; what is kept is still chosen
            among the whole batch, and the result differs by the order of summation alone. Default: all.
        recompute: extract every micro-batch twice rather than hold its gradients in between.
        on_start: called with the run folder once everything has been checked and before training starts.
        model_name: what the saved decomposition calls the model; default its folder or hub ID, else its class.
        callbacks: told of the run as it goes, such as `l3d.callbacks.TensorBoard`; left open.

    Where torch.distributed is initialised with several processes (torchrun), they train one decomposition together,
    each its share of the subnetworks (`process_group`); every process must call this alike, with the same data.

    Returns the trained `Decomposition`; its `history` holds the training curve. Of several processes the first returns
    it, on the CPU, and the others their shares of it.

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
        shuffle=shuffle,
        seed=seed,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        backend=backend,
    )
    every = max(1, settings.steps // 10)
    if checkpoint_every is not None:
        every = check_whole("checkpoint_every", checkpoint_every)
    n_restarts = check_whole("n_restarts", n_restarts)
    if micro_batch_size is not None:
        micro_batch_size = check_whole("micro_batch_size", micro_batch_size)
    if resume and (out is None or overwrite):
        raise ValueError("resume: expected the run folder as out, and no overwrite")
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError("model: has no parameters to decompose")
    home = first.device
    target = home if device is None else torch.device(device)
    model.to(target)
    folder = None
    try:
        extractor = Extractor(model, divergence, reference, params, positions)
        run = Run(settings, extractor, data, target, n_restarts, micro_batch_size, recompute, model_name, Decomposition)
        if cache is not None:
            run.use_cache(cache, n_references, cache_reads)
        elif n_references != 1 or cache_reads != "auto":
            raise ValueError("cache: n_references and cache_reads need the cache's folder, got none")
        run.check()
        folder = run.open(out, overwrite, resume, on_start) if out is not None else None
        if folder is not None and resume:
            restore(run, folder)
        label = f"{n_restarts} restarts" if n_restarts > 1 else "decompose"
        told = callbacks if run.is_first() else ()
        with ProgressBar(label) if progress and run.is_first() else Callback() as bar:
            run.train((bar, *told), every, partial(save, run, folder) if folder is not None else lambda: None)
        if run.cache is not None and progress and run.is_first():
            print(run.cache.choice(), file=sys.stderr)
        best = cast(Decomposition, run.best())
        if folder is not None and run.is_first():
            best.save(folder.path)
    finally:
        model.to(home)
        if folder is not None and run.is_first():
            release(folder.path)
    for callback in told:
        callback.on_end({name: values[-1] for name, values in best.history.items() if values})
    return best
