"""One process at a time writes into a run folder: a file in it says which, and is gone when the run has ended."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from l3d.storage.files import read_json, replace_text

LOCK = ".lock"


def check_free(folder: Path) -> None:
    """Raise ValueError where another process of this machine is writing into a folder; of other machines none is known.

    What a killed process has left behind is nobody's.
    """
    owner = _owner(folder / LOCK)
    if owner is not None:
        raise ValueError(
            f"out: process {owner} is writing into {folder}; wait for it, or choose another folder "
            f"(if that is no run of l3d any more, delete {folder / LOCK})"
        )


def claim(folder: Path) -> None:
    """Say that this process writes into a folder."""
    replace_text(folder / LOCK, json.dumps({"host": platform.node(), "process": os.getpid()}) + "\n")


def release(folder: Path) -> None:
    """Let others write into the folder."""
    (folder / LOCK).unlink(missing_ok=True)


def _owner(lock: Path) -> int | None:
    """Return the process that a lock names, if it is another one of this machine and still runs."""
    try:
        held = read_json(lock)
        process = int(held["process"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if held.get("host") != platform.node() or process == os.getpid() or os.name != "posix":
        return None
    try:
        os.kill(process, 0)  # only asks whether it is there
    except PermissionError:  # it is, and is somebody else's
        return process
    except OSError:
        return None
    return process
