"""Fine-tune a model along chosen subnetworks: weights W0 + Σ_k δ_k Vout_k, of which only the δ are trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l3d.analysis.intervention import intervene, output_with
from l3d.data.arguments import check_whole
from l3d.data.batch import to_device
from l3d.data.batches import Batches
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.fixed import check_fixed, only_trainable
from l3d.storage.store import write_tensors

Loss = Callable[[Tensor, Any], Tensor]

LR = 0.01  # Adam's first step size, as a fraction of the norm of the decomposed weights


@dataclass(frozen=True)
class FineTuned:
    """Result of `finetune`; `l3d.intervene(model, decomposition, tuned.deltas)` applies it inside a block."""

    deltas: dict[int, float]  # subnetwork -> δ
    losses: list[float]  # the loss of every step's batch, before the step
    model: nn.Module  # with its original weights
    decomposition: Subnetworks  # that `deltas` are distances along
    any_weights: bool = False  # as passed to `finetune`

    def __repr__(self) -> str:
        """Return the numbers of subnetworks and steps, the first and last loss, and the largest |δ|."""
        largest = max(map(abs, self.deltas.values()), default=0.0)
        ends = f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}" if self.losses else "no loss"
        return f"FineTuned({len(self.deltas)} subnetworks, {len(self.losses)} steps; {ends}; largest |δ| {largest:.4g})"

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the model's state dict with the δ merged into the weights, for `load_state_dict`."""
        with intervene(self.model, self.decomposition, self.deltas, any_weights=self.any_weights):
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def save(self, path: str | Path) -> Path:
        """Write `state_dict()` to a safetensors file, and return its path; missing folders are made."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, self.state_dict())
        return file


@torch.inference_mode(False)
@torch.enable_grad()
def finetune(
    model: nn.Module,
    decomposition: Subnetworks,
    data: Any,
    loss: Loss,
    subnetworks: Sequence[int],
    *,
    steps: int = 200,
    batch_size: int = 16,
    lr: float | None = None,
    seed: int = 0,
    any_weights: bool = False,
) -> FineTuned:
    """Train one number δ per chosen subnetwork by Adam: how far the weights move along it.

    Args:
        model: in evaluation mode; it is unchanged afterwards, also after an exception.
        decomposition: of the model's parameters; unchanged.
        data: a tensor, Dataset or iterable of batches. Rows are (input, target). A single input is its own target, so
            a language model's loss takes (logits, tokens).
        loss: f(output, target) -> scalar, such as torch.nn.functional.mse_loss; output is a tensor, or `.logits`.
        subnetworks: indices of the subnetworks to move along.
        steps, batch_size, seed: number of steps, rows in a batch, and the seed that shuffles the rows.
        lr: Adam's first step size, which falls along a cosine; default `LR` times the norm of the decomposed weights.
            The directions have unit norm, so each δ is a distance.
        any_weights: accept a model whose weights differ from the decomposed ones; otherwise that raises ValueError.

    Raises ValueError for arguments out of range, and for a loss that is not one finite number.

    >>> from l3d.decomposition.subnetworks import Subnetworks
    >>> model = nn.Linear(3, 2)
    >>> d = Subnetworks({"weight": model.weight.shape}, 4, 1)
    >>> x, y = torch.randn(32, 3), torch.randn(32, 2)
    >>> tuned = finetune(model, d, torch.utils.data.TensorDataset(x, y), nn.functional.mse_loss, [0, 2], steps=3)
    >>> sorted(tuned.deltas), len(tuned.losses)
    ([0, 2], 3)
    """
    chosen = list(subnetworks)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(decomposition.n_subnetworks)):
        raise ValueError(f"subnetworks: expected different ones of {decomposition.n_subnetworks}, got {chosen}")
    check_whole("steps", steps)
    if lr is not None and not lr > 0:
        raise ValueError(f"lr: expected a positive number, got {lr!r}")
    check_fixed(model)
    with intervene(model, decomposition, {}, any_weights=any_weights):  # checks that the decomposition fits the model
        weights = {name: model.get_parameter(name) for name in decomposition.shapes}
    home = next(iter(weights.values()))
    if lr is None:
        lr = LR * float(torch.stack([w.detach().double().square().sum() for w in weights.values()]).sum().sqrt())
    deltas = torch.zeros(len(chosen), dtype=torch.float32, device=home.device, requires_grad=True)
    optimizer = torch.optim.Adam([deltas], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = Batches(data, batch_size, seed)
    losses: list[float] = []
    with only_trainable(model, {}):
        factors = _factors(decomposition, chosen, home)
        for step in range(steps):
            batch = to_device(batches[step], home.device)
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            inputs, target = batch if pair else (batch, batch)
            moved = {
                name: weight + _weighted_sum(deltas, *factors[name]).view(weight.shape).to(weight)
                for name, weight in weights.items()
            }
            value = loss(output_with(model, moved, inputs), target)
            if not isinstance(value, Tensor) or value.numel() != 1 or not torch.isfinite(value).all():
                shown = list(value.shape) if isinstance(value, Tensor) and value.numel() != 1 else value
                raise ValueError(f"loss: expected one finite number, got {shown}; step {step}")
            (deltas.grad,) = torch.autograd.grad(value.reshape(()), [deltas])
            with torch.device("cpu"):  # Adam's counter: torch 2.11 makes it on the default device
                optimizer.step()
            schedule.step()
            losses.append(float(value.detach()))
    return FineTuned(dict(zip(chosen, deltas.tolist(), strict=True)), losses, model, decomposition, any_weights)


@torch.no_grad()
def _factors(decomposition: Subnetworks, chosen: list[int], like: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the chosen directions' factors by parameter name: left [n, R, O], right [n, R, I], at least float32."""
    target = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    pairs = {name: piece.factors() for name, piece in decomposition.decoder.items()}
    return {name: (left[chosen].to(target), right[chosen].to(target)) for name, (left, right) in pairs.items()}


def _weighted_sum(deltas: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_k δ_k V_k as a matrix [O, I] from the factors; no single V_k is formed."""
    return (left * deltas[:, None, None].to(left)).flatten(0, 1).mT @ right.flatten(0, 1)
