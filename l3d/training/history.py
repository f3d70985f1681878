"""Record a training run: its history, of bounded length, and which subnetworks were kept when."""

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

import l3d_kernels as lk
from l3d.distributed.process_group import ProcessGroup
from l3d.training.options import Replacement

COLUMNS = ("step", "error", "kept_per_sample", "dead_fraction", "lr", "k", "samples_per_second")
RECORDS = 1000  # rows of history a run keeps at most


class Kept(NamedTuple):
    """What the history needs of a batch's kept coefficients, summed over all processes."""

    n_entries: int
    columns: torch.Tensor  # [n] int64 the subnetworks that were kept, each at least once
    threshold: torch.Tensor  # [] or [restarts]
    shape: tuple[int, int]  # (S, K)

    @classmethod
    def of(cls, kept: lk.SparseCoefficients, group: ProcessGroup | None = None, first: int = 0) -> "Kept":
        """Read it from this process's kept coefficients; `first` is its first subnetwork among all."""
        n_samples, n_columns = kept.shape
        if group is None:
            return cls(kept.rows.numel(), kept.columns, kept.threshold, kept.shape)
        counts = group.total(torch.tensor([kept.rows.numel(), n_columns], device=kept.rows.device)).tolist()
        columns = group.gather(kept.columns.unique() + first)
        return cls(counts[0], columns, kept.threshold, (n_samples, counts[1]))

    @classmethod
    def where(cls, chosen: np.ndarray, thresholds: np.ndarray) -> "Kept":
        """Read it from a mask [S, restarts * K] and each restart's least kept magnitude [restarts]."""
        columns = torch.from_numpy(np.flatnonzero(chosen.any(0)))
        return cls(int(np.count_nonzero(chosen)), columns, torch.from_numpy(thresholds), chosen.shape)


class Recorder:
    """Average each figure over a few steps at a time, into a history of at most `RECORDS` rows.

    `history` maps each of `COLUMNS` to its values: error and kept per sample are means over the interval,
    dead_fraction is the fraction of subnetworks never kept in the last 200 batches or more. Of several restarts
    trained side by side, error and dead_fraction hold one value each: a row is then a list.
    """

    def __init__(self, steps: int, n_restarts: int = 1, dead_after: int = Replacement.restart_every) -> None:
        self.dead_after = dead_after  # batches in which a subnetwork was never kept, for it to count as dead
        self.every = max(1, -(-steps // RECORDS))
        self.history: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.thresholds = [float("nan")] * n_restarts
        self.first_errors: list[float] = []  # of the first step, before anything was learned
        self.errors = [0.0] * n_restarts  # sums over the interval
        self.kept = 0.0
        self.count = self.samples = 0
        self._unread: list[tuple[int, torch.Tensor, float, int]] = []  # step, errors, kept per sample, samples
        self.last_kept: torch.Tensor | None = None  # [restarts * K] the step each subnetwork was last kept at
        self.started = perf_counter()

    def add(
        self,
        step: int,
        errors: Sequence[float] | torch.Tensor,
        kept: Kept,
        lr: float,
        k: float,
        replay: Callable[[int], None] = lambda step: None,
    ) -> bool:
        """Record a step (counted from 1); return whether the history has a new row.

        Errors that are a tensor are read when a row is due, or `settle` is called, which see.
        """
        n_samples, n_subnetworks = kept.shape
        if self.last_kept is None:
            self.last_kept = torch.full((n_subnetworks,), step - 1, device=kept.columns.device)
        self.last_kept = self.last_kept.to(kept.columns.device)
        self.last_kept.index_fill_(0, kept.columns, step)
        share = kept.n_entries / (n_samples * len(errors))
        if isinstance(errors, torch.Tensor):
            self._unread.append((step, errors, share, n_samples))
            if step % self.every == 0:
                self.settle(replay)
        else:
            self._count(errors, share, n_samples)
        if step % self.every or not self.count:
            return False
        found = kept.threshold.reshape(-1).tolist()
        self.thresholds = [smooth(mean, value) for mean, value in zip(self.thresholds, found, strict=True)]
        dead = (self.last_kept <= step - self.dead_after).view(len(errors), -1).float().mean(1).tolist()
        error = _one_or_all([total / self.count for total in self.errors])
        rate = self.samples / max(perf_counter() - self.started, 1e-9)
        row = (step, error, self.kept / self.count, _one_or_all(dead), lr, k, rate)
        for name, value in zip(COLUMNS, row, strict=True):
            self.history[name].append(value)
        self.errors = [0.0] * len(errors)
        self.kept = 0.0
        self.count = self.samples = 0
        self.started = perf_counter()
        return True

    def settle(self, replay: Callable[[int], None] = lambda step: None) -> None:
        """Read the errors that were left on the device.

        Where one is not finite, `replay` is called with the number of steps before it: it raises what is wrong, or
        returns where there was nothing to learn; then the step does not count.
        """
        unread, self._unread = self._unread, []
        errors = torch.stack([errors for _, errors, _, _ in unread]).tolist() if unread else []
        for (step, _, kept, n_samples), each in zip(unread, errors, strict=True):
            if all(map(math.isfinite, each)):
                self._count(each, kept, n_samples)
            else:
                replay(step - 1)

    def _count(self, errors: Sequence[float], kept: float, n_samples: int) -> None:
        """Add a step to the sums over the interval."""
        self.first_errors = self.first_errors or list(errors)
        self.errors = [total + error for total, error in zip(self.errors, errors, strict=True)]
        self.kept += kept
        self.samples += n_samples
        self.count += 1

    def dead(self, step: int) -> torch.Tensor:
        """List the subnetworks of all restarts that have not been kept for `dead_after` steps: [n] int64."""
        assert self.last_kept is not None
        return (self.last_kept <= step - self.dead_after).nonzero()[:, 0]

    def revived(self, step: int, subnetworks: torch.Tensor) -> None:
        """Count subnetworks [n] as kept at a step."""
        assert self.last_kept is not None
        self.last_kept[subnetworks] = step

    def history_of(self, restart: int) -> dict[str, list[float]]:
        """Return one restart's own history."""
        return {name: [_of(value, restart) for value in values] for name, values in self.history.items()}

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs besides the history, as json-able values; after `settle`."""
        last = [] if self.last_kept is None else self.last_kept.tolist()
        thresholds = [None if math.isnan(threshold) else threshold for threshold in self.thresholds]
        pending = [self.errors, self.kept, self.count]
        return {"thresholds": thresholds, "last_kept": last, "pending": pending, "first_errors": self.first_errors}

    def load_state(self, state: dict[str, Any], history: dict[str, list[Any]]) -> None:
        """Continue from a checkpoint. Raises ValueError for one of another number of restarts or with a column less."""
        n = len(self.thresholds)
        rows = [row for column in history.values() for row in column if isinstance(row, list)]
        lengths = {len(state["thresholds"]), len(state["pending"][0]), *(len(row) for row in rows)}
        if lengths != {n} or set(history) != set(COLUMNS) or (history["step"] and bool(rows) != (n > 1)):
            raise ValueError("history: the checkpoint holds that of another run")
        self.history = history
        self.thresholds = [math.nan if threshold is None else threshold for threshold in state["thresholds"]]
        self.last_kept = torch.tensor(state["last_kept"], device="cpu") if state["last_kept"] else None
        self.errors, self.kept, self.count = state["pending"]
        self.first_errors = state.get("first_errors", [])  # an older checkpoint does not tell

    def latest(self) -> dict[str, float]:
        """Return the last row of the history: that of the restart with the least error in it.

        Without dead_fraction in the first steps, before a subnetwork can be known to be dead.
        """
        errors = self.history["error"][-1]
        best = errors.index(min(errors)) if isinstance(errors, list) else 0
        row = {name: _of(values[-1], best) for name, values in self.history.items()}
        if row["step"] < self.dead_after:
            del row["dead_fraction"]
        return row


def _of(value: float | list[float], restart: int) -> float:
    return value[restart] if isinstance(value, list) else value


def _one_or_all(values: list[float]) -> float | list[float]:
    return values[0] if len(values) == 1 else values


def smooth(mean: float, value: float, weight: float = 0.05) -> float:
    """Move an exponential mean towards a value; NaN starts it."""
    return value if mean != mean else mean + weight * (value - mean)
