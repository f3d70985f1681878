"""How well a decomposition found the circuits of a toy, by measures that suit it.

`MEASURES` names every figure. All but `mmcs` are about which subnetwork belongs to which circuit; none depends on the
sign, the scale or the order of the subnetworks.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

Circuits = list[dict[str, Tensor]]


class Known(Protocol):
    """What the measures ask of a toy: its true circuits, its model and its data."""

    @property
    def truth(self) -> Circuits:
        """The true circuits."""

    @property
    def model(self) -> nn.Module:
        """The trained model."""

    @property
    def data(self) -> Tensor:
        """The data to decompose it on: [n, features]."""


class Found(Protocol):
    """What the measures ask of a decomposition."""

    @property
    def n_subnetworks(self) -> int:
        """K."""

    def subnetwork(self, index: int) -> dict[str, Tensor]:
        """Return a subnetwork's tensors."""

    def evaluate(self, model: nn.Module, data: Any) -> Any:
        """Return an evaluation with `activation_rate` [K]."""

    def impact(self, model: nn.Module, data: Any) -> Tensor:
        """Return every subnetwork's impact on every sample: [n, K]."""


MEASURES = {
    "mmcs": "mean over true circuits of the best |cos| with a subnetwork, over all entries of both matrices",
    "mmcs_own": "the same over the feature's own weights, its column of W_in and row of W_out, as others measure it",
    "features_found": "features whose best subnetwork is no other feature's best",
    "r2": "r² of the columns that the subnetworks give, one scale each, with those of W_out W_in",
    "r2_task": "the same with the columns of the task's matrix A",
    "groups_found": "groups with a live subnetwork of purity .9 or more",
    "purity": "mean over groups of the best live subnetwork's purity: the share of its W_in in the group's columns",
    "inputs_found": "inputs that move a subnetwork most which no other input moves most",
}
LIVE = 0.01  # activation rate from which a subnetwork counts as live


def similarity(circuits: Circuits, decomposition: Found, own: bool = False) -> Tensor:
    """Return |cos| between circuits and subnetworks: [circuits, K]; see `cosines`."""
    return cosines(circuits, [decomposition.subnetwork(i) for i in range(decomposition.n_subnetworks)], own)


def cosines(circuits: Circuits, found: Circuits, own: bool = False) -> Tensor:
    """Return |cos| between circuits and directions over the tensors each circuit is given in: [circuits, directions].

    Over all entries of those tensors, or over the circuit's `own` alone, those that are not zero in it.
    """
    rows = []
    for circuit in circuits:
        t = torch.cat([circuit[name].flatten() for name in circuit])
        v = torch.stack([torch.cat([f[name].flatten() for name in circuit]) for f in found]).to(t)
        if own:
            v = v * (t != 0)
        rows.append((v @ t).abs() / (v.norm(dim=1) * t.norm()).clamp_min(1e-30))
    return torch.stack(rows)


def distinct(scores: Tensor) -> int:
    """Count the rows of scores [circuits, K] whose best column is no other row's best."""
    best = scores.argmax(1)
    return int((best[:, None] == best).sum(1).eq(1).sum())


def find_features(toy: Known, decomposition: Found) -> dict[str, float]:
    """Compare with true directions: mmcs, mmcs_own and features_found."""
    scores = similarity(toy.truth, decomposition)
    return {
        "mmcs": float(scores.amax(1).mean()),
        "mmcs_own": float(similarity(toy.truth, decomposition, own=True).amax(1).mean()),
        "features_found": distinct(scores),
    }


def find_columns(toy: Known, decomposition: Found, matrix: Tensor) -> dict[str, float]:
    """Compare with a linear map's columns: besides `find_features`, r2 and r2_task (matrix: the task's A).

    The column that feature i's subnetwork gives is ΔW_out W_in[:, i], what its change of the output weights makes of
    the feature.
    """
    scores = similarity(toy.truth, decomposition)
    w_in, w_out = (toy.model.get_parameter(f"{name}.weight").detach() for name in ("W_in", "W_out"))
    columns = []
    for i, k in enumerate(scores.argmax(1).tolist()):
        columns.append(decomposition.subnetwork(k)["W_out.weight"].to(w_in) @ w_in[:, i])
    found = torch.stack(columns, 1)
    return {
        **find_features(toy, decomposition),
        "r2": r_squared(found, w_out @ w_in),
        "r2_task": r_squared(found, matrix),
    }


def r_squared(found: Tensor, target: Tensor) -> float:
    """Return the share of the target's variance that found explains, each column after its least-squares scale.

    Both [rows, columns]; the variance is that of all entries about their one mean.
    """
    scale = (found * target).sum(0) / found.square().sum(0).clamp_min(1e-30)
    return float(1 - (found * scale - target).square().sum() / (target - target.mean()).square().sum())


def find_groups(toy: Known, decomposition: Found, size: int) -> dict[str, float]:
    """Look for one subnetwork per group of `size` neighbouring features: groups_found and purity."""
    live = decomposition.evaluate(toy.model, toy.data).activation_rate >= LIVE
    purities = [torch.zeros(toy.data.shape[1] // size)]  # what no live subnetwork at all would come to
    for i in live.nonzero()[:, 0].tolist():
        energy = decomposition.subnetwork(i)["W_in.weight"].square().sum(0).view(-1, size).sum(1)
        purities.append((energy / energy.sum().clamp_min(1e-30)).cpu())
    best = torch.stack(purities).amax(0)  # [groups]
    return {"groups_found": int((best >= 0.9).sum()), "purity": float(best.mean())}


def find_inputs(toy: Known, decomposition: Found) -> dict[str, float]:
    """Move one input at a time through [-1, 1], and see which subnetwork that moves most: inputs_found."""
    n_features = toy.data.shape[1]
    levels = torch.linspace(-1, 1, 20)
    alone = (levels[:, None, None] * torch.eye(n_features)).flatten(0, 1)  # [levels * features, features]
    impacts = decomposition.impact(toy.model, alone).view(len(levels), n_features, -1)
    return {"inputs_found": distinct(nn.functional.normalize(impacts.mean(0), dim=0))}
