"""A toy: a trained model, the data to decompose it on, and how to tell whether its circuits were found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from l3d.toys import recovery
from l3d.toys.networks import Network
from l3d.toys.recovery import Found

TRAINING = ("steps", "n_restarts")  # of a toy's settings, those that the published recipe has its own of


class Sample(Protocol):
    """Draw n points [n, features] by a generator."""

    def __call__(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw."""


@dataclass
class Toy:
    """A trained toy model, the data to decompose it on, and what a decomposition should find."""

    name: str
    describe: str
    model: Network
    data: Tensor  # [n, features]
    draw: Sample  # what the data was drawn by
    settings: dict[str, Any]  # recommended arguments of decompose
    measure: Callable[["Toy", Found], dict[str, float]]  # what `recovery` returns
    truth: list[dict[str, Tensor]] = field(default_factory=list)  # per circuit: {parameter: tensor of its shape}

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n fresh points [n, features] as the data was drawn."""
        return self.draw(n, generator=generator)

    def arguments(self, preset: str | None) -> dict[str, Any]:
        """Return the recommended arguments of `decompose`; "published" itself says how to train."""
        return {name: v for name, v in self.settings.items() if not (preset == "published" and name in TRAINING)}

    def similarity(self, decomposition: Found) -> Tensor:
        """Return |cos| between every true circuit and every subnetwork: [circuits, K].

        The cosine runs over the tensors the circuit is given in, all entries of them: a subnetwork that
        holds other features besides scores lower. Raises ValueError where the toy's circuits are no single directions.
        """
        if not self.truth:
            raise ValueError(f"toy: the circuits of {self.name!r} are no single directions; see recovery")
        return recovery.similarity(self.truth, decomposition)

    def mmcs(self, decomposition: Found) -> float:
        """Return the mean over true circuits of the best |cos| among the subnetworks, in [0, 1]."""
        return float(self.similarity(decomposition).max(1).values.mean())

    def recovery(self, decomposition: Found) -> dict[str, float]:
        """Say how well the circuits were found, by the toy's own measures; see `l3d.toys.recovery.MEASURES`.

        Raises ValueError where tensors that the measures look at were not decomposed.
        """
        try:
            return self.measure(self, decomposition)
        except KeyError as error:
            raise ValueError(f"toy: how well circuits were found cannot be told without {error.args[0]!r}") from error
