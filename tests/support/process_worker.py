"""Train one process of a test of several processes: `python process_worker.py FOLDER NAME..`, as torchrun would.

In one process without WORLD_SIZE it trains the run that the others are compared with.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import l3d
from l3d.api import Decomposition
from l3d.distributed import process_group as processes
from l3d.training import step as step_module
from l3d.training.run import Run
from l3d.training.step import StepResult

ARGUMENTS: dict[str, Any] = {"n_subnetworks": 7, "rank": 2, "k": 0.15, "steps": 24, "batch_size": 6, "callbacks": []}


class Sequences(nn.Module):
    """Token sequences [B, 5] to logits [B, 5, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        return self.head(torch.relu(hidden + self.mix(hidden).cumsum(1)))


def language() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Sequences(), torch.randint(7, (20, 5))


def convolution() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)), torch.randn(20, 2, 5, 5)


# What is trained, by name: a model with its data, and what is set otherwise. 20 rows in batches of 6 end in one of 2.
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "language": (language, {"divergence": "kl", "k": 0.02, "lr": 0.02, "warm_start": 3}),  # subnetworks die, and revive
    "convolution": (convolution, {"divergence": "kl", "reference": "mean", "memory": l3d.Memory(micro_batch_size=5)}),
    "recomputed": (language, {"divergence": "kl", "positions": 2, "memory": l3d.Memory(recompute=True), "steps": 12}),
    "cached": (convolution, {"preset": "published", "steps": 12}),
    "interrupted": (language, {"divergence": "kl", "steps": 14, "checkpoint_every": 4}),
}


@contextmanager
def recording(kept: list[Any]) -> Iterator[None]:
    """Note what every step keeps, by sample and subnetwork of all: [n, 2]."""
    originals = {name: getattr(step_module, name) for name in ("objective", "objective_in_chunks")}
    take_step = Run.take_step
    results: list[Any] = []

    def noting(run: Run, gradients: Any) -> StepResult | None:
        # steps in numpy do not list what they keep; tests/training/test_numpy_step.py holds them to those that do
        run.stepper.plan = run.stepper.plan._replace(small=False)
        found = take_step(run, gradients)
        result = results.pop()
        result = result[0] if run.micro_batch_size is not None or run.group is not None else result
        entries = torch.stack([result.kept.rows, result.kept.columns + run._first_column], 1)
        kept.append(entries if run.group is None else run.group.gather(entries))
        return found

    def held(name: str) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            results.append(originals[name](*given, **options))
            return results[-1]

        return call

    step_module.objective, step_module.objective_in_chunks = held("objective"), held("objective_in_chunks")
    Run.take_step = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.take_step = take_step  # type: ignore[method-assign]
        for name, original in originals.items():
            setattr(step_module, name, original)


def run(name: str, folder: Path, **changes: Any) -> tuple[Decomposition, list[set[tuple[int, int]]]]:
    """Train a run by name; return it, and the set of what each step kept."""
    torch.set_default_dtype(torch.float64)
    make, own = RUNS[name]
    model, data = make()
    arguments = {**ARGUMENTS, **own, **changes}
    preset = l3d.PRESETS[arguments.get("preset", "default")]
    arguments["preset"] = replace(preset, replacement=replace(preset.replacement, restart_every=4))
    if name == "cached":
        arguments["cache"] = folder / "cache"
    kept: list[Tensor] = []
    with recording(kept):
        d = l3d.decompose(model, data, **arguments)
    return d, [set(map(tuple, each.tolist())) for each in kept]


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Interrupt training before a step, as Ctrl-C would."""
    original = Run.take_step

    def stopping(run: Run, gradients: Any) -> StepResult | None:
        if run.step == step:
            raise KeyboardInterrupt
        return original(run, gradients)

    Run.take_step = stopping  # type: ignore[method-assign]
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        Run.take_step = original  # type: ignore[method-assign]


def main(folder: Path, names: list[str]) -> None:
    """Train what is named and write what came of it; resume what one process has begun, begin what one will resume."""
    torch.set_num_threads(1)
    found = processes.start()
    assert found is not None
    for name in names:
        d, kept = run(name, folder, out=folder / f"run {name}")
        size = next(d.parameters()).shape[0]
        assert d.n_subnetworks == size == (7 if found.rank == 0 else found.share(7).stop - found.share(7).start)
        if found.rank == 0:
            torch.save((d.history, d.state_dict(), kept, d.threshold), folder / f"{name}.pt")
    d, _ = run("interrupted", folder, out=folder / "begun by one", existing="resume")
    with interrupted_at(10):
        run("interrupted", folder, out=folder / "begun by many")
    refused = ""
    try:
        run("interrupted", folder, out=folder / "begun by many")  # what the first refuses, all do
    except ValueError as error:
        refused = str(error)
    assert "is not empty" in refused
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
