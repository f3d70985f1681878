"""Times against S, T, K, R and width, with the exponent measured beside those predicted.

    python -m bench.scaling [QUANTITY ..] [--page docs/benchmarks/performance.md] [--again]

One thread, and its processor time rather than the clock's, which other work on the machine disturbs less; all sizes of
a quantity take turns, and the fastest round of each counts. Two predictions stand beside it: from the FLOPs, bytes and
operations that torch runs, at this machine's rates (measure/counting.py), and from the multiply-adds by which paths are
chosen (costs.py). Exponents are slopes of least squares in logarithms, over five sizes, the largest 16 times the
smallest. Writes bench/results/scaling.json and, with --page, the table between the page's marks and scaling.svg beside
it; --again shows the file that is there.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.measure.counting import Rates, count, rates
from bench.measure.environment import RESULTS, described, environment
from bench.memory import exponent
from bench.methods.scaling_cases import AXES, QUANTITIES, Quantity
from bench.scale import Case
from l3d.storage.files import replace_between, replace_text
from l3d.toys import one_thread

MARKS = ("<!-- scaling -->", "<!-- /scaling -->")
SECONDS = 8.0  # of processor time per quantity, and at least so many rounds:
ROUNDS = 3
FILE = RESULTS / "scaling.json"


def measure(name: str, quantity: Quantity, best: Rates) -> list[dict[str, Any]]:
    """Time a quantity at all its sizes; return a row per axis, with its exponents."""
    along = quantity.cases()
    works = {case: quantity.prepare(case) for cases in along.values() for case in cases}
    times: dict[Case, list[float]] = {case: [] for case in works}
    counts = {case: count(work.call).and_bytes(work.unseen_bytes) for case, work in works.items()}
    started = time.process_time()
    while len(times[quantity.base]) < ROUNDS or time.process_time() - started < SECONDS:
        for case, work in works.items():
            before = time.process_time()
            work.call()
            times[case].append(time.process_time() - before)
    rows = []
    for axis, cases in along.items():
        row: dict[str, Any] = {"quantity": name, "axis": axis, "base": quantity.base._asdict()}
        row["sizes"] = [getattr(case, axis) for case in cases]
        row["seconds"] = [min(times[case]) for case in cases]
        row["medians"] = [statistics.median(times[case]) for case in cases]
        row["predicted_seconds"] = [best.seconds(counts[case]) for case in cases]
        row["counts"] = [counts[case]._asdict() for case in cases]
        row["multiply_adds"] = [works[case].cost for case in cases]
        row["rounds"] = len(times[quantity.base])
        rows.append(row | exponents(row))
    return rows


def exponents(row: dict[str, Any]) -> dict[str, float]:
    """Fit the exponents of a row: measured, predicted from counts at the machine's rates, and by formula.

    >>> exponents({"sizes": [1, 2], "seconds": [1, 2], "predicted_seconds": [3, 3], "multiply_adds": [1, 4]})
    {'measured': 1.0, 'predicted': 0.0, 'by_formula': 2.0}
    """
    of = {"measured": "seconds", "predicted": "predicted_seconds", "by_formula": "multiply_adds"}
    return {name: round(exponent(row["sizes"], row[key]), 4) + 0.0 for name, key in of.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Write the exponents as a table, a quantity a line: measured / predicted (by formula)."""
    lines = ["| work | at the base | ms / predicted | " + " | ".join(AXES) + " |", "|---" * (3 + len(AXES)) + "|"]
    for name in dict.fromkeys(row["quantity"] for row in rows):
        own = {row["axis"]: row for row in rows if row["quantity"] == name}
        first = next(iter(own.values()))
        at = first["sizes"].index(first["base"][first["axis"]])
        base = ", ".join(f"{axis} {first['base'][axis]}" for axis in own)
        times = f"{1000 * first['seconds'][at]:.3g} / {1000 * first['predicted_seconds'][at]:.3g}"
        cells = [_cell(own[axis]) if axis in own else "" for axis in AXES]
        lines.append(f"| {name} | {base} | {times} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return f"{row['measured']:.2f} / {row['predicted']:.2f} ({row['by_formula']:.2f})"


def show(found: dict[str, Any], page: Path) -> list[Path]:
    """Put the table between a page's marks, with the machine it is of, and draw the curves beside the page."""
    from bench.measure.drawings import scaling_curves
    from l3d.report.plots import to_svg

    replace_between(page, MARKS, described(found["environment"]) + "\n\n" + table(found["rows"]))
    return [page, replace_text(page.with_name("scaling.svg"), to_svg(scaling_curves(found["rows"])) + "\n")]


def main() -> None:
    """Measure the quantities named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantity", nargs="*", help=f"of {', '.join(QUANTITIES)}; all where none is named")
    parser.add_argument("--page", type=Path, help="put table and picture into this page")
    parser.add_argument("--again", action="store_true", help="measure nothing, show what was written")
    arguments = parser.parse_args()
    if unknown := set(arguments.quantity) - set(QUANTITIES):
        raise SystemExit(f"quantity: expected some of {', '.join(QUANTITIES)}, got {', '.join(sorted(unknown))}")
    if arguments.page is not None:
        replace_between(arguments.page, MARKS, None)
    if not arguments.again:
        rows: list[dict[str, Any]] = []
        with one_thread():
            where, best = environment(), rates()
            for name in arguments.quantity or QUANTITIES:
                rows += measure(name, QUANTITIES[name], best)
                print(table([row for row in rows if row["quantity"] == name]), flush=True)
        found = {"environment": where, "rates": best._asdict(), "rows": rows}
        print(f"written: {replace_text(FILE, json.dumps(found, indent=1) + chr(10))}")
    if arguments.page is not None:
        for path in show(json.loads(FILE.read_text(encoding="utf-8")), arguments.page):
            print(f"written: {path}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
