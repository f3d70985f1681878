"""The kept coefficients of a batch: a sparse [S, K] matrix that can be walked by sample and by subnetwork."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SparseCoefficients(NamedTuple):
    """The N kept entries of a coefficient matrix [S, K], in row-major order.

    `values` may carry autograd history; every other field is plain data. Row s owns the entries
    `row_offsets[s]:row_offsets[s + 1]`; column k owns `column_order[column_offsets[k]:column_offsets[k + 1]]`,
    which are positions in the row-major arrays, themselves in ascending row order.
    """

    values: Tensor  # [N] the coefficients, signed
    rows: Tensor  # [N] int64, ascending
    columns: Tensor  # [N] int64, ascending within a row
    row_offsets: Tensor  # [S+1] int64
    column_order: Tensor  # [N] int64, a permutation
    column_offsets: Tensor  # [K+1] int64
    threshold: Tensor  # [] or [groups]: the smallest kept |value|, infinity where nothing is kept; of `above` its bound
    shape: tuple[int, int]  # (S, K)

    def dense(self) -> Tensor:
        """Return the matrix [S, K] with zeros where nothing was kept; differentiable in `values`."""
        n_rows, n_columns = self.shape
        flat = self.values.new_zeros(n_rows * n_columns)
        return flat.index_put((self.rows * n_columns + self.columns,), self.values).view(n_rows, n_columns)

    def by_group(self, n_groups: int) -> "SparseCoefficients":
        """Give every group of columns rows of its own: [S, K] becomes [S * n_groups, K], block-diagonal in each row.

        The entries and their order stay; an entry of sample s and group g is then in row s * n_groups + g.
        """
        if n_groups == 1:
            return self
        n_rows, n_columns = self.shape
        rows = self.rows * n_groups + torch.div(self.columns, n_columns // n_groups, rounding_mode="floor")
        offsets = _offsets(rows, n_rows * n_groups)
        return self._replace(rows=rows, row_offsets=offsets, shape=(n_rows * n_groups, n_columns))


def sparse_coefficients(
    values: Tensor, rows: Tensor, columns: Tensor, threshold: Tensor, shape: tuple[int, int]
) -> SparseCoefficients:
    """Index row-major entries (`values`, `rows`, `columns`, each [N]) of an [S, K] matrix by row and by column."""
    if columns.device.type == "cpu":
        return from_arrays(values, rows.numpy(), columns.numpy(), threshold, shape)
    order = torch.argsort(columns, stable=True)
    row_offsets, column_offsets = _offsets(rows, shape[0]), _offsets(columns[order], shape[1])
    return SparseCoefficients(values, rows, columns, row_offsets, order, column_offsets, threshold, shape)


def from_arrays(
    values: Tensor, rows: np.ndarray, columns: np.ndarray, threshold: Tensor, shape: tuple[int, int]
) -> SparseCoefficients:
    """`sparse_coefficients` on a CPU by numpy: its calls take half as long as torch's; it sorts 16 bits by radix."""
    narrow = columns.astype(np.int16 if shape[1] < 1 << 15 else np.int64)
    order = narrow.argsort(kind="stable")
    row_offsets = rows.searchsorted(np.arange(shape[0] + 1))
    column_offsets = narrow[order].searchsorted(np.arange(shape[1] + 1, dtype=narrow.dtype))
    to = torch.from_numpy
    offsets = to(row_offsets), to(order), to(column_offsets)
    return SparseCoefficients(values, to(rows), to(columns), *offsets, threshold, shape)


def above(coefficients: Tensor, threshold: float) -> SparseCoefficients:
    """Return the entries of magnitude at least `threshold` of a coefficient matrix [S, K], each row by itself.

    NaN counts as infinitely large, as in `batch_topk`. The values stay differentiable in `coefficients`.

    >>> above(torch.tensor([[3.0, -1.0], [0.5, -4.0]]), 2.0).values
    tensor([ 3., -4.])
    """
    rows, columns = (~(coefficients.detach().abs() < threshold)).nonzero(as_tuple=True)
    bound = coefficients.new_full((), threshold)
    return sparse_coefficients(
        coefficients[rows, columns], rows, columns, bound, (coefficients.shape[0], coefficients.shape[1])
    )


def _offsets(groups: Tensor, n_groups: int) -> Tensor:
    """Return where each group starts among its members' ascending numbers [N]: [n_groups + 1] int64."""
    if groups.device.type == "cpu":  # numpy's calls take half as long
        return torch.from_numpy(groups.numpy().searchsorted(np.arange(n_groups + 1)))
    return torch.searchsorted(groups, torch.arange(n_groups + 1, device=groups.device))
