"""Identify the weights a decomposition belongs to: the model's name and revision, and a hash of every parameter.

Directions in parameter space are meaningless for other weights. So every function that applies a decomposition to a
model checks the hashes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_moved: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> number of open `moving` blocks


def identity(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe the model whose parameters these are, as json holds it: name, revision, and hashes by name.

    name: the model's `name_or_path` (folder or hub ID), else its class. revision: the hub's commit, or None.
    """
    config = getattr(model, "config", None)
    found = getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or type(model).__name__
    if Path(found).is_dir():
        found = Path(found).resolve().name  # keep the folder's name only: the path is private to this machine
    hashes = {name: fingerprint(p) for name, p in parameters.items()}
    return {"name": found, "revision": getattr(config, "_commit_hash", None), "parameters": hashes}


def fingerprint(parameter: Tensor) -> str:
    """Return a parameter's dtype and the SHA-256 of its entries' bytes, as "float32:9f86d081..".

    >>> fingerprint(torch.zeros(2))
    'float32:af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc'
    """
    values = parameter.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(values.view(torch.uint8).numpy().data) if len(values) else hashlib.sha256()
    return f"{str(parameter.dtype).removeprefix('torch.')}:{digest.hexdigest()}"


def digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """Return the SHA-256 of a text and of tensors, with their dtypes, shapes and entries."""
    hashed = hashlib.sha256(text.encode())
    for tensor in tensors:
        hashed.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        hashed.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return hashed.hexdigest()


def check_identity(
    base: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    advice: str = "; pass any_weights=True to use them anyway",
) -> None:
    """Raise ValueError if a parameter's entries differ from those of the decomposed one.

    base: a decomposition's `base_model`; without hashes it fits any weights. Parameters that `l3d.intervene` has moved
    are skipped: they were checked before the move. The message ends with `advice`.
    """
    for name, expected in base.get("parameters", {}).items():
        parameter = parameters.get(name)
        if parameter is None or parameter in _moved:
            continue
        found = fingerprint(parameter)
        if found != expected:
            kinds = (expected.partition(":")[0], found.partition(":")[0])
            differ = f"is {kinds[1]}, was {kinds[0]}" if kinds[0] != kinds[1] else "has other values"
            known = base.get("name", "the model") + (f" at {base['revision']}" if base.get("revision") else "")
            raise ValueError(
                f"model: {name!r} {differ}: these are not the weights of {known} that were decomposed{advice}"
            )


@contextmanager
def moving(parameters: list[Tensor]) -> Iterator[None]:
    """Make `check_identity` skip parameters inside the block, while an intervention has moved them."""
    for parameter in parameters:
        _moved[parameter] = _moved.get(parameter, 0) + 1
    try:
        yield
    finally:
        for parameter in parameters:
            _moved[parameter] -= 1
            if not _moved[parameter]:
                del _moved[parameter]
