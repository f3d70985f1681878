"""Save and load decompositions: safetensors for tensors, json for all else; loading executes no code.

A decomposition is two files in a folder. decomposition.safetensors holds tensors named "encoder.NAME.left", ..;
decomposition.json holds shapes, ranks, settings and history; manifest.json holds the SHA-256 of both. Every file is
written under a temporary name and then renamed, so an interrupted write leaves the old file.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from l3d.data.arguments import warn
from l3d.decomposition.subnetworks import Subnetworks
from l3d.storage.card import write_card
from l3d.storage.files import naming, read_json, replacing
from l3d.storage.manifest import DECOMPOSITION, MANIFEST, check, sha256, write_files
from l3d.storage.progress import check_finished, how_to_go_on, last_checkpoint
from l3d.storage.schema import check_decomposition, one_line

FORMAT = "l3d-decomposition-1"
SIDES = ("encoder", "decoder")
LONGEST_HEADER = 8 * 2**20  # bytes of a safetensors file's header: some 50,000 tensors
METRICS = "metrics.json"
SUBNETWORKS = "subnetworks.json"
INTERVENTIONS = "interventions.json"
COLUMNS = "columns.json"  # columns of the user's own in the report's table
PER_SUBNETWORK = (METRICS, SUBNETWORKS, INTERVENTIONS, COLUMNS)  # they hold figures of each subnetwork

Built = TypeVar("Built", bound=Subnetworks)


def save(decomposition: Subnetworks, path: str | Path) -> None:
    """Write a decomposition and its model card (README.md) into a folder, which is made if missing.

    A README.md that l3d did not write is kept. Where the folder held another decomposition, the files with figures of
    its subnetworks (columns.json, ..) are deleted, with a warning. Raises ValueError, before anything is written, for
    settings that json cannot hold, and WriteError, an OSError of one line, where the disk is full or fails; the old
    files are then whole.
    """
    folder = Path(path)
    derived = [folder / name for name in PER_SUBNETWORK if (folder / name).is_file()]
    before = sha256(folder / DECOMPOSITION[0]) if derived else ""
    write_card(folder, write(decomposition, folder))
    if before and sha256(folder / DECOMPOSITION[0]) != before:
        for each in derived:
            with naming(each):
                each.unlink()
        warn(f"{folder}: held another decomposition, so its {', '.join(each.name for each in derived)} are deleted")


def write(
    decomposition: Subnetworks, folder: Path, others: Mapping[str, Callable[[], bytes]] | None = None
) -> dict[str, Any]:
    """Write a decomposition's two files and the manifest, and return the content of the json file.

    others: contents of more files for the manifest, as `write_files` takes them.
    """
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
        "first_error": decomposition.first_error if math.isfinite(decomposition.first_error) else None,
        "restart_errors": [error if math.isfinite(error) else None for error in decomposition.restart_errors],
    }
    text = to_json(header).encode()  # raises before anything is written
    own = {"decomposition.safetensors": lambda: tensor_bytes(_named(decomposition)), "decomposition.json": lambda: text}
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, {**own, **(others or {})})
    return header


def load(path: str | Path, build: type[Built], columns: slice | None = None) -> Built:
    """Read a decomposition from a folder; with `columns`, a slice of its subnetworks only.

    build: the class of the result, `Subnetworks` or a subclass. Warns of a folder without a manifest. Raises
    FileNotFoundError if a file is missing or the folder's run is unfinished, and ValueError if the files are damaged or
    have another format.
    """
    folder = Path(path)
    check_finished(folder)
    if not (folder / MANIFEST).exists():
        if all((folder / name).is_file() for name in DECOMPOSITION):
            warn(f"{folder}: has no {MANIFEST}, so a damaged file may go unnoticed; save it again to write one")
    elif (damaged := check(folder, DECOMPOSITION)) is not None and damaged.exists():
        advice = "take it from a copy, or delete the manifest if you meant to change it"
        advice = advice if last_checkpoint(folder) is None else how_to_go_on(folder)
        raise ValueError(f"{damaged}: damaged: its SHA-256 is not the one in {MANIFEST}; {advice}")
    return read(folder, build, columns)


def read(folder: Path, build: type[Built], columns: slice | None = None) -> Built:
    """Read a decomposition as `load` does, from a folder that has been checked."""
    where = folder / "decomposition.json"
    header = read_json(where)
    if header.get("format") != FORMAT:
        got = one_line(repr(header.get("format")))
        raise ValueError(f"{folder}: expected a decomposition of format {FORMAT!r}, got {got}")
    check_decomposition(header, f"{where}: damaged")
    tensors = read_tensors(folder / "decomposition.safetensors", columns)
    if columns is not None:
        header["n_subnetworks"] = columns.stop - columns.start
    try:
        return _assembled(header, tensors, build)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: damaged: decomposition.safetensors does not belong to decomposition.json ({one_line(error)})"
        ) from error


def _assembled(header: Mapping[str, Any], tensors: Mapping[str, Tensor], build: type[Built]) -> Built:
    """Build a decomposition from its header and named tensors; any error means that the two do not belong together."""
    shapes = {name: torch.Size(shape) for name, shape in header["shapes"].items()}
    ranks = {name: tuple(each) for name, each in header["ranks"].items()}
    held = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if held != _listed(shapes, ranks, header["n_subnetworks"]):
        raise ValueError("the tensors differ from those that the header lists")  # before memory is asked for
    like = next(iter(tensors.values()))
    if any(tensor.dtype != like.dtype for tensor in tensors.values()) or not like.is_floating_point():
        raise ValueError("the tensors are of several types, or hold whole numbers")
    decomposition = build.empty(shapes, header["n_subnetworks"], ranks, header["settings"], like)
    own = _named(decomposition)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    decomposition.history, decomposition.timing = header["history"], header["timing"]
    decomposition.base_model = dict(header.get("base_model", {}))  # older files have none, and fit any weights
    decomposition.threshold = math.nan if header["threshold"] is None else header["threshold"]
    first = header.get("first_error")  # older files have none
    decomposition.first_error = math.nan if first is None else first
    decomposition.restart_errors = [math.inf if error is None else error for error in header["restart_errors"]]
    return decomposition


def _listed(
    shapes: Mapping[str, torch.Size], ranks: Mapping[str, tuple[int, ...]], n_subnetworks: int
) -> dict[str, list[int]]:
    """Return the shapes of the tensors that `_named` returns, from a header alone."""
    found: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        each = ranks.get(name, ())
        factors = {"vector": [shape.numel()]}
        if len(shape) == 2:
            factors = {"left": [*each, shape[0]], "right": [*each, shape[1]]}
        elif each:
            modes = zip(each, shape, strict=True)
            factors = {"core": list(each), **{f"modes.{i}": list(mode) for i, mode in enumerate(modes)}}
        for side in SIDES:
            found |= {f"{side}.{name}.{factor}": [n_subnetworks, *tail] for factor, tail in factors.items()}
    return found


def _named(decomposition: Subnetworks) -> dict[str, Tensor]:
    """Return every tensor by side, parameter and factor, as in "encoder.W_in.weight.left"."""
    named = {}
    for side in SIDES:
        for name, piece in getattr(decomposition, side).items():
            for factor, tensor in piece.named_parameters():
                named[f"{side}.{name}.{factor}"] = tensor.detach()
    return named


# --- files ------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """Return a value as strict json text. Raises ValueError for values that json cannot hold, such as NaN."""
    try:
        return json.dumps(value, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: cannot be saved as json ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically, readable under the usual file permissions."""
    with replacing(path) as partial:
        # safetensors' own save_file makes the file readable by its owner only
        partial.write_bytes(tensor_bytes(tensors))


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a safetensors file."""
    return to_bytes({name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def read_tensors(path: Path, rows: slice | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; with `rows`, only these rows of tensors that have more than one row.

    Raises FileNotFoundError or ValueError, with a message of one line.
    """
    check_header(path)
    try:  # safetensors reads slices, and before 0.7 whole tensors too, to torch's default device
        if rows is None:
            with torch.device("cpu"):
                return load_file(path)
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape = part.get_shape()
                found[name] = part[rows] if shape and shape[0] > 1 else file.get_tensor(name)
            return found
    except (SafetensorError, ValueError, RuntimeError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not a valid safetensors file ({one_line(error)})") from error


def check_header(path: Path) -> None:
    """Raise FileNotFoundError or ValueError unless a file can be a safetensors file whose names fit into memory."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder that l3d wrote")
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
    if not 0 < length <= min(size - 8, LONGEST_HEADER):
        raise ValueError(f"{path}: not a valid safetensors file (a header of {length:,} bytes, of {size:,} in all)")
