"""Arguments that count something."""

import operator
from typing import Any


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number as an int, whoever's integer it is; raises ValueError for anything else, or less.

    >>> import numpy as np
    >>> check_whole("steps", np.int64(3))
    3
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):  # the latter for a tensor of several
        number = least - 1
    if number < least:
        wanted = "a positive whole number" if least == 1 else f"a whole number from {least}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return number
