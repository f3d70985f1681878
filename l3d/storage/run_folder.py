"""What a run folder holds beside the decomposition: config.yaml (settings), metrics.json (figures) and
subnetworks.json (what each subnetwork does, see `l3d.analysis.description`).

All are written beside their place first and then renamed, so that a reader finds the old file or the new
one, never half of one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l3d.storage.files import read_json, replace_text
from l3d.storage.lock import LOCK

CONFIG = "config.yaml"
METRICS = "metrics.json"
SUBNETWORKS = "subnetworks.json"
REPORT = "report.html"
INTERVENTIONS = "interventions.json"
SUBNETWORKS_FORMAT = "l3d-subnetworks-1"


def write_config(run: Path, command: str, settings: Mapping[str, Any]) -> Path:
    """Write RUN/config.yaml, which `l3d COMMAND --config` accepts, and return its path."""
    import yaml

    header = f"# l3d {command}; again with: l3d {command} --config THIS_FILE --out ANOTHER_FOLDER\n"
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return replace_text(run / CONFIG, header + text)


def read_command(run: Path) -> str:
    """Tell which command made the run folder, "toy" or "decompose".

    Raises FileNotFoundError for a missing folder, ValueError for one that l3d did not make.
    """
    import yaml

    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder")
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{run}: not a run folder of l3d: it has no {CONFIG}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML ({_one_line(error)})") from error
    if isinstance(settings, dict) and "name" in settings:
        return "toy"
    if isinstance(settings, dict) and "model" in settings:
        return "decompose"
    raise ValueError(f"{path}: not a configuration of l3d: it names neither a toy nor a model")


def write_metrics(run: Path, metrics: Mapping[str, Any]) -> Path:
    """Write RUN/metrics.json and return its path; a figure that is not finite becomes null."""
    text = json.dumps({name: _finite(value) for name, value in metrics.items()}, indent=2, allow_nan=False)
    return replace_text(run / METRICS, text + "\n")


def read_metrics(run: Path) -> dict[str, Any]:
    """Read RUN/metrics.json; an empty dict where there is none yet. Raises ValueError for a broken one."""
    path = run / METRICS
    if not path.is_file():
        return {}
    found = read_json(path)
    rates = found.get("activation_rate", [])
    if not isinstance(rates, list) or not all(isinstance(rate, (int, float)) for rate in rates):
        raise ValueError(f"{path}: activation_rate: expected a list of numbers")
    for name in ("error", "held_out_error", "kept_per_sample", "dead_fraction", "seconds"):
        if not isinstance(found.get(name, 0.0), (int, float, type(None))):
            raise ValueError(f"{path}: {name}: expected a number, got {found[name]!r}")
    return found


def write_subnetworks(run: Path, described: Mapping[str, Any]) -> Path:
    """Write RUN/subnetworks.json and return its path."""
    return replace_text(run / SUBNETWORKS, json.dumps(described, allow_nan=False, separators=(",", ":")) + "\n")


def read_subnetworks(run: Path) -> dict[str, Any]:
    """Read RUN/subnetworks.json; an empty dict where there is none. Raises ValueError for a broken or foreign one."""
    path = run / SUBNETWORKS
    if not path.is_file():
        return {}
    found = read_json(path)
    if found.get("format") != SUBNETWORKS_FORMAT or not isinstance(found.get("subnetworks"), list):
        raise ValueError(f"{path}: expected format {SUBNETWORKS_FORMAT!r}, got {found.get('format')!r}")
    return found


def read_ratios(run: Path) -> dict[int, float]:
    """Read intervention ratios by subnetwork from RUN/interventions.json; none where they were not measured."""
    path = run / INTERVENTIONS
    if not path.is_file():
        return {}
    found = read_json(path)
    try:
        pairs = zip(found["subnetworks"], found["ratio"], strict=True)
        return {int(k): float(ratio) for k, ratio in pairs if ratio is not None}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not what l3d intervene writes ({error})") from error


def with_rates(described: Mapping[str, Any], rates: Sequence[float]) -> dict[str, Any]:
    """Return what was described of subnetworks with other activation rates [K]; nothing where they are not as many."""
    each = described.get("subnetworks", [])
    if len(each) != len(rates):
        return {}
    return {
        **described,
        "subnetworks": [seen | {"activation_rate": rate} for seen, rate in zip(each, rates, strict=True)],
    }


def last_checkpoint(run: Path) -> Path | None:
    """Find the checkpoint that was written last; None where there is none yet."""
    found = list((run / "checkpoints").glob("step*[0-9]"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def interrupted(run: Path, command: str = "l3d resume") -> str:
    """Say how to go on with a run that was interrupted."""
    last = last_checkpoint(run)
    if last is None:
        return f"interrupted, before the first checkpoint in {run}"
    return f"interrupted; last checkpoint: {last}; go on with: {command} {run}"


def check_new(out: Path) -> None:
    """Raise ValueError unless `out` is a new or empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not an empty folder")


def check_copy(run: Path, out: Path) -> None:
    """Raise ValueError unless `out` is a new or empty folder outside the run folder."""
    check_new(out)
    if out.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"--out: {out} lies inside the run folder {run}")


def copy_run(run: Path, out: Path) -> None:
    """Copy a run folder to `out`, which check_copy has allowed."""
    check_copy(run, out)
    shutil.copytree(run, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK))


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
