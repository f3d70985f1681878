"""Choose each tensor's path in a training step by counted cost.

Costs are in multiply-adds; an element gathered for a kept pair is charged GATHER of them, since gathering is
bound by memory. All paths are exact, so that a wrong guess costs time and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from l3d.decomposition.directions import Directions, Piece, Whole
from l3d.decomposition.flat import is_small
from l3d.gradients.factors import Gradients, Rows, matrix_shape
from l3d_kernels import SparseCoefficients
from l3d_kernels.splitting import energy_costs

# Multiply-adds that one gathered element costs on a CPU. Measured on 2 cores for one tensor (K=100, S=256, T=16, 10 %
# kept; ms for factored, factored and sampled, materialised, materialised and sampled):
#     width 64, rank 6: 74, 25, 7, 18;  width 256, rank 4: 29, 124, 103, 72;  width 256, rank 25: 243, 117, 100, 120
# With this value the cheapest by count is the fastest in all three, and at 2 % kept in the last: 457, 279, 319, 276.
GATHER = 45
# The constant charged for reading and writing intermediates, for each pair of ranks of two directions kept together.
# Measured on 2 cores at 489 kept per sample: 3.1 ns, where a product of width 64 takes 1.2.
PAIR = 150


class Path(NamedTuple):
    """How one tensor's gradients meet the directions."""

    materialised: bool  # multiply the gradient out, whole or in tiles, and project that; else project the rows
    sampled: bool  # after top-k, project the kept pairs only; else all pairs, and pick


class Plan(NamedTuple):
    """How a batch's coefficients and loss are computed; every plan gives the same values up to rounding.

    What is None is chosen by counted cost when the batch is known (`for_batch`).
    """

    backend: str = "auto"  # "auto", "torch" or "triton"
    n_groups: int = 1  # decompositions side by side, each with its own batch top-k and loss
    small: bool | None = None  # multiply everything out (`flat`): worth it where calls cost more than the arithmetic
    paths: Mapping[str, Path] | None = None  # each tensor's path; not used where small
    coactive: bool | None = None  # sum ‖ĝ_s‖² over the pairs that a sample keeps, else from the Gram matrix or tiles

    def for_batch(self, gradients: Gradients, directions: Directions, n_kept: int) -> "Plan":
        """Return the plan for a batch of which `n_kept` coefficients are kept, over all groups."""
        small, paths = self.small, self.paths
        if small is None:
            small = paths is None and self.coactive is None and is_small(gradients, directions, self.backend)
        if paths is None and not small:
            paths = choose_paths(gradients, directions, n_kept)
        return self._replace(small=small, paths=paths)

    def path(self, name: str) -> Path:
        """Return one tensor's path, once it has been chosen."""
        assert self.paths is not None
        return self.paths[name]


@dataclass(frozen=True)
class Sizes:
    """What the cost of projecting one tensor's rows depends on."""

    n_sequences: int  # B
    n_samples: int  # S
    n_positions: int  # T
    n_inputs: int  # I, the width of x
    n_outputs: int  # O, the width of dy
    n_subnetworks: int  # K
    rank: int  # R
    n_kept: int  # N


def projection_costs(s: Sizes) -> dict[Path, float]:
    """Count the multiply-adds of one training step's projections for each possible path.

    A step projects on the encoder (all pairs), on the decoder (kept pairs), and once backward through each. Where the
    gradient is too large to be kept whole, its tiles are formed once more for the backward pass; that is not counted.
    """
    rows = s.n_positions * s.n_subnetworks * s.rank * (s.n_samples * s.n_outputs + s.n_sequences * s.n_inputs)
    area = s.n_inputs * s.n_outputs
    form = s.n_samples * s.n_positions * area
    dense = (s.n_samples + s.rank) * s.n_subnetworks * area
    gathered = s.n_kept * s.n_positions * (s.n_inputs + s.n_outputs)
    sampled = gathered * (s.rank + GATHER)
    return {
        Path(materialised=False, sampled=False): 4 * rows,
        Path(materialised=True, sampled=False): form + 4 * dense,
        Path(materialised=False, sampled=True): rows + 4 * sampled,
        Path(materialised=True, sampled=True): form + dense + 4 * sampled,
    }


def choose_paths(gradients: Gradients, directions: Directions, n_kept: int) -> dict[str, Path]:
    """Choose every tensor's path for a batch of which `n_kept` coefficients are kept."""
    return {name: _choose(gradients, name, piece, n_kept) for name, piece in directions.items()}


def _choose(gradients: Gradients, name: str, piece: Piece, n_kept: int) -> Path:
    parts = [part for part in gradients.parts[name] if isinstance(part, Rows)]
    if isinstance(piece, Whole) or not parts or len(parts) < len(gradients.parts[name]):
        return Path(materialised=False, sampled=False)
    left, _ = piece.factors()
    totals: dict[Path, float] = {}
    for part in parts:
        sizes = Sizes(
            n_sequences=part.x.shape[0],
            n_samples=part.dy.shape[0],
            n_positions=part.dy.shape[1],
            n_inputs=matrix_shape(gradients.shapes[name])[part.x_axis],
            n_outputs=part.dy.shape[2],
            n_subnetworks=left.shape[0],
            rank=left.shape[1],
            n_kept=n_kept,
        )
        for path, cost in projection_costs(sizes).items():
            # indices are gathered, not multiplied: never worth forming one-hot products for, in any of the parts
            if path.materialised and not all(p.x.is_floating_point() for p in parts):
                continue
            totals[path] = totals.get(path, 0.0) + cost
    return min(totals, key=totals.__getitem__)


def coactive_is_cheaper(decoder: Directions, kept: SparseCoefficients, n_groups: int = 1) -> bool:
    """Tell whether ‖ĝ‖² is cheaper over the pairs kept in the same sample, Σ_s n_s², than over all pairs.

    All pairs: the full Gram matrix, or, for fewer samples than subnetworks, tiles of ĝ. With several groups of
    directions, pairs lie within a group, and there is a Gram matrix for each. Backward passes are counted.
    """
    n_rows, n_kept = kept.shape[0] * n_groups, kept.rows.numel()
    sizes = decoder.sizes()
    by_gram, by_tiles = energy_costs((kept.shape[0], kept.shape[1] // n_groups), sizes, backward=True)
    full = n_groups * by_gram if n_groups > 1 else min(by_gram, by_tiles)
    gathered = 3.0 * n_kept * GATHER * sum(rank * (n_outputs + n_inputs) for rank, n_outputs, n_inputs in sizes)
    per_pair = 3.0 * sum(rank**2 * (n_outputs + n_inputs + PAIR) for rank, n_outputs, n_inputs in sizes)
    if gathered + n_kept**2 / n_rows * per_pair >= full:  # Σ n_s² is at least N²/rows, so that it need not be computed
        return False
    if kept.rows.device.type != "cpu":  # nor is a GPU waited for
        return True
    return gathered + int(kept.by_group(n_groups).row_offsets.diff().square().sum()) * per_pair < full
