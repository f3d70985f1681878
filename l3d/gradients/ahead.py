"""Extract the gradients of several steps' batches in one pass, where they are so small that calls cost more than work.

Gradients depend on the model and the data, not on the decomposition: nothing keeps the next steps' from being extracted
with this one's. References and positions are drawn batch by batch, as they would be alone.
"""

import time
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch

from l3d.data.batch import tensors_of, to_device
from l3d.data.batches import Batches
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients

# Bytes that may be held at once: of inputs, of what the graph keeps, and of the gradients in factors. And batches.
BYTES = 192 << 20
MOST = 64


class Ahead:
    """The gradients of a run's batches by step, extracted some steps at a time.

    Which steps go together depends on the step alone, so a resumed run and one that reads a cache see the same bits.

    Args:
        extractor: of the model.
        batches: that can be read in any order.
        device: of the model.
        generator: makes the generator that draws a step's positions and references.
    """

    def __init__(
        self, extractor: Extractor, batches: Batches, device: torch.device, generator: Callable[[int], torch.Generator]
    ) -> None:
        self.extractor, self.batches, self.device, self.generator = extractor, batches, device, generator
        self.width = 0  # steps extracted at once; 0: not known yet
        self._held: dict[int, Gradients] = {}
        self._tried = -1  # the first step of those last extracted together, or tried to be
        self._seconds = 0.0

    def seconds(self) -> float:
        """Return what the last pass took, per batch."""
        return self._seconds

    def __getitem__(self, step: int) -> Gradients:
        """Return the gradients of a step's batch."""
        if self.width == 0:
            first = self._alone(0)
            self.width = self._choose_width(first)
            if self.width == 1 and step == 0:
                return first
        if self.width == 1:
            return self._alone(step)
        start = step - step % self.width
        if start != self._tried:
            self._tried, self._held = start, {}  # what was held goes before more is
            self._held = self._together(range(start, start + self.width))
        return self._held[step] if step in self._held else self._alone(step)

    def _choose_width(self, first: Gradients) -> int:
        """Decide by the first batch's gradients how many go together: one where a row may depend on others."""
        if not self.extractor.rows_stay:
            return 1
        inputs = sum(tensor.nbytes for tensor in tensors_of(self.batches[0]))
        width = max(1, min(MOST, BYTES // max(1, inputs + self.extractor.graph_bytes + first.nbytes())))
        if width > 1:
            self._tried, self._held = 0, self._together(range(width))
            # what cannot go together now will not later; and a model may mix rows before its first parameter, where no
            # graph tells
            if 0 not in self._held or not _agree(first, self._held[0]):
                self._held = {}
                return 1
        return width

    def _alone(self, step: int) -> Gradients:
        started = time.perf_counter()
        gradients = self.extractor(to_device(self.batches[step], self.device), self.generator(step))
        self._seconds = self._since(started)
        return gradients

    def _together(self, steps: range) -> dict[int, Gradients]:
        """Extract the batches of some steps at once; nothing where they cannot be, or one of them is at fault."""
        started = time.perf_counter()
        batches = [to_device(self.batches[step], self.device) for step in steps]
        try:
            found = self.extractor.several(batches, [self.generator(step) for step in steps])
        except ValueError:  # met again by the step that it is about, which is then named
            return {}
        if found is None:
            return {}
        whole, counts = found
        self._seconds = self._since(started) / len(steps)
        ends = [0, *accumulate(counts)]
        return {step: whole.between(*between) for step, between in zip(steps, pairwise(ends), strict=True)}

    def _since(self, started: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def _agree(alone: Gradients, among_others: Gradients) -> bool:
    """Tell whether two extractions of one batch are the same but for rounding."""
    tolerance = torch.finfo(alone.dtype).eps ** 0.5
    for (_, one), (_, other) in zip(alone.tensors(), among_others.tensors(), strict=True):
        if one.shape != other.shape:
            return False
        if one.numel() and float((one - other).abs().max()) > tolerance * float(one.abs().max()):
            return False
    return True
