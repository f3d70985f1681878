"""What the commands of `l3d` do: load ─► decompose ─► evaluate ─► fill the run folder ─► print."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import l3d
from l3d.callbacks import Callback, ProgressBar, log_to
from l3d.cli import job as jobs
from l3d.cli.job import Job, Settings
from l3d.cli.output import print_estimate, write_results
from l3d.cli.parser import read_settings
from l3d.data.batches import count_rows, take
from l3d.data.sources import Data
from l3d.distributed.signals import Terminated
from l3d.distributed.watch import is_first, together
from l3d.storage import run_folder
from l3d.storage.files import WriteError
from l3d.storage.progress import advised, interrupted


def decompose(settings: Settings) -> None:
    """Decompose a model on data, into a new run folder."""
    dry_run = settings.pop("dry_run")
    out, overwrite = jobs.take_out(settings, "runs/decompose", check=not dry_run)
    jobs.make_absolute(settings, "; see l3d decompose --help")
    cache = settings["cache"]
    if cache["folder"] is not None:  # a resumed run may start elsewhere
        cache["folder"] = str(Path(cache["folder"]).resolve())
    if dry_run:
        return _estimate(jobs.load(settings))
    _train(jobs.load(settings), out, overwrite=overwrite)


def toy(settings: Settings) -> None:
    """Decompose a toy model, into a new run folder."""
    for name in ("seeds", "readme"):
        if settings.pop(name) is not None:
            raise ValueError(f"--{name}: only for l3d toy all, got the toy {settings['name']}")
    out, overwrite = jobs.take_out(settings, f"runs/{settings['name']}")
    _train(jobs.load_toy(settings), out, overwrite=overwrite)


def resume(settings: Settings) -> None:
    """Go on with an interrupted run from its last checkpoint."""
    run, target = jobs.find_run(settings, finished=False)
    job = jobs.reload(run, {})
    copied = target != run and is_first()
    if copied:
        run_folder.copy_run(run, target)
    try:
        _train(job, target, resume=True)
    except ValueError:
        steps = [[path.name for path in run_folder.RunFolder(each).checkpoints()] for each in (run, target)]
        if copied and steps[0] == steps[1]:  # refused: the copy is worth nothing
            shutil.rmtree(target)
        raise


def evaluate(settings: Settings) -> None:
    """Evaluate a run's decomposition again and renew its figures."""
    run, target = jobs.find_run(settings)
    names = ("evaluate_rows", "describe", "device")
    changes = {name: settings[name] for name in names if settings[name] is not None}
    if settings["data"] is not None:
        changes |= {"data": settings["data"], "data_args": _data_args(run, settings), "held_out": 0}
    elif settings["data_args"] is not None:
        raise ValueError("--data_args: needs --data, to which they belong")
    job = jobs.reload(run, changes)
    metrics = run_folder.read_metrics(run)
    metrics.pop("held_out_error", None)  # either computed anew or of other rows than the rest
    metrics.pop("evaluated_on", None)
    d = l3d.load(run)
    data = jobs.evaluation_data(job)
    metrics |= jobs.evaluate_run(d, job, data, settings["any_weights"])
    if settings["data"] is not None:
        metrics["evaluated_on"] = settings["data"]
    described = _describe(d, job, data, metrics, settings["any_weights"])
    if target != run:
        run_folder.copy_run(run, target)
    write_results(target, metrics, described)


def _data_args(run: Path, settings: Settings) -> Settings:
    """Return the arguments of --data: those given, else how the run's own data of the same kind are read."""
    if settings["data_args"] is not None:
        given: Settings = settings["data_args"]
        return given
    own = read_settings(run_folder.read_command(run), run)
    kind = settings["data"].partition(":")[0]
    if kind == "python" or kind != str(own.get("data")).partition(":")[0]:
        return {}
    kept = {name: value for name, value in own["data_args"].items() if name not in ("rows", "max_rows")}
    if kept:
        print(f"l3d: --data_args as in the run: {', '.join(kept)} (--data_args {{}} for none)", file=sys.stderr)
    return kept


def report(settings: Settings) -> None:
    """Write a run's report again."""
    from l3d.report.report import render_report, write_report

    run, target = jobs.find_run(settings, reloads=False)
    if target != run:
        render_report(run)  # fails before anything is copied
        run_folder.copy_run(run, target)
    print(f"report: {write_report(target)}")


def _train(job: Job, out: Path, overwrite: bool = False, resume: bool = False) -> None:
    existing = "resume" if resume else "overwrite" if overwrite else "refuse"
    try:
        with log_to(job.settings.get("log"), out) if is_first() else Callback() as log:
            with together(lambda command: interrupted(out, command)), ProgressBar() as bar:
                told = [bar, Callback() if resume else jobs.ConfigWriter(job), log]
                own = jobs.arguments(job.settings)
                d = l3d.decompose(job.model, job.data, **own, out=out, existing=existing, callbacks=told)
            if not is_first():
                return  # of several processes the first one writes, and reports
            data = jobs.evaluation_data(job)
            metrics = jobs.evaluate_run(d, job, data) | jobs.costs(d, job.model)
            log.on_end(metrics)
        write_results(out, metrics, _describe(d, job, data, metrics))
    except (WriteError, KeyboardInterrupt, Terminated) as stop:
        raise advised(stop, out) from None


def _estimate(job: Job) -> None:
    """Print what a run would take."""
    from l3d.distributed import process_group as processes
    from l3d.estimate import estimate
    from l3d.gradients.explain import explain

    joined = processes.start()
    found = estimate(job.model, job.data, **jobs.arguments(job.settings))
    if joined is not None:
        processes.leave()
    if not is_first():
        return
    print_estimate(found)
    count = count_rows(job.data)
    if count is not None:  # a stream may have been read to its end
        for use in explain(job.model, take(job.data, range(min(4, count))), job.settings["params"]).slow:
            print(f"one backward call per sample for {use.parameter} at {use.operation}: {use.why}")


def _describe(
    d: l3d.Decomposition, job: Job, data: Data, metrics: Mapping[str, Any], any_weights: bool = False
) -> dict[str, Any] | None:
    """Return what each subnetwork does; None where that is not wanted. data: where job.data is a stream."""
    from l3d.analysis.description import default_rows, describe
    from l3d.analysis.view import load_view

    settings, count = job.settings, count_rows(job.data)
    n_rows = settings.get("describe")
    if n_rows == 0:
        return None
    if count is not None:
        data = job.data
        n_rows = min(count, n_rows or default_rows(d.settings["steps"], d.settings["batch_size"]))
    view = load_view(settings.get("data"), settings.get("model"), settings.get("data_args") or {}, job.data, job.model)
    d = d.to(next(job.model.parameters()).device)
    shown: Settings = {"view": view, "activation_rate": metrics["activation_rate"], "any_weights": any_weights}
    shown["divergence"] = jobs.own_divergence(d, settings)
    try:
        return describe(d, job.model, data, n_rows=n_rows, **shown)
    except ValueError as error:  # the run and its figures are good all the same
        print(f"l3d: no descriptions of subnetworks: {error} (--describe 0 does not try)", file=sys.stderr)
        return None
