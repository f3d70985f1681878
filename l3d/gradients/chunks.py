"""A batch's gradients, some samples at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from l3d.gradients.factors import Gradients, concatenate


class Chunks:
    """A batch's gradients, some samples at a time; walked over as often as needed.

    Args:
        make: returns a chunk; it may hold it ready or extract it anew each time.
        n_chunks: how many there are.
    """

    def __init__(self, make: Callable[[int], Gradients], n_chunks: int) -> None:
        self.make, self.n_chunks = make, n_chunks
        self.sizes: list[int] = []  # samples in each chunk, known once they have been walked over

    @classmethod
    def of(cls, gradients: Gradients, size: int) -> "Chunks":
        """Cut a batch that is at hand into chunks of so many samples."""
        n = gradients.n_samples
        return cls(lambda i: gradients.between(i * size, min(n, (i + 1) * size)), -(-n // size))

    @classmethod
    def held(cls, chunks: Sequence[Gradients]) -> "Chunks":
        """Take chunks that are at hand."""
        return cls(chunks.__getitem__, len(chunks))

    def __iter__(self) -> Iterator[Gradients]:
        """Walk over the chunks."""
        for i in range(self.n_chunks):
            yield self.make(i)

    @property
    def n_samples(self) -> int:
        """S."""
        if not self.sizes:
            self.sizes = [chunk.n_samples for chunk in self]
        return sum(self.sizes)

    def squared_norm(self) -> Tensor:
        """Return ‖g_s‖²: [S]."""
        return torch.cat([chunk.squared_norm() for chunk in self])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Walk over (parameter name, tensor) of all parts of all chunks."""
        for chunk in self:
            yield from chunk.tensors()

    def select(self, samples: Tensor) -> Gradients:
        """Take some samples [n], in that order."""
        found, places, start = [], [], 0
        for chunk in self:
            mine = ((samples >= start) & (samples < start + chunk.n_samples)).nonzero()[:, 0]
            if len(mine):
                found.append(chunk.select(samples[mine] - start))
                places.append(mine)
            start += chunk.n_samples
        return concatenate(found).select(torch.argsort(torch.cat(places)))
