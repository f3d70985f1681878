"""Write files atomically: a reader finds the complete old file or the complete new one."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move that file to `path` if the block raises nothing, else delete it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
