"""Short training runs that can be interrupted at any step, and their comparison to the bit: for tests/training."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import l3d
from l3d.api import Decomposition
from l3d.training.history import COLUMNS


class Net(nn.Module):
    """Two layers; counts its forward passes, and can do something unusual at one of them."""

    def __init__(self, at: int | None = None, act: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.made, self.at, self.act = SimpleNamespace(calls=0), at, act

    def forward(self, x: Tensor) -> Tensor:
        self.made.calls += torch.is_grad_enabled()  # the look whether a batch gives the same again is without
        y = self.second(torch.tanh(self.first(x)))
        return self.act(y) if self.made.calls == self.at and self.act is not None else y


def interrupt(_: Tensor) -> Tensor:
    """Stop a run as Ctrl-C would."""
    raise KeyboardInterrupt


def stopping(turn: Callable[..., bool], at: int) -> Callable[..., bool]:
    """Interrupt before a step, as Ctrl-C would."""

    def stopped(run: Any, gradients: Any) -> bool:
        if run.step == at:
            raise KeyboardInterrupt
        return turn(run, gradients)

    return stopped


def nan(y: Tensor) -> Tensor:
    """Return an output that is NaN throughout."""
    return y * float("nan")


def points(n: int = 40, seed: int = 0) -> Tensor:
    """Draw n rows for `Net`, the same for the same seed."""
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


ARGUMENTS: dict[str, Any] = {"n_subnetworks": 4, "rank": 2, "k": 0.3, "steps": 20, "batch_size": 8, "callbacks": []}


def recipe(name: str = "default", **replacement: Any) -> l3d.Preset:
    """Return a preset with some fields of its `Replacement` changed."""
    preset = l3d.PRESETS[name]
    return replace(preset, replacement=replace(preset.replacement, **replacement))


def train(model: nn.Module | None = None, data: Any = None, **changes: Any) -> Decomposition:
    """Train 20 steps by `ARGUMENTS`, with changes."""
    model, data = Net() if model is None else model, points() if data is None else data
    return l3d.decompose(model, data, **{**ARGUMENTS, **changes})


def assert_same_bits(a: Decomposition, b: Decomposition) -> None:
    """Assert that two runs agree in every tensor, the threshold and all of the history but the speed."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert a.threshold == b.threshold
    for column in set(COLUMNS) - {"samples_per_second"}:
        assert a.history[column] == b.history[column], column


def differ(a: Decomposition, b: Decomposition) -> bool:
    """Tell whether any tensor of two runs differs."""
    return any(not torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
