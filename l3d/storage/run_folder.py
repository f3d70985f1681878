"""Read and write a run folder: checkpoints, config.yaml (settings), metrics.json (figures) and subnetworks.json.

subnetworks.json describes what each subnetwork does, see `l3d.analysis.description`. Every file is written under a
temporary name and then renamed, so a reader finds the complete old file or the complete new one. The last two
checkpoints are kept, each with a manifest of its files' SHA-256: where the last one is damaged, the one before is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from l3d.data.arguments import warn
from l3d.decomposition.subnetworks import Subnetworks
from l3d.storage import schema
from l3d.storage.card import CARD, is_card
from l3d.storage.files import (
    WriteError,
    beginning,
    check_links,
    flush,
    is_leftover,
    naming,
    read_json,
    remove,
    replace_text,
)
from l3d.storage.lock import LOCK, check_free, claim, release
from l3d.storage.manifest import FORMAT as MANIFEST_FORMAT
from l3d.storage.manifest import MANIFEST, check
from l3d.storage.progress import CONFIG, checkpoints
from l3d.storage.store import (
    FORMAT,
    INTERVENTIONS,
    METRICS,
    PER_SUBNETWORK,
    SUBNETWORKS,
    read,
    read_tensors,
    tensor_bytes,
    to_json,
    write,
)

REPORT = "report.html"
SUBNETWORKS_FORMAT = "l3d-subnetworks-1"
_CHECKPOINT = re.compile(r"step\d+(\.partial|\.damaged)?")


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
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            claim(folder)
        try:
            _check_usable(folder, overwrite, resume)  # since then another process may have been and gone
            with naming(folder):
                if overwrite and not resume and holds_files(folder):
                    _remove_run(folder)
                for each in filter(is_leftover, folder.iterdir()):
                    each.unlink()
        except BaseException:
            release(folder)
            raise
        return cls(folder)

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, in the order of their steps."""
        return checkpoints(self.path)

    def save_checkpoint(
        self, step: int, decomposition: Subnetworks, optimizer: Mapping[str, Tensor], state: Any
    ) -> None:
        """Write a checkpoint: decomposition, optimizer tensors and state; then delete all but it and the one before.

        It is on the disk, whole, before it gets its name and before another is deleted. Raises WriteError.
        """
        if not self.path.is_dir():
            raise WriteError(f"{self.path}: cannot be written: the run folder has vanished")
        home = self.path / "checkpoints"
        target = home / f"step{step:09d}"
        partial = target.with_name(target.name + ".partial")
        others = {"optimizer.safetensors": lambda: tensor_bytes(optimizer)}
        others["state.json"] = lambda: to_json({"step": step, **state}).encode()
        try:
            with naming(target):
                if not home.is_dir():
                    home.mkdir()
                    flush(self.path)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                write(decomposition, partial, others)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(partial, target)
                flush(home)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._delete_older(target)

    def whole_checkpoint(self) -> Path | None:
        """Return the last checkpoint whose files are what its manifest lists; None if there is no checkpoint.

        Warns of later ones, which are damaged. Raises ValueError if all are.
        """
        damaged: list[str] = []
        for path in reversed(self.checkpoints()):
            reason = _damage(path)
            if reason is None:
                for each in damaged:
                    warn(f"{each}; going on from the checkpoint before, {path}")
                return path
            damaged.append(reason)
        if damaged:
            raise ValueError(f"{damaged[0]}, and no older checkpoint is whole; start again with existing='overwrite'")
        return None

    def load_checkpoint(
        self, path: Path, columns: slice | None = None
    ) -> tuple[Subnetworks, dict[str, Tensor], dict[str, Any]]:
        """Read a checkpoint that has been checked: (decomposition, optimizer tensors, state).

        columns: read this slice of the subnetworks only.
        """
        optimizer = read_tensors(path / "optimizer.safetensors", columns)
        return read(path, Subnetworks, columns), optimizer, read_json(path / "state.json", schema.STATE)

    def go_on_from(self, path: Path) -> None:
        """Rename checkpoints later than `path`, which are damaged, and delete what a killed process has left.

        The next checkpoint that is written deletes the damaged ones.
        """
        damaged = []
        for each in self.checkpoints():
            if each > path:
                damaged.append(each.with_name(f"{each.name}.damaged"))
                with naming(each):
                    shutil.rmtree(damaged[-1], ignore_errors=True)
                    each.rename(damaged[-1])
        self._delete_older(path, damaged)

    def _delete_older(self, last: Path, damaged: Sequence[Path] = ()) -> None:
        """Delete all checkpoints, also partial ones, but the last, the one before and some that are damaged."""
        kept = {last, *damaged, *[path for path in self.checkpoints() if path < last][-1:]}
        for path in last.parent.iterdir():
            if path not in kept and _CHECKPOINT.fullmatch(path.name):
                with suppress(OSError):  # nothing is lost by one too many
                    if path.suffix != ".partial":  # half deleted, it must not look complete
                        path = path.rename(path.with_name(f"{path.name}.partial"))
                    shutil.rmtree(path)


def _damage(checkpoint: Path) -> str | None:
    """Say which file of a checkpoint is damaged; None if all are what the manifest lists."""
    if (checkpoint / MANIFEST).exists():
        found = check(checkpoint)
        return None if found is None else f"{found}: damaged: its SHA-256 is not the one in {MANIFEST}"
    try:
        RunFolder(checkpoint.parents[1]).load_checkpoint(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)
    warn(f"{checkpoint}: has no {MANIFEST}, so a damaged file may go unnoticed")
    return None


def holds_files(folder: Path) -> bool:
    """Tell whether a folder exists and holds more than what a killed process leaves before its first file."""
    return folder.exists() and any(each.name != LOCK and not is_leftover(each) for each in folder.iterdir())


def _check_usable(folder: Path, overwrite: bool, resume: bool) -> None:
    """Raise ValueError or FileNotFoundError, in one line, if a folder cannot become or go on with a run."""
    if resume and not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"out: nothing to resume in {folder}; it holds no checkpoints")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; name a folder")
    if not holds_files(folder):
        return
    if not (overwrite or resume):
        raise ValueError(f"out: {folder} is not empty; choose another folder or pass existing='overwrite'")
    check_links(folder)
    is_run = FORMAT in beginning(folder / "decomposition.json") or beginning(folder / CONFIG).startswith("# l3d ")
    is_run = is_run or any((folder / "checkpoints").glob("step*/decomposition.json"))
    if not resume and not is_run:
        raise ValueError(f"out: {folder} holds no run of l3d, so overwrite deletes nothing; choose another folder")


def _remove_run(folder: Path) -> None:
    """Delete the files that a run wrote into a folder, and no others."""
    for name in ("checkpoints", "tensorboard", "wandb"):
        remove(folder / name)
    files = ("decomposition.safetensors", "decomposition.json", CONFIG, *PER_SUBNETWORK, REPORT)
    for name in (*files, "interventions.svg", "interventions.png"):
        remove(folder / name)
    if is_card(folder / CARD):
        remove(folder / CARD)
    if MANIFEST_FORMAT in beginning(folder / MANIFEST):
        remove(folder / MANIFEST)


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
    from l3d.storage.yaml_text import read_yaml  # imports yaml, which a decomposition does not need

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


def check_new(out: Path, advice: str = "") -> None:
    """Raise ValueError, which ends with `advice`, unless `out` is a new or empty folder."""
    if out.exists() and (not out.is_dir() or holds_files(out)):
        raise ValueError(f"--out: {out} exists and is not an empty folder{advice}")


def check_copy(run: Path, out: Path) -> None:
    """Raise ValueError unless `out` is a new or empty folder outside the run folder."""
    check_new(out)
    if out.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"--out: {out} lies inside the run folder {run}")


def copy_run(run: Path, out: Path) -> None:
    """Copy a run folder, without its lock, to `out`; `out` must pass `check_copy`. Raises WriteError."""
    check_copy(run, out)
    check_links(run)
    try:
        with naming(out):
            shutil.copytree(run, out, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK))
    except WriteError:
        shutil.rmtree(out, ignore_errors=True)  # half a copy is worth nothing
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
