"""Select evenly spaced rows from any kind of data, and collate chosen rows into batches for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from l3d.analysis.view import plain_inputs
from l3d.data.batch import join, without_label
from l3d.data.batches import check_iterable, count_rows, take


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
            check_iterable(data)
            self.data: Any = list(data)
            self._all = join([without_label(batch) for batch in self.data])
            if self._all is None:
                raise ValueError("data: rows differ in shape, so they cannot form a batch")
            self.numbers = list(range(len(plain_inputs(self._all))))
        else:
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
        return without_label(take(self._all, [self.numbers[row] for row in rows]))

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
        batch = self.batch(range(self.count))
        return batch["attention_mask"] != 0 if isinstance(batch, Mapping) and "attention_mask" in batch else None
