"""Read files into tensors: texts as rows of token ids, images and other arrays as they feed a model.

Errors are ValueErrors that name the argument at fault; `l3d.sources` puts the file's name before them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

_TEXTS_AT_ONCE = 256  # handed to the tokenizer together: enough to be quick, few enough to stop early


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is a whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")


def read_texts(path: Path, separator: str | None) -> list[str]:
    """Read the non-empty texts of a UTF-8 file, or of all *.txt files below a folder, ordered by name."""
    if not path.exists():
        raise FileNotFoundError("no such file or folder")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    texts: list[str] = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is not UTF-8 text") from error
        parts = content.split(separator) if separator else [content]
        texts.extend(part.strip() for part in parts if part.strip())
    if not texts:
        raise ValueError("holds no *.txt file with text" if path.is_dir() else "holds no text")
    return texts


def token_rows(texts: list[str], encoder: Any, length: int, max_rows: int | None, start: str) -> torch.Tensor:
    """Cut texts into rows of `length` token ids -> int64 [n, length].

    encoder: a tokenizer of transformers. Each row is its BOS, if it has one, and then consecutive tokens
    of one text; a tail too short for a row is dropped. start: "every" window of a text or its "first".
    """
    prefix = [] if encoder.bos_token_id is None else [encoder.bos_token_id]
    rows: list[list[int]] = []
    for ids in _encode(encoder, texts):
        rows.extend(prefix + window for window in _windows(ids, length - len(prefix), start))
        if max_rows is not None and len(rows) >= max_rows:
            break
    if not rows:
        raise ValueError(f"length: none of the {len(texts)} texts fills a row of {length} tokens")
    return torch.tensor(rows[:max_rows], dtype=torch.int64)


def _encode(encoder: Any, texts: list[str]) -> Iterator[list[int]]:
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        # verbose=False: a whole text may be longer than the model takes, its windows are not.
        batch = encoder(texts[first : first + _TEXTS_AT_ONCE], add_special_tokens=False, verbose=False)
        yield from batch["input_ids"]


def _windows(ids: list[int], size: int, start: str) -> Iterator[list[int]]:
    last = len(ids) - size if start == "every" else min(0, len(ids) - size)
    for first in range(0, last + 1, size):
        yield ids[first : first + size]


def read_array(path: Path, key: str | None) -> np.ndarray:
    """Read an array of numbers from an .npz file: `key`, else "images", else the only one; never unpickle."""
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError("not an .npz archive")
    with np.load(path, allow_pickle=False) as archive:
        names = list(archive.files)
        chosen = key or ("images" if "images" in names else names[0] if len(names) == 1 else None)
        if chosen not in names:
            problem = "which array?" if chosen is None else f"no array {chosen!r}"
            raise ValueError(f"key: {problem} (the file holds: {', '.join(names) or 'none'})")
        try:
            array = archive[chosen]
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"array {chosen!r} cannot be read: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim == 0 or array.dtype.kind not in "fiub":
        raise ValueError(f"key: {chosen!r} is not an array of numbers with rows")
    return array


def array_rows(array: np.ndarray, mean: list[float] | None, std: list[float] | None) -> torch.Tensor:
    """Turn uint8 images [n, H, W, C] into float32 [n, C, H, W] / 255, less mean, over std.

    mean, std: one number per channel. Arrays of other numbers are returned as they are.
    """
    rows = torch.from_numpy(np.ascontiguousarray(array))
    if rows.dtype != torch.uint8:
        if mean is not None or std is not None:
            raise ValueError(f"mean, std: only for uint8 images; this array is {array.dtype}")
        return rows
    if rows.ndim != 4:
        raise ValueError(f"key: expected uint8 images [n, H, W, C], got {list(array.shape)}")
    images = rows.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    if mean is not None:
        images -= _per_channel("mean", mean, images.shape[1])
    if std is not None:
        scale = _per_channel("std", std, images.shape[1])
        if not bool((scale > 0).all()):
            raise ValueError(f"std: expected positive numbers, got {std}")
        images /= scale
    return images.contiguous()


def _per_channel(name: str, values: list[float], channels: int) -> torch.Tensor:
    try:
        channel = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError):
        channel = torch.empty(0)
    if channel.shape != (channels,):
        raise ValueError(f"{name}: expected {channels} numbers, one per channel, got {values!r}")
    return channel[:, None, None]
