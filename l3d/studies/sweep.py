"""Sweep over k, K, rank and seed: decompose one model many times, and tabulate the runs' figures.

points ─ one run folder each; finished ones are kept ─► records ─► table, sweep.json, plot of error against kept

Runs that differ in the seed alone are compared by the mean |cos| of matched subnetworks (`alike`). A low value means
that the subnetworks depend on the seed and should not be trusted.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from l3d.analysis.consistency import consistency
from l3d.api import load
from l3d.data.arguments import check_fraction, check_whole
from l3d.storage.files import check_links, read_json, replace_text
from l3d.storage.progress import last_checkpoint
from l3d.storage.run_folder import METRICS, read_metrics, write_metrics
from l3d.storage.schema import SWEEP
from l3d.storage.store import to_json
from l3d.studies.recovery_suite import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVER = ("k", "n_subnetworks", "rank", "seed")  # settings that a sweep may vary, in this order
BASE = "sweep.json"  # the file with the settings that all runs share, and the results


class Point(NamedTuple):
    """One run of a sweep."""

    values: dict[str, Any]  # the value of each varied setting
    random_weights: bool  # True for a control, whose decomposed weights are random

    @property
    def name(self) -> str:
        """The name of its run folder."""
        named = [f"{name}={value}" for name, value in self.values.items()]
        return ",".join(named + ["random"] * self.random_weights) or "run"


class Record(NamedTuple):
    """A run's figures, or why it failed."""

    point: Point
    metrics: dict[str, Any]  # empty where the run failed
    alike: float | None  # mean matched |cos| with the runs that differ in the seed alone; None without any
    failure: str = ""  # why the run failed, in one line


Train = Callable[[Path, Point, bool], Mapping[str, Any]]  # (folder, point, resume) -> metrics


def points(over: Mapping[str, Sequence[Any]], random_weights: bool = False) -> list[Point]:
    """Return the sweep's runs: every combination, seeds innermost; with random_weights a control follows each run.

    Raises ValueError for settings that a sweep cannot vary, and for lists that are empty or repeat a value.
    """
    for name, values in over.items():
        if name not in OVER:
            raise ValueError(f"over: expected lists for some of {', '.join(OVER)}, got {name!r}")
        if not isinstance(values, (list, tuple)) or not values or len({json.dumps(v) for v in values}) < len(values):
            raise ValueError(f"over.{name}: expected a list of different values, got {values!r}")
        if any(isinstance(value, (dict, list)) for value in values):
            raise ValueError(f"over.{name}: expected numbers (or rank auto), got {values!r}")
        for value in values:  # checked now, so that a late run does not fail
            if name == "k":
                check_fraction("over.k", value)
            if name == "n_subnetworks" or (name == "rank" and value != "auto"):
                check_whole(f"over.{name}", value)
    names = [name for name in OVER if name in over]
    combinations = itertools.product(*(over[name] for name in names))
    controls = (False, True) if random_weights else (False,)
    return [Point(dict(zip(names, each, strict=True)), control) for each in combinations for control in controls]


def run_sweep(
    out: Path, base: Mapping[str, Any], runs: Sequence[Point], train: Train, tell: Callable[[str], None] = print
) -> list[Record]:
    """Run the points that are not finished, and return the figures of all.

    Finished runs (with metrics) in `out`/runs are kept, and an interrupted run resumes from its last checkpoint. So a
    sweep may be extended by more values in the same folder. A run that fails leaves its reason in its record, and the
    others go on. Raises ValueError if `out` holds a sweep with other settings.
    """
    check_base(out, base)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / BASE).is_file():
        replace_text(out / BASE, to_json({"base": dict(base), "runs": []}))
    failures: dict[str, str] = {}  # by the run's name
    for i, point in enumerate(runs):
        folder = out / "runs" / point.name
        where = f"[{i + 1}/{len(runs)}] {point.name}"
        if (folder / METRICS).is_file():
            tell(f"{where}: kept")
            continue
        try:
            metrics = train(folder, point, last_checkpoint(folder) is not None)
            write_metrics(folder, metrics)
        except Exception as error:  # the model and the data are the user's: they may raise anything
            if os.environ.get("L3D_DEBUG", "") not in ("", "0"):
                traceback.print_exc()
            failures[point.name] = _one_line(error)
            tell(f"{where}: failed: {failures[point.name]}")
            continue
        tell(f"{where}: error {short(metrics['error'])}")
    return records(out, runs, failures)


def check_base(out: Path, base: Mapping[str, Any]) -> None:
    """Raise ValueError unless `out` is new, empty, or holds a sweep with the same settings."""
    path = out / BASE
    check_links(out)
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out: {out} exists and holds no sweep; choose a new folder")
        return
    try:
        old = read_json(path, SWEEP)["base"]
    except ValueError as error:
        raise ValueError(f"{path}: not the settings of a sweep ({error})") from error
    changed = [name for name in {**old, **base} if json.dumps(old.get(name)) != json.dumps(base.get(name))]
    if changed:
        raise ValueError(f"--out: {out} holds a sweep with other {', '.join(changed)}; choose a new folder")


def records(out: Path, runs: Sequence[Point], failures: Mapping[str, str] | None = None) -> list[Record]:
    """Read finished runs' figures, and measure the similarity of runs that differ in the seed alone.

    failures: reasons of runs that failed, by name; a run whose files cannot be read has failed too.
    """
    reasons = dict(failures or {})

    def read(point: Point, reader: Callable[[Path], Any]) -> Any:
        try:
            return None if point.name in reasons else reader(out / "runs" / point.name)
        except (ValueError, OSError) as error:
            reasons[point.name] = _one_line(error)

    found = [Record(point, read(point, read_metrics) or {}, None) for point in runs]
    alike: dict[str, float] = {}
    for group in _grouped(found):
        every = {each.point.name: read(each.point, load) for each in group}
        loaded = {name: d for name, d in every.items() if d is not None}
        pairs = {name: dict.fromkeys(loaded, 0.0) for name in loaded}
        for first, second in itertools.combinations(loaded, 2):
            pairs[first][second] = pairs[second][first] = consistency(loaded[first], loaded[second]).mean
        if len(loaded) > 1:
            alike |= {name: sum(row.values()) / (len(loaded) - 1) for name, row in pairs.items()}
    names = [each.point.name for each in found]
    return [each._replace(alike=alike.get(n), failure=reasons.get(n, "")) for n, each in zip(names, found, strict=True)]


def to_markdown(found: Sequence[Record]) -> str:
    """Return the table in Markdown: one row per setting, with figures averaged over seeds."""
    names = [name for name in OVER if name in found[0].point.values and name != "seed"]
    columns = {"error": "error", "held_out_error": "held out", "kept_per_sample": "kept", "dead_fraction": "dead"}
    columns = {key: label for key, label in columns.items() if any(key in each.metrics for each in found)}
    failed = ["failed"] * any(each.failure for each in found)
    head = [*names, "weights", "runs", *columns.values(), "alike", "s", *failed]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for group in _grouped(found):
        point = group[0].point
        cells = [str(point.values[name]) for name in names]
        n_done = sum(not each.failure for each in group)
        count = str(n_done) if n_done == len(group) else f"{n_done} of {len(group)}"
        cells += ["redrawn" if point.random_weights else "trained", count]
        figures = [{**each.metrics, "alike": each.alike} for each in group]
        cells += [_mean([each.get(key) for each in figures]) for key in (*columns, "alike", "seconds")]
        cells += ["; ".join(_why(each) for each in group if each.failure)] * len(failed)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_results(out: Path, base: Mapping[str, Any], found: Sequence[Record]) -> list[Path]:
    """Write sweep.json, table.md and, with the extra `report`, the plot; return their paths."""
    rows = [
        {**each.point.values, "random_weights": each.point.random_weights, "folder": f"runs/{each.point.name}"}
        | {"alike": each.alike}
        | {key: value for key, value in each.metrics.items() if not isinstance(value, list)}
        | ({"failure": each.failure} if each.failure else {})
        for each in found
    ]
    results = to_json({"base": dict(base), "runs": rows})
    paths = [replace_text(out / BASE, results), replace_text(out / "table.md", to_markdown(found))]
    try:
        from l3d.report.plots import write_figure

        paths += write_figure(error_against_kept(found), out / "error-kept")
    except ImportError:  # without matplotlib only the plot is missing
        pass
    return paths


def error_against_kept(found: Sequence[Record]) -> Figure:
    """Draw every run's error against the subnetworks kept per sample: a line per K and rank, controls hollow."""
    from l3d.report.plots import POSITIVE, RULE, canvas

    with canvas(6.4, 4.2) as (figure, axes):
        lines: dict[str, list[tuple[float, float]]] = {}
        for group in _grouped(found):
            point = group[0].point
            measured = [each.metrics for each in group if each.metrics.get("error") is not None]
            if not measured:
                continue
            errors, kept = [each["error"] for each in measured], measured[0]["kept_per_sample"]
            parts = {"n_subnetworks": "K", "rank": "rank"}
            label = ", ".join(f"{sign} {point.values[name]}" for name, sign in parts.items() if name in point.values)
            label = ", ".join(filter(None, [label, "redrawn weights" if point.random_weights else ""])) or "error"
            lines.setdefault(label, []).append((kept, statistics.mean(errors)))
            fill = "none" if point.random_weights else RULE
            axes.scatter([kept] * len(errors), errors, 14, facecolors=fill, edgecolors=RULE, linewidths=0.8)
        strengths = [0.35 + 0.65 * (i + 1) / len(lines) for i in range(len(lines))]
        for (label, line), strength in zip(lines.items(), strengths, strict=True):
            x, y = zip(*sorted(line), strict=True)
            dashed = (0, (3, 2)) if "redrawn" in label else "-"
            axes.plot(x, y, color=POSITIVE, alpha=strength, linewidth=1.6, linestyle=dashed, marker="o", markersize=4)
            axes.annotate(label, (x[-1], y[-1]), (6, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set(xlabel="subnetworks kept per sample", ylabel="error", ylim=(0, None))
        axes.margins(x=0.25)
        axes.grid(axis="y", color=RULE, alpha=0.3, linewidth=0.6)
        return figure


def _grouped(found: Sequence[Record]) -> list[list[Record]]:
    """Put runs together that differ in the seed alone."""
    groups: dict[str, list[Record]] = {}
    for each in found:
        values = {name: value for name, value in each.point.values.items() if name != "seed"}
        groups.setdefault(each.point._replace(values=values).name, []).append(each)
    return list(groups.values())


def _why(each: Record) -> str:
    """Say why a run failed, with its seed, as a cell of the table."""
    seed = f"seed {each.point.values['seed']}: " if "seed" in each.point.values else ""
    return seed + each.failure.replace("|", "\\|")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return short(statistics.mean(known)) if known else ""
