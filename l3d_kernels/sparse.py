"""Store the kept coefficients of a batch: a sparse [S, K] matrix, indexed by sample and by subnetwork."""

from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from l3d_kernels.transforms import readable, transformed


class SparseCoefficients(NamedTuple):
    """The N kept entries of a coefficient matrix [S, K], in row-major order.

    Only `values` may carry autograd history. Row s owns the entries `row_offsets[s]:row_offsets[s + 1]`. Column k owns
    the entries at `column_order[column_offsets[k]:column_offsets[k + 1]]`, positions in the row-major arrays in
    ascending order.
    """

    values: Tensor  # [N] the coefficients, signed
    rows: Tensor  # [N] int64, ascending
    columns: Tensor  # [N] int64, ascending within a row
    row_offsets: Tensor  # [S+1] int64
    column_order: Tensor  # [N] int64, a permutation
    column_offsets: Tensor  # [K+1] int64
    threshold: Tensor  # [] or [groups]: the smallest kept |value|, infinity if nothing is kept; of `above` its bound
    shape: tuple[int, int]  # (S, K)

    def __repr__(self) -> str:
        """Return the sizes, dtype, device and threshold; never the numbers."""
        n, (n_rows, n_columns), bound = len(self.values), self.shape, self.threshold
        shown = f"{bound.item():.4g}" if bound.numel() == 1 and bound.device.type != "meta" else f"{list(bound.shape)}"
        return (
            f"SparseCoefficients({n} kept of {n_rows} x {n_columns}, {self.values.dtype}, {self.values.device}, "
            f"threshold {shown})"
        )

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return where the entries are: (rows, columns, row_offsets, column_order, column_offsets)."""
        return self.rows, self.columns, self.row_offsets, self.column_order, self.column_offsets

    def dense(self) -> Tensor:
        """Return the matrix [S, K], zero where nothing is kept; differentiable in `values`."""
        n_rows, n_columns = self.shape
        flat = self.values.new_zeros(n_rows * n_columns)
        return flat.index_put((self.rows * n_columns + self.columns,), self.values).view(n_rows, n_columns)

    def by_group(self, n_groups: int) -> "SparseCoefficients":
        """Give every group of columns its own rows: [S, K] becomes [S * n_groups, K].

        An entry of sample s and group g moves to row s * n_groups + g; the entries and their order do not change.
        """
        if n_groups == 1:
            return self
        n_rows, n_columns = self.shape
        rows = self.rows * n_groups + torch.div(self.columns, n_columns // n_groups, rounding_mode="floor")
        offsets = _offsets(rows, n_rows * n_groups)
        by_group = self._replace(rows=rows, row_offsets=offsets, shape=(n_rows * n_groups, n_columns))
        return _known(by_group) if _is_known(self) else by_group


def sparse_coefficients(
    values: Tensor, rows: Tensor, columns: Tensor, threshold: Tensor, shape: tuple[int, int]
) -> SparseCoefficients:
    """Index row-major entries (`values`, `rows`, `columns`, each [N]) of an [S, K] matrix by row and by column."""
    if columns.device.type == "cpu" and not transformed():
        return from_arrays(values, rows.numpy(), columns.numpy(), threshold, shape)
    order = torch.argsort(columns, stable=True)
    row_offsets, column_offsets = _offsets(rows, shape[0]), _offsets(columns[order], shape[1])
    return SparseCoefficients(values, rows, columns, row_offsets, order, column_offsets, threshold, shape)


def from_arrays(
    values: Tensor, rows: np.ndarray, columns: np.ndarray, threshold: Tensor, shape: tuple[int, int]
) -> SparseCoefficients:
    """Index entries on a CPU by numpy, whose calls take half as long as torch's; it sorts 16-bit integers by radix."""
    narrow = columns.astype(np.int16 if shape[1] < 1 << 15 else np.int64)
    order = narrow.argsort(kind="stable")
    row_offsets = rows.searchsorted(np.arange(shape[0] + 1))
    column_offsets = narrow[order].searchsorted(np.arange(shape[1] + 1, dtype=narrow.dtype))
    to = torch.from_numpy
    offsets = to(row_offsets), to(order), to(column_offsets)
    return _known(SparseCoefficients(values, to(rows), to(columns), *offsets, threshold, shape))


def kept_where(mask: Tensor, coefficients: Tensor, threshold: Tensor) -> SparseCoefficients:
    """Keep the entries of a coefficient matrix [S, K] where `mask` is true; they stay differentiable."""
    rows, columns = mask.nonzero(as_tuple=True)
    shape = (coefficients.shape[0], coefficients.shape[1])
    return sparse_coefficients(coefficients[rows, columns], rows, columns, threshold, shape)


def above(coefficients: Tensor, threshold: float) -> SparseCoefficients:
    """Keep the entries of magnitude at least `threshold` of a coefficient matrix [S, K].

    Whether an entry is kept depends on no other entry.
    NaN counts as infinitely large, as in `batch_topk`. The values stay differentiable in `coefficients`.

    >>> above(torch.tensor([[3.0, -1.0], [0.5, -4.0]]), 2.0).values
    tensor([ 3., -4.])
    """
    return kept_where(~(coefficients.detach().abs() < threshold), coefficients, coefficients.new_full((), threshold))


def _offsets(groups: Tensor, n_groups: int) -> Tensor:
    """Return where each group starts in `groups` [N], the entries' ascending group numbers: [n_groups + 1] int64."""
    if transformed():  # torch can batch a scatter, but no search
        counts = torch.zeros(n_groups + 1, dtype=torch.int64, device=groups.device)
        return counts.index_add(0, groups + 1, torch.ones_like(groups)).cumsum(0)
    if groups.device.type == "cpu":  # numpy's calls take half as long
        return torch.from_numpy(groups.numpy().searchsorted(np.arange(n_groups + 1)))
    return torch.searchsorted(groups, torch.arange(n_groups + 1, device=groups.device))


# --- checks -----------------------------------------------------------------------------------------------------

# The indices made or checked last, their matrix's shape and versions: ops that share them check them once.
_KNOWN: list[Any] = [(), None, 0]


def _is_known(kept: SparseCoefficients) -> bool:
    """Return whether the indices are those made or checked last."""
    if torch.compiler.is_compiling():
        return False
    known, shape, versions = _KNOWN
    if shape != kept.shape or versions != _versions(kept):
        return False
    rows, columns, row_offsets, column_order, column_offsets = known
    by_row = rows() is kept.rows and row_offsets() is kept.row_offsets
    by_column = column_order() is kept.column_order and column_offsets() is kept.column_offsets
    return by_row and by_column and columns() is kept.columns


def _known(kept: SparseCoefficients) -> SparseCoefficients:
    """Remember that the indices fit each other."""
    if not torch.compiler.is_compiling():
        _KNOWN[:] = [ref(own) for own in kept.indices()], kept.shape, _versions(kept)
    return kept


def _versions(kept: SparseCoefficients) -> int:
    """Count the changes in place of the indices; tensors made under inference_mode count none."""
    rows, columns, row_offsets, column_order, column_offsets = kept.indices()
    try:
        by_row, by_column = rows._version + row_offsets._version, column_order._version + column_offsets._version
        return by_row + by_column + columns._version
    except (RuntimeError, AttributeError):  # AttributeError: no tensors, which the checks say
        return -1


def check_entries(kept: SparseCoefficients, device: torch.device) -> None:
    """Refuse entries on another device, not in row-major order, or whose indices contradict each other.

    Their numbers are read on a CPU only. Raises ValueError that names the field.
    """
    values, rows, (n_rows, n_columns) = kept.values, kept.rows, kept.shape
    same = _is_known(kept) and isinstance(values, Tensor) and values.shape == rows.shape
    if same and values.device == rows.device == device:
        return
    n_entries = len(rows) if isinstance(rows, Tensor) and rows.ndim else 0
    sizes = {"values": n_entries, "rows": n_entries, "columns": n_entries, "row_offsets": n_rows + 1}
    sizes |= {"column_order": n_entries, "column_offsets": n_columns + 1}
    for name, size in sizes.items():
        tensor = getattr(kept, name)
        if not isinstance(tensor, Tensor) or tensor.shape != (size,) or tensor.device != device:
            raise ValueError(f"kept.{name}: expected shape [{size}] on {device}, got {_described(tensor)}")
        if name != "values" and tensor.dtype is not torch.int64:
            raise ValueError(f"kept.{name}: expected int64, got {tensor.dtype}")
    if readable(rows):
        _check_order(kept)
        _known(kept)


def _check_order(kept: SparseCoefficients) -> None:
    """Refuse entries out of range or order, and indices by row or by column that are not theirs."""
    (n_rows, n_columns), (rows, columns, *rest) = kept.shape, (own.numpy() for own in kept.indices())
    row_offsets, column_order, column_offsets = rest
    flat = rows * n_columns + columns
    for name, numbers, stop in (("rows", rows, n_rows), ("columns", columns, n_columns)):
        if ((numbers < 0) | (numbers >= stop)).any():
            raise ValueError(f"kept.{name}: expected 0 to {stop - 1}, got {numbers.min()} to {numbers.max()}")
    if (flat[1:] <= flat[:-1]).any():
        raise ValueError("kept.columns: expected entries in row-major order, none twice; sort them by row and column")
    order = columns.argsort(kind="stable")
    if not np.array_equal(row_offsets, rows.searchsorted(np.arange(n_rows + 1))):
        raise ValueError("kept.row_offsets: expected where each row starts in kept.rows, from 0 to their number")
    if not np.array_equal(column_order, order):
        raise ValueError("kept.column_order: expected the order that sorts kept.columns, equal ones by their position")
    if not np.array_equal(column_offsets, columns[order].searchsorted(np.arange(n_columns + 1))):
        raise ValueError("kept.column_offsets: expected where each column starts in kept.columns[kept.column_order]")


def _described(value: Any) -> str:
    """Return a tensor's shape and device, or the kind of anything else."""
    return f"{list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
