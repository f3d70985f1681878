"""Turn autocast off around the package's own arithmetic; it is meant for the user's model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_precision() -> Iterator[None]:
    """Compute in the tensors' own dtypes while the block runs, even inside `torch.autocast`; its flags are restored."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in on:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)
