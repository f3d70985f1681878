"""Write and restore checkpoints: everything a run needs to go on to the same bits."""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from l3d.data.batch import tensors_of
from l3d.decomposition.subnetworks import Subnetworks
from l3d.storage.identity import check_identity, digest
from l3d.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from l3d.training.run import Run


def save(run: "Run", folder: RunFolder) -> None:
    """Write a checkpoint; of several processes all must call this, and the first writes."""
    tensors, values = run.optimizer.state()
    state = {"optimizer": values, "recorder": run.recorder.state(), "seen": _seen(run)}
    decomposition: Subnetworks | None = run.decomposition
    if run.group is not None:
        decomposition = run.decomposition.gathered(run.group, run.settings.n_subnetworks)
        collected = {name: t if name.startswith("scale") else run.group.collect(t) for name, t in tensors.items()}
        tensors = {name: tensor for name, tensor in collected.items() if tensor is not None}
    if decomposition is None:
        return  # another process writes
    decomposition.history = run.recorder.history
    decomposition.timing = run.timing()
    lone = run.recorder.thresholds[0]  # that of a lone restart
    decomposition.threshold = math.ldexp(lone, -run.extractor.exponent)
    folder.save_checkpoint(run.step, decomposition, tensors, state)


def restore(run: "Run", folder: RunFolder) -> None:
    """Continue from the last checkpoint that is whole, if there is one; of several processes the first looks for it."""
    path = folder.whole_checkpoint() if run.group is None else run.group.agreed(folder.whole_checkpoint)
    if path is None:
        return
    decomposition, tensors, state = folder.load_checkpoint(path, run.columns)
    now, before = run.decomposition.settings, decomposition.settings
    changed = [name for name in now if json.dumps(now[name]) != json.dumps(before.get(name))]
    if decomposition.n_subnetworks != run.decomposition.n_subnetworks and "n_subnetworks" not in changed:
        changed.append("n_restarts")
    own = _seen(run)
    changed += [name for name, value in own.items() if state.get("seen", own)[name] != value]  # older ones do not tell
    if changed:
        raise ValueError(f"resume: {', '.join(changed)} differ from the interrupted run's; pass the same arguments")
    if decomposition.shapes != run.decomposition.shapes or decomposition.ranks != run.decomposition.ranks:
        raise ValueError("resume: the interrupted run decomposed other parameters; pass the same model")
    check_identity(decomposition.base_model, run.extractor.parameters, advice="")
    last_kept, seconds = state["recorder"]["last_kept"], decomposition.timing.get("seconds")
    if len(last_kept) not in (0, run.settings.n_subnetworks * run.n_restarts) or seconds is None:
        raise ValueError("resume: the checkpoint holds the figures of another run")
    if run.is_first():
        folder.go_on_from(path)
    run.decomposition.load_state_dict(decomposition.state_dict())
    run.optimizer.load_state(tensors, state["optimizer"])
    run.recorder.load_state(state["recorder"], decomposition.history)
    run.step = state["step"]
    run.seconds = seconds


def _seen(run: "Run") -> dict[str, Any]:
    """Describe the data that a run learns from: the number of rows, the first batch's hash, the reference's.

    Rows of a Dataset or a stream are made when they are asked for and may differ each time: they have no hash.
    """
    data, reference = run.batches.data, run.extractor.reference
    rows = digest(tensors_of(run.batches[0])) if isinstance(data, (Tensor, Mapping)) else None
    compared = digest([reference]) if isinstance(reference, Tensor) else None
    return {"data": [run.batches.n_rows, rows], "reference": compared}
