"""Pictures of what benchmarks wrote: rows in, a matplotlib Figure out. Colours and style are those of plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.methods.scaling_cases import AXES
from l3d.report.plots import INK, NEGATIVE, POSITIVE, RULE, _style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "l3d torch"  # the provider that others are compared with
LOOKS = {"published": (NEGATIVE, "s"), "afternoon": (INK, "o"), "l3d triton": (POSITIVE, "D")}  # colour and marker


def scaling_curves(rows: list[dict[str, Any]]) -> Figure:
    """Draw measured times (dots) and predicted ones (dashed) against each size: a row per quantity, a column per axis.

    rows: as in bench/results/scaling.json.
    """
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.4, 1.55 * len(quantities) + 0.5), layout="constrained")
        panels = figure.subplots(len(quantities), len(AXES), squeeze=False, sharey="row")
        for axes in panels.flat:
            axes.set_axis_off()
        for row in rows:
            i, j = quantities.index(row["quantity"]), AXES.index(row["axis"])
            axes = panels[i][j]
            axes.set_axis_on()
            axes.plot(row["sizes"], [1000 * s for s in row["predicted_seconds"]], color=INK, linestyle=(0, (4, 2)))
            axes.plot(row["sizes"], [1000 * s for s in row["seconds"]], color=POSITIVE, marker="o", markersize=3.5)
            axes.set(xscale="log", yscale="log")
            axes.grid(color=RULE, alpha=0.25, linewidth=0.6)
            axes.minorticks_off()
            axes.set_xticks(row["sizes"][::2], map(str, row["sizes"][::2]))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            slopes = f"{row['measured']:.2f} / {row['predicted']:.2f}"
            axes.text(0.04, 0.96, slopes, transform=axes.transAxes, va="top", size=8)
            if axes is next(panels[i][k] for k in range(len(AXES)) if panels[i][k].axison):
                axes.set_ylabel(f"{row['quantity']}, ms")
        for axes, name in zip(panels[0], AXES, strict=True):
            axes.text(0.5, 1.08, name, transform=axes.transAxes, ha="center", weight="bold")
        return figure


def ratios(rows: list[dict[str, Any]]) -> Figure:
    """Draw how much longer other providers take than ours, a line per group.

    rows: as in bench/results/suites.json.
    """
    ours = {row["group"]: row["median"] for row in rows if row["provider"] == OURS}
    groups = [group for group in dict.fromkeys(row["group"] for row in rows) if group in ours]
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.2, 0.21 * len(groups) + 1.1), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color=POSITIVE, linewidth=1.2)
        for provider, (colour, marker) in LOOKS.items():
            own = [row for row in rows if row["provider"] == provider and row["group"] in ours]
            if own:
                x = [row["median"] / ours[row["group"]] for row in own]
                y = [groups.index(row["group"]) for row in own]
                axes.scatter(x, y, 26, colour, marker=marker, linewidths=0, label=provider, zorder=3)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.grid(color=RULE, alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"time ÷ {OURS}'s: right of the line ours is faster")
        figure.legend(loc="outside upper right", ncols=len(LOOKS), frameon=False)
        return figure
