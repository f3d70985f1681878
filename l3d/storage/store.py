"""Decompositions and checkpoints on disk: safetensors for tensors, json for the rest; loading executes nothing.

A decomposition is two files in a folder: decomposition.safetensors with tensors named
"encoder.NAME.left", .. and decomposition.json with shapes, ranks, settings and history. Every file is written
beside its place and moved there, so an interrupted write leaves the old one.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from l3d.decomposition.subnetworks import Subnetworks
from l3d.storage.card import CARD, is_card, write_card
from l3d.storage.files import read_json, replace_text, replacing
from l3d.storage.lock import LOCK, check_free, claim

FORMAT = "l3d-decomposition-1"

Built = TypeVar("Built", bound=Subnetworks)


def save(decomposition: Subnetworks, path: str | Path) -> None:
    """Write a decomposition into a folder, which is made if missing, with a model card (README.md).

    A README.md that is no card of ours is left as it is.
    """
    header = write(decomposition, Path(path))
    write_card(Path(path), header)


def write(decomposition: Subnetworks, folder: Path) -> dict[str, Any]:
    """Write a decomposition's two files, and return what the json holds."""
    header = {
        "format": FORMAT,
        "base_model": decomposition.base_model,
        "n_subnetworks": decomposition.n_subnetworks,
        "shapes": {name: list(shape) for name, shape in decomposition.shapes.items()},
        "ranks": {name: list(ranks) for name, ranks in decomposition.ranks.items()},
        "settings": decomposition.settings,
        "history": decomposition.history,
        "timing": decomposition.timing,
        "threshold": decomposition.threshold if math.isfinite(decomposition.threshold) else None,
        "restart_errors": [error if math.isfinite(error) else None for error in decomposition.restart_errors],
    }
    text = to_json(header)  # what json cannot hold is refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "decomposition.safetensors", _named(decomposition))
    replace_text(folder / "decomposition.json", text)
    return header


def load(path: str | Path, build: type[Built], columns: slice | None = None) -> Built:
    """Read a decomposition from a folder; of `columns` only, neighbouring subnetworks, where they are given.

    build: the class to make, `Subnetworks` or one that extends it. Raises FileNotFoundError where there is none,
    ValueError where the files are damaged or of another kind.
    """
    folder = Path(path)
    header = read_json(folder / "decomposition.json")
    if header.get("format") != FORMAT:
        raise ValueError(f"{folder}: expected a decomposition of format {FORMAT!r}, got {header.get('format')!r}")
    tensors = read_tensors(folder / "decomposition.safetensors", columns)
    if columns is not None:
        header["n_subnetworks"] = columns.stop - columns.start
    try:
        return _assembled(header, tensors, build)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: damaged: decomposition.safetensors does not belong to decomposition.json ({reason})"
        ) from error


def _assembled(header: Mapping[str, Any], tensors: Mapping[str, Tensor], build: type[Built]) -> Built:
    """Build the decomposition that a header and named tensors describe; any error says that they do not."""
    shapes = {name: torch.Size(shape) for name, shape in header["shapes"].items()}
    ranks = {name: tuple(each) for name, each in header["ranks"].items()}
    if not tensors:
        raise ValueError("the tensors are others than the header says")
    like = next(iter(tensors.values()))
    decomposition = build.empty(shapes, header["n_subnetworks"], ranks, header["settings"], like)
    own = _named(decomposition)
    if set(own) != set(tensors) or any(own[name].shape != tensors[name].shape for name in own):
        raise ValueError("the tensors are others than the header says")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    decomposition.history, decomposition.timing = header["history"], header["timing"]
    decomposition.base_model = dict(header.get("base_model", {}))  # older files have none: they fit any weights
    decomposition.threshold = math.nan if header["threshold"] is None else header["threshold"]
    decomposition.restart_errors = [math.inf if error is None else error for error in header["restart_errors"]]
    return decomposition


def _named(decomposition: Subnetworks) -> dict[str, Tensor]:
    """Name every tensor by side, parameter and factor: "encoder.W_in.weight.left"."""
    named = {}
    for side in ("encoder", "decoder"):
        for name, piece in getattr(decomposition, side).items():
            for factor, tensor in piece.named_parameters():
                named[f"{side}.{name}.{factor}"] = tensor.detach()
    return named


# --- run folders and checkpoints --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run: checkpoints while it trains, the decomposition after."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, overwrite: bool, resume: bool) -> "RunFolder":
        """Make the folder, or check that it may be used, and claim it for this process until `release`."""
        folder = Path(path)
        check_free(folder)
        if resume and not (folder / "checkpoints").is_dir():
            raise FileNotFoundError(f"out: nothing to resume in {folder}; it holds no checkpoints")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out: {folder} is a file; name a folder")
        if folder.exists() and any(each.name != LOCK for each in folder.iterdir()) and not resume:
            if not overwrite:
                raise ValueError(f"out: {folder} is not empty; choose another folder or pass overwrite")
            _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        return cls(folder)

    def checkpoints(self) -> list[Path]:
        """List the complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step*[0-9]"))

    def save_checkpoint(
        self, step: int, decomposition: Subnetworks, optimizer: Mapping[str, Tensor], state: Any
    ) -> None:
        """Write a checkpoint and drop the older ones."""
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
        """Read the last checkpoint: (decomposition, optimiser tensors, state), or None; whole or some subnetworks."""
        found = self.checkpoints()
        if not found:
            return None
        path = found[-1]
        optimizer = read_tensors(path / "optimizer.safetensors", columns)
        return load(path, Subnetworks, columns), optimizer, read_json(path / "state.json")


def _remove_run(folder: Path) -> None:
    """Delete what a run wrote into a folder, and nothing else; refuse a folder that no run wrote."""
    header = folder / "decomposition.json"
    config = folder / "config.yaml"
    ours = header.is_file() and FORMAT in header.read_text(encoding="utf-8", errors="replace")[:200]
    ours = ours or (config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith("# l3d "))
    ours = ours or any((folder / "checkpoints").glob("step*/decomposition.json"))
    if not ours:
        raise ValueError(f"out: {folder} holds no run of l3d, so overwrite will not touch it; choose another folder")
    for name in ("checkpoints", "tensorboard", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = ["config.yaml", "metrics.json", "subnetworks.json", "report.html"]
    files += [f"interventions.{ending}" for ending in ("json", "svg", "png")]
    for name in ("decomposition.safetensors", "decomposition.json", *files):
        (folder / name).unlink(missing_ok=True)
    if is_card(folder / CARD):
        (folder / CARD).unlink()


# --- files ------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """Return strict json; raises ValueError for what it cannot hold."""
    try:
        return json.dumps(value, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: cannot be saved as json ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole."""
    with replacing(path) as partial:
        # save_file would make the file readable by its owner only
        partial.write_bytes(to_bytes({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path, rows: slice | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; FileNotFoundError or ValueError with one line otherwise.

    Of tensors with more than one row only `rows` are read, where given.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder that l3d wrote")
    try:
        if rows is None:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape = part.get_shape()
                found[name] = part[rows] if shape and shape[0] > 1 else file.get_tensor(name)
            return found
    except SafetensorError as error:
        raise ValueError(f"{path}: not a valid safetensors file ({error})") from error
