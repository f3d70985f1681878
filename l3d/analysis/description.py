"""What each subnetwork does on data, as plain values for RUN/subnetworks.json.

    data ─ impact ─► [rows, positions, K] ─ contexts ─► where each acts most ─ logits ─► what it moves there ─► json

One pass over the rows per reference, and one forward-mode product per subnetwork and shown row: the cost is bounded by
`n_rows`, and the subnetworks go through the model many at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l3d.analysis.contexts import top_contexts
from l3d.analysis.evaluation import impact
from l3d.analysis.logits import Movement, move_many, softmax_movement
from l3d.analysis.shown_rows import ShownRows
from l3d.analysis.view import View, kind_of
from l3d.analysis.words import Reader, short
from l3d.data.batch import to_device
from l3d.gradients.model import run_fixed
from l3d.storage.run_folder import SUBNETWORKS_FORMAT

if TYPE_CHECKING:
    from l3d.decomposition.subnetworks import Subnetworks

N_ROWS = 1000  # that are looked at, at most, unless asked for
N_SHOWN = 6  # rows per subnetwork
N_MOVED = 4  # of these, the derivatives are taken at so many
N_REFERENCES = 2
IMPACTS_AT_ONCE = 2**26  # numbers held
ROWS_AT_ONCE, NUMBERS_AT_ONCE = 128, 2**22  # that go through the model together


def default_rows(steps: int, batch_size: int) -> int:
    """Return how many rows a run's description looks at: a twentieth of those trained on, within 256 and 1,000."""
    return min(N_ROWS, max(256, steps * batch_size // 20))


def describe(
    decomposition: Subnetworks,
    model: nn.Module,
    data: Any,
    *,
    n_rows: int | None = None,
    view: View | None = None,
    activation_rate: Sequence[float] | Tensor | None = None,
    intervention_ratio: Sequence[float | None] | Tensor | None = None,
    any_weights: bool = False,
) -> dict[str, Any]:
    """Describe every subnetwork: its mean impact, its norm per tensor, the rows it acts on most, what it moves there.

    Args:
        decomposition, model: as trained.
        data: a tensor, mapping of tensors or Dataset of rows, or a list of batches.
        n_rows: how many rows at most, evenly spaced, to look at; a list of batches is looked at whole.
        view: how tokens, classes and images are shown; without it by number.
        activation_rate: [K] P_act, from `evaluate`.
        intervention_ratio: [K], where it was measured; None for a subnetwork without.
        any_weights: go on where the model's weights are others than those decomposed, which is refused otherwise.

    Returns a json-able dict. Positions of a language model's rows count one by one, also where a few were drawn in
    training. What is moved is softmax(output) where the divergence is "kl", else the output; per unit of δ, the mean
    over the shown rows.
    """
    n_rows = N_ROWS if n_rows is None else n_rows
    if n_rows < 2:
        raise ValueError(f"n_rows: expected at least 2, got {n_rows}")
    view = view or View()
    source = ShownRows(data, n_rows)
    shown = source.inputs([0])
    kind = kind_of(shown)
    length = shown.shape[1] if kind == "text" else 1
    source.limit(max(2, IMPACTS_AT_ONCE // (length * decomposition.n_subnetworks)))
    kl = decomposition.settings.get("divergence") == "kl"
    found = impact(decomposition, model, source.data, N_REFERENCES, any_weights=any_weights).cpu()
    impacts, at = _by_place(found, source, length)
    tokens = source.inputs() if kind == "text" else None
    contexts = top_contexts(impacts, N_SHOWN, tokens if impacts.shape[1] == length else None)
    at = at[contexts.rows, contexts.positions]
    raised, predicted = _moves(decomposition, model, source, contexts.rows, at, kl)
    reader = Reader(view, source, kind, impacts, kl)
    return {
        "format": SUBNETWORKS_FORMAT,
        "kind": kind,
        "moved": "probability" if kl else "output",
        "n_rows": source.count,
        "n_samples": len(found),
        "n_references": N_REFERENCES,
        "tensors": decomposition.parameter_names,
        "subnetworks": [
            {
                "activation_rate": None if activation_rate is None else short(activation_rate[k]),
                "impact": short(found[:, k].mean()),
                "norms": [short(t.norm()) for t in decomposition.subnetwork(k).values()],
                **({} if intervention_ratio is None else {"intervention_ratio": short(intervention_ratio[k])}),
                **reader.moves(raised[k].mean(0)),
                "top": reader.places(contexts, at[k], k, raised[k], predicted[k]),
            }
            for k in range(decomposition.n_subnetworks)
        ],
        **reader.seen(),
    }


def _by_place(found: Tensor, source: ShownRows, length: int) -> tuple[Tensor, Tensor]:
    """Lay impacts [n, K] out as [rows, positions, K], −inf at padding; and tell the positions in the output: [rows, P].

    length: of a row of tokens, 1 for other rows.
    """
    mask = source.mask() if length > 1 else None
    last = torch.full((source.count,), length - 1)
    if mask is not None and mask.shape == (source.count, length):
        last = (mask * torch.arange(length)).amax(1)
        if len(found) == int(mask.sum()) != source.count:
            laid = found.new_full((source.count * length, found.shape[1]), -torch.inf)
            laid[mask.flatten()] = found
            return laid.unflatten(0, mask.shape), torch.arange(length).expand(mask.shape)
    if len(found) % source.count:
        raise ValueError(f"data: {len(found)} samples in {source.count} rows; rows of one length are needed")
    impacts = found.unflatten(0, (source.count, -1))
    n_positions = impacts.shape[1]
    return impacts, last[:, None] if n_positions == 1 else torch.arange(n_positions).expand(source.count, -1)


@torch.no_grad()
def _moves(
    d: Subnetworks, model: nn.Module, source: ShownRows, rows: Tensor, positions: Tensor, kl: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return, per subnetwork, how its first rows' outputs move, [m, V], and which entry each predicts, [m].

    rows, positions: [K, n].
    """
    device = next(model.parameters()).device
    m = min(N_MOVED, rows.shape[1])
    one = run_fixed(model, to_device(source.batch([0]), device))
    held = max(one.numel(), source.inputs([0]).numel())
    at_once = max(1, min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // held) // m)
    moves: list[Tensor] = []
    predicted: list[Tensor] = []
    method = "forward"
    for start in range(0, d.n_subnetworks, at_once):
        chosen = range(d.n_subnetworks)[start : start + at_once]
        parts = [d.subnetwork(k) for k in chosen]
        directions = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        batches = to_device(source.batches([rows[k, :m].tolist() for k in chosen]), device)
        try:
            moved = move_many(model, directions, batches, method)
        except RuntimeError:  # an operation without forward mode; what else is wrong, the other way says again
            method = "double_backward"
            moved = move_many(model, directions, batches, method)
        for c, k in enumerate(chosen):
            at = Movement(*(_at_positions(part[c], positions[k, :m]) for part in moved))
            moves.append((softmax_movement(at) if kl else at.derivative).float().cpu().flatten(1))
            predicted.append(at.output.flatten(1).argmax(1).cpu())
    return moves, predicted


def _at_positions(output: Tensor, positions: Tensor) -> Tensor:
    """Pick each row's position from a language model's output [m, T, V]; other outputs have none."""
    if output.ndim < 3:
        return output
    return output.flatten(1, -2)[torch.arange(len(output)), positions.to(output.device)]
