"""Let one process at a time write into a run folder: a lock file names the process, and is deleted at the end."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from l3d.storage.files import read_json, replace_text

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
    """Write the lock file: this process writes into the folder."""
    replace_text(folder / LOCK, json.dumps({"host": platform.node(), "process": os.getpid()}) + "\n")


def release(folder: Path) -> None:
    """Delete the lock file, so that other processes may write into the folder."""
    (folder / LOCK).unlink(missing_ok=True)


def _owner(lock: Path) -> int | None:
    """Return the process that a lock file names, if it is another process of this machine and still runs."""
    try:
        held = read_json(lock)
        process = int(held["process"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if held.get("host") != platform.node() or process == os.getpid() or os.name != "posix":
        return None
    try:
        os.kill(process, 0)  # signal 0 only tests whether the process exists
    except PermissionError:  # the process exists, and belongs to another user
        return process
    except OSError:
        return None
    return process
