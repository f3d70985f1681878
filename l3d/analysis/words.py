"""Build the JSON parts of a description: shown rows, output changes and token texts, each text stored once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from l3d.analysis.contexts import Contexts
from l3d.analysis.shown_rows import ShownRows
from l3d.analysis.view import View, thumbnails

N_ENTRIES = 6  # output entries in each direction, averaged over the shown rows
N_HERE = 3  # output entries in each direction, at one row
WINDOW = (20, 6)  # number of tokens shown before and after the marked one


class DescriptionParts:
    """Builds a description's parts, and records the rows, tokens and output entries they mention by number.

    Args:
        view: how tokens, classes and images are displayed.
        source: the rows.
        kind: the kind of rows, as `l3d.analysis.view.kind_of` tells it.
        impacts: [rows, positions, K].
        entries: what an entry of the output is: "tokens" (every position is a sample), "classes" or "outputs".
    """

    def __init__(self, view: View, source: ShownRows, kind: str, impacts: Tensor, entries: str) -> None:
        self.view, self.source, self.kind, self.impacts = view, source, kind, impacts
        self.by_token = entries == "tokens"
        self.tokens = source.inputs() if kind == "text" else None
        self.rows: set[int] = set()
        self.ids: set[int] = set()
        self.entries: set[int] = set()

    def moves(self, movement: Tensor, n: int = N_ENTRIES) -> dict[str, list[list[float]]]:
        """Return the n output entries that rise and fall most, as [entry, derivative]. movement: [V] derivatives."""
        n = min(n, len(movement))
        moved = {}
        for name, sign in (("raised", 1), ("lowered", -1)):
            best = (sign * movement).topk(n)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            moved[name] = [[entry, short(sign * value)] for entry, value in pairs if value > 0]
            self.entries |= {int(entry) for entry, _ in moved[name]}
        return moved

    def places(self, contexts: Contexts, at: Tensor, k: int, moved: Tensor, predicted: Tensor) -> list[dict[str, Any]]:
        """Return subnetwork k's rows of largest impact.

        at: [n] positions in the output; each row's last one where a row is one sample. moved: [m, V] output
        derivatives at the first m rows, predicted: [m] entries.
        """
        shown = []
        largest = max(float(contexts.impacts[k, 0]), 1e-30)
        for i, (row, impact) in enumerate(zip(contexts.rows[k].tolist(), contexts.impacts[k].tolist(), strict=True)):
            if not math.isfinite(impact):
                break
            self.rows.add(row)
            place: dict[str, Any] = {"row": row, "impact": short(impact)}
            if self.tokens is not None:
                position = int(at[i])
                first, last = max(0, position - WINDOW[0]), position + 1 + WINDOW[1]
                if self.by_token:
                    place["position"] = position
                else:  # no token is marked: the row's beginning is shown
                    first, last = 0, min(position, sum(WINDOW)) + 1
                ids = self.tokens[row, first:last].tolist()
                self.ids |= set(ids)
                place |= {"first": first, "tokens": ids}
                if self.impacts.shape[1] > 1:  # in percent of the largest impact shown
                    shares = 100 * self.impacts[row, first:last, k] / largest
                    place["shares"] = shares.clamp(0, 100).round().int().tolist()
            if i < len(moved):
                place |= self.moves(moved[i], N_HERE)
                place["predicted"] = int(predicted[i])
                self.entries.add(place["predicted"])
            shown.append(place)
        return shown

    def mentioned(self) -> dict[str, Any]:
        """Return the content of every mentioned row, and the text of every mentioned token and class, once each."""
        rows = sorted(self.rows)
        found: dict[str, Any] = {"rows": {str(row): {"number": self.source.numbers[row]} for row in rows}}
        if self.kind == "text":
            found["tokens"] = self._named(self.ids | (self.entries if self.by_token else set()))
        if self.kind == "image":
            for start in range(0, len(rows), 64):
                chosen = rows[start : start + 64]
                pictures = thumbnails(self.source.inputs(chosen), self.view)
                for row, picture in zip(chosen, pictures, strict=True):
                    found["rows"][str(row)]["png"] = picture
        if self.kind == "point":
            for row, values in zip(rows, self.source.inputs(rows).tolist(), strict=True):
                found["rows"][str(row)]["point"] = [short(value) for value in values]
        names = self.view.classes
        if not self.by_token and names is not None:
            found["classes"] = {str(i): names[i] for i in sorted(self.entries) if i < len(names)}
        return found

    def _named(self, ids: set[int]) -> dict[str, str]:
        ordered: Sequence[int] = sorted(ids)
        if self.view.tokens is None:
            return {str(token): f"#{token}" for token in ordered}
        return dict(zip(map(str, ordered), self.view.tokens(ordered), strict=True))


def short(value: Any) -> float | None:
    """Return a number rounded to four significant figures; None for a missing number or one that is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.4g}")
