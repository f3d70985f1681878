"""Load models and data from one-line descriptions such as "hf:DIR", "text:FILE" or "python:module:factory".

A "python:" description imports and runs code: load only descriptions you trust.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from l3d.data.arguments import check_whole
from l3d.data.batches import count_rows
from l3d.data.images import array_rows
from l3d.data.pretrained import causal_lm
from l3d.data.readers import read_array
from l3d.data.tokens import load_dataset, load_text, load_tokens

Data = torch.Tensor | Mapping[str, torch.Tensor] | Dataset | Iterable
Factory = Callable[..., Any]

_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


def load_model(spec: str, **arguments: Any) -> nn.Module:
    """Load the model that `spec` names, in evaluation mode.

    spec: "hf:DIR_OR_ID", a causal language model of transformers; the arguments (dtype, revision, ...)
    go to its from_pretrained. Or "python:pkg.module:factory", where factory(**arguments) returns the
    module; the working directory is searched too.
    Raises ValueError for a description that does not name a model, FileNotFoundError for a missing
    folder, ImportError if transformers is not installed.
    """
    scheme, target = _split(spec, {"hf": "DIR_OR_ID", "python": "pkg.module:factory"}, "model")
    model = _call_factory(spec, target, arguments) if scheme == "python" else causal_lm(spec, target, **arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec}: expected a torch.nn.Module, got {type(model).__name__}")
    return model.eval()


def load_data(spec: str, *, model_spec: str | None = None, rows: str | None = None, **arguments: Any) -> Data:
    """Load the data that `spec` names: rows that are the model's inputs, or what a factory returns.

    spec and its arguments:
    * "text:FILE_OR_FOLDER" -> token ids, int64 [n, length]. A folder gives all its *.txt files. Texts end
      at separator="<|endoftext|>". Each is cut into windows of length=16 ids, of which the first is the
      tokenizer's BOS if it has one; shorter tails are dropped. start="every" takes all windows of a
      text, "first" its first. tokenizer: folder or hub ID (default: that of model_spec, an "hf:" one).
      short="pad" pads the tails instead: rows are then mappings of input_ids and attention_mask, and padded
      positions are not samples.
    * "dataset:FOLDER_OR_FILE_OR_ID" -> the same from a column of a Hugging Face dataset (default: "text", else the
      only column of texts; lists of token ids are used directly). split="train", name (of the configuration), revision.
      A folder may hold parquet, json lines or csv, or what save_to_disk wrote; an ID is streamed from the hub.
    * "tokens:FILE" -> whole numbers [n, length] of an .npy file, or of an .npz file the array `key` (default:
      "input_ids", else the only one), with padding where its array "attention_mask" is 0.
    * "npz:FILE" -> the array `key` (default: "images", else the only one). Images, uint8 [n, H, W, C],
      become float32 [n, C, H, W] / 255, then (x - mean) / std per channel if those are given; with size=224
      (or [height, width]) they are resized as they are read. Arrays of another dtype are not changed.
    * "python:pkg.module:factory" -> what factory(**arguments) returns: tensor, mapping of tensors, Dataset or iterable.

    max_rows (all but python): take only the first max_rows rows.
    rows: "START:STOP" then keeps the slice x[START:STOP]: "-200:" is the last 200 rows.
    Raises ValueError for arguments that do not fit the data, FileNotFoundError for a missing file.
    """
    scheme, target = _split(spec, {name: form for name, (form, _) in _LOADERS.items()}, "data")
    load = _LOADERS[scheme][1]
    if load is None:
        data = _call_factory(spec, target, arguments)
    else:
        known: dict[str, Any] = {"source": target} if scheme == "dataset" else {"path": Path(target).expanduser()}
        if scheme != "npz":
            known["model_spec"] = model_spec
        _check_arguments(load, known, arguments, spec)
        try:
            if arguments.get("max_rows") is not None:
                check_whole("max_rows", arguments["max_rows"])
            data = load(**known, **arguments)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{spec}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{spec}: {error}") from error
    if isinstance(data, Mapping):
        count_rows(data)  # raises ValueError if its tensors differ in length
        data = dict(data)
    scalar = isinstance(data, (str, bytes)) or (isinstance(data, torch.Tensor) and data.ndim == 0)
    if scalar or not isinstance(data, (torch.Tensor, Dataset, Iterable)):
        raise ValueError(f"{spec}: expected a tensor, Dataset or iterable, got {type(data).__name__}")
    if rows is not None:
        data = take_rows(data, _parse_rows(spec, rows), spec)
    if count_rows(data) == 0:
        raise ValueError(f"{spec}: no rows" + (f" in {rows!r}" if rows else ""))
    return data


def load_function(spec: str) -> Factory:
    """Return the function that "python:pkg.module:function" names; the working directory is searched too.

    Raises ValueError for a description that names none.
    """
    _, target = _split(spec, {"python": "pkg.module:function"}, "function")
    with _here_too():
        return _find_factory(spec, *_names(spec, target))


def take_rows(data: Data, rows: slice | list[int], name: str = "data") -> Data:
    """Take some rows of a tensor, a mapping of tensors or a Dataset. Raises ValueError for any other iterable."""
    if isinstance(data, torch.Tensor):
        return data[rows]
    if isinstance(data, Mapping):
        return {key: value[rows] for key, value in data.items()}
    count = count_rows(data)
    if count is None:
        raise ValueError(f"{name}: rows can only be chosen from a tensor or a Dataset with a length")
    return Subset(data, list(range(count)[rows]) if isinstance(rows, slice) else rows)  # type: ignore[arg-type]


def absolute(spec: str) -> str:
    """Make a description's path absolute, so that it is valid in any working directory."""
    scheme, _, target = spec.partition(":")
    path = Path(target).expanduser()
    return f"{scheme}:{path.resolve()}" if scheme in ("hf", *_LOADERS) and path.exists() else spec


def absolute_files(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Make the paths of files among the arguments absolute, so that they are valid in any working directory.

    A value counts as a file if it has a suffix and exists: "weights.pt" does, a revision "main" does not.
    """
    paths = {name: Path(value) for name, value in arguments.items() if isinstance(value, str)}
    files = {name: str(path.resolve()) for name, path in paths.items() if path.suffix and path.is_file()}
    return {**arguments, **files}


def _split(spec: str, schemes: dict[str, str], what: str) -> tuple[str, str]:
    """Split "scheme:target". Raises ValueError for an unknown scheme or an empty target."""
    scheme, _, target = spec.partition(":")
    if scheme not in schemes or not target:
        known = ", ".join(f"{name}:{form}" for name, form in schemes.items())
        raise ValueError(f"{what} {spec!r}: expected one of {known}")
    return scheme, target


def _parse_rows(spec: str, rows: Any) -> slice:
    """Read "START:STOP" as a slice. Raises ValueError for anything else."""
    # YAML reads an unquoted 10:20 as the number 620, so anything but a string is refused.
    match = _SLICE.fullmatch(rows) if isinstance(rows, str) else None
    if match is None:
        raise ValueError(f'{spec}: rows: expected "START:STOP" (with the quotes in YAML), got {rows!r}')
    return slice(*(None if bound is None else int(bound) for bound in match.groups()))


def _check_arguments(function: Factory, known: dict[str, Any], arguments: dict[str, Any], spec: str) -> None:
    """Raise ValueError, listing the function's parameters, if the arguments do not match them."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have no signature
        return
    try:
        signature.bind(**known, **arguments)
    except TypeError as error:
        takes = ", ".join(name for name in signature.parameters if name not in known) or "none"
        raise ValueError(f"{spec}: {error} (arguments it takes: {takes})") from error


def _call_factory(spec: str, target: str, arguments: dict[str, Any]) -> Any:
    """Call the factory of "pkg.module:factory", with the working directory on sys.path meanwhile."""
    with _here_too():
        factory = _find_factory(spec, *_names(spec, target))
        _check_arguments(factory, {}, arguments, spec)
        return factory(**arguments)


def _names(spec: str, target: str) -> tuple[str, str]:
    """Split "pkg.module:name". Raises ValueError if either is missing."""
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ValueError(f"{spec}: expected python:pkg.module:factory")
    return module_name, name


@contextmanager
def _here_too() -> Iterator[None]:
    """Search the working directory for modules inside the block: a console script, unlike `python -m`, does not."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def _find_factory(spec: str, module_name: str, name: str) -> Factory:
    """Import the module and look the factory up. Raises ValueError if either is missing or is not callable."""
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise  # the module exists; a module that it imports does not
        raise ValueError(
            f"{spec}: no module named {missing!r}, neither installed nor in the working directory {os.getcwd()}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{spec}: module {module_name!r} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{spec}: {name!r} is not callable")
    return found


def _load_npz(
    path: Path,
    key: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    max_rows: int | None = None,
    size: int | list[int] | None = None,
) -> torch.Tensor | Dataset:
    """Read an array of rows or images; see `load_data`."""
    return array_rows(read_array(path, key)[:max_rows], mean, std, size)


# scheme: (form of its target, loader; None: call the factory)
_LOADERS: dict[str, tuple[str, Factory | None]] = {
    "text": ("FILE_OR_FOLDER", load_text),
    "dataset": ("FOLDER_OR_FILE_OR_ID", load_dataset),
    "tokens": ("FILE", load_tokens),
    "npz": ("FILE", _load_npz),
    "python": ("pkg.module:factory", None),
}
