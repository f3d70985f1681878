"""Draw the paper's figures: numbers in, a matplotlib Figure out, in the colours of `l3d.report.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l3d.report.plots import INK, NEGATIVE, POSITIVE, RULE, _style
from l3d.studies.paper.measure import Pairwise, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure_of(width: float, height: float, **layout: Any) -> tuple[Figure, Any]:
    """Return a figure and its panels. width, height: in inches; layout: arguments of `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**layout)


def planes(
    features: Sequence[Tensor], decoder: Sequence[Tensor], encoder: Sequence[Tensor], titles: Sequence[str]
) -> Figure:
    """Draw directions in the hidden plane, one panel per tensor.

    Grey lines are the features, blue arrows the subnetworks (Vout), thin red arrows their encoders (Vin).
    features, decoder, encoder: per panel [n, 2]; row i of each belongs to feature i.
    """
    with _style():
        figure, panels = figure_of(4.4 * len(titles), 4.3, ncols=len(titles), squeeze=False)
        for axes, true, directions, encoders, title in zip(panels[0], features, decoder, encoder, titles, strict=True):
            unit = torch.nn.functional.normalize(true.double().cpu())
            for i, (x, y) in enumerate(unit.tolist()):
                axes.plot([0, 1.18 * x], [0, 1.18 * y], color=RULE, linewidth=7, alpha=0.55, solid_capstyle="round")
                axes.text(1.32 * x, 1.32 * y, str(i), ha="center", va="center")
            for arrows, colour, width, length in ((encoders, NEGATIVE, 0.8, 0.7), (directions, POSITIVE, 1.7, 1.0)):
                seen = torch.nn.functional.normalize(arrows.double().cpu())
                seen = length * seen * (unit * seen).sum(1, keepdim=True).sign()  # a direction's sign is arbitrary
                style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
                for end in seen.tolist():
                    axes.annotate("", end, (0, 0), arrowprops=style)
            axes.set(xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal", title=title)
            axes.set_axis_off()
        return figure


def heat(panels: dict[str, Tensor], x_label: str, y_label: str, bar: str) -> Figure:
    """Draw matrices [rows, columns] of values in [0, 1] as shades of blue, one panel per title."""
    with _style():
        n_rows, n_columns = next(iter(panels.values())).shape
        width, height = 0.9 + 0.34 * n_columns, 1.1 + 0.34 * n_rows
        figure, grid = figure_of(
            max(3.6, width * len(panels) + 0.8), max(2.6, height), ncols=len(panels), squeeze=False
        )
        for axes, (title, values) in zip(grid[0], panels.items(), strict=True):
            image = _shades(axes, values, 1.0)
            axes.set(xlabel=x_label, ylabel=y_label)
            axes.set_title(title, size=9, color=INK)
            axes.set_xticks(range(n_columns))
            axes.set_yticks(range(n_rows))
            axes.tick_params(length=0, labelsize=8)
        shades = figure.colorbar(image, ax=grid[0].tolist(), shrink=0.85)
        shades.outline.set_visible(False)
        shades.set_label(bar)
        return figure


def scatter(true: Tensor, panels: Sequence[tuple[str, Tensor, float]], x_label: str) -> Figure:
    """Draw found values against true ones, one panel per (name of the found values, values, r²)."""
    with _style():
        figure, grid = figure_of(4.2 * len(panels), 4.2, ncols=len(panels), squeeze=False)
        x = true.flatten().double().cpu()
        for axes, (name, found, r2) in zip(grid[0], panels, strict=True):
            y = found.flatten().double().cpu()
            low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
            margin = 0.05 * (high - low)
            axes.plot([low, high], [low, high], color=RULE, linewidth=1.0, linestyle=(0, (4, 3)))
            axes.scatter(x, y, 14, POSITIVE, alpha=0.7, linewidths=0)
            axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
            axes.set(xlabel=x_label, ylabel=name)
            axes.text(0.04, 0.95, f"r² = {r2:.3f}", transform=axes.transAxes, va="top", size=11)
        return figure


def sweeps(curves: Sequence[Sweep], titles: Sequence[str], hidden: Sequence[Sweep] | None = None) -> Figure:
    """Draw output changes over δ, one panel per subnetwork: samples with its feature in blue, the others in red.

    hidden: the same curves with only the hidden layers moved, drawn dashed.
    """
    n_columns = min(5, len(curves))
    n_rows = -(-len(curves) // n_columns)
    with _style():
        figure, grid = figure_of(
            1.95 * n_columns + 0.4, 1.75 * n_rows + 0.65, nrows=n_rows, ncols=n_columns,
            sharex=True, sharey=True, squeeze=False,
        )  # fmt: skip
        for axes in grid.flat[len(curves) :]:
            axes.set_axis_off()
        for i, (axes, curve, title) in enumerate(zip(grid.flat, curves, titles, strict=False)):
            series = [(curve, "-", "")] + ([] if hidden is None else [(hidden[i], (0, (3, 2)), ", hidden layers only")])
            for each, line, note in series:
                for values, colour, label in (
                    (each.holding, POSITIVE, "samples with the feature"),
                    (each.without, NEGATIVE, "samples without it"),
                ):
                    axes.plot(each.deltas, values, color=colour, linewidth=1.6, linestyle=line, label=label + note)
            axes.set_title(title, size=9, color=INK)
            axes.grid(axis="y", color=RULE, alpha=0.3, linewidth=0.6)
        grid[0, 0].set_ylim(bottom=0)
        figure.supxlabel("δ, distance moved along the subnetwork", size=9, color=INK)
        figure.supylabel("output change (rms)", size=9, color=INK)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
        return figure


def pairs(found: Pairwise, first: str, second: str) -> Figure:
    """Draw output changes over a grid of two δ, one panel per kind of sample, and the interactions of all pairs."""
    with _style():
        figure, panels = figure_of(
            12.6, 2.9, ncols=len(found.changes) + 1, width_ratios=[1] * len(found.changes) + [1.2]
        )
        highest = max(max(map(max, rows)) for rows in found.changes.values())
        reach = found.deltas[-1]
        for axes, (kind, rows) in zip(panels, found.changes.items(), strict=False):
            values = torch.tensor(rows)
            image = _shades(axes, values.mT, highest, extent=(-reach, reach, -reach, reach), origin="lower")
            axes.set_title(f"samples with {kind}", size=9, color=INK)
            axes.set_xlabel(f"δ of subnetwork {first}")
        panels[0].set_ylabel(f"δ of subnetwork {second}")
        bar = figure.colorbar(image, ax=panels[len(found.changes) - 1], shrink=0.85)
        bar.outline.set_visible(False)
        bar.set_label("output change (rms)")
        values = torch.tensor(found.interaction)
        _shade(figure, panels[-1], values, "interaction", 1.0)
        panels[-1].set_title("every pair of subnetworks", size=9, color=INK)
        panels[-1].set_xticks(range(len(values)))
        panels[-1].set_yticks(range(len(values)))
        panels[-1].tick_params(length=0, labelsize=8)
        return figure


def against(x: Sequence[int], by_seed: Sequence[Sequence[float]], x_label: str, published: dict[int, float]) -> Figure:
    """Draw the error against a whole number: a grey line per seed, the mean in blue, published values as crosses."""
    with _style():
        figure, axes = figure_of(4.8, 3.2)
        for errors in by_seed:
            axes.plot(x, errors, color=RULE, linewidth=1.0, marker="o", markersize=3, alpha=0.8)
        mean = torch.tensor(by_seed, dtype=torch.float64).mean(0).tolist()
        axes.plot(
            x, mean, color=POSITIVE, linewidth=1.8, marker="o", markersize=5, label=f"mean of {len(by_seed)} seeds"
        )
        if published:
            at = list(published)
            axes.scatter(at, list(published.values()), 45, NEGATIVE, marker="x", label="published", zorder=3)
        axes.set(xlabel=x_label, ylabel="error", ylim=(0, 1.1 * max(map(max, (*by_seed, [*published.values(), 0])))))
        axes.set_xticks(list(x))
        axes.grid(axis="y", color=RULE, alpha=0.3, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
        return figure


def _shade(figure: Figure, axes: Axes, values: Tensor, label: str, highest: float | None = None) -> None:
    image = _shades(axes, values, float(values.max()) if highest is None else highest)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.outline.set_visible(False)
    bar.set_label(label)


def _shades(axes: Axes, values: Tensor, highest: float, **options: Any) -> Any:
    """Draw values from 0 (transparent) to `highest` (blue) as an image for light and dark pages."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    shades = LinearSegmentedColormap.from_list("clear", [to_rgba(RULE, 0.14), to_rgba(POSITIVE)])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes.imshow(
        values.double().cpu().numpy(), cmap=shades, vmin=0, vmax=highest or 1.0, aspect="equal", **options
    )
