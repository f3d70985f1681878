"""Read and write a run folder: checkpoints, config.yaml (settings), metrics.json (figures) and subnetworks.json.

subnetworks.json describes what each subnetwork does, see `l3d.analysis.description`. Every file is written under a
temporary name and then renamed, so a reader finds the complete old file or the complete new one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from l3d.decomposition.subnetworks import Subnetworks
from l3d.storage import schema
from l3d.storage.card import CARD, is_card
from l3d.storage.files import beginning, check_links, read_json, remove, replace_text
from l3d.storage.lock import LOCK, check_free, claim, release
from l3d.storage.store import FORMAT, load, read_tensors, to_json, write, write_tensors

CONFIG = "config.yaml"
METRICS = "metrics.json"
SUBNETWORKS = "subnetworks.json"
COLUMNS = "columns.json"  # columns of the user's own in the report's table
REPORT = "report.html"
INTERVENTIONS = "interventions.json"
SUBNETWORKS_FORMAT = "l3d-subnetworks-1"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: it holds checkpoints during training, and the decomposition afterwards."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, overwrite: bool, resume: bool) -> RunFolder:
        """Make the folder, or check that it may be used, and claim it for this process until `lock.release`.

        overwrite: delete the files of an earlier run first. resume: keep its checkpoints. Raises FileNotFoundError if
        there is nothing to resume, and ValueError if the folder is in use, not empty or not a folder.
        """
        folder = Path(path)
        check_free(folder)
        _check_usable(folder, overwrite, resume)
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        try:
            _check_usable(folder, overwrite, resume)  # since then another process may have been and gone
            if overwrite and not resume and _holds_files(folder):
                _remove_run(folder)
        except BaseException:
            release(folder)
            raise
        return cls(folder)

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, in the order of their steps."""
        return sorted((self.path / "checkpoints").glob("step*[0-9]"))

    def save_checkpoint(
        self, step: int, decomposition: Subnetworks, optimizer: Mapping[str, Tensor], state: Any
    ) -> None:
        """Write a checkpoint: decomposition, optimizer tensors and state; then delete the older ones."""
        old = self.checkpoints()
        target = self.path / "checkpoints" / f"step{step:09d}"
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(decomposition, partial)
        write_tensors(partial / "optimizer.safetensors", dict(optimizer))
        replace_text(partial / "state.json", to_json({"step": step, **state}))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for path in old:
            if path != target:
                shutil.rmtree(path)

    def load_checkpoint(
        self, columns: slice | None = None
    ) -> tuple[Subnetworks, dict[str, Tensor], dict[str, Any]] | None:
        """Read the last checkpoint, (decomposition, optimizer tensors, state); None if there is none.

        columns: read this slice of the subnetworks only.
        """
        found = self.checkpoints()
        if not found:
            return None
        optimizer = read_tensors(found[-1] / "optimizer.safetensors", columns)
        return load(found[-1], Subnetworks, columns), optimizer, read_json(found[-1] / "state.json", schema.STATE)


def _check_usable(folder: Path, overwrite: bool, resume: bool) -> None:
    """Raise ValueError or FileNotFoundError, in one line, if a folder cannot become or go on with a run."""
    if resume and not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"out: nothing to resume in {folder}; it holds no checkpoints")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; name a folder")
    if not _holds_files(folder):
        return
    if not (overwrite or resume):
        raise ValueError(f"out: {folder} is not empty; choose another folder or pass existing='overwrite'")
    check_links(folder)
    if not resume and not _is_run(folder):
        raise ValueError(f"out: {folder} holds no run of l3d, so overwrite deletes nothing; choose another folder")


def _holds_files(folder: Path) -> bool:
    return folder.exists() and any(each.name != LOCK for each in folder.iterdir())


def _is_run(folder: Path) -> bool:
    is_run = FORMAT in beginning(folder / "decomposition.json") or beginning(folder / CONFIG).startswith("# l3d ")
    return is_run or any((folder / "checkpoints").glob("step*/decomposition.json"))


def _remove_run(folder: Path) -> None:
    """Delete the files that a run wrote into a folder, and no others."""
    files = ("decomposition.safetensors", "decomposition.json", CONFIG, METRICS, SUBNETWORKS, COLUMNS, REPORT)
    for name in (
        "checkpoints",
        "tensorboard",
        "wandb",
        *files,
        INTERVENTIONS,
        "interventions.svg",
        "interventions.png",
    ):
        remove(folder / name)
    if is_card(folder / CARD):
        remove(folder / CARD)


def write_config(run: Path, command: str, settings: Mapping[str, Any]) -> Path:
    """Write RUN/config.yaml, which `l3d COMMAND --config` reads, and return its path."""
    import yaml

    header = f"# l3d {command}; again with: l3d {command} --config THIS_FILE --out ANOTHER_FOLDER\n"
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return replace_text(run / CONFIG, header + text)


def read_command(run: Path) -> str:
    """Return the command that made the run folder, "toy" or "decompose".

    Raises FileNotFoundError for a missing folder, ValueError for one that l3d did not make.
    """
    from l3d.storage.yaml_text import read_yaml

    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder")
    check_links(run)
    path = run / CONFIG
    if not path.is_file():
        if (run / "decomposition.json").is_file() or (run / "checkpoints").is_dir():
            raise ValueError(
                f"{run}: was made from Python, so no {CONFIG} names its model and data; in Python call "
                "l3d.load(RUN).evaluate, l3d.intervention_ratios, or l3d.decompose(.., existing='resume')"
            )
        raise ValueError(f"{run}: not a run folder of l3d: it has no {CONFIG}")
    settings = read_yaml(path)
    if isinstance(settings, dict) and "name" in settings:
        return "toy"
    if isinstance(settings, dict) and "model" in settings:
        return "decompose"
    raise ValueError(f"{path}: not a configuration of l3d: it names neither a toy nor a model")


def write_metrics(run: Path, metrics: Mapping[str, Any]) -> Path:
    """Write RUN/metrics.json and return its path; figures that are not finite become null."""
    text = json.dumps({name: _finite(value) for name, value in metrics.items()}, indent=2, allow_nan=False)
    return replace_text(run / METRICS, text + "\n")


def read_metrics(run: Path) -> dict[str, Any]:
    """Read RUN/metrics.json; return an empty dict if it is missing. Raises ValueError for a damaged file."""
    path = run / METRICS
    return read_json(path, schema.METRICS) if path.is_file() else {}


def write_subnetworks(run: Path, described: Mapping[str, Any]) -> Path:
    """Write RUN/subnetworks.json and return its path."""
    return replace_text(run / SUBNETWORKS, json.dumps(described, allow_nan=False, separators=(",", ":")) + "\n")


def read_subnetworks(run: Path) -> dict[str, Any]:
    """Read RUN/subnetworks.json; return an empty dict if it is missing.

    Raises ValueError for a damaged file or another format.
    """
    path = run / SUBNETWORKS
    if not path.is_file():
        return {}
    found = read_json(path)
    if found.get("format") != SUBNETWORKS_FORMAT or not isinstance(found.get("subnetworks"), list):
        got = schema.one_line(repr(found.get("format")))
        raise ValueError(f"{path}: expected format {SUBNETWORKS_FORMAT!r}, got {got}")
    schema.check(found, {"subnetworks": [{}]}, str(path))
    older = "outputs" if found.get("moved") == "output" else "tokens" if found.get("kind") == "text" else "classes"
    return {"entries": older, **found}  # older files name no entries


def read_ratios(run: Path) -> dict[int, float]:
    """Read intervention ratios by subnetwork from RUN/interventions.json; return an empty dict if it is missing.

    Raises ValueError for a damaged file.
    """
    path = run / INTERVENTIONS
    if not path.is_file():
        return {}
    found = read_json(path, schema.INTERVENTIONS)
    if len(found["subnetworks"]) != len(found["ratio"]):
        raise ValueError(f"{path}: ratio: expected {len(found['subnetworks'])} numbers, got {len(found['ratio'])}")
    return {k: ratio for k, ratio in zip(found["subnetworks"], found["ratio"], strict=True) if ratio is not None}


def with_rates(described: Mapping[str, Any], rates: Sequence[float]) -> dict[str, Any]:
    """Return a description with its activation rates replaced by `rates` [K]; an empty dict if K differs."""
    each = described.get("subnetworks", [])
    if len(each) != len(rates):
        return {}
    renewed = [seen | {"activation_rate": rate} for seen, rate in zip(each, rates, strict=True)]
    return {**described, "subnetworks": renewed}


def last_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint that was written last; None if there is none yet."""
    return max((run / "checkpoints").glob("step*[0-9]"), key=lambda path: path.stat().st_mtime, default=None)


def interrupted(run: Path, command: str = "l3d resume") -> str:
    """Return a message that says how to resume an interrupted run."""
    last = last_checkpoint(run)
    if last is None:
        return f"interrupted, before the first checkpoint in {run}"
    return f"interrupted; last checkpoint: {last}; resume with: {command} {run}"


def check_new(out: Path, advice: str = "") -> None:
    """Raise ValueError, which ends with `advice`, unless `out` is a new or empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not an empty folder{advice}")


def check_copy(run: Path, out: Path) -> None:
    """Raise ValueError unless `out` is a new or empty folder outside the run folder."""
    check_new(out)
    if out.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"--out: {out} lies inside the run folder {run}")


def copy_run(run: Path, out: Path) -> None:
    """Copy a run folder, without its lock, to `out`; `out` must pass `check_copy`."""
    check_copy(run, out)
    check_links(run)
    shutil.copytree(run, out, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK))


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
