"""Write files atomically: a reader finds the complete old file or the complete new one, also after a power cut."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class WriteError(OSError):
    """A file cannot be written; the message is one line that names it and the reason, such as a full disk."""

    advised = False  # whether the message says how to go on with the run


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that names the file or folder `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # [(source, target, reason), ..]
            reason = str(error.args[0][0][-1])
        raise WriteError(f"{path}: cannot be written: {reason}") from error


def flush(path: Path) -> None:
    """Wait until the disk holds a file's content, or the names in a folder."""
    if path.is_dir() and os.name != "posix":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_all(paths: Sequence[Path], flushed: bool = True) -> Iterator[list[Path]]:
    """Yield temporary paths beside `paths`, which are in one folder; move those files there if the block succeeds.

    They are moved in the order of `paths`, once all are complete. If anything fails, the temporary files are deleted.
    flushed: flush the files before they are moved, and the folder after. Raises WriteError, which names the file.
    """
    partials = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in paths]
    try:
        with naming(paths[0]):
            yield partials
        for partial, path in zip(partials if flushed else (), paths, strict=False):
            with naming(path):
                flush(partial)
        for partial, path in zip(partials, paths, strict=True):
            with naming(path):
                os.replace(partial, path)
        if flushed:
            with naming(paths[-1]):
                flush(paths[-1].parent)
    finally:
        for partial in partials:
            with suppress(OSError):  # the disk has failed: the first error tells
                partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, flushed: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move that file to `path` if the block succeeds: see `replacing_all`."""
    with replacing_all([path], flushed) as (partial,):
        yield partial


def is_leftover(path: Path) -> bool:
    """Tell whether a file is a temporary one, which a killed process has left."""
    return re.fullmatch(r"\..+\.\d+\.partial", path.name) is not None


def replace_text(path: Path, text: str) -> Path:
    """Write a text file atomically, and return its path."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def replace_between(path: Path, marks: tuple[str, str], text: str | None) -> Path:
    """Replace the text between two marker lines of a file, and return its path; text None only checks the markers.

    Raises FileNotFoundError if the file is missing, and ValueError if a marker line is.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    stripped = [line.strip() for line in lines]
    if marks[0] not in stripped or marks[1] not in stripped[stripped.index(marks[0]) :]:
        raise ValueError(f"{path}: expected the marker lines {marks[0]} and {marks[1]} around the text to replace")
    start = stripped.index(marks[0])
    stop = stripped.index(marks[1], start)
    return path if text is None else replace_text(path, "".join([*lines[: start + 1], text, *lines[stop:]]))


def beginning(path: Path) -> str:
    """Return the first 200 characters of a text file, damaged or not; "" if there is none."""
    return path.read_text(encoding="utf-8", errors="replace")[:200] if path.is_file() else ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a json object. Raises FileNotFoundError or ValueError, with a message of one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder that l3d wrote")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
