"""Write and restore checkpoints: everything a run needs to go on to the same bits."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from l3d.data.batch import tensors_of
from l3d.decomposition.subnetworks import Subnetworks
from l3d.storage.identity import check_identity, digest
from l3d.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from l3d.training.run import Run

MOST_HASHED = 1 << 28  # bytes of data of which every row is hashed


def save(run: "Run", folder: RunFolder) -> None:
    """Write a checkpoint; of several processes all must call this, and the first writes."""
    tensors, values = run.optimizer.state()
    state: dict[str, Any] = {"optimizer": values, "recorder": run.recorder.state(), "seen": _seen(run)}
    state["exponent"] = run.extractor.exponent
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
    now, then = run.decomposition.settings, decomposition.settings
    changed = [name for name in now if json.dumps(now[name]) != json.dumps(then.get(name))]
    if decomposition.n_subnetworks != run.decomposition.n_subnetworks and "n_subnetworks" not in changed:
        changed.append("n_restarts")
    own, before = _seen(run), state.get("seen", {})
    other = [name for name, value in own.items() if before.get(name, value) != value]  # older ones do not tell all
    changed += dict.fromkeys("data" if name == "rows" else name for name in other if name not in ("model", "norm"))
    if changed:
        raise ValueError(f"resume: {', '.join(changed)} differ from the interrupted run's; pass the same arguments")
    if decomposition.shapes != run.decomposition.shapes or decomposition.ranks != run.decomposition.ranks:
        raise ValueError("resume: the interrupted run decomposed other parameters; pass the same model")
    check_identity(decomposition.base_model, run.extractor.parameters, advice="")
    if "model" in other:
        raise ValueError("resume: the model's other weights differ from the interrupted run's; pass the same model")
    norms = [norm for norm in (own["norm"], before.get("norm")) if norm is not None]
    if len(norms) == 2 and abs(norms[0] - norms[1]) > 1e-3:  # more than rounding on another machine
        raise ValueError(
            "resume: the first batch's gradients differ from the interrupted run's; pass the same model and divergence"
        )
    last_kept, seconds = state["recorder"]["last_kept"], decomposition.timing.get("seconds")
    if len(last_kept) not in (0, run.settings.n_subnetworks * run.n_restarts) or seconds is None:
        raise ValueError("resume: the checkpoint holds the figures of another run")
    if run.is_first():
        folder.go_on_from(path)
    for mine, saved in zip(run.decomposition.children(), decomposition.children(), strict=True):
        mine.load_state_dict(saved.state_dict())
    run.optimizer.load_state(tensors, state["optimizer"])
    run.recorder.load_state(state["recorder"], decomposition.history)
    shift = run.extractor.exponent - state.get("exponent", run.extractor.exponent)  # that of another first micro-batch
    run.recorder.thresholds = [math.ldexp(threshold, shift) for threshold in run.recorder.thresholds]
    run.step = state["step"]
    run.seconds = seconds


def _seen(run: "Run") -> dict[str, Any]:
    """Describe what decides a run's numbers beside its settings, as far as it can be told; see `resume` in the pages.

    data: the number of rows, and the first batch's hash. rows: the hash of all. model: that of all its weights.
    reference: that of a tensor. cache: after how many steps batches repeat. norm: log2 Σ_s ‖g_s‖² of the first batch,
    which tells another code of the model or of the divergence.
    """
    if run.seen is None:
        data, reference = run.batches.data, run.extractor.reference
        first = digest(tensors_of(run.batches[0])) if isinstance(data, (Tensor, Mapping)) else None
        run.seen = {
            "data": [run.batches.n_rows, first],
            "rows": _hash_of_rows(run),
            "model": digest(weights_of(run.extractor.model)),
            "reference": digest([reference]) if isinstance(reference, Tensor) else None,
            "cache": None if run.cache is None or run.cache.n_steps >= run.settings.steps else run.cache.n_steps,
        }
        is_known = run.seen["rows"] is not None and math.isfinite(run.norm)
        run.seen["norm"] = run.norm if is_known else None
    return run.seen


def _hash_of_rows(run: "Run") -> str | None:
    """Hash what data lie in memory, or the first batch of a Dataset; None for rows that differ each time.

    Of more than `MOST_HASHED` bytes evenly spaced rows are hashed.
    """
    data = getattr(run.batches.data, "tensors", run.batches.data)  # those of a TensorDataset
    if isinstance(data, (Tensor, Mapping, list, tuple)):
        tensors = tensors_of(data)
        every = max(1, -(-sum(tensor.nbytes for tensor in tensors) // MOST_HASHED))
        return digest(tensor[::every] if tensor.ndim else tensor for tensor in tensors)
    if run.batches.n_rows is None:
        return None
    once, again = (digest(tensors_of(run.batches[0])) for _ in range(2))
    return once if once == again else None


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield a model's parameters and the buffers that are saved with it."""
    yield from model.parameters()
    for module in model.modules():
        names = module._buffers.keys() - module._non_persistent_buffers_set
        yield from (buffer for name, buffer in module._buffers.items() if name in names and buffer is not None)
