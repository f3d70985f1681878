"""Draw a decomposition's figures: plain data in, a matplotlib Figure out.

Backgrounds are transparent, and every colour is one of the mid-tones below, readable on light and on dark pages.
`to_svg(figure, css=True)` replaces the colours by CSS variables, so that a page can theme them. matplotlib is optional
(pip install 'l3d[report]'), and is imported when a figure is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from l3d.storage.files import replace_text, replacing

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#79828d"  # text and node dots
RULE = "#a9b1ba"  # axes, grid and quiet lines
POSITIVE = "#2f7fc1"  # blue, also the accent colour
NEGATIVE = "#d0603c"  # vermilion: distinct from the blue for every common colour blindness
CSS_VARIABLES = {INK: "--ink-soft", RULE: "--rule-strong", POSITIVE: "--positive", NEGATIVE: "--negative"}

PNG_DPI = 110
MAX_UNITS = 32  # a diagram of wider layers would be unreadable
MAX_POINTS = 200  # a curve of more points is drawn as mean and range per bin
MAX_BARS = 60  # more activation rates are drawn as an area
FLOOR = 0.02  # diagrams omit entries below this fraction of the largest one

_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), RULE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "svg.hashsalt": "l3d",
}


class ChainLayer(NamedTuple):
    """One layer of an MLP: a weight matrix and its bias."""

    weight: str  # name of the [n_out, n_in] matrix
    bias: str | None  # name of its [n_out] vector
    n_in: int
    n_out: int


@contextmanager
def _style() -> Iterator[None]:
    """Use matplotlib's defaults and l3d's settings inside the block, independent of the user's own settings."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'l3d[report]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@contextmanager
def canvas(width: float, height: float, **layout: Any) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure of this size, in inches, and its panels, to draw in l3d's style inside the block.

    layout: arguments of `Figure.subplots`.
    """
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**layout)


def error_curve(history: Mapping[str, Sequence[float]], dead_after: int = 0) -> Figure:
    """Draw the error over the training steps; below it in grey, kept subnetworks per sample and the dead fraction.

    history: equally long lists `step`, `error`, `kept_per_sample`, `dead_fraction`, `k`. dead_after: the step from
    which the dead fraction is known.
    """
    with canvas(9.4, 4.9, nrows=3, sharex=True, height_ratios=(5, 1, 1)) as (figure, panels):
        error, kept, dead = panels
        step, lowest, mean, highest = _binned(history["step"], history["error"])
        error.fill_between(step, lowest, highest, color=POSITIVE, alpha=0.18, linewidth=0)
        error.plot(step, mean, color=POSITIVE, linewidth=1.6)
        error.set_ylabel("error")
        top, last = max(highest.compressed(), default=1.0), [1.0, *mean.compressed()][-1]
        error.set_ylim(0, 1.06 * min(top, max(1.4, 1.3 * last)) or 1.0)  # early spikes may be cut off
        error.grid(axis="y", color=RULE, alpha=0.3, linewidth=0.6)
        for axes, key, label in ((kept, "kept_per_sample", "kept"), (dead, "dead_fraction", "dead")):
            first = dead_after if key == "dead_fraction" else 0
            known = [math.nan if s < first else each for s, each in zip(history["step"], history[key], strict=True)]
            step, _, mean, _ = _binned(history["step"], known)
            axes.plot(step, mean, color=RULE, linewidth=1.2)
            axes.set_ylabel(label, rotation=0, ha="right", va="center")
        kept.set_ylim(bottom=0)
        dead.set_ylim(0, max(0.1, dead.get_ylim()[1]))
        dead.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        dead.set_xlabel("step")
        for axis in (dead.xaxis, kept.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        ks = history["k"]
        n_warm = next(i for i, k in enumerate(ks) if k <= ks[-1])  # the warm start, with a larger k, ends at this entry
        for axes in panels:
            axes.set_xlim(0, max(1, history["step"][-1]))
            axes.axvspan(0, history["step"][n_warm] if n_warm else 0, color=RULE, alpha=0.16, linewidth=0)
        if n_warm:
            note = "warm start:\nlarger k"
            at: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            error.annotate(note, (history["step"][n_warm], 1), (5, -3), **at, va="top", size=8)
        figure.align_ylabels(panels)
        return figure


def intervention_ratios(ratios: Mapping[str, Sequence[float]]) -> Figure:
    """Draw intervention ratios (output change on active samples / on inactive ones) in descending order, by name."""
    with canvas(7.2, 3.8) as (figure, axes):
        looks = ((POSITIVE, "-"), (NEGATIVE, "-"), (INK, (0, (4, 2))))
        for (name, values), (colour, line) in zip(ratios.items(), looks, strict=False):
            falling = sorted((value for value in values if 0 < value < float("inf")), reverse=True)
            share = np.linspace(0, 100, len(falling))
            axes.plot(share, falling, color=colour, linestyle=line, linewidth=1.8, label=name)
        axes.axhline(1, color=RULE, linewidth=0.9)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="share of directions, %", ylabel="change on active / on inactive samples")
        axes.grid(axis="y", color=RULE, alpha=0.3, linewidth=0.6)
        axes.legend(frameon=False)
        return figure


def activation_rates(rates: Sequence[float]) -> Figure:
    """Draw the activation rate of each subnetwork, most active first; rates: [K] fractions of the samples."""
    order = sorted(range(len(rates)), key=lambda i: -float(rates[i]))
    ordered = [float(rates[i]) for i in order]
    n_alive, n_all = sum(rate > 0 for rate in ordered), len(ordered)
    with canvas(9.4, 2.9) as (figure, axes):
        if n_all <= MAX_BARS:
            axes.bar(range(n_all), ordered, width=0.66, color=POSITIVE, alpha=0.85)
            axes.set_xticks(range(n_all), map(str, order), size=min(9.0, 360 / max(1, n_all)))
            axes.tick_params(axis="x", length=0)
        else:
            axes.fill_between(range(n_alive), ordered[:n_alive], color=POSITIVE, alpha=0.25, linewidth=0)
            axes.plot(range(n_alive), ordered[:n_alive], color=POSITIVE, linewidth=1.6)
            axes.set_xticks([])
        mean = sum(ordered) / max(1, n_all)
        axes.axhline(mean, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"mean {100 * mean:.3g} %", (1, mean), (0, 3), **at, ha="right", va="bottom")
        axes.set_xlim(-0.6, max(n_all, 10) - 0.4)
        axes.set_ylim(0, 1.12 * max(ordered, default=0.0) or 1.0)
        if n_alive < n_all:
            axes.axvspan(n_alive - 0.5, n_all - 0.4, color=RULE, alpha=0.18, linewidth=0)
            middle, note = ((n_alive + n_all - 1) / 2, 0.5), f"{n_all - n_alive:,} dead"
            axes.text(*middle, note, transform=axes.get_xaxis_transform(), ha="center", va="center")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.set_ylabel("activation rate")
        axes.set_xlabel("subnetworks, most active first")
        axes.grid(axis="y", color=RULE, alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        return figure


def mlp_chain(shapes: Mapping[str, Sequence[int]]) -> tuple[ChainLayer, ...] | None:
    """Return an MLP's layers from its parameter shapes in order; None if the shapes are no MLP that can be drawn.

    Consecutive matrices [n_out, n_in] must have matching sizes. A vector is the bias of a matrix with its n_out: the
    nearest one before it, else after it. No layer may have more than MAX_UNITS units.
    """
    names = list(shapes)
    matrices = [name for name in names if len(shapes[name]) == 2]
    vectors = [name for name in names if len(shapes[name]) == 1]
    if not matrices or len(matrices) + len(vectors) < len(names):
        return None
    if any(not 1 <= n_units <= MAX_UNITS for name in matrices for n_units in shapes[name]):
        return None
    if any(shapes[after][1] != shapes[before][0] for before, after in pairwise(matrices)):
        return None
    bias_of: dict[str, str] = {}
    for vector in vectors:
        at = names.index(vector)
        fitting = [name for name in matrices if shapes[name][0] == shapes[vector][0] and name not in bias_of]
        if not fitting:
            return None
        owner = min(fitting, key=lambda name: (names.index(name) > at, abs(names.index(name) - at)))
        bias_of[owner] = vector
    return tuple(ChainLayer(m, bias_of.get(m), n_in=shapes[m][1], n_out=shapes[m][0]) for m in matrices)


def network_diagram(
    subnetworks: Sequence[Mapping[str, torch.Tensor]], shapes: Mapping[str, Sequence[int]], scale: float | None = None
) -> Figure:
    """Draw each subnetwork as a network diagram: columns of units, inputs on the left, one line per weight.

    Blue is positive, vermilion negative; width and opacity grow with |entry|; rings are biases. scale: the |entry|
    drawn at full width; default the largest. Raises ValueError if `mlp_chain(shapes)` is None.
    """
    chain = mlp_chain(shapes)
    if chain is None:
        raise ValueError("shapes: expected a chain of [out, in] matrices and their biases, small enough to draw")
    if not subnetworks:
        raise ValueError("subnetworks: expected at least one")
    full = scale or largest_entry(subnetworks)
    tallest = max(chain[0].n_in, *(layer.n_out for layer in chain))
    width, height = 0.4 + 0.7 * len(chain), min(3.4, 1.0 + 0.1 * tallest)
    n_columns = min(len(subnetworks), max(1, int(10 / width)))
    n_rows = -(-len(subnetworks) // n_columns)
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width * n_columns, height * n_rows))
        figure.subplots_adjust(0, 0, 1, 1, wspace=0, hspace=0)
        grid = figure.subplots(n_rows, n_columns, squeeze=False).flat
        for axes in grid:
            axes.set_axis_off()
        for i, network in enumerate(subnetworks):
            _draw_network(grid[i], network, chain, full)
            if len(subnetworks) > 1:
                grid[i].set_ylim(-0.06, 1.16)
                grid[i].annotate(str(i), (0.5, 0.99), xycoords="axes fraction", ha="center", va="top")
        return figure


def largest_entry(subnetworks: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Return the largest |entry| of all tensors; 1 if all entries are zero."""
    return max(float(tensor.abs().max()) for network in subnetworks for tensor in network.values()) or 1.0


def to_svg(figure: Figure, prefix: str = "", css: bool = False) -> str:
    """Return the figure as one <svg> element whose ids start with `prefix`; equal figures give equal text.

    css: replace colours by CSS variables (see CSS_VARIABLES), and let the page set the size.
    """
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    _, tag, text = buffer.getvalue().partition("<svg")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", tag + text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r'(url\(#| id="|href="#)', rf"\g<1>{prefix}", text)
    if css:
        text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
        text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
        for colour, variable in CSS_VARIABLES.items():
            text = text.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", text).strip()


def write_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PATH.svg and PATH.png, and return both paths; equal figures give equal bytes."""
    svg, png = (path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png"))
    replace_text(svg, to_svg(figure) + "\n")
    with replacing(png) as partial:
        figure.savefig(partial, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return [svg, png]


def _draw_network(axes: Axes, network: Mapping[str, torch.Tensor], chain: Sequence[ChainLayer], full: float) -> None:
    """Draw one subnetwork into the axes: columns of units at x = 0, 1, ..., unit 0 at the top."""
    from matplotlib.collections import LineCollection

    widths = [chain[0].n_in, *(layer.n_out for layer in chain)]
    y = [[1 - (unit + 0.5) / width for unit in range(width)] for width in widths]
    dot = min(22.0, 160.0 / max(widths))
    for x, layer in enumerate(chain):
        edges = _visible(network[layer.weight], full)
        lines = [[(x, y[x][i]), (x + 1, y[x + 1][o])] for (o, i), _ in edges]
        colours = [(POSITIVE if value > 0 else NEGATIVE, round(0.2 + 0.8 * abs(value), 2)) for _, value in edges]
        sizes = [round(0.4 + 3.6 * abs(value), 2) for _, value in edges]
        axes.add_collection(LineCollection(lines, colors=colours, linewidths=sizes, capstyle="round"))
        rings = _visible(network[layer.bias], full) if layer.bias is not None else []
        for (o,), value in rings:
            colour, size = POSITIVE if value > 0 else NEGATIVE, 0.4 + 3.6 * abs(value)
            axes.scatter(x + 1, y[x + 1][o], 7 * dot, "none", edgecolors=colour, linewidths=size, zorder=3)
    for x, column in enumerate(y):
        axes.scatter([x] * len(column), column, dot, INK, linewidths=0, zorder=4)
    for x, offset, align in ((0, -5, "right"), (len(chain), 10, "left")):
        for unit in range(widths[x] if widths[x] <= 12 else 0):
            place: dict[str, Any] = {"textcoords": "offset points", "ha": align, "va": "center_baseline"}
            axes.annotate(str(unit), (x, y[x][unit]), (offset, 0), **place, size=7.5)
    axes.set_xlim(-0.34, len(chain) + 0.42)
    axes.set_ylim(-0.02, 1.02)


def _visible(tensor: torch.Tensor, full: float) -> list[tuple[tuple[int, ...], float]]:
    """Return (position, entry / full) of all entries with |entry / full| of at least FLOOR, smallest first."""
    values = np.clip(tensor.detach().double().cpu().numpy() / full, -1, 1)
    seen = [(at, float(value)) for at, value in np.ndenumerate(values) if abs(value) >= FLOOR]
    return sorted(seen, key=lambda entry: abs(entry[1]))


def _binned(steps: Sequence[float], values: Sequence[float]) -> tuple[Any, ...]:
    """Return the mean step and the lowest, mean and highest value per bin; values that are not finite are masked."""
    edges = np.linspace(0, len(values), min(MAX_POINTS, len(values)), endpoint=False, dtype=int)
    size = np.diff([*edges, len(values)])
    y = np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    n_finite = np.add.reduceat(finite.astype(int), edges)
    lowest = np.minimum.reduceat(np.where(finite, y, np.inf), edges)
    highest = np.maximum.reduceat(np.where(finite, y, -np.inf), edges)
    mean = np.add.reduceat(np.where(finite, y, 0.0), edges) / np.maximum(n_finite, 1)
    step = np.add.reduceat(np.asarray(steps, dtype=float), edges) / size
    return step, *(np.ma.masked_array(curve, n_finite == 0) for curve in (lowest, mean, highest))
