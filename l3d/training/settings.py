"""Complete what a caller chose by a preset: every setting of a training run, checked and resolved."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from l3d.callbacks import Callback
from l3d.data.arguments import check_folder, check_fraction, check_whole
from l3d.data.batches import batches_per_epoch
from l3d.training.options import (
    PRESETS,
    GradientCache,
    GradientOptions,
    Learning,
    Machine,
    Memory,
    Preset,
    Replacement,
    Training,
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run, resolved; `l3d.training.options` explains the choices."""

    n_subnetworks: int
    rank: Any  # int, or {glob: int or list}; None or "auto" until tensors or the first batch have been seen
    k: float
    divergence: str | None  # "callable" where it is a function; None until the first batch has been seen
    reference: str  # "tensor" where it is one
    params: Any
    positions: Any
    preset: str  # its name
    steps: int
    batch_size: int
    lr: float
    schedule: str
    relative_lr: bool
    rest: bool
    warm_start: int  # steps before k reaches its value
    warm_shape: str  # "anneal" or "hold"
    seed: int
    dtype: str | None
    backend: str
    gradients: GradientOptions
    replacement: Replacement

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain json-able values."""
        return asdict(self)

    def learning_rate(self, step: int) -> float:
        """Return the step size at a step."""
        progress = step / self.steps
        if self.schedule == "step":
            return self.lr * 0.8 ** math.floor(10 * progress)
        return self.lr * (0.5 * (1 + math.cos(math.pi * progress)) * 0.99 + 0.01)

    def kept_fraction(self, step: int) -> float:
        """Return the fraction of coefficients kept at a step: 1 at first, `k` from step `warm_start` on."""
        if step >= self.warm_start:
            return self.k
        return 1.0 if self.warm_shape == "hold" else self.k ** (step / self.warm_start)

    def replaces(self, step: int, every: int) -> bool:
        """Tell whether subnetworks are restarted or replaced after so many steps, where it is done so often."""
        in_time = self.warm_start + every <= step <= self.replacement.until * self.steps
        return self.replacement.enabled and in_time and step % every == 0


def resolve(chosen: Mapping[str, Any], n_rows: int | None) -> Settings:
    """Complete arguments of `decompose` by their defaults and their preset; n_rows: of the data, None where unknown.

    Raises ValueError naming the argument that is out of range.
    """
    defaults = {each.name: each.default for group in (Learning, Training, Machine) for each in fields(group)}
    given: dict[str, Any] = {**defaults, "gradients": None, **chosen}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    preset = plain["preset"]
    if not isinstance(preset, Preset):
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        preset = PRESETS[preset]
    batch_size, n_subnetworks = (check_whole(name, plain[name]) for name in ("batch_size", "n_subnetworks"))
    if not _is_number(plain["seed"], int):
        raise ValueError(f"seed: expected a whole number, got {plain['seed']!r}")
    steps, warm_start, lr = plain["steps"], plain["warm_start"], plain["lr"]
    if steps is None and preset.epochs is not None and n_rows is not None:
        steps = preset.epochs * batches_per_epoch(n_rows, batch_size)
    steps = check_whole("steps", 2000 if steps is None else steps)
    warm_start = steps // 10 if warm_start is None else warm_start
    if not (_is_number(warm_start, int) and 0 <= warm_start <= steps):
        raise ValueError(f"warm_start: expected a number of steps in [0, {steps}], got {warm_start!r}")
    lr = preset.lr if lr is None else lr
    if not (_is_number(lr, (int, float)) and 0 < lr < math.inf):
        raise ValueError(f"lr: expected a positive number, got {lr!r}")
    dtype, gradients = plain["dtype"], plain["gradients"]
    if not (gradients is None or isinstance(gradients, GradientOptions)):
        raise ValueError(f"gradients: expected l3d.GradientOptions, got {gradients!r}")
    same = {name: plain[name] for name in ("rank", "params", "positions", "seed", "backend")}
    recipe = {name: getattr(preset, name) for name in ("schedule", "relative_lr", "rest", "replacement")}
    return Settings(
        **same,
        **recipe,
        n_subnetworks=n_subnetworks,
        k=check_fraction("k", plain["k"]),
        divergence="callable" if callable(plain["divergence"]) else plain["divergence"],
        reference=plain["reference"] if isinstance(plain["reference"], str) else "tensor",
        preset=preset.name,
        steps=steps,
        batch_size=batch_size,
        lr=float(lr),
        warm_start=warm_start,
        warm_shape=preset.warm_start,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        gradients=gradients or GradientOptions(),
    )


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which is an int to Python


def check_kinds(chosen: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument of `decompose` of the wrong kind, of those that `Settings` does not hold."""
    existing, out, cache, callbacks = (chosen[name] for name in ("existing", "out", "cache", "callbacks"))
    if existing not in ("refuse", "overwrite", "resume"):
        raise ValueError(f"existing: expected refuse, overwrite or resume, got {existing!r}")
    if existing == "resume" and out is None:
        raise ValueError("existing: 'resume' needs the run folder as out, got none")
    if not (cache is None or isinstance(cache, (GradientCache, str, Path))):
        raise ValueError(f"cache: expected l3d.GradientCache, got {cache!r}")
    if not (chosen["memory"] is None or isinstance(chosen["memory"], Memory)):
        raise ValueError(f"memory: expected l3d.Memory, got {chosen['memory']!r}")
    folder = cache.folder if isinstance(cache, GradientCache) else cache
    for name, path in (("out", out), ("cache", folder)):
        if path is not None:
            check_folder(name, path)
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise ValueError(f"callbacks: expected a list, got {callbacks!r}; one alone goes into a list too")
    for each in callbacks or ():
        if not isinstance(each, Callback):
            raise ValueError(f"callbacks: expected instances of l3d.callbacks.Callback or its kinds, got {each!r}")
