"""Toy models whose circuits are known, to see whether a decomposition finds them.

    tms           five sparse features through two hidden units and back: one circuit per feature
    tms_parallel  three of those side by side in one network
    tms_40_10     forty features through ten
    tmcs          x -> Ax through too few hidden units: one circuit per column of A
    high_rank     the same with features that are present in groups: one circuit, of higher rank, per group
    squared       x -> x² by a deep network: one circuit per input

A circuit is a direction in parameter space. What feature i of `tms` does is its gain W_out[i] . W_in[:, i], so its
circuit is the gradient of that gain: W_out[i] in column i of W_in, W_in[:, i] in row i of W_out, nothing elsewhere.
"""

from l3d.toys.networks import Deep, Network, Superposition, one_thread
from l3d.toys.recipes import RECIPES
from l3d.toys.sampling import grouped_features, signed_features, sparse_features
from l3d.toys.toy import Toy

__all__ = [
    "NAMES",
    "Deep",
    "Network",
    "Superposition",
    "Toy",
    "grouped_features",
    "make",
    "one_thread",
    "signed_features",
    "sparse_features",
]

NAMES = tuple(RECIPES)


def make(name: str, seed: int = 0) -> Toy:
    """Build and train a toy model, the same for the same seed; from the cache where it has been trained before.

    Args:
        name: one of `NAMES`.
        seed: of the task, the model's training and the points to decompose it on.

    Raises ValueError for a name that is none.
    """
    if name not in RECIPES:
        raise ValueError(f"toy: expected one of {', '.join(NAMES)}, got {name!r}")
    return RECIPES[name](seed)
