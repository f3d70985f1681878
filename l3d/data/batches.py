"""Make batches from the user's data: a tensor, a mapping of tensors, a Dataset, a DataLoader, any iterable of batches.

Tensors, mappings and Datasets are read by row. Every epoch shuffles their rows by a permutation that depends on the
seed and the epoch only, so a run can be resumed at any step. Anything else yields batches, which are passed on
unchanged; an iterable that ends is started again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from l3d.data.arguments import check_whole
from l3d.data.batch import describe, join, rows_in

ENDED = object()  # marks the end of a stream of batches


class Batches:
    """A source of training batches, by step number.

    Args:
        data: a tensor [n, ...], a mapping of such tensors, a Dataset of rows, or an iterable of batches.
        batch_size: rows per batch; an iterable decides for itself. The last batch of an epoch may be smaller. If it
            would be a single row, it is dropped: reference="sample" needs a second row.
        seed: seeds the order of the rows.

    Raises ValueError for data without rows or of another type, and for a batch_size that is not positive.
    """

    def __init__(self, data: Any, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, check_whole("batch_size", batch_size), seed
        self.n_rows = count_rows(data)
        if self.n_rows == 0:
            raise ValueError("data: expected at least one sample, got none")
        if self.n_rows is None:
            check_iterable(data)
        self.per_epoch = None if self.n_rows is None else batches_per_epoch(self.n_rows, batch_size)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64, device="cpu")
        self._stream: Iterator[Any] | None = None
        self._streamed = 0
        self._first: Any = None  # first batch of a stream, fetched by `peek`
        self._following: Any = ENDED  # next batch of the stream, if it has been read already
        self._largest = 0  # most rows seen in a batch of the stream

    def peek(self) -> Any:
        """Return the first batch without consuming it: step 0 returns it again."""
        if self.per_epoch is not None:
            return self[0]
        if self._streamed == 0:
            self._first = self._next()
        return self._first

    def __getitem__(self, step: int) -> Any:
        """Return the batch of a step. Steps of an iterable must be asked for in increasing order."""
        if self.per_epoch is None:
            if step == 0 and self._streamed == 1:
                return self.peek()
            while self._streamed < step:  # a resumed run skips the batches it has trained on
                self._next()
            return self._next()
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            assert self.n_rows is not None
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._order = torch.randperm(self.n_rows, generator=generator, device="cpu")
            self._epoch = epoch
        return take(self.data, self._order[index * self.batch_size : (index + 1) * self.batch_size])

    def _next(self) -> Any:
        """Read the stream's next batch, starting the iterable again once if it has ended."""
        for _ in range(2):
            if self._stream is None:
                self._stream = iter(self.data)
            batch = self._following if self._following is not ENDED else next(self._stream, ENDED)
            self._following = ENDED
            if batch is not ENDED and rows_in(batch) == 1 < self._largest:
                self._following = next(self._stream, ENDED)
                if self._following is ENDED:  # drop an epoch's last batch of a single row, as `batches_per_epoch` does
                    batch = ENDED
            if batch is ENDED:
                self._stream = None
                continue
            self._largest = max(self._largest, rows_in(batch) or 0)
            self._streamed += 1
            return batch
        raise ValueError(f"data: the iterable ended after {self._streamed} batches and yields nothing when restarted")


def batches_per_epoch(n_rows: int, batch_size: int) -> int:
    """Count an epoch's batches. A last batch of a single row is dropped: it has no second row as its reference.

    >>> batches_per_epoch(66, 32), batches_per_epoch(65, 32)
    (3, 2)
    """
    whole, rest = divmod(n_rows, batch_size)
    return max(1, whole + (rest > 1))


def count_rows(data: Any) -> int | None:
    """Return how many rows a tensor, a mapping of tensors or a Dataset has; None for an iterable of batches.

    Raises ValueError for a numpy array, for a sparse tensor or a single number, for a mapping whose values are not
    tensors of one length, and for a tuple of tensors of one length that may mean batches, or rows with labels or
    contrasts: of two, or of more that are not alike.
    """
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(each, Tensor) and each.ndim for each in data):
        alike = len({(each.shape[1:], each.dtype) for each in data}) == 1 and len(data) > 2
        if len({len(each) for each in data}) == 1 and not alike:
            count = "two" if len(data) == 2 else str(len(data))
            raise ValueError(
                f"data: a tuple of {count} tensors would be {count} batches; pass torch.utils.data.TensorDataset(x, y) "
                "for rows that are pairs, x alone for rows, or a list for batches"
            )
    if isinstance(data, np.ndarray):
        raise ValueError("data: got a numpy array; pass torch.from_numpy(array)")
    if isinstance(data, Tensor):
        if data.ndim == 0 or data.layout != torch.strided:
            got = "a single number" if data.ndim == 0 else f"a tensor of layout {data.layout}; pass data.to_dense()"
            raise ValueError(f"data: expected an ordinary tensor with a row for each sample, got {got}")
        return len(data)
    if isinstance(data, Mapping):
        lengths = {len(value) if isinstance(value, Tensor) and value.ndim else None for value in data.values()}
        if len(lengths) != 1 or None in lengths:
            held = ", ".join(f"{key} {describe(value)}" for key, value in data.items())
            raise ValueError(f"data: expected a mapping of tensors with one row for each sample, got {held or 'none'}")
        return lengths.pop()
    by_row = isinstance(data, Dataset) or hasattr(data, "__getitems__")  # Hugging Face datasets have it
    return len(data) if by_row and hasattr(data, "__len__") and not isinstance(data, IterableDataset) else None


def take(data: Any, rows: Tensor | Sequence[int]) -> Any:
    """Collect rows of a tensor, mapping or Dataset into a batch. Raises ValueError if rows differ in shape."""
    if isinstance(data, Tensor):
        return data[rows.start : rows.stop] if isinstance(rows, range) else data[rows]
    if isinstance(data, Mapping):
        return {key: take(value, rows) for key, value in data.items()}
    try:
        found = [data[int(row)] for row in rows]
        with torch.device("cpu"):  # a batch is moved to the model's device, whatever torch's default is
            return default_collate(found)
    except RuntimeError as error:
        raise ValueError(
            f"data: rows differ in shape; pad them to one shape and mark the padding in an attention_mask ({error})"
        ) from error


def in_order(data: Any, batch_size: int) -> Iterator[Any]:
    """Yield all of the data once, in order. Raises ValueError if there is none.

    A last batch of a single row is joined to the batch before: reference="sample" needs a second row.
    """
    check_whole("batch_size", batch_size)
    n_rows = count_rows(data)
    if n_rows is None:
        yield from _stream_in_order(data)
        return
    if n_rows == 0:
        raise ValueError("data: expected at least one sample, got none")
    edges = [*range(0, n_rows, batch_size), n_rows]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]  # join a single last row to the batch before
    for start, stop in pairwise(edges):
        yield take(data, range(start, stop))


def check_iterable(data: Any) -> None:
    """Raise ValueError for data that yield no batches: numbers, texts, models."""
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise ValueError(f"data: expected a tensor, Dataset, DataLoader or iterable, got {type(data).__name__}")


def _stream_in_order(data: Any) -> Iterator[Any]:
    """Yield an iterable's batches once; a last batch of a single row is joined to the batch before."""
    check_iterable(data)
    held: list[Any] = []  # the last two batches
    for batch in data:
        held.append(batch)
        if len(held) > 2:
            yield held.pop(0)
    if not held:
        spent = iter(data) is data
        raise ValueError(
            "data: expected at least one batch, got none"
            + ("; an iterator can be read only once: pass a list or a DataLoader" if spent else "")
        )
    if len(held) == 2 and rows_in(held[1]) == 1 < (rows_in(held[0]) or 0):
        joined = join(held)
        held = held if joined is None else [joined]  # as in `in_order`
    yield from held


def mix(*numbers: int) -> int:
    """Mix numbers into one seed, the same on every machine (splitmix64's finaliser, chained)."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**63
