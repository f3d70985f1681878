"""Describe what each subnetwork does on data, as JSON values for RUN/subnetworks.json.

    data ─ impact ─► [rows, positions, K] ─ contexts ─► samples of largest impact ─ logits ─► output changes ─► json

Cost: one pass over at most `n_rows` rows per reference, and one forward-mode product per subnetwork and shown row.
Many subnetworks go through the model together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3d.analysis.contexts import top_contexts
from l3d.analysis.evaluation import extractor_of, impact
from l3d.analysis.logits import Movement, move_many, softmax_movement
from l3d.analysis.shown_rows import ShownRows
from l3d.analysis.view import View, kind_of
from l3d.analysis.words import DescriptionParts, short
from l3d.data.batch import to_device
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.divergence import Divergence
from l3d.gradients.fixed import run_fixed
from l3d.storage.run_folder import SUBNETWORKS_FORMAT

N_ROWS = 1000  # default limit on the rows examined
N_SHOWN = 6  # rows shown per subnetwork
N_MOVED = 4  # of these, rows at which derivatives are taken
N_REFERENCES = 2
IMPACTS_AT_ONCE = 2**26  # limit on the impacts held in memory, in numbers
ROWS_AT_ONCE, NUMBERS_AT_ONCE = 128, 2**22  # limits on what goes through the model together


def default_rows(steps: int, batch_size: int) -> int:
    """Return how many rows a run's description examines: a twentieth of the rows trained on, from 256 to 1,000."""
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
    divergence: str | Divergence | None = None,
    reference: str | Tensor | None = None,
    any_weights: bool = False,
) -> dict[str, Any]:
    """Describe every subnetwork: mean impact, norm per tensor, rows of largest impact and output changes there.

    Args:
        decomposition, model: the trained decomposition and its model.
        data: a tensor, mapping of tensors or Dataset of rows, or a list of batches.
        n_rows: examine at most this many rows, evenly spaced; a list of batches is examined whole.
        view: how tokens, classes and images are shown; without it by number.
        activation_rate: [K] P_act, from `evaluate`.
        intervention_ratio: [K], if measured; None for a subnetwork without one.
        divergence, reference: replace the trained ones, as in `evaluate`.
        any_weights: accept a model whose weights differ from the decomposed ones; otherwise that raises ValueError.

    Returns a dict that json can hold. Every position of a language model's row is a sample, even if training drew only
    a few positions. The output changes are derivatives per unit of δ, averaged over the shown rows: of softmax(output)
    for the divergence "kl", else of the output. Raises ValueError for n_rows below 2 and for rows of several lengths.
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
    extractor = extractor_of(
        decomposition, model, divergence, reference, any_weights=True
    )  # `impact` checks the weights
    kl, device = extractor.is_kl, next(model.parameters()).device
    with torch.no_grad():
        one = run_fixed(model, to_device(source.batch([0]), device))
    by_position = kind == "text" and one.ndim > 2 and extractor.positions is not None
    given: dict[str, Any] = {"divergence": divergence, "reference": reference, "any_weights": any_weights}
    by_sample = impact(decomposition, model, source.data, N_REFERENCES, **given).cpu()
    impacts, at = _by_row_and_position(by_sample, source, length)
    tokens = source.inputs() if kind == "text" else None
    contexts = top_contexts(impacts, N_SHOWN, tokens if impacts.shape[1] == length else None)
    at = at[contexts.rows, contexts.positions]
    at_once = max(1, min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // max(one.numel(), shown.numel())))
    raised, predicted = _moves(decomposition, model, source, contexts.rows, at, kl, at_once)
    entries = "tokens" if by_position else "classes" if kl else "outputs"
    parts = DescriptionParts(view, source, kind, impacts, entries)
    return {
        "format": SUBNETWORKS_FORMAT,
        "kind": kind,
        "entries": entries,
        "moved": "probability" if kl else "output",
        "n_rows": source.count,
        "n_samples": len(by_sample),
        "n_references": N_REFERENCES,
        "tensors": decomposition.parameter_names,
        "subnetworks": [
            {
                "activation_rate": None if activation_rate is None else short(activation_rate[k]),
                "impact": short(by_sample[:, k].mean()),
                "norms": [short(t.norm()) for t in decomposition.subnetwork(k).values()],
                **({} if intervention_ratio is None else {"intervention_ratio": short(intervention_ratio[k])}),
                **parts.moves(raised[k].mean(0)),
                "top": parts.places(contexts, at[k], k, raised[k], predicted[k]),
            }
            for k in range(decomposition.n_subnetworks)
        ],
        **parts.mentioned(),
    }


def _by_row_and_position(by_sample: Tensor, source: ShownRows, length: int) -> tuple[Tensor, Tensor]:
    """Reshape impacts [n, K] to [rows, P, K], −inf at padding; return them with the output positions [rows, P].

    length: number of tokens in a row, 1 for other kinds of rows. P is 1 where a row is one sample. Raises ValueError if
    rows hold different numbers of samples.
    """
    mask = source.mask() if length > 1 else None
    last = torch.full((source.count,), length - 1, device="cpu")
    if mask is not None and mask.shape == (source.count, length):
        last = (mask * torch.arange(length, device="cpu")).amax(1)
        if len(by_sample) == int(mask.sum()) != source.count:
            padded = by_sample.new_full((source.count * length, by_sample.shape[1]), -torch.inf)
            padded[mask.flatten()] = by_sample
            return padded.unflatten(0, mask.shape), torch.arange(length, device="cpu").expand(mask.shape)
    if len(by_sample) % source.count:
        raise ValueError(f"data: expected rows of one length, got {len(by_sample)} samples in {source.count} rows")
    impacts = by_sample.unflatten(0, (source.count, -1))
    n_positions = impacts.shape[1]
    if n_positions == 1:
        return impacts, last[:, None]
    return impacts, torch.arange(n_positions, device="cpu").expand(source.count, -1)


@torch.no_grad()
def _moves(
    d: Subnetworks, model: nn.Module, source: ShownRows, rows: Tensor, positions: Tensor, kl: bool, n_rows: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return per subnetwork the output derivatives at its first m rows, [m, V], and the predicted entries, [m].

    rows, positions: [K, n], the samples of largest impact. kl: the derivatives are those of softmax(output).
    n_rows: about how many rows go through the model together.
    """
    device = next(model.parameters()).device
    m = min(N_MOVED, rows.shape[1])
    at_once = max(1, n_rows // m)
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
        except RuntimeError:  # an operation has no forward mode; another error is raised again by the second way
            method = "double_backward"
            moved = move_many(model, directions, batches, method)
        for c, k in enumerate(chosen):
            at = Movement(*(_at_positions(part[c], positions[k, :m]) for part in moved))
            moves.append((softmax_movement(at) if kl else at.derivative).float().cpu().flatten(1))
            predicted.append(at.output.flatten(1).argmax(1).cpu())
    return moves, predicted


def _at_positions(output: Tensor, positions: Tensor) -> Tensor:
    """Select each row's position from a language model's output [m, T, V]; return other outputs unchanged."""
    if output.ndim < 3:
        return output
    return output.flatten(1, -2)[torch.arange(len(output), device="cpu"), positions.to(output.device)]
