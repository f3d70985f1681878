"""Follow a training run: a small protocol, with a progress bar, TensorBoard and Weights & Biases behind it.

    with l3d.callbacks.TensorBoard("logs/tms") as board:
        l3d.decompose(model, data, callbacks=[board])

A callback may be given to one run after another. TensorBoard and Weights & Biases are optional: pip install 'l3d[log]'.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Kind = TypeVar("Kind", bound="Callback")


class Callback:
    """What a run tells; every method does nothing until it is overridden.

    Figures are numbers by name, as in `Decomposition.history`. `decompose` calls on_start, on_step and, where training
    did not fail, on_end. Whoever made a callback closes it, by `close` or by leaving its `with` block.
    """

    def on_folder(self, folder: Path) -> None:
        """The run folder is open; everything has been checked, and nothing written yet."""

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Training starts, with all settings resolved, also where an interrupted run goes on."""

    def on_step(self, step: int, figures: Mapping[str, float]) -> None:
        """A row was added to the history: means over the steps since the row before.

        `dead_fraction` is left out in the first steps, before a subnetwork can be known to be dead.
        """

    def on_note(self, line: str) -> None:
        """Something the user should know, in one line."""

    def on_end(self, figures: Mapping[str, float]) -> None:
        """Training has ended, with these figures; the command line calls this again with those of the evaluation."""

    def close(self) -> None:
        """Nothing more will be told."""

    def __enter__(self: Kind) -> Kind:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ProgressBar(Callback):
    """A bar on standard error with the latest figures; silent where that is no terminal."""

    def __init__(self, label: str = "decompose") -> None:
        console = Console(stderr=True)
        console.quiet = not console.is_terminal
        figures = TextColumn("{task.fields[figures]}")
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=console, refresh_per_second=4, disable=console.quiet)

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Show an empty bar."""
        self._bar.start()
        self._task = self._bar.add_task("", total=settings["steps"], figures="")

    def on_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Show a step and its figures."""
        dead = f"dead {figures['dead_fraction']:.0%}  " if "dead_fraction" in figures else ""  # not known at first
        shown = (
            f"error {figures['error']:.4f}  kept {figures['kept_per_sample']:.1f}  {dead}"
            f"{figures['samples_per_second']:,.0f} samples/s"
        )
        self._bar.update(self._task, completed=step, figures=shown)

    def on_note(self, line: str) -> None:
        """Print the line to standard error."""
        print(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


class TensorBoard(Callback):
    """Write every figure as a scalar to a folder for `tensorboard --logdir`.

    Raises ImportError where tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("logging to TensorBoard needs tensorboard: pip install 'l3d[log]'") from error
        self.folder = Path(folder)
        self._make = SummaryWriter
        self._writer: Any = None
        self._step = 0

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Open the folder and write the settings as text."""
        if self._writer is None:
            self._writer = self._make(str(self.folder))
        lines = ("    " + line for name, value in settings.items() for line in f"{name}: {value}".splitlines())
        self._writer.add_text("settings", "\n".join(lines))

    def on_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures under train/."""
        self._step = step
        self._write("train", figures)

    def on_end(self, figures: Mapping[str, float]) -> None:
        """Write the figures under end/, at the run's last step, which they tell where nothing was trained."""
        self._step = int(figures.get("step", self._step))
        self._write("end", figures)

    def _write(self, group: str, figures: Mapping[str, float]) -> None:
        for name, value in numbers(figures).items():
            self._writer.add_scalar(f"{group}/{name}", value, self._step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class WandB(Callback):
    """Send figures and settings to Weights & Biases, or keep them in a folder where WANDB_MODE=offline.

    arguments: of wandb.init: project, name, dir, mode, ... Raises ImportError where wandb is not installed.
    """

    def __init__(self, **arguments: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("logging to Weights & Biases needs wandb: pip install 'l3d[log]'") from error
        self._wandb = wandb
        self._arguments: dict[str, Any] = {"project": "l3d"} | arguments
        self._run: Any = None

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Start a run with these settings."""
        if self._run is None:
            self._run = self._wandb.init(config=dict(settings), **self._arguments)

    def on_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures at their step."""
        self._run.log(numbers(figures), step=step)

    def on_end(self, figures: Mapping[str, float]) -> None:
        """Put the figures into the run's summary."""
        self._run.summary.update(numbers(figures))

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Keep what is one number: no lists, texts or truths; not `step`, which callbacks are told by itself."""
    return {
        name: value
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }


def log_to(kind: str | None, run: Path) -> Callback:
    """Return the callback that `--log KIND` means for a run folder; None: one that does nothing."""
    if kind == "tensorboard":
        return TensorBoard(run / "tensorboard")
    if kind == "wandb":
        return WandB(name=run.name, dir=str(run))
    return Callback()
