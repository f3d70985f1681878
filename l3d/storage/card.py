"""Write the README.md of a saved decomposition, which the hub shows as its model card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l3d.decomposition.subnetworks import mean_of_last
from l3d.storage.files import beginning, read_json, replace_text

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MARK = "library_name: l3d"
# the settings shown in the card; decomposition.json holds all of them
_SETTINGS = (
    "divergence", "reference", "positions", "k", "preset", "steps", "batch_size", "lr", "warm_start", "seed", "dtype",
)  # fmt: skip
_FIGURES = {
    "error": "error on the training data",
    "held_out_error": "error on held-out data",
    "dead_fraction": "dead subnetworks (fraction)",
    "kept_per_sample": "subnetworks kept per sample",
    "seconds": "training time, s",
}


def model_card(header: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Return the card's text from the content of decomposition.json and, if given, the figures of metrics.json."""
    base, settings = header.get("base_model", {}), header["settings"]
    name = base.get("name", "a model")
    front = [_MARK, "tags: [l3d, interpretability, parameter-decomposition]"]
    if _HUB_ID.fullmatch(name):
        front.insert(1, f"base_model: {name}")
    revision = f", revision `{base['revision']}`" if base.get("revision") else ""
    lines = [
        "---", *front, "---", "",
        f"# {header['n_subnetworks']} subnetworks of {_plain(name)}", "",
        "Low-rank directions in parameter space such that each sample's gradient is a sparse sum of a few of them "
        "(Local Loss Landscape Decomposition, [arXiv 2504.00194](https://arxiv.org/abs/2504.00194)), found by l3d.", "",
        "```python", "import l3d", "", 'd = l3d.load("hf://USER/NAME")  # or this folder', "```", "",
        f"Decomposed: `{_plain(name)}`{revision}.", "",
        "| parameter | shape | ranks | type and SHA-256 of its weights |", "|---|---|---|---|",
    ]  # fmt: skip
    hashes = base.get("parameters", {})
    for parameter, shape in header["shapes"].items():
        ranks = header["ranks"].get(parameter) or "whole"
        lines.append(f"| `{_plain(parameter)}` | {shape} | {ranks} | {hashes.get(parameter, 'unknown')} |")
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {_plain(settings[key])} |" for key in _SETTINGS if key in settings]
    labels = _FIGURES | ({"error": "error on other data"} if "evaluated_on" in figures else {})
    rows = {label: figures[key] for key, label in labels.items() if isinstance(figures.get(key), (int, float))}
    errors = header.get("history", {}).get("error", [])
    if "error" not in figures and errors:
        rows = {"error over the last tenth of training": mean_of_last(errors), **rows}
    if rows:
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {label} | {value:.4g} |" for label, value in rows.items()]
        lines += ["", "Error is Σ‖g − ĝ‖² / Σ‖g‖²: 0 is perfect, 1 is no better than ĝ = 0. It is local: it describes"]
        lines += ["how the output changes near these weights, on data like the training data."]
    return "\n".join(lines) + "\n"


def write_card(folder: Path, header: Mapping[str, Any], figures: Mapping[str, Any] | None = None) -> Path | None:
    """Write a folder's card and return its path; keep a README.md that l3d did not write, and return None."""
    path = folder / CARD
    if path.is_file() and not is_card(path):
        return None
    return replace_text(path, model_card(header, figures or {}))


def renew_card(folder: Path, figures: Mapping[str, Any]) -> Path | None:
    """Rewrite the card of a folder that holds a decomposition, with figures; see `write_card`."""
    return write_card(folder, read_json(folder / "decomposition.json"), figures)


def is_card(path: Path) -> bool:
    """Return whether a file is a card that l3d wrote."""
    return _MARK in beginning(path)


def _plain(value: Any) -> str:
    """Return a value as text that is safe in a Markdown table cell or code span."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
