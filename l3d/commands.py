"""What the commands of `l3d` do: load ─► decompose ─► evaluate ─► fill the run folder ─► print."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from l3d import options, run_folder
from l3d.callbacks import Callback, log_to
from l3d.card import renew_card
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
    dry_run = settings.pop("dry_run")
    out, overwrite = _take_out(settings, "runs/decompose", check=not dry_run)
    for name in ("model", "data"):
        if not settings[name]:
            raise ValueError(f"--{name} SPEC is required; see l3d decompose --help")
        settings[name] = absolute(settings[name])
    if dry_run:
        return _estimate(load(settings))
    _train(load(settings), out, overwrite=overwrite)


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
        _train(load_toy(settings), out, overwrite=overwrite)


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
    run, target = find_run(settings)
    job = reload(run, {})
    if target != run:
        run_folder.copy_run(run, target)
    _train(job, target, resume=True)


def evaluate(settings: Settings) -> None:
    """Evaluate a run's decomposition again and renew its figures."""
    import l3d

    run, target = find_run(settings)
    names = ("evaluate_rows", "describe", "device")
    changes = {name: settings[name] for name in names if settings[name] is not None}
    if settings["data"] is not None:
        changes |= {"data": settings["data"], "data_args": settings["data_args"] or {}, "held_out": 0}
    elif settings["data_args"] is not None:
        raise ValueError("--data_args: needs --data, to which they belong")
    job = reload(run, changes)
    metrics = run_folder.read_metrics(run)
    metrics.pop("held_out_error", None)  # either computed anew or of other rows than the rest
    metrics.pop("evaluated_on", None)
    d = l3d.load(run)
    data = evaluation_data(job)
    metrics |= evaluate_run(d, job, data, settings["any_weights"])
    if settings["data"] is not None:
        metrics["evaluated_on"] = settings["data"]
    described = _describe(d, job, data, metrics, settings["any_weights"])
    if target != run:
        run_folder.copy_run(run, target)
    _finish(target, metrics, described)


def report(settings: Settings) -> None:
    """Write a run's report again."""
    from l3d.report import render_report, write_report

    run, target = find_run(settings)
    if target != run:
        render_report(run)  # fails before anything is copied
        run_folder.copy_run(run, target)
    print(f"report: {write_report(target)}")


def sweep(settings: Settings) -> None:
    """Decompose one model over every combination of some settings."""
    from l3d import study_commands

    study_commands.sweep(settings)


def intervene(settings: Settings) -> None:
    """Measure interventions along every subnetwork of a run."""
    from l3d import study_commands

    study_commands.intervene(settings)


def paper(settings: Settings) -> None:
    """Make the figures of one of the paper's studies again."""
    from l3d import study_commands

    study_commands.paper(settings)


def _take_out(settings: Settings, default: str, check: bool = True) -> tuple[Path, bool]:
    """Take the run folder to make, and whether it may be replaced, out of the settings."""
    out, overwrite = Path(settings.pop("out") or default), settings.pop("overwrite")
    if check and not overwrite:
        run_folder.check_new(out)  # before the model is loaded, which may take long
    return out, overwrite


def find_run(settings: Settings) -> tuple[Path, Path]:
    """Return the run folder and the one to write into: the same, or a copy to be made in --out."""
    run = Path(settings["run"])
    run_folder.read_command(run)
    if settings["out"] is None:
        return run, run
    run_folder.check_copy(run, Path(settings["out"]))
    return run, Path(settings["out"])


def reload(run: Path, changes: Settings) -> Job:
    """Load what a run folder was made from, with some settings changed."""
    command = run_folder.read_command(run)
    settings = read_settings(command, run)
    for name in ("out", "overwrite", "dry_run"):
        settings.pop(name, None)
    if command == "toy" and "data" in changes:
        raise ValueError("--data: a toy has its own data")
    return load_toy(settings | changes) if command == "toy" else load(settings | changes)


def load(settings: Settings) -> Job:
    """Load the model and the data that settings name."""
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


def load_toy(settings: Settings) -> Job:
    """Make the toy that settings name, and complete them by its own."""
    from l3d import toys

    seed = settings["seed"] or 0
    made = toys.make(settings["name"], seed=seed)
    given = {name: value for name, value in settings.items() if value is not None}
    resolved = {"name": made.name, "seed": seed} | made.arguments(settings["preset"]) | given
    return Job("toy", resolved, _move(made.model, settings["device"]), made.data, None, made)


def _move(model: nn.Module, device: str | None) -> nn.Module:
    if device is None:
        return model
    if device == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():  # torchrun: a GPU for each
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise ValueError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from error


def _train(job: Job, out: Path, overwrite: bool = False, resume: bool = False) -> None:
    import l3d

    names = [option.name for option in (*options.DECOMPOSE, *options.MEMORY)]
    arguments = {name: job.settings[name] for name in names if name in job.settings}

    def write_config(_: object) -> None:
        run_folder.write_config(out, job.command, job.settings)

    try:
        arguments |= {"out": out, "overwrite": overwrite, "resume": resume, "model_name": _model_name(job)}
        arguments |= {"on_start": None if resume else write_config}
        with log_to(job.settings.get("log"), out) if _is_first() else Callback() as log:
            with _together(out):
                d = l3d.decompose(job.model, job.data, **arguments, callbacks=[log])
            if not _is_first():
                return  # of several processes the first one writes, and reports
            data = evaluation_data(job)
            metrics = evaluate_run(d, job, data) | {name: float(d.timing[name]) for name in TIMING}
            metrics |= _peak_memory() | {"environment": _environment(job.model)}
            log.on_end(metrics)
        _finish(out, metrics, _describe(d, job, data, metrics))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run_folder.interrupted(out)) from None


def _model_name(job: Job) -> str | None:
    """Name the model as its run does; a Hugging Face model knows its name itself."""
    if job.command == "toy":
        return f"toy:{job.settings['name']}"
    spec: str = job.settings["model"]
    return None if spec.startswith("hf:") else spec


def _estimate(job: Job) -> None:
    """Print what a run would take."""
    from rich.console import Console
    from rich.table import Table

    from l3d import processes
    from l3d.estimate import estimate, path_name
    from l3d.formats import duration, size

    joined = processes.start()
    names = [option.name for option in (*options.DECOMPOSE, *options.MEMORY) if option.name in job.settings]
    found = estimate(job.model, job.data, **{name: job.settings[name] for name in names})
    if joined is not None:
        processes.leave()
    if not _is_first():
        return
    tensors = Table("tensor", "shape", "rank", "path", "parameters", "factors", box=None)
    for each in found.tensors:
        shape, rank = "×".join(map(str, each.shape)), "×".join(map(str, each.ranks)) or "whole"
        tensors.add_row(each.name, shape, rank, path_name(each), f"{each.parameters:,}", size(each.factor_bytes))
    totals = Table(box=None, show_header=False)
    for label, value in (
        ("samples in a batch", f"{found.n_samples:,}"),
        ("coefficients kept", f"{found.n_kept:,}"),
        ("encoder and decoder", size(found.parameter_bytes)),
        ("optimiser and gradients", size(found.optimizer_bytes)),
        ("factors of a batch", size(found.factor_bytes)),
        ("peak memory, predicted", size(found.peak_bytes)),
        ("peak memory of the steps taken", size(found.measured_peak_bytes)),
        ("a step", f"{found.seconds_per_step:.4f} s"),
        ("a step while all is kept", f"{found.seconds_per_warm_step:.4f} s"),
        ("the whole run", duration(found.seconds)),
    ):
        totals.add_row(label, value)
    console = Console()
    console.print(tensors)
    console.print(totals)


def _is_first() -> bool:
    """Tell whether this is the only process, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _together(out: Path) -> Iterator[None]:
    """Where torchrun has started several processes, join them while the block runs, and end when one of them does."""
    from l3d import processes
    from l3d.watch import watching

    joined = processes.start()
    if joined is None:
        yield
        return
    command = f"torchrun --nproc_per_node {joined.size} (or any other number) -m l3d resume"
    with watching(joined, lambda: run_folder.interrupted(out, command)):
        yield
    processes.leave()


def evaluation_data(job: Job) -> Data:
    """Return the training rows to evaluate on: at most so many, evenly spaced; of a stream some first batches."""
    count, most = count_rows(job.data), job.settings["evaluate_rows"]
    if count is None:  # a stream of batches, which may have no end
        return list(itertools.islice(job.data, max(1, most // job.settings["batch_size"])))  # type: ignore[arg-type]
    return job.data if count <= most else take_rows(job.data, [i * count // most for i in range(most)])


def _describe(
    d: Decomposition, job: Job, data: Data, metrics: Mapping[str, Any], any_weights: bool = False
) -> dict[str, Any] | None:
    """Return what each subnetwork does; None where that is not wanted. data: where job.data is a stream."""
    from l3d.description import default_rows, describe
    from l3d.identity import moving
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
    with moving(list(job.model.parameters())) if any_weights else nullcontext():
        return describe(d, job.model, data, n_rows=n_rows, view=view, activation_rate=metrics["activation_rate"])


def evaluate_run(d: Decomposition, job: Job, data: Data, any_weights: bool = False) -> dict[str, Any]:
    """Return the figures of an evaluation, as metrics.json holds them."""
    d = d.to(next(job.model.parameters()).device)
    backend = job.settings.get("backend", "auto")
    # a toy's thousand points are few: references are drawn more than once, for a figure that does not wobble
    options = {"backend": backend, "any_weights": any_weights}
    found = d.evaluate(job.model, data, n_references=1 if job.toy is None else 30, **options)
    figures = {
        "error": float(found.error),
        "kept_per_sample": float(found.kept_per_sample),
        "dead_fraction": float(found.dead_fraction),
        "activation_rate": [float(rate) for rate in found.activation_rate],
        "n_rows": count_rows(data),
    }
    if job.held_out is not None:
        figures["held_out_error"] = float(d.evaluate(job.model, job.held_out, **options).error)
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
    renew_card(run, metrics)
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
