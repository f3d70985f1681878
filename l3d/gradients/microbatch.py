"""Extract a batch's gradients in chunks of rows, and split over ranks: the same gradients with less memory.

A sample's reference may depend on the other rows (another sample's output, or the mean), and random draws are made for
the whole batch. So if there is more than one chunk, the outputs of the whole batch are computed first, without
autograd; each chunk then gets them with its own place in the batch (`l3d.gradients.samples.BatchPart`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from l3d.data.batch import count_rows_of, rows_of, without_label
from l3d.distributed.process_group import ProcessGroup
from l3d.gradients.chunks import Chunks
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Dense, Gradients, Part, Place, Rows, place_of
from l3d.gradients.samples import BatchPart, padding_mask


class Microbatches:
    """A batch in chunks of at most `size` rows; all ranks together extract a chunk when it is asked for.

    Args:
        extractor: extracts the model's gradients.
        batch: B rows of data.
        generator: returns the generator that draws positions and references, in the same state on every call.
        size: rows per chunk; None for all.
        group: the processes that split each chunk's rows; all must ask for the same chunks in the same order.
    """

    def __init__(
        self,
        extractor: Extractor,
        batch: Any,
        generator: Callable[[], torch.Generator],
        size: int | None,
        group: ProcessGroup | None,
    ) -> None:
        self.extractor, self.batch, self.generator, self.group = extractor, batch, generator, group
        self.whole = size is None and group is None
        self.n_rows = 1 if self.whole else count_rows_of(batch)
        self.size = self.n_rows if size is None else size
        mask = None if self.whole else padding_mask(without_label(batch), extractor.model)
        self.padded = mask is not None and bool((mask == 0).any())
        self.outputs: Tensor | None = None  # outputs of all samples, [S, ...], if references need them
        if len(self) > 1 and extractor.needs_whole():
            self.outputs = torch.cat([self._outputs(i) for i in range(len(self))])

    def __len__(self) -> int:
        """Return the number of chunks."""
        return max(1, -(-self.n_rows // self.size))

    def __call__(self, index: int) -> Gradients:
        """Return the gradients of a chunk, the same on every rank."""
        if self.whole:
            return self.extractor(self.batch, self.generator())
        rows, split = self._rows(index)
        gradients = self.extractor(rows_of(self.batch, rows), self.generator(), self._batch_part(rows, split))
        return gather_gradients(self.group, gradients) if self.group is not None and split else gradients

    def _outputs(self, index: int) -> Tensor:
        """Return the outputs of a chunk's samples, on every rank: [s, ...]."""
        rows, split = self._rows(index)
        part = self._batch_part(rows, split)
        return self._whole(self.extractor.outputs(rows_of(self.batch, rows), self.generator(), part), split)

    def _whole(self, own: Tensor, split: bool) -> Tensor:
        """Return the outputs of the batch if they are known, else those of the chunk, of which this rank has `own`."""
        if self.outputs is not None:
            return self.outputs
        return self.group.gather(own) if self.group is not None and split else own

    def _rows(self, index: int) -> tuple[slice, bool]:
        """Return the rows of a chunk that this rank extracts, and whether the chunk is split over the ranks."""
        start, stop = index * self.size, min(self.n_rows, (index + 1) * self.size)
        if self.group is None or stop - start < self.group.size:  # fewer rows than ranks: each extracts all
            return slice(start, stop), False
        own = self.group.share(stop - start)
        return slice(start + own.start, start + own.stop), True

    def _batch_part(self, rows: slice, split: bool) -> BatchPart | None:
        """Return the place of these rows in the batch; None if they are all of it."""
        if len(self) == 1 and not split:
            return None
        return BatchPart(rows.start, self.n_rows, partial(self._whole, split=split), self.padded)


def gather_gradients(group: ProcessGroup, own: Gradients) -> Gradients:
    """Append every rank's samples; a tensor that several parts share is sent once."""
    done: dict[Place, Tensor] = {}

    def gathered(tensor: Tensor) -> Tensor:
        place = place_of(tensor)
        if place not in done:
            done[place] = group.gather(tensor)
        return done[place]

    def whole(part: Part) -> Part:
        if isinstance(part, Dense):
            return Dense(gathered(part.grad))
        return Rows(gathered(part.x), gathered(part.dy), part.x_axis)

    return own.changed(whole, n_samples=int(group.total(torch.tensor(own.n_samples, device=own.device))))


def in_chunks(microbatches: Microbatches, keep: bool, held: Callable[[Gradients], Gradients]) -> Chunks:
    """Return a batch's gradients in chunks: extracted once and kept, or (keep=False) again in every iteration.

    held: is applied to each extracted chunk, for example to hold it in a narrower dtype.
    """
    if keep:
        return Chunks.held([held(microbatches(i)) for i in range(len(microbatches))])
    return Chunks(lambda i: held(microbatches(i)), len(microbatches))
