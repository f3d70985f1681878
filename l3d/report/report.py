"""Render a run folder as RUN/report.html: one self-contained page that opens offline.

    run folder ─ l3d.load, *.json, config.yaml ─► figures (plots), table (table) ─ template ─► page

The page requests nothing over the network, and its Content-Security-Policy forbids it. Every name shown is escaped. The
page depends on the run folder alone: the same folder gives the same bytes. jinja2 and matplotlib are optional: pip
install 'l3d[report]'.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from l3d.decomposition.subnetworks import mean_of_last
from l3d.report import plots
from l3d.report.table import common_prefix, make_table
from l3d.storage.files import check_links, read_json, replace_text
from l3d.storage.formats import duration, figure, percent, size
from l3d.storage.run_folder import (
    CONFIG,
    METRICS,
    REPORT,
    SUBNETWORKS,
    read_metrics,
    read_ratios,
    read_subnetworks,
    write_subnetworks,
)
from l3d.storage.schema import check_subnetworks
from l3d.storage.store import COLUMNS, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from l3d.decomposition.subnetworks import Subnetworks

MAX_DIAGRAMS = 60  # of more subnetworks only the most active ones are drawn

HEADERS = ("#", "kept for, %", "impact", "ratio", "raises", "lowers", "mostly in")  # the template's own

_TEMPLATES = Path(__file__).parent / "templates"


class Headline(NamedTuple):
    """One figure at the top of the page."""

    label: str
    shown: str  # rounded, with its unit
    exact: str  # as in metrics.json
    note: str  # what the figure means; "" for none


def write_report(
    run_dir: str | os.PathLike[str],
    *,
    described: Mapping[str, Any] | None = None,
    columns: Mapping[str, Sequence[float | None] | Tensor] | None = None,
) -> Path:
    """Write RUN/report.html from the run folder's files, and return its path.

    Args:
        run_dir: a folder that holds a decomposition: a run's, `decompose(out=..)`'s, or one that `save` wrote.
        described: what `describe` returned, for the cards; kept in RUN/subnetworks.json.
        columns: {header: [K] numbers} to add to the table, None for an unknown one; kept in RUN/columns.json in place
            of all that it held.

    The page is written under a temporary name and then renamed, so a failure keeps the old page. Without metrics.json
    the page shows the figures of the end of training. Raises FileNotFoundError or ValueError, which name the file,
    for a folder without a readable run, ValueError for `columns` or `described` of another number of subnetworks or
    with a header of the table's own, and ImportError without the extra `report`.
    """
    folder = Path(run_dir)
    own = None if columns is None else _as_lists(columns)
    page = render_report(folder, described, own)
    if described is not None:
        write_subnetworks(folder, described)
    if own is not None:
        replace_text(folder / COLUMNS, to_json(own))
    return replace_text(folder / REPORT, page)


def render_report(
    run_dir: str | os.PathLike[str],
    described: Mapping[str, Any] | None = None,
    columns: Mapping[str, Sequence[float | None] | Tensor] | None = None,
) -> str:
    """Return the page as text; see `write_report`."""
    from l3d.api import load

    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    check_links(folder)
    metrics = read_metrics(folder)
    config, subject = _read_config(folder / CONFIG)
    d = load(folder)
    rates = metrics.get("activation_rate")
    if rates is not None and len(rates) != d.n_subnetworks:
        raise ValueError(f"{folder / METRICS}: activation_rate: expected {d.n_subnetworks} rates, got {len(rates)}")
    shapes = {name: tuple(shape) for name, shape in d.shapes.items()}
    described = read_subnetworks(folder) if described is None else described
    if described and len(described["subnetworks"]) != d.n_subnetworks:
        got = len(described["subnetworks"])
        raise ValueError(f"{folder / SUBNETWORKS}: expected {d.n_subnetworks} subnetworks, got {got}")
    if described:
        check_subnetworks(described, str(folder / SUBNETWORKS))
    ratios = read_ratios(folder)
    if described and ratios:
        each = enumerate(described["subnetworks"])
        measured = [seen | ({"intervention_ratio": ratios[k]} if k in ratios else {}) for k, seen in each]
        described = {**described, "subnetworks": measured}
    if rates is None and described:
        known = [seen.get("activation_rate") for seen in described["subnetworks"]]
        rates = None if None in known else known
    prefix = common_prefix(list(shapes))
    table = make_table(d, rates, described, prefix, ratios)
    own = _own_columns(folder, columns, d.n_subnetworks, {*HEADERS, table.acts, *table.columns})
    dead_after = d.settings.get("replacement", {}).get("restart_every", 0)
    history = {key: list(values) for key, values in d.history.items()}
    if any(isinstance(values[-1], list) for values in history.values() if values):
        history = {}  # that of a checkpoint of several restarts, which are no one run
    drawn = bool(history.get("step")) and {"error", "kept_per_sample", "dead_fraction", "k"} <= history.keys()
    script, style = ((_TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    return render(
        _TEMPLATES / "report.html.j2",
        title=subject or folder.resolve().name,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=style,
        n_subnetworks=d.n_subnetworks,
        n_parameters=sum(math.prod(shape) for shape in shapes.values()),
        shapes=shapes,
        headlines=headlines(metrics or d.figures() | {"diverged": d.diverged}),
        from_history=not metrics,
        curve=plots.to_svg(plots.error_curve(history, dead_after), "curve-", css=True) if drawn else None,
        curve_summary=_curve_summary(history),
        rates=plots.to_svg(plots.activation_rates(rates), "rates-", css=True) if rates else None,
        n_dead=sum(rate == 0 for rate in rates or ()),
        diagrams=[(i, plots.to_svg(drawing, f"net{i}-", css=True)) for i, drawing in _diagrams(d, shapes, rates)],
        chain=plots.mlp_chain(shapes),
        prefix=prefix,
        table=table,
        own_columns=own,
        described=described,
        cards=_in_script(described) if described else None,
        settings={key: _compact(value) for key, value in sorted(d.settings.items())},
        metrics={key: _compact(value) for key, value in metrics.items() if key != "activation_rate"},
        config=config,
        environment=metrics.get("environment"),
    )


def render(template: Path, **values: Any) -> str:
    """Fill in a template; values are escaped but where it says `safe`. Raises ImportError without jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'l3d[report]'") from error
    loader = jinja2.FileSystemLoader(template.parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "figure": figure}
    return environment.get_template(template.name).render(**values)


HEADLINES: dict[str, tuple[str, Callable[[float], str], str]] = {  # key: label, shown as, what it means
    "diverged": ("diverged", lambda _: "yes", "training ended at twice its first error or more; lower lr"),
    "error": ("error", percent, "of the gradients’ squared norm is not reconstructed; 0 % is perfect"),
    "held_out_error": ("error on held-out data", percent, "the same, on rows not used in training"),
    "mmcs": ("match with the true features", "{:.3f}".format, "mean best |cosine| with the true ones; 1 is perfect"),
    "mmcs_own": ("match of own weights", "{:.3f}".format, "the same over each feature’s own weights alone"),
    "features_found": ("features found", "{:.0f}".format, "have a subnetwork of their own"),
    "r2": ("r² with the weights", "{:.3f}".format, "between the columns found and those of W_out W_in"),
    "r2_task": ("r² with the task", "{:.3f}".format, "between the columns found and those of the task’s matrix"),
    "groups_found": ("groups found", "{:.0f}".format, "have a live subnetwork of purity 0.9 or more"),
    "purity": ("purity", "{:.3f}".format, "of W_in lies in the group, for each group’s best subnetwork, on average"),
    "inputs_found": ("inputs found", "{:.0f}".format, "act most on a subnetwork of their own"),
    "kept_per_sample": ("kept per sample", "{:.3g}".format, "subnetworks used to reconstruct one gradient, on average"),
    "dead_fraction": ("dead", percent, "of the subnetworks are never kept"),
    "seconds": ("training time", duration, ""),
    "steps_per_second": ("steps per second", "{:,.4g}".format, ""),
    "peak_memory_bytes": ("peak memory", size, ""),
    "cuda_peak_memory_bytes": ("peak memory, GPU", size, ""),
}


def headlines(figures: Mapping[str, Any]) -> list[Headline]:
    """Return the figures for the top of the page and the end of a command, in the order of HEADLINES."""
    other = {"error": "error on other data"} if "evaluated_on" in figures else {}
    found = []
    for key, (label, shown, note) in HEADLINES.items():
        if key in figures and not (key == "diverged" and not figures[key]):
            text = "not finite" if figures[key] is None else shown(figures[key])
            found.append(Headline(other.get(key, label), text, json.dumps(figures[key]), note))
    return found


def _read_config(path: Path) -> tuple[str, str]:
    """Return config.yaml's text and the name of its toy or model; both are empty if there is no such file."""
    from l3d.storage.yaml_text import read_yaml

    if not path.is_file():
        return "", ""
    settings, text = read_yaml(path), path.read_text(encoding="utf-8")
    named = settings if isinstance(settings, dict) else {}
    model = str(named.get("model") or "")  # "hf:folder/name", "python:package.module:factory"
    return text, str(named.get("name") or re.split("[:/]", model.rstrip("/"))[-1])


def _own_columns(
    folder: Path, columns: Mapping[str, Any] | None, n_subnetworks: int, taken: set[str]
) -> dict[str, list[float | None]]:
    """Return the columns given, else RUN/columns.json's, {} if there is no such file; `taken` are no headers."""
    path = folder / COLUMNS
    if columns is None and not path.is_file():
        return {}
    where = "columns" if columns is not None else str(path)
    try:
        own = _as_lists(read_json(path) if columns is None else columns, where)
        for name, values in own.items():
            if len(values) != n_subnetworks:
                wanted = f"a number for each of {n_subnetworks} subnetworks"
                raise ValueError(f"{where}: {name!r}: expected {wanted}, got {len(values)}")
            if not name.strip() or name in taken:
                raise ValueError(f"{where}: {name!r}: expected a header that the table does not have")
    except ValueError as error:
        if columns is None:
            raise ValueError(f"{error}; write_report(RUN, columns={{}}) drops them") from error
        raise
    return own


def _as_lists(columns: Mapping[str, Any], where: str = "columns") -> dict[str, list[float | None]]:
    """Return columns as lists of numbers, None for one that is not finite. Raises ValueError for other values."""
    name, found = "", {}
    try:
        for name, values in columns.items():
            if isinstance(values, (str, Mapping)) or getattr(values, "ndim", 1) != 1:
                got = f"{type(values).__name__} {list(getattr(values, 'shape', ''))}".removesuffix(" []")
                raise TypeError(f"expected one dimension, got {got}")
            numbers = [None if value is None or not math.isfinite(value) else float(value) for value in values]
            found[str(name)] = numbers
    except (AttributeError, OverflowError, TypeError) as error:
        raise ValueError(f"{where}: expected {{header: list of numbers}} ({name!r}: {error})") from error
    return found


def _diagrams(
    d: Subnetworks, shapes: Mapping[str, tuple[int, ...]], rates: Sequence[float] | None
) -> Iterator[tuple[int, Figure]]:
    """Yield (index, diagram) per subnetwork, all to one scale; nothing if the tensors form no small MLP."""
    if plots.mlp_chain(shapes) is None:
        return
    by_rate = sorted(range(d.n_subnetworks), key=lambda i: -rates[i] if rates else 0.0)
    networks = {i: d.subnetwork(i) for i in sorted(by_rate[:MAX_DIAGRAMS])}
    scale = plots.largest_entry(networks.values())
    for i, network in networks.items():
        yield i, plots.network_diagram([network], shapes, scale)


def _curve_summary(history: Mapping[str, Sequence[float]]) -> str:
    """Return the error curve in one sentence, for screen readers."""
    if not history.get("step"):
        return ""
    first, last = history["error"][0], mean_of_last(history["error"])
    return f"The error goes from {percent(first)} to {percent(last)} over {history['step'][-1]:,.0f} steps."


def _in_script(described: Mapping[str, Any]) -> str:
    """Return JSON that is safe inside a <script>: no text in it can end the element or begin a tag."""
    return json.dumps(described, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _compact(value: Any) -> str:
    """Return a setting as text: strings unchanged, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
