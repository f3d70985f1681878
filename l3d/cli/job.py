"""Load what a command's settings name, and score what a run has made: what `commands` and `studies` share."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import l3d
from l3d import toys
from l3d.callbacks import Callback
from l3d.cli import options
from l3d.cli.output import environment, peak_memory
from l3d.cli.parser import read_settings
from l3d.data.arguments import check_device, check_folder
from l3d.data.batches import count_rows
from l3d.data.sources import Data, absolute, absolute_files, load_data, load_function, load_model, take_rows
from l3d.distributed.watch import is_first
from l3d.gradients.divergence import Divergence
from l3d.storage import run_folder
from l3d.storage.files import check_links
from l3d.storage.progress import check_finished
from l3d.training.options import PRESETS

Settings = dict[str, Any]


class Job(NamedTuple):
    """What a run needs, loaded and checked."""

    command: str  # that made it: "toy" or "decompose"
    settings: Settings  # what its config.yaml holds
    model: nn.Module
    data: Data  # to train on
    held_out: Data | None
    toy: toys.Toy | None


def find_run(settings: Settings, reloads: bool = True, finished: bool = True) -> tuple[Path, Path]:
    """Return the run folder and the one to write into: the same, or a copy to be made in --out.

    reloads: whether its model and data are needed, which a folder made from Python does not name. finished: whether its
    decomposition is needed, which an interrupted run does not have.
    """
    run = Path(settings["run"])
    check_links(run)
    if finished:
        check_finished(run)
    if reloads or not (run / "decomposition.json").is_file():
        run_folder.read_command(run)
    if settings["out"] is None:
        return run, run
    out = check_folder("--out", settings["out"])
    if is_first():  # of several processes it alone copies, and the others may come later
        run_folder.check_copy(run, out)
    return run, out


def reload(run: Path, changes: Settings) -> Job:
    """Load what a run folder was made from, with some settings changed."""
    command = run_folder.read_command(run)
    settings = read_settings(command, run)
    for name in ("out", "overwrite", "dry_run"):
        settings.pop(name, None)
    for name in ("name",) if command == "toy" else ("model", "data"):
        if not isinstance(settings.get(name), str):
            raise ValueError(f"{run / run_folder.CONFIG}: {name}: expected a text, got {settings.get(name)!r}")
    if command == "toy" and "data" in changes:
        raise ValueError("--data: a toy has its own data")
    return load_toy(settings | changes) if command == "toy" else load(settings | changes)


def make_absolute(settings: Settings, hint: str) -> None:
    """Name the model and the data in full, so that they are found from anywhere; both are required."""
    for name in ("model", "data"):
        if not settings.get(name):
            raise ValueError(f"--{name} SPEC is required{hint}")
        settings[name] = absolute(settings[name])
        settings[f"{name}_args"] = absolute_files(settings[f"{name}_args"])


def load(settings: Settings) -> Job:
    """Load the model and the data that settings name."""
    _check_scored_rows(settings)
    model = _move(named(load_model(settings["model"], **settings["model_args"]), settings["model"]), settings["device"])
    data = load_data(settings["data"], model_spec=settings["model"], **settings["data_args"])
    _redraw_if_asked(model, settings)
    n_held_out = settings["held_out"]
    if n_held_out == 0:
        return Job("decompose", settings, model, data, None, None)
    count = count_rows(data)
    if count is None:
        raise ValueError("--held_out: needs data whose rows can be counted, a tensor or a Dataset with a length")
    if count <= n_held_out:
        raise ValueError(f"--held_out: cannot keep {n_held_out} of {count} rows out of training")
    first = take_rows(data, slice(None, count - n_held_out))
    return Job("decompose", settings, model, first, take_rows(data, slice(count - n_held_out, None)), None)


def load_toy(settings: Settings) -> Job:
    """Make the toy that settings name, and complete them by its own."""
    _check_scored_rows(settings)
    seed = settings["seed"] or 0
    own_seed = settings.get("toy_seed")
    made = toys.make(settings["name"], seed=seed if own_seed is None else own_seed)
    given = {name: value for name, value in settings.items() if value is not None}
    resolved = {"name": made.name, "seed": seed} | made.arguments(settings["preset"]) | given
    model = _move(named(made.model, f"toy:{made.name}"), settings["device"])
    redrawn = _redraw_if_asked(model, resolved)
    return Job("toy", resolved, model, made.data, None, None if redrawn else made)  # redrawn, it has no true circuits


def _check_scored_rows(settings: Settings) -> None:
    """Refuse to score a single row, before the work and not after."""
    for name in ("held_out", "evaluate_rows"):
        if settings.get(name) == 1:
            raise ValueError(f"--{name}: expected at least 2 rows: one alone has no other to refer to")


def _redraw_if_asked(model: nn.Module, settings: Settings) -> bool:
    """Redraw the weights where the run is a control; tell whether it is."""
    from l3d.analysis.controls import redraw_

    asked: bool = settings.get("random_weights", False)
    seed = settings.get("weights_seed")
    if seed is not None and not asked:
        raise ValueError("--weights_seed: needs --random_weights, whose draw it is")
    if asked:
        redraw_(model, settings.get("params"), (settings.get("seed") or 0) if seed is None else seed)
    return asked


def _move(model: nn.Module, device: str | None) -> nn.Module:
    if device is None:
        return model
    if device == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():  # torchrun: a GPU for each
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        return model.to(check_device(device, "--device"))
    except RuntimeError as error:
        raise ValueError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from error


def costs(d: l3d.Decomposition, model: nn.Module) -> dict[str, Any]:
    """Return what a run took and where, as metrics.json holds it."""
    return {**d.timing, "diverged": d.diverged, **peak_memory(), "environment": environment(model)}


def standing_alone(job: Job, chosen: Settings, random_weights: bool) -> Job:
    """Return one run of a sweep as `l3d toy` or `l3d decompose` would make it, with the settings of such a command."""
    settings = {name: job.settings[name] for name in ("evaluate_rows",) if name in job.settings} | chosen
    if job.command == "toy":
        settings |= {"name": job.settings["name"], "toy_seed": job.settings["seed"]}
    else:
        settings |= {option.name: job.settings[option.name] for option in options.SOURCE}
    settings |= {"random_weights": random_weights, "weights_seed": weights_seed(job) if random_weights else None}
    return job._replace(settings=settings, toy=None if random_weights else job.toy)


def weights_seed(job: Job) -> int:
    """Return the seed that all controls of a sweep redraw with: one network, so that seeds of runs can be compared."""
    return job.settings.get("seed") or 0


def arguments(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `decompose` that settings hold."""
    given = {option.name: settings[option.name] for option in options.DECOMPOSE if option.name in settings}
    for name, group in options.GROUPS.items():
        chosen = {key: value for key, value in settings.get(name, {}).items() if value is not None}
        given[name] = group(**chosen)
    enabled = settings.get("replacement", {}).get("enabled")
    if enabled is not None:
        preset = PRESETS[given.get("preset") or "default"]
        given["preset"] = replace(preset, replacement=replace(preset.replacement, enabled=enabled))
    if str(given.get("divergence")).startswith("python:"):
        given["divergence"] = load_function(given["divergence"])
    return given


def own_divergence(d: l3d.Decomposition, settings: Settings) -> Divergence | None:
    """Return the function that --divergence python: names, if the decomposition was trained with one; else None."""
    spec = str(settings.get("divergence"))
    return load_function(spec) if spec.startswith("python:") and d.settings.get("divergence") == "callable" else None


class ConfigWriter(Callback):
    """Writes a command's settings into the run folder once it is open."""

    def __init__(self, job: Job) -> None:
        self.job, self.folder = job, Path()

    def on_folder(self, folder: Path) -> None:
        """Write config.yaml."""
        self.folder = folder
        run_folder.write_config(folder, self.job.command, self.job.settings)

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Write it again with the divergence that was left to the model's outputs."""
        if self.job.settings.get("divergence") is None:
            self.job.settings["divergence"] = settings["divergence"]
            run_folder.write_config(self.folder, self.job.command, self.job.settings)


def named(model: nn.Module, spec: str) -> nn.Module:
    """Let a model know what the command line calls it; a Hugging Face model knows its name itself."""
    if not getattr(model, "name_or_path", ""):
        model.name_or_path = spec  # type: ignore[assignment]
    return model


def evaluation_data(job: Job) -> Data:
    """Return the training rows to evaluate on: at most so many, evenly spaced; of a stream some first batches."""
    count, most = count_rows(job.data), job.settings["evaluate_rows"]
    if count is None:  # a stream of batches, which may have no end
        return list(itertools.islice(job.data, max(1, most // job.settings["batch_size"])))  # type: ignore[arg-type]
    return job.data if count <= most else take_rows(job.data, [i * count // most for i in range(most)])


def evaluate_run(d: l3d.Decomposition, job: Job, data: Data, any_weights: bool = False) -> dict[str, Any]:
    """Return the figures of an evaluation, as metrics.json holds them."""
    d = d.to(next(job.model.parameters()).device)
    # a toy's thousand points are few: references are drawn more than once, for a figure that does not wobble
    options = {"backend": job.settings.get("backend", "auto"), "any_weights": any_weights}
    options |= {"divergence": own_divergence(d, job.settings)}
    found = d.evaluate(job.model, data, n_references=1 if job.toy is None else 30, **options)
    figures: dict[str, Any] = {name: getattr(found, name) for name in ("error", "kept_per_sample", "dead_fraction")}
    figures |= {"activation_rate": found.activation_rate.tolist(), "n_rows": count_rows(data)}
    if job.held_out is not None:
        figures["held_out_error"] = d.evaluate(job.model, job.held_out, **options).error
    if job.toy is not None:
        try:
            figures |= job.toy.recovery(d)
        except ValueError as error:  # --params left out what it looks at
            print(f"l3d: {error}", file=sys.stderr)
    return figures


def folder_of(out: str | None, default: str) -> Path:
    """Return the folder that --out names, or the default where it is not given. Raises ValueError for none."""
    return Path(default) if out is None else check_folder("--out", out)


def take_out(settings: Settings, default: str, check: bool = True) -> tuple[Path, bool]:
    """Take the run folder to make, and whether it may be replaced, out of the settings."""
    out, overwrite = folder_of(settings.pop("out"), default), settings.pop("overwrite")
    if check and not overwrite:
        run_folder.check_new(
            out, "; choose another, or pass --overwrite"
        )  # before the model is loaded, which may take long
    return out, overwrite
