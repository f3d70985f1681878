"""Iterate over a batch's gradients in chunks of samples, to use less memory."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from l3d.gradients.factors import Gradients, concatenate


class Chunks:
    """A batch's gradients in chunks of samples, which can be iterated over any number of times.

    Args:
        make: returns the chunk with a number; it may keep the chunks or extract them again.
        n_chunks: number of chunks.
    """

    def __init__(self, make: Callable[[int], Gradients], n_chunks: int) -> None:
        self.make, self.n_chunks = make, n_chunks
        self.sizes: list[int] = []  # samples in each chunk; empty until they have been counted

    @classmethod
    def of(cls, gradients: Gradients, size: int) -> "Chunks":
        """Cut extracted gradients into chunks of `size` samples."""
        n = gradients.n_samples
        return cls(lambda i: gradients.between(i * size, min(n, (i + 1) * size)), -(-n // size))

    @classmethod
    def held(cls, chunks: Sequence[Gradients]) -> "Chunks":
        """Use chunks that have been extracted."""
        return cls(chunks.__getitem__, len(chunks))

    def __iter__(self) -> Iterator[Gradients]:
        """Yield the chunks in order."""
        for i in range(self.n_chunks):
            yield self.make(i)

    @property
    def n_samples(self) -> int:
        """The number of samples, S."""
        if not self.sizes:
            self.sizes = [chunk.n_samples for chunk in self]
        return sum(self.sizes)

    def squared_norm(self) -> Tensor:
        """Return ‖g_s‖²: [S]."""
        return torch.cat([chunk.squared_norm() for chunk in self])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter name, tensor) for all parts of all chunks."""
        for chunk in self:
            yield from chunk.tensors()

    def select(self, samples: Tensor) -> Gradients:
        """Return the gradients of the given samples, int64 [n], in that order."""
        found, places, start = [], [], 0
        for chunk in self:
            mine = ((samples >= start) & (samples < start + chunk.n_samples)).nonzero()[:, 0]
            if len(mine):
                found.append(chunk.select(samples[mine] - start))
                places.append(mine)
            start += chunk.n_samples
        return concatenate(found).select(torch.argsort(torch.cat(places)))
