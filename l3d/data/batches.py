"""Batches from whatever the user has: a tensor, tensors by name, a Dataset, a DataLoader, any iterable of batches.

The first three are read by row: shuffled anew every epoch, by a permutation that depends on the seed and the epoch
alone, so that a run can be resumed at any step. Everything else yields batches as they are and is started over when it
ends.
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

ENDED = object()  # stands for the batch after the last


class Batches:
    """A source of training batches, by step number.

    Args:
        data: a tensor [n, ...], a mapping of such, a Dataset of rows, or an iterable of batches.
        batch_size: rows per batch, but for iterables; the last batch of an epoch may be smaller. A last one of a single
            row, which has no other to refer to, is left out.
        seed: of the order of the rows.
    """

    def __init__(self, data: Any, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, check_whole("batch_size", batch_size), seed
        self.n_rows = count_rows(data)
        if self.n_rows == 0:
            raise ValueError("data: expected at least one sample, got none")
        if self.n_rows is None and (not isinstance(data, Iterable) or isinstance(data, str)):
            raise ValueError(f"data: expected a tensor, Dataset, DataLoader or iterable, got {type(data).__name__}")
        self.per_epoch = None if self.n_rows is None else batches_per_epoch(self.n_rows, batch_size)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._stream: Iterator[Any] | None = None
        self._streamed = 0
        self._first: Any = None  # of a stream, fetched ahead
        self._following: Any = ENDED  # batch of the stream, looked at already
        self._largest = 0  # rows in a batch of the stream so far

    def peek(self) -> Any:
        """Return the first batch, which step 0 will return again."""
        if self.per_epoch is not None:
            return self[0]
        if self._streamed == 0:
            self._first = self._next()
        return self._first

    def __getitem__(self, step: int) -> Any:
        """Return the batch of a step; iterables must be asked for their steps in order."""
        if self.per_epoch is None:
            if step == 0 and self._streamed == 1:
                return self.peek()
            while self._streamed < step:  # a resumed run skips what was seen
                self._next()
            return self._next()
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            assert self.n_rows is not None
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._order = torch.randperm(self.n_rows, generator=generator)
            self._epoch = epoch
        return take(self.data, self._order[index * self.batch_size : (index + 1) * self.batch_size])

    def _next(self) -> Any:
        for _ in range(2):
            if self._stream is None:
                self._stream = iter(self.data)
            batch = self._following if self._following is not ENDED else next(self._stream, ENDED)
            self._following = ENDED
            if batch is not ENDED and rows_in(batch) == 1 < self._largest:
                self._following = next(self._stream, ENDED)
                if self._following is ENDED:  # the single row that an epoch leaves over: see `batches_per_epoch`
                    batch = ENDED
            if batch is ENDED:
                self._stream = None
                continue
            self._largest = max(self._largest, rows_in(batch) or 0)
            self._streamed += 1
            return batch
        raise ValueError(f"data: the iterable ended after {self._streamed} batches and yields nothing when restarted")


def batches_per_epoch(n_rows: int, batch_size: int) -> int:
    """Count the batches that n_rows make; a last one of a single row, which has no other to refer to, is left out.

    >>> batches_per_epoch(66, 32), batches_per_epoch(65, 32)
    (3, 2)
    """
    whole, rest = divmod(n_rows, batch_size)
    return max(1, whole + (rest > 1))


def count_rows(data: Any) -> int | None:
    """Return how many rows a tensor, a mapping of tensors or a Dataset has; None for a stream of batches."""
    if isinstance(data, np.ndarray):
        raise ValueError("data: got a numpy array; pass torch.from_numpy(array)")
    if isinstance(data, Tensor):
        return len(data)
    if isinstance(data, Mapping):
        lengths = {len(value) if isinstance(value, Tensor) and value.ndim else None for value in data.values()}
        if len(lengths) != 1 or None in lengths:
            held = ", ".join(f"{key} {describe(value)}" for key, value in data.items())
            raise ValueError(f"data: expected a mapping of tensors with one row for each sample, got {held or 'none'}")
        return lengths.pop()
    by_row = isinstance(data, Dataset) or hasattr(data, "__getitems__")  # which a dataset of Hugging Face has
    if by_row and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        return len(data)
    return None


def take(data: Any, rows: Tensor | Sequence[int]) -> Any:
    """Collect rows of a tensor or Dataset into a batch."""
    if isinstance(data, Tensor):
        return data[rows.start : rows.stop] if isinstance(rows, range) else data[rows]
    if isinstance(data, Mapping):
        return {key: take(value, rows) for key, value in data.items()}
    try:
        return default_collate([data[int(row)] for row in rows])
    except RuntimeError as error:
        raise ValueError(
            f"data: rows differ in shape; make them alike, and tell padding by an attention_mask ({error})"
        ) from error


def in_order(data: Any, batch_size: int) -> Iterator[Any]:
    """Yield all of the data once, in order; raises ValueError where there is none."""
    check_whole("batch_size", batch_size)
    n_rows = count_rows(data)
    if n_rows is None:
        yield from _stream_in_order(data)
        return
    if n_rows == 0:
        raise ValueError("data: expected at least one sample, got none")
    edges = [*range(0, n_rows, batch_size), n_rows]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]  # a single row has no other sample to refer to: it joins the batch before
    for start, stop in pairwise(edges):
        yield take(data, range(start, stop))


def _stream_in_order(data: Any) -> Iterator[Any]:
    before = last = ENDED
    for batch in data:
        if before is not ENDED:
            yield before
        before, last = last, batch
    if last is ENDED:
        spent = iter(data) is data
        raise ValueError(
            "data: expected at least one batch, got none"
            + ("; an iterator gives its batches once: pass a list or a DataLoader" if spent else "")
        )
    if before is not ENDED:
        joined = join([before, last]) if rows_in(last) == 1 < (rows_in(before) or 0) else None
        if joined is not None:  # as `in_order` does
            yield joined
            return
        yield before
    yield last


def mix(*numbers: int) -> int:
    """Mix numbers into one seed, the same on every machine (splitmix64's finaliser, chained)."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**63
