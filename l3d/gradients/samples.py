"""Choose which entries of a model's output are samples: its rows, or positions of every row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3d.data.batch import sent
from l3d.gradients.graph.layout import Layout


class BatchPart(NamedTuple):
    """The place of some rows in a larger batch. Random draws are made for the larger batch and cut to the rows."""

    start: int  # index of the first row in the larger batch
    n_rows: int  # rows of the larger batch
    whole: Callable[[Tensor], Tensor]  # these samples' outputs [s, ...] -> outputs of the larger batch [S, ...]
    padded: bool = False  # padding anywhere in the larger batch: then every process raises ValueError


class Samples:
    """The samples of one batch, sequence-major: without padding, sample s is position s % P of row s // P.

    Gradients are extracted for all B·P chosen positions, so that the samples of a row share its factors; `of` then
    drops those at padding.

    Args:
        output: [B, ...] the model's output.
        positions: None (a row is a sample), "all", "last", or how many to draw per row.
        is_kl: all dimensions but the first and last are positions; else dimension 1 is.
        generator: draws positions.
        mask: [B, T], 1 at tokens and 0 at padding. Padding is never a sample: "all" takes all tokens, "last" the last
            token, and a row with fewer tokens than are to be drawn gives all of them. `kept` lists the samples.
        part: the place of these rows in a larger batch, which must have no padding; None if they are all.

    Raises ValueError for a mask of another shape or other values, for more positions than the output has, and for
    padding in a batch that is split.
    """

    def __init__(
        self,
        output: Tensor,
        positions: str | int | None,
        is_kl: bool,
        generator: torch.Generator | None,
        mask: Tensor | None = None,
        part: BatchPart | None = None,
    ) -> None:
        self.shape, self.n_rows, self.part = output.shape, output.shape[0], part
        self.positions: Tensor | None = None  # [B, P] positions, flat
        self.kept: Tensor | None = None  # indices among the B·P chosen positions that are not padding; None: all
        self.per_row = 1
        self.width = output.shape[1:]  # the shape of one sample's output
        if positions is not None and output.ndim >= 3:
            self.width = output.shape[-1:] if is_kl else output.shape[2:]
            self.n_positions = output.shape[1:].numel() // self.width.numel()
            real = None if mask is None else self._real(mask)
            if part is not None and (real is not None or part.padded):
                raise ValueError(
                    "attention_mask: a batch with padding cannot be split over micro-batches or processes; "
                    "cut texts to one length"
                )
            chosen = self._choose(positions, generator, real, part, output.device)
            self.positions = sent(chosen, output.device)
            self.per_row = chosen.shape[1]
            self._row = torch.arange(self.n_rows, device=output.device)[:, None]
            if real is not None and not (found := real.gather(1, chosen).flatten()).all():
                self.kept = found.nonzero()[:, 0].to(output.device)
        self.count = self.n_rows * self.per_row

    @classmethod
    def joined(cls, output: Tensor, each: Sequence["Samples"]) -> "Samples":
        """Join the samples of batches, without padding, whose rows appended in this order are the rows of `output`."""
        whole = cls(output, None, False, None)
        if each[0].positions is not None:
            whole.positions = torch.cat([samples.positions for samples in each if samples.positions is not None])
            whole.per_row, whole.width, whole.n_positions = each[0].per_row, each[0].width, each[0].n_positions
            whole._row = torch.arange(whole.n_rows, device=output.device)[:, None]
            whole.count = whole.n_rows * whole.per_row
        return whole

    def _real(self, mask: Tensor) -> Tensor | None:
        """Return True where a position is not padding, bool [B, T] on the CPU; None if there is no padding."""
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
        self,
        positions: str | int,
        generator: torch.Generator | None,
        real: Tensor | None,
        part: BatchPart | None,
        device: torch.device,
    ) -> Tensor:
        """Choose each row's positions, in increasing order: int64 [B, P], on the CPU where padding or chance decide."""
        device = device if real is None else torch.device("cpu")
        if positions == "all":
            return torch.arange(self.n_positions, device=device).expand(self.n_rows, -1)
        if positions == "last":
            last = torch.full((self.n_rows, 1), self.n_positions - 1, device=device)
            return last if real is None else (torch.arange(self.n_positions, device="cpu") * real).amax(1, keepdim=True)
        assert isinstance(positions, int)
        if positions > self.n_positions:
            raise ValueError(f"positions: expected at most the output's {self.n_positions}, got {positions}")
        start, n_rows = (0, self.n_rows) if part is None else part[:2]
        draws = torch.rand(n_rows, self.n_positions, generator=generator, dtype=torch.float32, device="cpu")
        draws = draws[start : start + self.n_rows]
        if real is not None:
            draws += ~real  # draws are below 1, so padding comes last
        return draws.argsort(1)[:, :positions].sort(1).values

    def of(self, values: Tensor) -> Tensor:
        """Drop the chosen positions that are padding: [B·P, ...] -> [S, ...]."""
        return values if self.kept is None else values[self.kept]

    def spread(self, values: Tensor) -> Tensor:
        """Invert `of`, with zeros at padding: [S, ...] -> [B·P, ...]."""
        if self.kept is None:
            return values
        return values.new_zeros(self.count, *values.shape[1:]).index_copy_(0, self.kept, values)

    def gather(self, output: Tensor) -> Tensor:
        """Return the samples' outputs, without padding: [B, ...] -> [S, *width].

        Raises ValueError if `output`, which may be the contrast's, differs in shape from the model's output.
        """
        if output.shape != self.shape:
            raise ValueError(
                f"data: the contrast's output has shape {list(output.shape)}, the input's {list(self.shape)}"
            )
        if self.positions is None:
            return output
        rows = output.reshape(self.n_rows, self.n_positions, *self.width)
        return self.of(rows[self._row, self.positions].flatten(0, 1))

    def scatter(self, d_out: Tensor) -> Tensor:
        """Place gradients [B·P, *width], padding included, at their outputs' positions, zeros elsewhere: [B, ...]."""
        if self.positions is None:
            return d_out
        whole = d_out.new_zeros(self.n_rows, self.n_positions, *self.width)
        whole[self._row, self.positions] = d_out.unflatten(0, (self.n_rows, self.per_row))
        return whole.view(self.shape)

    def alone(self, whole: Tensor, start: int, stop: int) -> Tensor:
        """Return copies of `whole`, [n, ...]: copy j keeps sample start + j of every row, and is zero elsewhere.

        The leading dimensions of `whole` are rows and positions, [B, T, ...] or [B*T, ...].
        """
        if self.positions is None:
            return whole[None]
        by_position = whole.reshape(self.n_rows, self.n_positions, -1)
        every = torch.arange(self.n_positions, device=whole.device)
        own = self.positions.mT[start:stop, :, None] == every  # [n, B, T]
        return torch.where(own[..., None], by_position, 0).reshape(-1, *whole.shape)

    def own_rows(self, values: Tensor) -> Tensor:
        """Select the row of each sample's own position from [B*T, D]: [S, 1, D]."""
        assert self.positions is not None
        return values.reshape(self.n_rows, self.n_positions, -1)[self._row, self.positions].flatten(0, 1)[:, None]


def padding_mask(inputs: Any, model: object) -> Tensor | None:
    """Return the mask [B, T] of the model's output positions from a batch that is a mapping; None if it has none.

    The key is `attention_mask`, or for an encoder-decoder model, whose outputs are the decoder's positions,
    `decoder_attention_mask`. Raises ValueError if the mask is not a tensor of two dimensions.
    """
    if not isinstance(inputs, Mapping):
        return None
    has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    has_decoder = has_decoder or any(str(key).startswith("decoder_input") for key in inputs)
    mask = inputs.get("decoder_attention_mask" if has_decoder else "attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected a tensor [rows, positions] with 0 at padding, got {got}")
    return mask


def check_same_padding(mask: Tensor | None, other: Tensor | None) -> None:
    """Raise ValueError if an input and its contrast are padded differently: a sample would lack its contrast."""
    given = mask if mask is not None else other
    if given is None:
        return
    one, two = (torch.ones_like(given) if each is None else each for each in (mask, other))
    if one.shape != two.shape or not torch.equal(one != 0, two != 0):
        raise ValueError("attention_mask: expected the contrast to be padded at the same positions as the input")


@dataclass(frozen=True)
class OwnRows(Layout):
    """The layout at a language model's head, where a sample's gradient needs only the row of its own position."""

    pick: Callable[[Tensor], Tensor]

    def split(self, tensor: Tensor) -> Tensor:
        """Select the samples' rows: [B*T, D] -> [S, 1, D]."""
        return self.pick(tensor)
