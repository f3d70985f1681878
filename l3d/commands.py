"""What the commands of `l3d` do: load ─► decompose ─► evaluate ─► fill the run folder ─► print."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from l3d import options, run_folder
from l3d.callbacks import log_to
from l3d.cli import read_settings
from l3d.data import count_rows
from l3d.files import replace_text
from l3d.sources import Data, absolute, load_data, load_model, take_rows

if TYPE_CHECKING:
    from l3d import Decomposition
    from l3d.toys import Toy

Settings = dict[str, Any]

TIMING = ("seconds", "steps_per_second")
TABLE_MARKS = ("<!-- toys -->", "<!-- /toys -->")  # between these lines of a README stands the suite's table


class Job(NamedTuple):
    """What a run needs, loaded and checked."""

    command: str  # that made it: "toy" or "decompose"
    settings: Settings  # what its config.yaml holds
    model: nn.Module
    data: Data  # to train on
    held_out: Data | None
    toy: Toy | None


def decompose(settings: Settings) -> None:
    """Decompose a model on data, into a new run folder."""
    out, overwrite = _take_out(settings, "runs/decompose")
    for name in ("model", "data"):
        if not settings[name]:
            raise ValueError(f"--{name} SPEC is required; see l3d decompose --help")
        settings[name] = absolute(settings[name])
    _train(_load(settings), out, overwrite=overwrite)


def toy(settings: Settings) -> None:
    """Decompose a toy model, into a new run folder; or all of them, over several seeds."""
    suite_only = {name: settings.pop(name) for name in ("seeds", "readme")}
    if settings["name"] != "all":
        for name, value in suite_only.items():
            if value is not None:
                raise ValueError(f"--{name}: only for l3d toy all, got the toy {settings['name']}")
    out, overwrite = _take_out(settings, f"runs/{settings['name']}")
    if settings["name"] == "all":
        _toy_suite(settings, out, suite_only["seeds"] or 10, suite_only["readme"])
    else:
        _train(_load_toy(settings), out, overwrite=overwrite)


def _toy_suite(settings: Settings, out: Path, n_seeds: int, readme: str | None) -> None:
    """Run the recovery suite and write its table."""
    from l3d.files import replace_between
    from l3d.toys import suite

    if readme is not None:
        replace_between(Path(readme), TABLE_MARKS, None)  # is there a place for it? before the work, not after
    names = [option.name for option in options.DECOMPOSE if option.name != "seed"]
    arguments = {name: settings[name] for name in names if settings[name] is not None}
    first = settings["seed"] or 0
    seeds = range(first, first + n_seeds)
    results = suite.run_suite(seeds, suite.EXPERIMENTS, tell=lambda line: print(line, file=sys.stderr), **arguments)
    table = suite.to_markdown(results, suite.EXPERIMENTS)
    out.mkdir(parents=True, exist_ok=True)
    holds = {"environment": _environment(nn.Linear(1, 1)), "seeds": list(seeds), "arguments": arguments}
    paths = [
        replace_text(out / "table.md", table),
        replace_text(out / "results.json", json.dumps(holds | {"results": results}, indent=1) + "\n"),
    ]
    if readme is not None:
        paths.append(replace_between(Path(readme), TABLE_MARKS, table))
    print(table)
    for path in paths:
        print(f"written: {path}")


def resume(settings: Settings) -> None:
    """Go on with an interrupted run from its last checkpoint."""
    run, target = _find_run(settings)
    job = _reload(run, {})
    if target != run:
        run_folder.copy_run(run, target)
    _train(job, target, resume=True)


def evaluate(settings: Settings) -> None:
    """Evaluate a run's decomposition again and renew its figures."""
    import l3d

    run, target = _find_run(settings)
    names = ("evaluate_rows", "describe", "device")
    changes = {name: settings[name] for name in names if settings[name] is not None}
    if settings["data"] is not None:
        changes |= {"data": settings["data"], "data_args": settings["data_args"] or {}, "held_out": 0}
    elif settings["data_args"] is not None:
        raise ValueError("--data_args: needs --data, to which they belong")
    job = _reload(run, changes)
    metrics = run_folder.read_metrics(run)
    metrics.pop("held_out_error", None)  # either computed anew or of other rows than the rest
    metrics.pop("evaluated_on", None)
    d = l3d.load(run)
    data = _evaluation_data(job)
    metrics |= _evaluate(d, job, data)
    if settings["data"] is not None:
        metrics["evaluated_on"] = settings["data"]
    described = _describe(d, job, data, metrics)
    if target != run:
        run_folder.copy_run(run, target)
    _finish(target, metrics, described)


def report(settings: Settings) -> None:
    """Write a run's report again."""
    from l3d.report import render_report, write_report

    run, target = _find_run(settings)
    if target != run:
        render_report(run)  # fails before anything is copied
        run_folder.copy_run(run, target)
    print(f"report: {write_report(target)}")


def _take_out(settings: Settings, default: str) -> tuple[Path, bool]:
    """Take the run folder to make, and whether it may be replaced, out of the settings."""
    out, overwrite = Path(settings.pop("out") or default), settings.pop("overwrite")
    if not overwrite:
        run_folder.check_new(out)  # before the model is loaded, which may take long
    return out, overwrite


def _find_run(settings: Settings) -> tuple[Path, Path]:
    """Return the run folder and the one to write into: the same, or a copy to be made in --out."""
    run = Path(settings["run"])
    run_folder.read_command(run)
    if settings["out"] is None:
        return run, run
    run_folder.check_copy(run, Path(settings["out"]))
    return run, Path(settings["out"])


def _reload(run: Path, changes: Settings) -> Job:
    command = run_folder.read_command(run)
    settings = read_settings(command, run)
    for name in ("out", "overwrite"):
        settings.pop(name)
    if command == "toy" and "data" in changes:
        raise ValueError("--data: a toy has its own data")
    return _load_toy(settings | changes) if command == "toy" else _load(settings | changes)


def _load(settings: Settings) -> Job:
    model = _move(load_model(settings["model"], **settings["model_args"]), settings["device"])
    data = load_data(settings["data"], model_spec=settings["model"], **settings["data_args"])
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


def _load_toy(settings: Settings) -> Job:
    from l3d import toys

    seed = settings["seed"] or 0
    made = toys.make(settings["name"], seed=seed)
    given = {name: value for name, value in settings.items() if value is not None}
    resolved = {"name": made.name, "seed": seed} | made.arguments(settings["preset"]) | given
    return Job("toy", resolved, _move(made.model, settings["device"]), made.data, None, made)


def _move(model: nn.Module, device: str | None) -> nn.Module:
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise ValueError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from error


def _train(job: Job, out: Path, overwrite: bool = False, resume: bool = False) -> None:
    import l3d

    names = [option.name for option in options.DECOMPOSE]
    arguments = {name: job.settings[name] for name in names if name in job.settings}

    def write_config(_: object) -> None:
        run_folder.write_config(out, job.command, job.settings)

    try:
        arguments |= {"out": out, "overwrite": overwrite, "resume": resume}
        arguments |= {"on_start": None if resume else write_config}
        with log_to(job.settings.get("log"), out) as log:
            d = l3d.decompose(job.model, job.data, **arguments, callbacks=[log])
            data = _evaluation_data(job)
            metrics = _evaluate(d, job, data) | {name: float(d.timing[name]) for name in TIMING}
            metrics |= _peak_memory() | {"environment": _environment(job.model)}
            log.on_end(metrics)
        _finish(out, metrics, _describe(d, job, data, metrics))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(out)) from None


def _interrupted(out: Path) -> str:
    last = run_folder.last_checkpoint(out)
    if last is None:
        return f"interrupted, before the first checkpoint in {out}"
    return f"interrupted; last checkpoint: {last}; go on with: l3d resume {out}"


def _evaluation_data(job: Job) -> Data:
    """Return the training rows to evaluate on: at most so many, evenly spaced; of a stream some first batches."""
    count, most = count_rows(job.data), job.settings["evaluate_rows"]
    if count is None:  # a stream of batches, which may have no end
        return list(itertools.islice(job.data, max(1, most // job.settings["batch_size"])))  # type: ignore[arg-type]
    return job.data if count <= most else take_rows(job.data, [i * count // most for i in range(most)])


def _describe(d: Decomposition, job: Job, data: Data, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what each subnetwork does; None where that is not wanted. data: where job.data is a stream."""
    from l3d.description import default_rows, describe
    from l3d.view import load_view

    settings, count = job.settings, count_rows(job.data)
    n_rows = settings.get("describe")
    if n_rows == 0:
        return None
    if count is not None:
        data = job.data
        n_rows = min(count, n_rows or default_rows(d.settings["steps"], d.settings["batch_size"]))
    view = load_view(settings.get("data"), settings.get("model"), settings.get("data_args") or {}, job.data)
    d = d.to(next(job.model.parameters()).device)
    return describe(d, job.model, data, n_rows=n_rows, view=view, activation_rate=metrics["activation_rate"])


def _evaluate(d: Decomposition, job: Job, data: Data) -> dict[str, Any]:
    """Return the figures of an evaluation, as metrics.json holds them."""
    d = d.to(next(job.model.parameters()).device)
    backend = job.settings.get("backend", "auto")
    # a toy's thousand points are few: references are drawn more than once, for a figure that does not wobble
    found = d.evaluate(job.model, data, backend=backend, n_references=1 if job.toy is None else 30)
    figures = {
        "error": float(found.error),
        "kept_per_sample": float(found.kept_per_sample),
        "dead_fraction": float(found.dead_fraction),
        "activation_rate": [float(rate) for rate in found.activation_rate],
        "n_rows": count_rows(data),
    }
    if job.held_out is not None:
        figures["held_out_error"] = float(d.evaluate(job.model, job.held_out, backend=backend).error)
    if job.toy is not None:
        figures |= job.toy.recovery(d)
    return figures


def _environment(model: nn.Module) -> str:
    """Say what made the figures, in one line."""
    from l3d import __version__

    device = next(model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"l3d {__version__}, torch {torch.__version__}, {where}"


def _peak_memory() -> dict[str, int]:
    figures = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        figures["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        figures["cuda_peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def _finish(run: Path, metrics: Mapping[str, Any], described: Mapping[str, Any] | None) -> None:
    """Write metrics, what each subnetwork does, and the report; print the figures that matter with the paths."""
    from rich.console import Console
    from rich.table import Table

    from l3d.formats import duration, percent, size
    from l3d.report import write_report

    paths = {"metrics": run_folder.write_metrics(run, metrics)}
    if described is not None:
        paths["subnetworks"] = run_folder.write_subnetworks(run, described)
    try:
        paths["report"] = write_report(run)
    except ImportError as error:  # the report is an extra; the figures are there without it
        print(f"l3d: no report: {error}", file=sys.stderr)

    table = Table(box=None, show_header=False)
    shown = {
        "error": ("error", percent),
        "held_out_error": ("held-out error", percent),
        "mmcs": ("match with the truth (mmcs)", "{:.4f}".format),
        "mmcs_own": ("the same, feature's own weights", "{:.4f}".format),
        "features_found": ("features found", "{:.0f}".format),
        "groups_found": ("groups found", "{:.0f}".format),
        "purity": ("purity", "{:.4f}".format),
        "r2": ("r² with W_out W_in", "{:.4f}".format),
        "r2_task": ("r² with the task's matrix", "{:.4f}".format),
        "inputs_found": ("inputs found", "{:.0f}".format),
        "kept_per_sample": ("kept per sample", "{:.3g}".format),
        "dead_fraction": ("dead", percent),
        "steps_per_second": ("steps per second", "{:,.4g}".format),
        "seconds": ("training time", duration),
        "peak_memory_bytes": ("peak memory", size),
        "cuda_peak_memory_bytes": ("peak memory, GPU", size),
    }
    for name, (label, show) in shown.items():
        if name in metrics:
            table.add_row(label, "not finite" if metrics[name] is None else show(metrics[name]))
    Console().print(table)
    for name, path in paths.items():
        print(f" {name}: {path}")  # whole, where a table would cut it to the width of the terminal
