"""Match two decompositions' subnetworks one to one, and measure how similar the matched pairs are."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l3d.decomposition.subnetworks import Subnetworks


def match(scores: Tensor) -> Tensor:
    """Match every row to a different column so that the total score is largest; return the columns: [rows] int64.

    scores: [rows, columns], at least as many columns as rows. Exact, by the Hungarian method with potentials. It takes
    about rows² steps over all columns: a second for 200 rows, half a minute for 1,000. Raises ValueError for more rows
    than columns, and for scores that are not finite.

    >>> match(torch.tensor([[0.9, 0.8], [0.7, 0.1]]))
    tensor([1, 0])
    """
    if scores.ndim != 2 or scores.shape[0] > scores.shape[1]:
        raise ValueError(f"scores: expected [rows, columns] with no more rows than columns, got {list(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise ValueError("scores: holds NaN or infinity")
    cost = -scores.detach().double().cpu().numpy()
    n_rows, n_columns = cost.shape
    of_row, of_column = np.zeros(n_rows), np.zeros(n_columns)  # dual variables
    owner = np.full(n_columns, -1)  # the row matched to each column, -1 for a free column
    # invariant: of_row + of_column <= cost, with equality at matched pairs
    for start in range(n_rows):
        # the cheapest augmenting path from row `start` to a free column, found by Dijkstra's method over columns
        slack, before, done = np.full(n_columns, np.inf), np.full(n_columns, -1), np.zeros(n_columns, dtype=bool)
        row, last, length = start, -1, 0.0
        while True:
            reduced = length + cost[row] - of_row[row] - of_column
            shorter = ~done & (reduced < slack)
            slack[shorter], before[shorter] = reduced[shorter], last
            last = int(np.where(done, np.inf, slack).argmin())
            length = slack[last]
            done[last] = True
            if owner[last] < 0:
                break
            row = owner[last]
        seen = done.copy()
        seen[last] = False
        of_row[start] += length
        of_row[owner[seen]] += length - slack[seen]
        of_column[seen] -= length - slack[seen]
        while last >= 0:  # swap matched and unmatched edges along the path
            owner[last] = start if before[last] < 0 else owner[before[last]]
            last = before[last]
    columns = np.empty(n_rows, dtype=np.int64)
    columns[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return torch.from_numpy(columns)


class Consistency(NamedTuple):
    """Similarity of two decompositions of the same parameters, by matched subnetworks."""

    cosines: Tensor  # [K] |cos| of each matched pair, in the first decomposition's order
    partners: Tensor  # [K] int64: index of the matched subnetwork in the second decomposition

    def __repr__(self) -> str:
        """Return the number of pairs, and the mean, median and least |cos|."""
        median, low = self.cosines.median(), self.cosines.min()
        return f"Consistency({len(self.cosines)} pairs; |cos| mean {self.mean:.4g}, median {median:.4g}, min {low:.4g})"

    @property
    def mean(self) -> float:
        """Mean |cos| of the matched pairs, in [0, 1]."""
        return float(self.cosines.mean())


@torch.no_grad()
def consistency(first: Subnetworks, second: Subnetworks) -> Consistency:
    """Match two decompositions' subnetworks one to one by the |cos| of their directions Vout.

    A direction's sign is arbitrary, hence |cos|. Raises ValueError if the two decompose different parameters, or if the
    first has more subnetworks than the second.
    """
    if first.shapes != second.shapes:
        raise ValueError("second: expected a decomposition of the same parameters")
    if first.n_subnetworks > second.n_subnetworks:
        raise ValueError(
            f"first: expected no more subnetworks than second's {second.n_subnetworks}, got {first.n_subnetworks}"
        )
    inner = first.decoder.inner(second.decoder)
    norms = first.decoder.squared_norm()[:, None] * second.decoder.squared_norm().to(inner)
    cosines = (inner.abs() / norms.sqrt().clamp_min(1e-30)).clamp_max(1)
    partners = match(cosines)
    return Consistency(cosines.cpu().gather(1, partners[:, None])[:, 0], partners)
