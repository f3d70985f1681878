"""The caller's modes stay the caller's: what of them the package's own sums take no part in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_precision() -> Iterator[None]:
    """Keep sums in the dtypes they are given, though the caller be in `torch.autocast`: that is for the model."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in on:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)
