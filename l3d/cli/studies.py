"""What `l3d toy all`, `sweep`, `intervene` and `paper` do: studies over many runs, of one, of the paper's toys."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import l3d
from l3d.callbacks import ProgressBar
from l3d.cli import job as jobs
from l3d.cli import options
from l3d.cli.job import Settings
from l3d.cli.output import environment
from l3d.cli.parser import read_settings
from l3d.storage import run_folder
from l3d.storage.files import replace_text
from l3d.storage.identity import check_identity
from l3d.storage.lock import check_free

TABLE_MARKS = ("<!-- toys -->", "<!-- /toys -->")  # between these lines of a README stands the suite's table


def toy_suite(settings: Settings) -> None:
    """Run the recovery suite and write its table."""
    n_seeds, readme = settings.pop("seeds") or 10, settings.pop("readme")
    if settings["random_weights"] or settings["toy_seed"] is not None or settings["weights_seed"] is not None:
        raise ValueError("--random_weights, --weights_seed and --toy_seed: for one toy, not for l3d toy all")
    out, _ = jobs.take_out(settings, "runs/all")
    from torch import nn

    from l3d.storage.files import replace_between
    from l3d.studies import recovery_suite as suite

    if readme is not None:
        replace_between(Path(readme), TABLE_MARKS, None)  # is there a place for it? before the work, not after
    for option in options.options_of(options.Results, only=("log", "describe", "evaluate_rows")):
        if settings[option.name] != option.default:
            raise ValueError(f"--{option.name}: for one toy, not for l3d toy all")
    if out.is_dir() and any(out.iterdir()) and not (out / "results.json").is_file():
        raise ValueError(f"--out: {out} holds no results of l3d toy all, so --overwrite will not touch it")
    out.mkdir(parents=True, exist_ok=True)  # before the work, not after
    names = [option.name for option in options.DECOMPOSE if option.name != "seed"]
    given = {name: settings[name] for name in names if settings[name] is not None}
    for name in ("gradients", "replacement"):
        given |= {name: settings[name]} if any(value is not None for value in settings[name].values()) else {}
    arguments = jobs.arguments(given)
    first = settings["seed"] or 0
    seeds = range(first, first + n_seeds)
    results: suite.Results = {}
    for done, seed in enumerate(seeds, start=1):  # what is done stays, whatever happens to the rest
        suite.run_suite(
            [seed], suite.EXPERIMENTS, results=results, tell=lambda line: print(line, file=sys.stderr), **arguments
        )
        table = suite.to_markdown(results, suite.EXPERIMENTS)
        holds = {"environment": environment(nn.Linear(1, 1)), "seeds": list(seeds[:done]), "arguments": given}
        figures = json.dumps(holds | {"results": results}, indent=1) + "\n"
        paths = [replace_text(out / "table.md", table), replace_text(out / "results.json", figures)]
    if readme is not None:
        paths.append(replace_between(Path(readme), TABLE_MARKS, table))
    print(table)
    for path in paths:
        print(f"written: {path}")


def sweep(settings: Settings) -> None:
    """Decompose one model over every combination of some settings."""
    from l3d.analysis.controls import redrawn
    from l3d.estimate import checked
    from l3d.studies.sweep import Point, points, run_sweep, write_results

    out = jobs.folder_of(settings.pop("out"), "runs/sweep")
    over, random_weights = settings.pop("over"), settings.pop("random_weights")
    if not over:
        raise ValueError("--over: expected at least one list, as --over.k '[.05,.1]'")
    runs = points(over, random_weights)
    given = {name: value for name, value in settings.items() if value is not None}
    if settings["toy"]:
        named = [name for name in ("model", "data", "held_out") if settings[name]]
        if named:
            raise ValueError(f"--{named[0]}: a toy has its own model and data")
        job = jobs.load_toy({**settings, "name": settings["toy"]})
    else:
        jobs.make_absolute(given, ", or --toy NAME; see l3d sweep --help")
        defaults = {option.name: option.default for option in options.DECOMPOSE}
        job = jobs.load({**settings, **defaults, **given})
    base = {name: value for name, value in given.items() if name not in over}
    names = [option.name for option in options.DECOMPOSE] + ["gradients", "replacement"]

    def chosen_by(point: Point) -> Settings:
        return {name: job.settings[name] for name in names if name in job.settings} | point.values

    for point in runs:  # before the first run, not at the one whose turn it would be
        try:
            checked(job.model, job.data, jobs.arguments(chosen_by(point)))
        except ValueError as error:
            prefix = "over." if str(error).partition(":")[0] in point.values else ""
            raise ValueError(f"{prefix}{error}") from error

    def train(folder: Path, point: Point, resume: bool) -> Mapping[str, Any]:
        chosen = chosen_by(point)
        check_free(folder)
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)  # what was cut off before its first checkpoint
        own = jobs.standing_alone(job, chosen, point.random_weights)
        control = redrawn(job.model, chosen.get("params"), jobs.weights_seed(job))

        with control if point.random_weights else nullcontext():
            existing = "resume" if resume else "refuse"
            with ProgressBar() as bar:
                told = [bar, jobs.ConfigWriter(own)]
                arguments = jobs.arguments(chosen)
                d = l3d.decompose(job.model, job.data, **arguments, out=folder, existing=existing, callbacks=told)
            metrics = jobs.evaluate_run(d, own, jobs.evaluation_data(own))
            return metrics | jobs.costs(d, own.model)

    try:
        found = run_sweep(out, base, runs, train)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on in {out}") from None
    paths = write_results(out, base, found)
    print((out / "table.md").read_text(encoding="utf-8"))
    for path in paths:
        print(f"written: {path}")
    n_failed = sum(bool(each.failure) for each in found)
    if n_failed:
        why = f"{out / 'table.md'} says why, and the same command tries them again"
        raise ValueError(f"{n_failed} of {len(found)} runs failed; {why}")


def intervene(settings: Settings) -> None:
    """Measure interventions along every subnetwork of a run."""
    from l3d.report import plots
    from l3d.report.report import write_report
    from l3d.storage.store import to_json

    run, target = jobs.find_run(settings)
    job = jobs.reload(run, {})
    runs = {"": run} | ({"control": Path(settings["control"])} if settings["control"] else {})
    loaded = {name: l3d.load(folder).to(next(job.model.parameters()).device) for name, folder in runs.items()}
    if "control" in loaded and not settings["any_weights"] and _redrawn(runs["control"]):
        try:
            check_identity(loaded["control"].base_model, dict(job.model.named_parameters(remove_duplicate=False)))
        except ValueError:
            why = f"{runs['control']} decomposed random weights, which are not those of {run}"
            raise ValueError(f"--control: {why}; measure it alone: l3d intervene {runs['control']}") from None
    how = {"n_rows": settings["rows"], "n_samples": settings["samples"], "any_weights": settings["any_weights"]}
    found = {
        name: l3d.intervention_ratios(d, job.model, job.data, divergence=jobs.own_divergence(d, job.settings), **how)
        for name, d in loaded.items()
    }
    if target != run:
        run_folder.copy_run(run, target)
    holds: Settings = {"rows": settings["rows"], "samples": settings["samples"]}
    for name, ratios in found.items():
        figures = ratios.as_dict()
        holds |= {name: {"run": str(runs[name]), **figures}} if name else figures
    paths = [replace_text(target / run_folder.INTERVENTIONS, to_json(holds))]
    lines = {"subnetworks": found[""].ratio, "random directions": found[""].random_ratio}
    if "control" in found:
        lines["control run"] = found["control"].ratio
    for name, values in lines.items():
        print(f"{name}: {len(values)}, median ratio {statistics.median(values.tolist()):.3g}")
    print(f"above the random direction: {100 * found[''].share_above_random:.1f} %")
    try:
        figure = plots.intervention_ratios({name: values.tolist() for name, values in lines.items()})
        paths += plots.write_figure(figure, target / "interventions")
        if (target / run_folder.REPORT).is_file():  # which has a column for them
            paths.append(write_report(target))
    except ImportError as error:
        print(f"no plot: {error}")
    for path in paths:
        print(f"written: {path}")


def _redrawn(run: Path) -> bool:
    """Tell whether a run decomposed random weights; one made from Python does not say."""
    if not (run / run_folder.CONFIG).is_file():
        return False
    return bool(read_settings(run_folder.read_command(run), run).get("random_weights"))


def paper(settings: Settings) -> None:
    """Make the figures of one of the paper's studies again."""
    from l3d.studies.paper import MARK, check_name, write_figures

    name = check_name(settings["name"])
    out = jobs.folder_of(settings["out"], f"runs/paper-{name}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not settings["overwrite"]:
            raise ValueError(f"--out: {out} exists and is not an empty folder")
        if not (out / MARK).is_file():
            raise ValueError(f"--out: {out} holds no figures of l3d, so --overwrite will not touch it")
    for path in write_figures(name, out, settings["seed"]):
        print(f"written: {path}")
