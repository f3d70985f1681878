"""Draw the paper's figures: numbers in, a matplotlib Figure out, in the colours of `l3d.report.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l3d.report.plots import INK, NEGATIVE, POSITIVE, RULE, canvas
from l3d.studies.paper.measure import Pairwise, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def planes(
    features: Sequence[Tensor], decoder: Sequence[Tensor], encoder: Sequence[Tensor], titles: Sequence[str]
) -> Figure:
    """Draw directions in the hidden plane, one panel per tensor.

    Grey lines are the features, blue arrows the subnetworks (Vout), thin red arrows their encoders (Vin).
    features, decoder, encoder: per panel [n, 2]; row i of each belongs to feature i.
    """
    with canvas(4.4 * len(titles), 4.3, ncols=len(titles), squeeze=False) as (figure, panels):
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
    n_rows, n_columns = next(iter(panels.values())).shape
    width, height = max(3.6, (0.9 + 0.34 * n_columns) * len(panels) + 0.8), max(2.6, 1.1 + 0.34 * n_rows)
    with canvas(width, height, ncols=len(panels), squeeze=False) as (figure, grid):
        for axes, (title, values) in zip(grid[0], panels.items(), strict=True):
            image = _matrix(axes, values, title)
            axes.set(xlabel=x_label, ylabel=y_label)
        _bar(figure, image, grid[0].tolist(), bar)
        return figure


def scatter(true: Tensor, panels: Sequence[tuple[str, Tensor, float]], x_label: str) -> Figure:
    """Draw found values against true ones, one panel per (name of the found values, values, r²)."""
    with canvas(4.2 * len(panels), 4.2, ncols=len(panels), squeeze=False) as (figure, grid):
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
    layout = {"nrows": n_rows, "ncols": n_columns, "sharex": True, "sharey": True, "squeeze": False}
    with canvas(1.95 * n_columns + 0.4, 1.75 * n_rows + 0.65, **layout) as (figure, grid):
        for axes in grid.flat[len(curves) :]:
            axes.set_axis_off()
        for i, (axes, curve, title) in enumerate(zip(grid.flat, curves, titles, strict=False)):
            series = [(curve, "-", "")] + ([] if hidden is None else [(hidden[i], (0, (3, 2)), ", hidden layers only")])
            for each, line, note in series:
                look: dict[str, Any] = {"linewidth": 1.6, "linestyle": line}
                axes.plot(each.deltas, each.holding, color=POSITIVE, label="samples with the feature" + note, **look)
                axes.plot(each.deltas, each.without, color=NEGATIVE, label="samples without it" + note, **look)
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
    n_kinds = len(found.changes)
    with canvas(12.6, 2.9, ncols=n_kinds + 1, width_ratios=[1] * n_kinds + [1.2]) as (figure, panels):
        highest = max(max(map(max, rows)) for rows in found.changes.values())
        reach = found.deltas[-1]
        for axes, (kind, rows) in zip(panels, found.changes.items(), strict=False):
            values = torch.tensor(rows)
            image = _shades(axes, values.mT, highest, extent=(-reach, reach, -reach, reach), origin="lower")
            axes.set_title(f"samples with {kind}", size=9, color=INK)
            axes.set_xlabel(f"δ of subnetwork {first}")
        panels[0].set_ylabel(f"δ of subnetwork {second}")
        _bar(figure, image, panels[n_kinds - 1], "output change (rms)")
        image = _matrix(panels[-1], torch.tensor(found.interaction), "every pair of subnetworks")
        _bar(figure, image, panels[-1], "interaction")
        return figure


def against(x: Sequence[int], by_seed: Sequence[Sequence[float]], x_label: str, published: dict[int, float]) -> Figure:
    """Draw the error against a whole number: a grey line per seed, the mean in blue, published values as crosses."""
    with canvas(4.8, 3.2) as (figure, axes):
        for errors in by_seed:
            axes.plot(x, errors, color=RULE, linewidth=1.0, marker="o", markersize=3, alpha=0.8)
        mean = torch.tensor(by_seed, dtype=torch.float64).mean(0).tolist()
        label = f"mean of {len(by_seed)} seeds"
        axes.plot(x, mean, color=POSITIVE, linewidth=1.8, marker="o", markersize=5, label=label)
        if published:
            at = list(published)
            axes.scatter(at, list(published.values()), 45, NEGATIVE, marker="x", label="published", zorder=3)
        axes.set(xlabel=x_label, ylabel="error", ylim=(0, 1.1 * max(map(max, (*by_seed, [*published.values(), 0])))))
        axes.set_xticks(list(x))
        axes.grid(axis="y", color=RULE, alpha=0.3, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
        return figure


def _matrix(axes: Axes, values: Tensor, title: str) -> Any:
    """Draw a matrix of values in [0, 1], with every row and column numbered; return the image."""
    image = _shades(axes, values, 1.0)
    axes.set_title(title, size=9, color=INK)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    axes.tick_params(length=0, labelsize=8)
    return image


def _bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    """Explain an image's shades by a bar beside its axes."""
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.outline.set_visible(False)
    bar.set_label(label)


def _shades(axes: Axes, values: Tensor, highest: float, **options: Any) -> Any:
    """Draw values from 0 (transparent) to `highest` (blue) as an image for light and dark pages."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    shades = LinearSegmentedColormap.from_list("clear", [to_rgba(RULE, 0.14), to_rgba(POSITIVE)])
    for spine in axes.spines.values():
        spine.set_visible(False)
    pixels = values.double().cpu().numpy()
    return axes.imshow(pixels, cmap=shades, vmin=0, vmax=highest or 1.0, aspect="equal", **options)
