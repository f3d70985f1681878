"""Hold a toy: a trained model, data to decompose it on, true circuits and measures of their recovery."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from l3d.toys import recovery
from l3d.toys.networks import Network
from l3d.toys.recovery import Found

TRAINING = ("steps", "n_restarts")  # settings of a toy that the preset "published" sets itself


class Sample(Protocol):
    """A function that draws n points [n, features] from a generator."""

    def __call__(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw n points: [n, features]."""


@dataclass
class Toy:
    """A trained toy model, data to decompose it on, and the circuits that a decomposition should find."""

    name: str
    describe: str
    model: Network
    data: Tensor  # [n, features]
    draw: Sample  # the function that drew the data
    settings: dict[str, Any]  # recommended arguments of decompose
    measure: Callable[["Toy", Found], dict[str, float]]  # computes what `recovery` returns
    truth: list[dict[str, Tensor]] = field(default_factory=list)  # per circuit: {parameter: tensor of its shape}

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n fresh points [n, features] as the data was drawn."""
        return self.draw(n, generator=generator)

    def arguments(self, preset: str | None) -> dict[str, Any]:
        """Return the recommended arguments of `decompose`, without those that the preset "published" sets itself."""
        return {name: v for name, v in self.settings.items() if not (preset == "published" and name in TRAINING)}

    def similarity(self, decomposition: Found) -> Tensor:
        """Return |cos| between every true circuit and every subnetwork: [circuits, K].

        The cosine is over all entries of the tensors that the circuit names, so a subnetwork that also holds other
        features scores lower. Raises ValueError for a toy whose circuits are not single directions.
        """
        if not self.truth:
            raise ValueError(f"toy: the circuits of {self.name!r} are not single directions; see recovery")
        return recovery.similarity(self.truth, decomposition)

    def mmcs(self, decomposition: Found) -> float:
        """Return the mean over true circuits of the best |cos| among the subnetworks, in [0, 1]."""
        return float(self.similarity(decomposition).max(1).values.mean())

    def recovery(self, decomposition: Found) -> dict[str, float]:
        """Measure how well the circuits were recovered, by the toy's own measures: see `l3d.toys.recovery.MEASURES`.

        Raises ValueError if a tensor that the measures need was not decomposed.
        """
        try:
            return self.measure(self, decomposition)
        except KeyError as error:
            raise ValueError(f"toy: recovery cannot be measured without {error.args[0]!r}; decompose it too") from error
