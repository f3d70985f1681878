"""Which entries of a model's output are samples: its rows, or chosen positions of every row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3d.gradients.graph.layout import Layout


class Share(NamedTuple):
    """Which rows of a whole batch the rows at hand are; what is drawn is drawn for the whole, and cut to them."""

    start: int  # the first of them
    n_rows: int  # of the whole batch
    whole: Callable[[Tensor], Tensor]  # their samples' outputs [s, ...] -> those of the whole batch [S, ...]
    padded: bool = False  # whether there is padding anywhere in the whole batch: then all processes refuse it alike


class Samples:
    """The samples of one batch, sequence-major: without padding, sample s is position s % P of row s // P.

    Gradients are extracted for all B·P chosen positions, so that the rows' factors are shared; `of` drops padding.

    Args:
        output: [B, ...] the model's output.
        positions: None (a row is a sample), "all", "last", or how many to draw per row.
        is_kl: all dimensions but the first and last are positions; else dimension 1 is.
        generator: draws positions.
        mask: [B, T] of ones, and zeros at padding, which is no sample: "all" are all others, "last" is the last
            other, and of a row with fewer than are to be drawn all are. `kept` then lists what is a sample.
        share: of which larger batch the rows are a part; there may be no padding in it.
    """

    def __init__(
        self,
        output: Tensor,
        positions: str | int | None,
        is_kl: bool,
        generator: torch.Generator | None,
        mask: Tensor | None = None,
        share: Share | None = None,
    ) -> None:
        self.shape = output.shape
        self.n_rows = output.shape[0]
        self.positions: Tensor | None = None  # [B, P] positions, flat
        self.kept: Tensor | None = None  # of the B·P chosen positions those that are no padding; None: all
        self.per_row = 1
        self.width = output.shape[1:]  # the shape of one sample's output
        if positions is not None and output.ndim >= 3:
            self.width = output.shape[-1:] if is_kl else output.shape[2:]
            self.n_positions = output.shape[1:].numel() // self.width.numel()
            real = None if mask is None else self._real(mask)
            if share is not None and (real is not None or share.padded):
                raise ValueError(
                    "attention_mask: a batch with padding cannot be split over micro-batches or processes; "
                    "cut texts to one length"
                )
            chosen = self._choose(positions, generator, real, share)
            self.positions = chosen.to(output.device)
            self.per_row = chosen.shape[1]
            self._row = torch.arange(self.n_rows, device=output.device)[:, None]
            if real is not None and not (found := real.gather(1, chosen).flatten()).all():
                self.kept = found.nonzero()[:, 0].to(output.device)
        self.count = self.n_rows * self.per_row

    @classmethod
    def joined(cls, output: Tensor, each: Sequence["Samples"]) -> "Samples":
        """Put the samples of batches together whose rows, one batch after the other, make up `output`; no padding."""
        whole = cls(output, None, False, None)
        if each[0].positions is not None:
            whole.positions = torch.cat([samples.positions for samples in each if samples.positions is not None])
            whole.per_row, whole.width, whole.n_positions = each[0].per_row, each[0].width, each[0].n_positions
            whole._row = torch.arange(whole.n_rows, device=output.device)[:, None]
            whole.count = whole.n_rows * whole.per_row
        return whole

    def _real(self, mask: Tensor) -> Tensor | None:
        """Return where the positions are no padding, bool [B, T] on the CPU; None: everywhere."""
        if mask.shape != (self.n_rows, self.n_positions):
            raise ValueError(
                f"attention_mask: expected the shape [{self.n_rows}, {self.n_positions}] of rows and output positions, "
                f"got {list(mask.shape)}"
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask: expected 1 at tokens and 0 at padding, got other values")
        real = mask.cpu() != 0
        if not real.any():
            raise ValueError("attention_mask: every position is padding, so there is no sample")
        return None if real.all() else real

    def _choose(
        self, positions: str | int, generator: torch.Generator | None, real: Tensor | None, share: Share | None
    ) -> Tensor:
        if positions == "all":
            return torch.arange(self.n_positions).expand(self.n_rows, -1)
        if positions == "last":
            last = torch.full((self.n_rows, 1), self.n_positions - 1)
            return last if real is None else (torch.arange(self.n_positions) * real).amax(1, keepdim=True)
        assert isinstance(positions, int)
        if positions > self.n_positions:
            raise ValueError(f"positions: expected at most the output's {self.n_positions}, got {positions}")
        start, n_rows = (0, self.n_rows) if share is None else share[:2]
        draws = torch.rand(n_rows, self.n_positions, generator=generator)[start : start + self.n_rows]
        if real is not None:
            draws += ~real  # padding comes last
        return draws.argsort(1)[:, :positions].sort(1).values

    def of(self, values: Tensor) -> Tensor:
        """Take the samples out of values for all chosen positions, padding included: [B·P, ...] -> [S, ...]."""
        return values if self.kept is None else values[self.kept]

    def spread(self, values: Tensor) -> Tensor:
        """Undo `of`, with zeros at padding: [S, ...] -> [B·P, ...]."""
        if self.kept is None:
            return values
        return values.new_zeros(self.count, *values.shape[1:]).index_copy_(0, self.kept, values)

    def gather(self, output: Tensor) -> Tensor:
        """Pick the samples' outputs, without padding: [B, ...] -> [S, *width]."""
        if output.shape != self.shape:
            raise ValueError(
                f"data: the contrast's output has shape {list(output.shape)}, the input's {list(self.shape)}"
            )
        if self.positions is None:
            return output
        rows = output.reshape(self.n_rows, self.n_positions, *self.width)
        return self.of(rows[self._row, self.positions].flatten(0, 1))

    def scatter(self, d_out: Tensor) -> Tensor:
        """Put gradients [B·P, *width], padding included, where their outputs are, zeros elsewhere: [B, ...]."""
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


def padding_mask(inputs: Any, model: object) -> Tensor | None:
    """Return the mask [B, T] of the model's output positions, where a batch is a mapping and has one.

    That is `attention_mask`; of an encoder and a decoder, whose outputs are the decoder's, `decoder_attention_mask`.
    """
    if not isinstance(inputs, Mapping):
        return None
    has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    has_decoder = has_decoder or any(str(key).startswith("decoder_input") for key in inputs)
    mask = inputs.get("decoder_attention_mask" if has_decoder else "attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected a tensor [rows, positions] that tells padding, got {got}")
    return mask


def check_same_padding(mask: Tensor | None, other: Tensor | None) -> None:
    """Refuse pairs of which one has padding where the other has none: a sample would lack its contrast."""
    given = mask if mask is not None else other
    if given is None:
        return
    one, two = (torch.ones_like(given) if each is None else each for each in (mask, other))
    if one.shape != two.shape or not torch.equal(one != 0, two != 0):
        raise ValueError("attention_mask: expected the contrast's padding to be where the input's is")


@dataclass(frozen=True)
class OwnRows(Layout):
    """A language model's head: of each sequence's rows a sample needs only its own position's."""

    pick: Callable[[Tensor], Tensor]

    def split(self, tensor: Tensor) -> Tensor:
        """Pick the samples' rows: [B*T, D] -> [S, 1, D]."""
        return self.pick(tensor)
