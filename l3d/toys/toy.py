"""Hold a toy: a trained model, data to decompose it on, true circuits and measures of their recovery."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from l3d.toys.networks import Network

Circuits = list[dict[str, Tensor]]

TRAINING = ("steps", "n_restarts")  # settings of a toy that the preset "published" sets itself


class Found(Protocol):
    """What the measures need of a decomposition."""

    @property
    def n_subnetworks(self) -> int:
        """K."""

    def subnetwork(self, index: int) -> dict[str, Tensor]:
        """Return a subnetwork's tensors."""

    def evaluate(self, model: nn.Module, data: Any) -> Any:
        """Return an evaluation with `activation_rate` [K]."""

    def impact(self, model: nn.Module, data: Any) -> Tensor:
        """Return every subnetwork's impact on every sample: [n, K]."""


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
    truth: Circuits = field(default_factory=list)  # per circuit: {parameter: tensor of its shape}

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
        return similarity(self.truth, decomposition)

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


def similarity(circuits: Circuits, decomposition: Found, own: bool = False) -> Tensor:
    """Return |cos| between circuits and subnetworks: [circuits, K]; see `cosines`."""
    return cosines(circuits, [decomposition.subnetwork(i) for i in range(decomposition.n_subnetworks)], own)


def cosines(circuits: Circuits, found: Circuits, own: bool = False) -> Tensor:
    """Return |cos| between circuits and directions, over the tensors that a circuit names: [circuits, directions].

    own: compare only the entries that are not zero in the circuit, instead of all entries of those tensors.
    """
    rows = []
    for circuit in circuits:
        t = torch.cat([circuit[name].flatten() for name in circuit])
        v = torch.stack([torch.cat([f[name].flatten() for name in circuit]) for f in found]).to(t)
        if own:
            v = v * (t != 0)
        rows.append((v @ t).abs() / (v.norm(dim=1) * t.norm()).clamp_min(1e-30))
    return torch.stack(rows)
