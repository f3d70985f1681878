"""Settings of a decomposition: what the user chose, completed by a preset.

"published" is the paper's recipe: Adam, one absolute step size, times .8 after every tenth of the run, everything
kept at first. "default" takes steps relative to each factor's own entries, leaves subnetworks alone that a batch does
not keep, follows a cosine schedule, lets the kept fraction fall gradually, and gives a new start to subnetworks that
are dead or that others can stand in for.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from l3d.data.arguments import check_fraction, check_whole
from l3d.data.batches import batches_per_epoch

PRESETS = ("default", "published")
STARTS = ("random", "data")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run, resolved: no None is left but in optional counts."""

    n_subnetworks: int  # K
    rank: Any  # int, or {glob: int or list}; None or "auto" until tensors or the first batch have been seen
    k: float  # fraction of coefficients kept
    divergence: str
    reference: str
    params: Any  # glob, list of globs or None
    positions: Any  # "all", "last" or a number
    preset: str
    steps: int
    batch_size: int  # rows of data
    lr: float  # of Adam; relative to each factor's typical entry where `relative_lr`
    schedule: str  # "cosine", or "step": x .8 ten times over the run
    relative_lr: bool
    lazy: bool  # subnetworks that a batch does not keep rest: Adam's memory neither moves them nor fades
    weight_decay: float  # of AdamW; 0 is Adam
    warm_start: int  # steps before k reaches its value
    updates: int  # of the optimiser per batch of gradients
    start: str  # "random" directions, or "data": low-rank parts of single samples' gradients
    revive: bool  # give dead subnetworks a new start, from samples that are reconstructed badly
    shuffle: bool  # control: learn from gradients whose samples have been torn apart
    warm_shape: str  # "anneal": k falls from 1 geometrically; "hold": everything is kept, then k
    seed: int
    dtype: str | None
    backend: str

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain json-able values."""
        return asdict(self)


def learning_rate(settings: Settings, step: int) -> float:
    """Return the step size at a step, as a multiple of `lr`, in (0, 1]."""
    progress = step / settings.steps
    if settings.schedule == "step":
        return 0.8 ** math.floor(10 * progress)
    return 0.5 * (1 + math.cos(math.pi * progress)) * 0.99 + 0.01


def kept_fraction(settings: Settings, step: int) -> float:
    """Return the fraction of coefficients kept at a step: 1 at first, `k` from step `warm_start` on."""
    if step >= settings.warm_start:
        return settings.k
    if settings.warm_shape == "hold":
        return 1.0
    return settings.k ** (step / settings.warm_start)


def resolve(preset: str, n_rows: int | None, **chosen: Any) -> Settings:
    """Complete the user's choices (None: not chosen) by a preset; checks the numbers.

    Raises ValueError naming the argument that is out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    chosen = {name: value.item() if isinstance(value, np.generic) else value for name, value in chosen.items()}
    chosen["k"] = check_fraction("k", chosen["k"])
    for name in ("batch_size", "n_subnetworks", "updates"):
        chosen[name] = check_whole(name, chosen[name])
    if not isinstance(chosen["seed"], int):
        raise ValueError(f"seed: expected a whole number, got {chosen['seed']!r}")
    published = preset == "published"
    steps = chosen.pop("steps")
    if steps is None:
        steps = 2000
        if published and n_rows is not None:
            steps = 1000 * batches_per_epoch(n_rows, chosen["batch_size"])  # a thousand epochs
    steps = check_whole("steps", steps)
    warm_start = chosen.pop("warm_start")
    warm_start = steps // 10 if warm_start is None else warm_start
    if not (isinstance(warm_start, int) and 0 <= warm_start <= steps):
        raise ValueError(f"warm_start: expected a number of steps in [0, {steps}], got {warm_start!r}")
    decay = chosen["weight_decay"]
    if not (isinstance(decay, (int, float)) and 0 <= decay < 1):
        raise ValueError(f"weight_decay: expected a number in [0, 1), got {decay!r}")
    if chosen["start"] not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {chosen['start']!r}")
    revive = chosen.pop("revive")
    if not (revive is None or isinstance(revive, bool)):
        raise ValueError(f"revive: expected True, False or None, got {revive!r}")
    if not isinstance(chosen["shuffle"], bool):
        raise ValueError(f"shuffle: expected True or False, got {chosen['shuffle']!r}")
    lr = chosen.pop("lr")
    lr = (0.01 if published else 0.1) if lr is None else lr
    if not (isinstance(lr, (int, float)) and 0 < lr < math.inf):
        raise ValueError(f"lr: expected a positive number, got {lr!r}")
    return Settings(
        preset=preset,
        steps=steps,
        lr=float(lr),
        schedule="step" if published else "cosine",
        relative_lr=not published,
        lazy=not published,
        revive=not published if revive is None else revive,
        warm_start=warm_start,
        warm_shape="hold" if published else "anneal",
        **chosen,
    )
