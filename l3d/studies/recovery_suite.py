"""Run the recovery suite: decompose every toy for several seeds, and tabulate our figures beside published ones.

`EXPERIMENTS` lists the runs; `run_suite` runs them, `to_markdown` writes the table.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from l3d.toys import make, one_thread

Results = dict[str, dict[str, list[float]]]  # experiment -> figure -> one value per seed

LABELS = {
    "error": "error",
    "mmcs": "MMCS",
    "mmcs_own": "MMCS, own weights",
    "features_found": "features found",
    "r2": "r² with W_out W_in",
    "r2_task": "r² with A",
    "groups_found": "groups found",
    "purity": "purity",
    "inputs_found": "inputs found",
    "seconds": "s",
}


@dataclass(frozen=True)
class Experiment:
    """One decomposition of a toy, with its published figures."""

    title: str
    toy: str
    published: Mapping[str, str] = field(default_factory=dict)  # figure -> value as printed in its source
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of `decompose`, in place of the toy's own


EXPERIMENTS = (
    Experiment("tms, `mse`", "tms", {"error": ".19", "mmcs_own": ".998 (APD), 1.000 (SPD)"}),
    Experiment("tms, `mse_published`", "tms", {"error": ".10-.11 (re-derived)"}, {"divergence": "mse_published"}),
    Experiment("tms_parallel, `mse`", "tms_parallel"),
    Experiment("tms_40_10, `mse`", "tms_40_10", {"mmcs_own": ".996 (APD), 1.000 (SPD)"}),
    Experiment("tmcs, `mse_published`", "tmcs", {"error": ".064", "r2_task": ".92"}),
    *(Experiment(f"high_rank, rank {r}", "high_rank", {"groups_found": "5"}, {"rank": r}) for r in (1, 3, 5)),
    Experiment("squared, 5 of rank 2, `mse`", "squared", {"error": ".32"}),
    *(
        Experiment(f"squared, {k} of rank 1, `mse`", "squared", {}, {"rank": 1, "n_subnetworks": k})
        for k in (3, 5, 10, 15)
    ),
)


def run_suite(
    seeds: Iterable[int],
    experiments: Sequence[Experiment] = EXPERIMENTS,
    tell: Callable[[str], None] = print,
    results: Results | None = None,
    **arguments: Any,
) -> Results:
    """Run every experiment for every seed, and return the figures, appended to those of `results`.

    Each seed makes another toy network. The figures are the toy's own measures, `error` (30 draws of references for
    each of at most 1,000 points) and `seconds` (the decomposition with its restarts). `arguments` go to `decompose`,
    and replace the experiment's and the toy's.
    """
    import l3d

    results = {} if results is None else results
    for experiment in experiments:
        results.setdefault(experiment.title, {})
    for seed in seeds:
        for experiment in experiments:
            toy = make(experiment.toy, seed)
            chosen = {**toy.arguments(arguments.get("preset")), **experiment.arguments, **arguments}
            with one_thread():
                d = l3d.decompose(toy.model, toy.data, seed=seed, callbacks=[], **chosen)
                error = d.evaluate(toy.model, toy.data[:1000], n_references=30).error
                figures = {"error": error, **toy.recovery(d), "seconds": d.timing["seconds"]}
            for name, value in figures.items():
                results[experiment.title].setdefault(name, []).append(value)
            shown = ", ".join(f"{LABELS[name]} {short(value)}" for name, value in figures.items())
            tell(f"{experiment.title}, seed {seed}: {shown}")
    return results


def to_markdown(results: Results, experiments: Sequence[Experiment] = EXPERIMENTS) -> str:
    """Return the table in Markdown: per experiment and figure the published value, and our median, min and max."""
    lines = ["| toy | figure | published | median | over seeds |", "|---|---|---|---|---|"]
    for experiment in experiments:
        for name, values in results.get(experiment.title, {}).items():
            if name == "inputs_found" and "n_subnetworks" in experiment.arguments:
                continue  # meaningless with fewer or more subnetworks than inputs
            published = experiment.published.get(name, "")
            ours = f"{short(statistics.median(values))} | {short(min(values))} to {short(max(values))}"
            lines.append(f"| {experiment.title} | {LABELS[name]} | {published} | {ours} |")
    return "\n".join(lines) + "\n"


def short(value: float) -> str:
    """Return a figure with three digits, without the leading zero; whole numbers without a decimal point.

    >>> short(0.1873), short(5.0), short(0.99652), short(1.0), short(12.34)
    ('.187', '5', '.997', '1', '12.3')
    """
    if not math.isfinite(value):
        return str(value)
    if value == int(value):
        return str(int(value))
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}".replace("0.", ".", 1)
