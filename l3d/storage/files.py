"""Write files atomically: a reader finds the complete old file or the complete new one, also after a power cut.

JSON is read within bounds, and a folder's links are kept within it.
"""

import json
import math
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from l3d.storage.schema import check, one_line


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


MARGIN = 200 * 2**20  # bytes; no file may make a reader hold more than twice its size and this


def read_json(path: Path, schema: Any = None) -> dict[str, Any]:
    """Read a json object, and check it against a schema of `l3d.storage.schema` if one is given.

    Raises FileNotFoundError or ValueError, with a message of one line: for a name given twice, and for numbers that are
    not finite, too.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder that l3d wrote")
    try:
        content = path.read_bytes() if path.stat().st_size <= 8 * MARGIN else b""
        held = (2 if content.isascii() else 8) * len(content) + 100 * (content.count(b"[") + content.count(b":"))
        held += 200 * content.count(b"{") + 40 * content.count(b",")
        if not content or held > len(content) + MARGIN:
            raise ValueError("empty" if not path.stat().st_size else "it would fill the memory")
        value = json.loads(content.decode(), **_STRICT)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    if schema is not None:
        check(value, schema, str(path))
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


_STRICT: dict[str, Any] = {"object_pairs_hook": _once, "parse_float": _finite, "parse_constant": _finite}


def check_links(folder: Path) -> None:
    """Raise ValueError if a link in a folder, at any depth, leads out of it: nothing is read or deleted through it."""
    home = os.path.realpath(folder)
    for where, folders, names in os.walk(home):  # which follows no links
        for name in [*folders, *names]:
            path = os.path.join(where, name)
            if os.path.islink(path) and not os.path.realpath(path).startswith(home + os.sep):
                shown = folder / os.path.relpath(path, home)
                raise ValueError(f"{shown}: a link to {os.readlink(path)}, outside the folder; delete the link")


def remove(path: Path) -> None:
    """Delete a file, a folder with all in it, or a link but not what it leads to; or nothing, if there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def create_text(path: Path, text: str) -> bool:
    """Write a new text file, whole from its first moment; return False, and write nothing, if there is one already."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: for a moment the file is there and empty
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                return False
        return True
    finally:
        partial.unlink(missing_ok=True)
