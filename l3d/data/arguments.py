"""Check arguments that are a count, a fraction, a device or a folder, and warn a caller."""

import operator
import os
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """Return an integer of any kind (int, numpy, one-element tensor) as an int.

    Raises ValueError for anything else, bool included, and for numbers below `least`.

    >>> check_whole("steps", np.int64(3))
    3
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):  # ValueError: a tensor of several entries
        number = least - 1
    if number < least:
        wanted = "a positive whole number" if least == 1 else f"a whole number from {least}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return number


def check_fraction(name: str, value: Any) -> float:
    """Return a number in (0, 1]; a numpy number becomes a float. Raises ValueError for anything else.

    >>> check_fraction("k", 0.1)
    0.1
    """
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= 1:
        raise ValueError(f"{name}: expected a fraction in (0, 1], got {value!r}")
    return number


def check_index(index: int, n_subnetworks: int) -> None:
    """Refuse a subnetwork that does not exist; a negative index would count from the end where it is read.

    Raises ValueError.
    """
    if not 0 <= index < n_subnetworks:
        raise ValueError(f"index: expected 0 <= index < {n_subnetworks}, got {index}")


def check_device(value: Any, name: str = "device") -> torch.device:
    """Return a device that is there and can hold values. Raises ValueError for anything else.

    >>> check_device("cpu")
    device(type='cpu')
    """
    reason = ""
    if isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
        try:
            device = torch.device(value)
            reason = "it holds no values"
            if device.type != "meta":
                torch.empty(0, device=device)
                return device
        except Exception as error:  # each kind of device has its own way to say that it is not there
            reason = str(error).partition("\n")[0] if reason else ""
    shown = value if isinstance(value, str) and value else repr(value)
    because = f" ({reason})" if reason else ""
    raise ValueError(f"{name}: {shown} cannot be used{because}; expected cpu, or a GPU that is there: cuda, cuda:1, ..")


def check_folder(name: str, value: Any) -> Path:
    """Return the path of a folder, which need not exist yet.

    Raises ValueError for what is no path, is empty, lies below a file, or cannot be looked up.
    """
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ValueError(f"{name}: expected the path of a folder, got {value!r}")
    path = Path(value)
    for at in (path, *path.parents):
        try:
            found = os.stat(at)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{name}: {path} cannot be used ({error.strerror})") from error
        if at != path and not stat.S_ISDIR(found.st_mode):
            raise ValueError(f"{name}: {path} lies below {at}, which is a file; name another folder")
        break
    return path


def warn(message: str) -> None:
    """Warn at the caller's own line: the nearest one that is neither ours nor torch's."""
    depth, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("l3d", "torch", "contextlib"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)
