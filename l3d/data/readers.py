"""Read text files as rows of token ids, and .npy and .npz files as arrays.

Errors are ValueErrors that name the wrong argument; `l3d.data.sources` puts the description before them.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

_TEXTS_AT_ONCE = 256  # texts per call of the tokenizer: enough to be fast, few enough to stop soon at max_rows


def read_texts(path: Path, separator: str | None) -> list[str]:
    """Read the non-empty texts of a UTF-8 file, or of all *.txt files below a folder, ordered by name.

    separator: splits a file into texts; None: a file is one text. Raises FileNotFoundError for a missing path,
    ValueError for a file that is not UTF-8 or if there is no text.
    """
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


class TokenRows(Dataset):
    """Hold rows of token ids, some padded. A row is a mapping of input_ids and attention_mask, each int64 [length]."""

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.ids = ids  # [n, length]
        self.mask = mask  # [n, length]: 1, or 0 at padding

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "attention_mask": self.mask[row]}


TokenData = torch.Tensor | TokenRows


def token_rows(
    texts: Iterable[Any], encoder: Any, length: int, max_rows: int | None, start: str, short: str = "drop"
) -> TokenData:
    """Cut texts into rows of `length` token ids: int64 [n, length], or `TokenRows` if some are padded.

    A row is the tokenizer's BOS, if it has one, then consecutive tokens of one text.

    Args:
        texts: strings, or lists of ids.
        encoder: a tokenizer of transformers; None if the texts are lists of ids.
        length: tokens per row, BOS included.
        max_rows: the most rows to return; None for no limit.
        start: "every" takes all windows of a text, "first" its first.
        short: what to do with a tail shorter than a row: "drop" it or "pad" it.

    Raises ValueError if no text fills a row.
    """
    prefix = [] if encoder is None or encoder.bos_token_id is None else [encoder.bos_token_id]
    rows: list[list[int]] = []
    n_texts = 0
    for n_texts, ids in enumerate(_encode(encoder, texts), 1):  # noqa: B007
        rows.extend(prefix + window for window in _windows(ids, length - len(prefix), start, short == "pad"))
        if max_rows is not None and len(rows) >= max_rows:
            break
    if not rows:
        raise ValueError(f"length: none of the {n_texts} texts fills a row of {length} tokens")
    rows = rows[:max_rows]
    sizes = torch.tensor([len(row) for row in rows], device="cpu")
    filled = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows], dtype=torch.int64, device="cpu")
    if (sizes == length).all():
        return filled
    return TokenRows(filled, (torch.arange(length, device="cpu") < sizes[:, None]).to(torch.int64))


def _encode(encoder: Any, texts: Iterable[Any]) -> Iterator[list[int]]:
    """Yield each text's token ids, without special tokens."""
    if encoder is None:
        yield from texts
        return
    remaining = iter(texts)
    while group := list(islice(remaining, _TEXTS_AT_ONCE)):
        # verbose=False: no warning that a text is longer than the model takes; its windows are not
        yield from encoder(group, add_special_tokens=False, verbose=False)["input_ids"]


def _windows(ids: list[int], size: int, start: str, tails: bool) -> Iterator[list[int]]:
    """Cut a text's ids into consecutive windows of `size`; with `tails`, the last may be shorter."""
    for first in range(0, len(ids) if start == "every" else min(1, len(ids)), size):
        window = ids[first : first + size]
        if len(window) == size or tails:
            yield window


def read_array(path: Path, key: str | None, default: str = "images") -> np.ndarray:
    """Read an array of numbers from an .npy file, or from an .npz file.

    Of an .npz file it is the array named `key`; without a key the one named `default`, else the only one. Pickled
    arrays are refused. Raises FileNotFoundError for a missing file, ValueError for one that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if path.suffix == ".npy":
        array = _read(path.name, lambda: np.load(path, allow_pickle=False))
        key = path.name
    elif not zipfile.is_zipfile(path):
        raise ValueError("not an .npz archive")
    else:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            key = key or (default if default in names else names[0] if len(names) == 1 else None)
            if key is None or key not in names:
                problem = "which array?" if key is None else f"no array {key!r}"
                raise ValueError(f"key: {problem} (the file holds: {', '.join(names) or 'none'})")
            array = _read(key, lambda: archive[key])
    if not isinstance(array, np.ndarray) or array.ndim == 0 or array.dtype.kind not in "fiub":
        raise ValueError(f"key: {key!r} is not an array of numbers with rows")
    return array


def array_names(path: Path) -> list[str]:
    """List the names of an .npz file's arrays; an empty list for an .npy file, whose array has no name."""
    if path.suffix == ".npy":
        return []
    with np.load(path, allow_pickle=False) as archive:
        return list(archive.files)


def _read(name: str, load: Callable[[], Any]) -> Any:
    """Return load(); raises ValueError with the array's name if the file is damaged or holds pickled objects."""
    try:
        return load()
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"array {name!r} cannot be read: {error}") from error
