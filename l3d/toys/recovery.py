"""Measure how well a decomposition recovers a toy's circuits.

`MEASURES` describes every figure. All but `mmcs` depend on which subnetwork is matched to which circuit. None depends
on the subnetworks' sign, scale or order.
"""

import torch
from torch import Tensor, nn

from l3d.toys.toy import Found, Toy, similarity

MEASURES = {
    "mmcs": "mean over true circuits of the best |cos| with a subnetwork, over all entries of both matrices",
    "mmcs_own": "the same over the feature's own weights only, its column of W_in and row of W_out, as in other work",
    "features_found": "number of features whose best subnetwork is no other feature's best",
    "r2": "r² of the subnetworks' columns, each scaled to fit, with the columns of W_out W_in",
    "r2_task": "the same with the columns of the task's matrix A",
    "groups_found": "number of groups with a live subnetwork of purity 0.9 or more",
    "purity": "mean over groups of the best live subnetwork's purity: the fraction of W_in² in the group's columns",
    "inputs_found": "number of inputs whose most affected subnetwork is no other input's most affected",
}
LIVE = 0.01  # least activation rate of a live subnetwork


def distinct(scores: Tensor) -> int:
    """Count the rows of scores [circuits, K] whose best column is no other row's best."""
    best = scores.argmax(1)
    return int((best[:, None] == best).sum(1).eq(1).sum())


def find_features(toy: Toy, decomposition: Found) -> dict[str, float]:
    """Compare subnetworks with the true circuits: mmcs, mmcs_own and features_found."""
    scores = similarity(toy.truth, decomposition)
    return {
        "mmcs": float(scores.amax(1).mean()),
        "mmcs_own": float(similarity(toy.truth, decomposition, own=True).amax(1).mean()),
        "features_found": distinct(scores),
    }


def find_columns(toy: Toy, decomposition: Found, matrix: Tensor) -> dict[str, float]:
    """Compare subnetworks with a linear map's columns: the measures of `find_features`, r2 and r2_task.

    The column of feature i is ΔW_out W_in[:, i], where ΔW_out is its best subnetwork's W_out: how the subnetwork
    changes the feature's outputs. matrix: the task's A.
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
    """Return the fraction of the target's variance that `found` explains after a least-squares scale per column.

    Both are [rows, columns]; the variance is of all entries about their common mean.
    """
    scale = (found * target).sum(0) / found.square().sum(0).clamp_min(1e-30)
    return float(1 - (found * scale - target).square().sum() / (target - target.mean()).square().sum())


def find_groups(toy: Toy, decomposition: Found, size: int) -> dict[str, float]:
    """Find one subnetwork per group of `size` neighbouring features: groups_found and purity."""
    live = decomposition.evaluate(toy.model, toy.data).activation_rate >= LIVE
    purities = [torch.zeros(toy.data.shape[1] // size)]  # purity 0 if no subnetwork is live
    for i in live.nonzero()[:, 0].tolist():
        energy = decomposition.subnetwork(i)["W_in.weight"].square().sum(0).view(-1, size).sum(1)
        purities.append((energy / energy.sum().clamp_min(1e-30)).cpu())
    best = torch.stack(purities).amax(0)  # [groups]
    return {"groups_found": int((best >= 0.9).sum()), "purity": float(best.mean())}


def find_inputs(toy: Toy, decomposition: Found) -> dict[str, float]:
    """Vary one input at a time over [-1, 1] and find the subnetwork with the largest impact: inputs_found."""
    n_features = toy.data.shape[1]
    levels = torch.linspace(-1, 1, 20)
    alone = (levels[:, None, None] * torch.eye(n_features)).flatten(0, 1)  # [levels * features, features]
    impacts = decomposition.impact(toy.model, alone).view(len(levels), n_features, -1)
    return {"inputs_found": distinct(nn.functional.normalize(impacts.mean(0), dim=0))}
