"""All suites in one run, and what is kept of it: a small JSON file, a table and a picture.

    python -m bench.suites [--from FILE] [--page docs/benchmarks/performance.md] [--again]

Runs `pytest bench` (a few minutes on two cores), or takes a file that --benchmark-json wrote. Writes
bench/results/suites.json and, with --page, the table between the page's marks and suites.svg beside it; --again shows
the file that is there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure.environment import RESULTS, ROOT, described
from bench.methods.providers import PROVIDERS
from l3d.storage.files import replace_between, replace_text

MARKS = ("<!-- suites -->", "<!-- /suites -->")
FILE = RESULTS / "suites.json"
OURS = "l3d torch"
COUNTED = ("peak_bytes", "flops", "bytes", "samples", "parameters")


def run() -> dict[str, Any]:
    """Run the suites and return what pytest-benchmark wrote; SystemExit where a gate refused a provider."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}"]
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"the suites ended with {done.returncode}: nothing is written")
        return json.loads(path.read_text(encoding="utf-8"))


def compact(written: dict[str, Any]) -> dict[str, Any]:
    """Keep of pytest-benchmark's file the environment and a row per figure."""
    rows = []
    for each in written["benchmarks"]:
        stats, info = each["stats"], each["extra_info"]
        row = {"group": each["group"], "provider": info["provider"]}
        row |= {name: stats[name] for name in ("median", "iqr", "min", "rounds")}
        rows.append(row | {name: info[name] for name in COUNTED if name in info})
    return {"environment": written["machine_info"]["l3d"], "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Write a line per group: each provider's median and spread, how often ours it is, and the peak memory it adds.

    >>> row = {"group": "topk", "median": 0.002, "iqr": 0.0001, "peak_bytes": 2**20}
    >>> print(table([row | {"provider": "l3d torch"}, row | {"provider": "published", "median": 0.006}]))
    | what | published | l3d torch | peak: published | l3d torch |
    |---|---|---|---|---|
    | topk | 6 ± 0.1 ms (3.0) | 2 ± 0.1 ms | 1 | 1 |
    <BLANKLINE>
    """
    found = [provider for provider in PROVIDERS if any(row["provider"] == provider for row in rows)]
    weighed = [
        provider for provider in found if any(row["provider"] == provider and "peak_bytes" in row for row in rows)
    ]
    peaks = [f"peak: {provider}" if i == 0 else provider for i, provider in enumerate(weighed)]
    columns = ["what", *found, *peaks]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for group in dict.fromkeys(row["group"] for row in rows):
        own = {row["provider"]: row for row in rows if row["group"] == group}
        cells = [_time(own, provider) for provider in found]
        cells += [_memory(own.get(provider, {})) for provider in weighed]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _time(own: dict[str, dict[str, Any]], provider: str) -> str:
    if provider not in own:
        return ""
    row = own[provider]
    ratio = f" ({row['median'] / own[OURS]['median']:.1f})" if provider != OURS and OURS in own else ""
    spread = float(f"{1000 * row['iqr']:.1g}")
    return f"{1000 * row['median']:.3g} ± {spread:g} ms{ratio}"


def _memory(row: dict[str, Any]) -> str:
    """Write mebibytes; what adds less than half of one is told as such."""
    if "peak_bytes" not in row:
        return ""
    return f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] >= 2**19 else "< 1"


def show(found: dict[str, Any], page: Path) -> list[Path]:
    """Put the table between a page's marks, with the machine it is of, and draw the ratios beside the page."""
    from bench.measure.drawings import ratios
    from l3d.report.plots import to_svg

    replace_between(page, MARKS, described(found["environment"]) + "\n\n" + table(found["rows"]))
    return [page, replace_text(page.with_name("suites.svg"), to_svg(ratios(found["rows"])) + "\n")]


def main() -> None:
    """Run the suites, and keep and show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="a file of pytest-benchmark's, instead of running")
    parser.add_argument("--page", type=Path, help="put table and picture into this page")
    parser.add_argument("--again", action="store_true", help="measure nothing, show what was written")
    arguments = parser.parse_args()
    if arguments.page is not None:
        replace_between(arguments.page, MARKS, None)
    if not arguments.again:
        written = run() if arguments.source is None else json.loads(arguments.source.read_text(encoding="utf-8"))
        print(f"written: {replace_text(FILE, json.dumps(compact(written), indent=1) + chr(10))}")
    if arguments.page is not None:
        for path in show(json.loads(FILE.read_text(encoding="utf-8")), arguments.page):
            print(f"written: {path}")


if __name__ == "__main__":
    main()
