"""Select evenly spaced rows from any kind of data, and collate chosen rows into batches for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import Subset, default_collate

from l3d.analysis.view import plain_inputs
from l3d.data.batches import count_rows, take


class ShownRows:
    """At most `most` rows of a tensor, mapping of tensors, Dataset or list of batches.

    Attributes:
        data: the selected rows, in a form that `impact` and `evaluate` take.
        count: number of rows.
        numbers: [count] index of each row in the original data.
    """

    def __init__(self, data: Any, most: int) -> None:
        count = count_rows(data)
        if count is None:  # a list of batches that the caller took from a stream
            batches = list(data)
            sizes = [len(plain_inputs(batch)) for batch in batches]
            self._row = lambda i: _row_of(batches, sizes, i)
            self.data: Any = batches
            self.numbers = list(range(sum(sizes)))
        else:
            self._row = partial(_row_in, data) if isinstance(data, Mapping) else data.__getitem__
            self._all = data
            self._keep([i * count // min(most, count) for i in range(min(most, count))])

    @property
    def count(self) -> int:
        """Number of selected rows."""
        return len(self.numbers)

    def limit(self, most: int) -> None:
        """Keep at most `most` of the rows, again evenly spaced; a list of batches is kept whole."""
        if not isinstance(self.data, list) and self.count > most:
            self._keep([self.numbers[i * self.count // most] for i in range(most)])

    def _keep(self, numbers: list[int]) -> None:
        self.numbers = numbers
        by_row = not isinstance(self._all, (Tensor, Mapping))
        self.data = Subset(self._all, numbers) if by_row else take(self._all, numbers)

    def batch(self, rows: Sequence[int]) -> Any:
        """Return rows (numbers below `count`) as one batch for the model, without labels and contrasts."""
        try:
            batch = default_collate([self._row(self.numbers[row]) for row in rows])
        except RuntimeError as error:
            raise ValueError(f"data: rows differ in shape, so they cannot form a batch ({error})") from error
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def batches(self, rows: Sequence[Sequence[int]]) -> Any:
        """Return C batches of m rows each, stacked: [C, m, ...]."""
        flat = self.batch([row for each in rows for row in each])
        shape = (len(rows), len(rows[0]))
        if isinstance(flat, Mapping):
            return {name: value.unflatten(0, shape) for name, value in flat.items()}
        return flat.unflatten(0, shape)

    def inputs(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the input tensor of some rows, or of all, for display: [n, ...]."""
        return plain_inputs(self.batch(range(self.count) if rows is None else rows))

    def mask(self) -> Tensor | None:
        """Return the rows' `attention_mask` as bool [count, T], False at padding; None if the data have none."""
        if not isinstance(self.batch([0]), Mapping) or "attention_mask" not in self.batch([0]):
            return None
        return self.batch(range(self.count))["attention_mask"] != 0


def _row_in(data: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return one row of a mapping of tensors."""
    return {name: values[index] for name, values in data.items()}


def _row_of(batches: list[Any], sizes: list[int], index: int) -> Any:
    """Return one row of a list of batches."""
    for batch, size in zip(batches, sizes, strict=True):
        if index < size:
            whole = batch[0] if isinstance(batch, (tuple, list)) else batch
            return _row_in(whole, index) if isinstance(whole, Mapping) else whole[index]
        index -= size
    raise IndexError(index)
