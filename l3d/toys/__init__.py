"""Build toy models with known circuits, and measure whether a decomposition finds them.

What comes in is a toy's name and a seed. What goes out is a `Toy`: a trained model, data, recommended settings and
true circuits, with measures of how well a decomposition recovers them. Read `recipes` first, then `recovery`.

    tms           five sparse features through two hidden units and back: one circuit per feature
    tms_parallel  three of those side by side in one network
    tms_40_10     forty features through ten hidden units
    tmcs          x -> Ax through too few hidden units: one circuit per column of A
    high_rank     the same with features present in groups: one circuit per group, of higher rank
    squared       x -> x² by a deep network: one circuit per input

A circuit is a direction in parameter space. In `tms`, feature i acts by its gain W_out[i] · W_in[:, i], so its circuit
is the gradient of that gain: W_out[i] in column i of W_in, W_in[:, i] in row i of W_out, zeros elsewhere.
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
    """Build and train a toy model, the same for the same seed, or load it from the cache.

    Args:
        name: one of `NAMES`.
        seed: seeds the task, the model's training and the points to decompose it on.

    Raises ValueError for any other name.
    """
    if name not in RECIPES:
        raise ValueError(f"toy: expected one of {', '.join(NAMES)}, got {name!r}")
    return RECIPES[name](seed)
