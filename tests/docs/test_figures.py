"""Compare the tables that stand in pages without a command of their own with bench/results, figure by figure."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20


def results(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def size(n: float) -> str:
    """Write bytes as the pages do: 467 MiB, 16 GiB."""
    return f"{n / MIB:.0f} MiB" if n < 2**30 else f"{n / 2**30:.0f} GiB"


def presets() -> Iterator[str]:
    """One row per preset and number of steps, on windows with a BOS each; only errors on plain windows."""
    for row in results("training-presets")["rows"]:
        start = f"| {row['variant']} | {row['steps']:,} | {row['error']:.3f} | {row['held_out']:.3f} |"
        yield start + (f" {row['dead']:.0%} |".replace("%", " %") if row["windows"] == "BOS each" else "")


def toys() -> Iterator[str]:
    """Medians over seeds, their median difference, and how often the default ends lower."""
    for row in results("training-toys")["rows"]:
        difference = f"{row['median difference']:.{5 if abs(row['median difference']) < 1e-4 else 4}f}"
        medians = f"{row['default']:.4f} | {row['published']:.4f}"
        yield f"| {row['variant']} | {medians} | {difference} | {row['seeds lower']} |"


def stability() -> Iterator[str]:
    """One row per K, one cell per rank."""
    rows: dict[str, list[str]] = {}
    for row in results("training-stability")["rows"]:
        rows.setdefault(row["variant"].split()[0].removeprefix("K="), []).append(
            f"{row['error']:.3f} / {row['held_out']:.3f}"
        )
    for K, cells in rows.items():
        yield f"| {int(K):,} | {' | '.join(cells)} |"


def floor() -> Iterator[str]:
    """The end of each row: step size, steps, batch, errors."""
    for row in results("floor")["rows"]:
        sizes = f"{row['lr']} | {row['steps']:,} | {row['batch']:,}"
        yield f"| {sizes} | {row['error']:.3f} | {row['held_out']:.3f} |"


def exchanges() -> Iterator[str]:
    """MMCS without and with replacement, of the best of four starts, and from the true circuits."""
    for row in results("exchanges")["rows"]:
        pairs = [f"{row[f'{n}, median']:.3f} / {row[f'{n}, least']:.3f}" for n in ("without", "with")]
        best, circuits = row["best of four, least"], "from the circuits"
        start = f"{row[f'{circuits}, median']:.3f} / {row[f'{circuits}, least']:.3f}"
        least = f"{row['without, at the least error'].split()[0]} / {row['with, at the least error']}"
        yield f"| {' | '.join(pairs)} | {best:.3f} | {start} | {least} |"


def scale() -> Iterator[str]:
    """FLOPs counted and predicted, and the bytes of directions, moments and factors."""
    for row in results("scale")["rows"]:
        measured, predicted = row["measured"], row["predicted"]
        flops, *held = (f"{predicted[name] / measured[name]:.2f}" for name in measured)
        count = f"{measured['flops']:.2e}".replace("e+0", "e")
        yield f"| {', '.join(map(str, row['case'].values()))} |"
        yield f"| {count} | {flops} | {', '.join(held)} |"


def memory() -> Iterator[str]:
    """Peak, factors and directions, and their materialised sizes."""
    found = results("memory")
    for row in found["rows"]:
        names = ("peak", "factor", "parameter", "materialised_gradient", "materialised_direction")
        yield f"| {row['width']} | {' | '.join(size(row[f'{name}_bytes']) for name in names)} |"
    yield f"exponent in width is {found['exponent']:.2f}"


def precision() -> Iterator[str]:
    """Errors after 500 steps by dtype."""
    single, half = results("precision")["rows"]
    yield f"error {half['error']:.3f} and {half['held_out']:.3f} held out"
    yield f"against {single['error']:.3f} and {single['held_out']:.3f}"


TABLES = [
    ("lab/ablations", presets),
    ("lab/ablations", toys),
    ("lab/ablations", stability),
    ("lab/ablations", floor),
    ("lab/ablations", exchanges),
    ("how/costs", scale),
    ("how/costs", memory),
    ("guides/memory", precision),
]


@pytest.mark.parametrize("page, rows", TABLES, ids=[rows.__name__ for _, rows in TABLES])
def test_the_page_shows_the_committed_results(page: str, rows: Any) -> None:
    """Each row that the committed results come to stands in the page, to the digits that it shows."""
    text = " ".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split())
    missing = [row for row in rows() if row not in text]
    assert not missing, "\n".join(missing)
