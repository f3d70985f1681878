"""Check arguments that are a count or a fraction, and warn a caller."""

import operator
import sys
import warnings
from typing import Any

import numpy as np


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


def warn(message: str) -> None:
    """Warn at the caller's own line: the nearest one that is neither ours nor torch's."""
    depth, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("l3d", "torch", "contextlib"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)
