"""Reproduce the paper's figures of toy models: `l3d paper tms|tmcs|high_rank|squared`.

    toy ─ decompose ─► measure (numbers) ─► draw (figures) ─► NAME.svg, NAME.png, figures.json, index.html

In: a study's name and a seed. Out: a folder with its figures, their numbers and a page. Read first: studies.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from l3d.report.plots import to_svg, write_figure
from l3d.report.report import render
from l3d.storage.files import replace_text
from l3d.storage.store import to_json

NAMES = ("tms", "tmcs", "high_rank", "squared")
MARK = "figures.json"  # the file that marks a folder of figures

_TEMPLATE = Path(__file__).parent / "templates" / "paper.html.j2"


def check_name(name: str) -> str:
    """Return a study's name; raise ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"paper: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


def write_figures(name: str, out: Path, seed: int = 0, tell: Callable[[str], None] = print) -> list[Path]:
    """Write a study's figures, numbers and page into the folder `out`; return the paths written, the page last.

    The same seed on the same machine gives the same files. tell: called with each figure's title and caption. Raises
    ValueError for an unknown name, and ImportError without the extra `report`.
    """
    check_name(name)
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the paper's figures need matplotlib and jinja2: pip install 'l3d[report]'") from error
    from l3d.studies.paper.studies import STUDIES

    out.mkdir(parents=True, exist_ok=True)  # before the work, not after
    study = STUDIES[name]
    pictures = []
    for picture in study(seed):
        tell(f"{picture.title}: {picture.caption}")
        pictures.append(picture)
    paths = [path for picture in pictures for path in write_figure(picture.figure, out / picture.name)]
    numbers = {picture.name: {"caption": picture.caption, **picture.numbers} for picture in pictures}
    paths.append(replace_text(out / MARK, to_json({"study": name, "seed": seed, "figures": numbers})))
    shown = [(p.name, p.title, p.caption, to_svg(p.figure, f"{p.name}-", css=True)) for p in pictures]
    page = render(_TEMPLATE, title=name, about=(study.__doc__ or "").strip(), pictures=shown, seed=seed)
    paths.append(replace_text(out / "index.html", page))
    return paths
