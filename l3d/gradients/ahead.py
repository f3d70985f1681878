"""Extract the gradients of several steps' batches in one pass, for models so small that call overhead dominates.

Gradients depend on the model and the data, not on the decomposition, so those of the next steps can be extracted with
this step's. References and positions are drawn batch by batch, the same as for one batch at a time.
"""

import time
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch

from l3d.data.batch import tensors_of, to_device
from l3d.data.batches import Batches
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients

# Limits on one pass: bytes of inputs, autograd graph and gradients together, and number of batches.
BYTES = 192 << 20
MOST = 64


class Ahead:
    """The gradients of a run's batches by step, extracted `width` steps at a time.

    Steps are grouped by their number only, so a resumed run, or one that reads a cache, gets the same bits.

    Args:
        extractor: extracts the model's gradients.
        batches: the run's batches, readable in any order.
        device: the model's device.
        generator: returns the generator that draws the positions and references of a step.
    """

    def __init__(
        self, extractor: Extractor, batches: Batches, device: torch.device, generator: Callable[[int], torch.Generator]
    ) -> None:
        self.extractor, self.batches, self.device, self.generator = extractor, batches, device, generator
        self.width = 0  # steps extracted per pass; 0: not chosen yet
        self._held: dict[int, Gradients] = {}
        self._tried = -1  # first step of the last group that was extracted or tried
        self._seconds = 0.0

    def seconds(self) -> float:
        """Return the last pass's time in seconds per batch."""
        return self._seconds

    def __getitem__(self, step: int) -> Gradients:
        """Return the gradients of a step's batch."""
        if self.width == 0:
            first = self.alone(0)
            self.width = self._choose_width(first)
            if self.width == 1 and step == 0:
                return first
        if self.width == 1:
            return self.alone(step)
        start = step - step % self.width
        if start != self._tried:
            self._tried, self._held = start, {}  # free the last group before the next is extracted
            self._held = self._together(range(start, start + self.width))
        return self._held[step] if step in self._held else self.alone(step)

    def _choose_width(self, first: Gradients) -> int:
        """Choose the steps per pass from the first batch's memory; one if a row's output may depend on other rows."""
        if not self.extractor.rows_stay:
            return 1
        inputs = sum(tensor.nbytes for tensor in tensors_of(self.batches[0]))
        width = max(1, min(MOST, BYTES // max(1, inputs + self.extractor.graph_bytes + first.nbytes())))
        if width > 1:
            self._tried, self._held = 0, self._together(range(width))
            # batches that cannot be joined now cannot be later; and a model may mix rows before its first parameter,
            # which the graph does not show
            if 0 not in self._held or not _agree(first, self._held[0]):
                self._held = {}
                return 1
        return width

    def alone(self, step: int) -> Gradients:
        """Extract the gradients of one step's batch."""
        started = time.perf_counter()
        gradients = self.extractor(to_device(self.batches[step], self.device), self.generator(step))
        self._seconds = self._since(started)
        return gradients

    def _together(self, steps: range) -> dict[int, Gradients]:
        """Extract several steps' batches in one pass; {} if they cannot be joined or one is invalid."""
        started = time.perf_counter()
        batches = [to_device(self.batches[step], self.device) for step in steps]
        try:
            found = self.extractor.several(batches, [self.generator(step) for step in steps])
        except ValueError:  # the step at fault raises it again by itself, and is then named
            return {}
        if found is None:
            return {}
        whole, counts = found
        self._seconds = self._since(started) / len(steps)
        ends = [0, *accumulate(counts)]
        return {step: whole.between(*between) for step, between in zip(steps, pairwise(ends), strict=True)}

    def _since(self, started: float) -> float:
        """Return the seconds since `started`, waiting for the GPU's work to finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def _agree(alone: Gradients, among_others: Gradients) -> bool:
    """Tell whether two extractions of one batch are equal up to rounding."""
    tolerance = torch.finfo(alone.dtype).eps ** 0.5
    for (_, one), (_, other) in zip(alone.tensors(), among_others.tensors(), strict=True):
        if one.shape != other.shape:
            return False
        if one.numel() and float((one - other).abs().max()) > tolerance * float(one.abs().max()):
            return False
    return True
