"""Read text files as rows of token ids, and .npy and .npz files as arrays.

Errors are ValueErrors that name the wrong argument; `l3d.data.sources` puts the description before them.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

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


def read_array(path: Path, key: str | None, default: str = "images", kinds: str = "fiub") -> np.ndarray:
    """Read an array of numbers from an .npy file, or from an .npz file.

    Of an .npz file it is the array named `key`; without a key the one named `default`, else the only one. Pickled
    arrays are refused, and sizes that the file cannot hold, before memory is asked for. kinds: of numpy's dtypes, by
    their letters. Raises FileNotFoundError for a missing file, ValueError for one that cannot be read.
    """
    if path.suffix == ".npy":
        size, key = _size(path), path.name
        with path.open("rb") as file:
            array = _read(file, size, key)
    else:
        with _archive(path) as archive:
            names = _names(archive)
            key = key or (default if default in names else next(iter(names)) if len(names) == 1 else None)
            if key is None or key not in names:
                problem = "which array?" if key is None else f"no array {key!r}"
                raise ValueError(f"key: {problem} (the file holds: {', '.join(names)[:500] or 'none'})")
            held = names[key].file_size
            if held > 2 * path.stat().st_size + MARGIN:
                raise ValueError(f"array {key!r} cannot be read: {held:,} bytes packed into few; save it unpacked")
            if names[key].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"array {key!r} cannot be read: it is not compressed as numpy does it")
            with _refusing(key), archive.open(names[key]) as member:
                array = _read(member, held, key)
    if array.ndim == 0 or array.dtype.kind not in kinds or (array.dtype.kind in "fiub" and array.itemsize > 8):
        raise ValueError(f"key: {key!r} is not an array of numbers with rows")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def array_names(path: Path) -> list[str]:
    """List the names of an .npz file's arrays; an empty list for an .npy file, whose array has no name."""
    if path.suffix == ".npy":
        return []
    with _archive(path) as archive:
        return list(_names(archive))


MARGIN = 200 * 2**20  # bytes; no file may make a reader hold more than twice its size and this
_DIRECTORY = 8 * 2**20  # bytes of an archive's list of members, and of anything else that is read in one piece
_LONGEST = 10_000  # characters of an .npy header, numpy's own limit


class _InPieces(io.FileIO):
    """A file of which no more than `_DIRECTORY` bytes are read at once: a list of members cannot fill the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > _DIRECTORY:
            raise ValueError("its list of members is too long")
        return super().read(max(0, size))


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz file."""
    _size(path)
    with _InPieces(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # zipfile raises what its parts do: BadZipFile, struct.error, ..
            raise ValueError(f"not an .npz archive ({_line(error)})") from error
        with archive:
            yield archive


def _names(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's members by the names of their arrays. Raises ValueError for a name that is there twice."""
    members = archive.infolist()
    found = {member.filename.removesuffix(".npy"): member for member in members}
    if len(found) < len(members):
        raise ValueError("not an .npz archive (two arrays have one name)")
    return found


def _read(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """Read one array of a file or member of `size` bytes. Raises ValueError with the array's name if that fails."""
    with _refusing(name):
        start = file.read(8)
        width = {1: 2, 2: 4}.get(start[6] if len(start) == 8 else 0, 0)
        if start[:6] != np.lib.format.MAGIC_PREFIX or not width:
            raise ValueError("not an .npy array of version 1 or 2")
        if (length := int.from_bytes(file.read(width), "little")) > _LONGEST:
            raise ValueError(f"a header of {length:,} bytes")
        file.seek(8)
        header = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size - file.tell():
            raise ValueError(f"{dtype} {list(shape)} is more than the file's {size:,} bytes")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn whatever numpy and zipfile raise for a damaged array into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # the parser of a header alone has five classes of error
        raise ValueError(f"array {name!r} cannot be read: {_line(error)}") from error


def _size(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    return path.stat().st_size


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
