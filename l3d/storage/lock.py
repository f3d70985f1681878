"""Let one process at a time write into a run folder: a lock file names the process, and is deleted at the end.

The file is created exclusively, so of several processes that start at once one gets the folder. A process is known by
its number and the moment it started, where the system tells that: a number that was given to another process since is
no owner, nor is one that has ended.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from l3d.storage.files import create_text, read_json
from l3d.storage.schema import OWNER

LOCK = ".lock"


def check_free(folder: Path) -> None:
    """Raise ValueError if another process of this machine is writing into a folder.

    A lock of a process that no longer runs is ignored, and so is a lock of another machine, which cannot be checked.
    """
    owner = _owner(folder / LOCK)
    if owner is not None:
        raise ValueError(
            f"out: process {owner} is writing into {folder}; wait for it, or choose another folder "
            f"(if process {owner} is not a run of l3d, delete {folder / LOCK})"
        )


def claim(folder: Path) -> None:
    """Create the lock file: this process writes into the folder. Raises ValueError if another one does."""
    text = json.dumps({"host": platform.node(), "process": os.getpid(), "started": _started(os.getpid())}) + "\n"
    with _alone(folder):  # else a lock that another process has just put in a stale one's place could be deleted
        while not create_text(folder / LOCK, text):
            check_free(folder)
            (folder / LOCK).unlink(missing_ok=True)


def release(folder: Path) -> None:
    """Delete the lock file, if this process owns it, so that other processes may write into the folder."""
    held = _read(folder / LOCK)
    if held is not None and (held["host"], held["process"]) == (platform.node(), os.getpid()):
        (folder / LOCK).unlink(missing_ok=True)


def _owner(lock: Path) -> int | None:
    """Return the process that a lock file names, if it is another process of this machine and still runs."""
    held = _read(lock)
    if held is None or held["host"] != platform.node() or held["process"] == os.getpid() or os.name != "posix":
        return None
    process: int = held["process"]
    try:
        os.kill(process, 0)  # signal 0 only tests whether the process exists
    except PermissionError:  # the process exists, and belongs to another user
        pass
    except (OSError, OverflowError):
        return None
    known, now = held.get("started"), _started(process)
    return None if now == 0 or (known and now and known != now) else process


def _read(lock: Path) -> dict[str, Any] | None:
    """Return what a lock file says; None for none, or one that no process of ours wrote."""
    try:
        return read_json(lock, OWNER)
    except (OSError, ValueError):
        return None


def _started(process: int) -> int | None:
    """Return when a process started, in ticks since the machine did; 0 if it has ended, None where that is unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])  # the fields from the third on, state and starttime
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time replace a stale lock; without a wait where the system has no such locks."""
    held = None
    try:
        with suppress(ImportError, OSError):
            import fcntl

            held = os.open(folder, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        if held is not None:
            os.close(held)  # which lets go
