"""Which entries of a model's output are samples: its rows, or chosen positions of every row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l3d.layout import Layout


class Share(NamedTuple):
    """Which rows of a whole batch the rows at hand are; what is drawn is drawn for the whole, and cut to them."""

    start: int  # the first of them
    n_rows: int  # of the whole batch
    whole: Callable[[Tensor], Tensor]  # their samples' outputs [s, ...] -> those of the whole batch [S, ...]


class Samples:
    """The samples of one batch, sequence-major: sample s is position s % P of row s // P.

    Args:
        output: [B, ...] the model's output.
        positions: None (a row is a sample), "all", "last", or how many to draw per row.
        is_kl: all dimensions but the first and last are positions; else dimension 1 is.
        generator: draws positions.
        share: of which larger batch the rows are a part.
    """

    def __init__(
        self,
        output: Tensor,
        positions: str | int | None,
        is_kl: bool,
        generator: torch.Generator | None,
        share: Share | None = None,
    ) -> None:
        self.shape = output.shape
        self.n_rows = output.shape[0]
        self.positions: Tensor | None = None  # [B, P] positions, flat
        self.per_row = 1
        self.width = output.shape[1:]  # the shape of one sample's output
        if positions is not None and output.ndim >= 3:
            self.width = output.shape[-1:] if is_kl else output.shape[2:]
            self.n_positions = output.shape[1:].numel() // self.width.numel()
            chosen = self._choose(positions, generator, share)
            self.positions = chosen.to(output.device)
            self.per_row = chosen.shape[1]
            self._row = torch.arange(self.n_rows, device=output.device)[:, None]
        self.count = self.n_rows * self.per_row

    def _choose(self, positions: str | int, generator: torch.Generator | None, share: Share | None) -> Tensor:
        if positions == "all":
            return torch.arange(self.n_positions).expand(self.n_rows, -1)
        if positions == "last":
            return torch.full((self.n_rows, 1), self.n_positions - 1)
        assert isinstance(positions, int)
        if positions > self.n_positions:
            raise ValueError(f"positions: expected at most the output's {self.n_positions}, got {positions}")
        start, n_rows = (0, self.n_rows) if share is None else share[:2]
        order = torch.rand(n_rows, self.n_positions, generator=generator)[start : start + self.n_rows].argsort(1)
        return order[:, :positions].sort(1).values

    def gather(self, output: Tensor) -> Tensor:
        """Pick the samples' outputs: [B, ...] -> [S, *width]."""
        if output.shape != self.shape:
            raise ValueError(
                f"data: the contrast's output has shape {list(output.shape)}, the input's {list(self.shape)}"
            )
        if self.positions is None:
            return output
        return output.reshape(self.n_rows, self.n_positions, *self.width)[self._row, self.positions].flatten(0, 1)

    def scatter(self, d_out: Tensor) -> Tensor:
        """Put the samples' gradients [S, *width] where their outputs are, zeros elsewhere: [B, ...]."""
        if self.positions is None:
            return d_out
        whole = d_out.new_zeros(self.n_rows, self.n_positions, *self.width)
        whole[self._row, self.positions] = d_out.unflatten(0, (self.n_rows, self.per_row))
        return whole.view(self.shape)

    def one_by_one(self, whole: Tensor) -> Iterator[Tensor]:
        """Yield `whole` with all but one sample per row zeroed: the first of every row, then the second, ..

        `whole` is laid out by row and position in its leading dimensions, [B, T, ...] or [B*T, ...].
        """
        if self.positions is None:
            yield whole
            return
        by_position = whole.reshape(self.n_rows, self.n_positions, -1)
        for j in range(self.per_row):
            place = (self._row[:, 0], self.positions[:, j])
            alone = torch.zeros_like(by_position)
            alone[place] = by_position[place]
            yield alone.view(whole.shape)

    def own_rows(self, values: Tensor) -> Tensor:
        """Pick each sample's own row from [B*T, D]: [S, 1, D]."""
        assert self.positions is not None
        picked = values.reshape(self.n_rows, self.n_positions, -1)[self._row, self.positions]
        return picked.flatten(0, 1)[:, None]

    def own_layout(self) -> Layout:
        """Return the layout in which every sample keeps only its own row."""
        return OwnRows("major", self.count, self.own_rows)


@dataclass(frozen=True)
class OwnRows(Layout):
    """A language model's head: of each sequence's rows a sample needs only its own position's."""

    pick: Callable[[Tensor], Tensor]

    def split(self, tensor: Tensor) -> Tensor:
        """Pick the samples' rows: [B*T, D] -> [S, 1, D]."""
        return self.pick(tensor)
