"""Build the report's table: a row per subnetwork, from the decomposition and the description of its behaviour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from l3d.decomposition.subnetworks import Subnetworks

MAX_COLUMNS = 8  # tensors with a column of their own, the largest ones; the others are summed
N_WORDS = 4  # words per subnetwork in the column of what it acts on
N_MOVES = 2  # output entries in each direction


class Row(NamedTuple):
    """One subnetwork's row in the table; unknown values are None or empty."""

    subnetwork: int
    rate: float | None  # activation rate: fraction of the samples it is kept for
    impact: float | None  # mean over the examined samples
    ratio: float | None  # output change on active samples / on inactive ones
    acts: list[str]  # tokens, predicted classes or inputs at the samples of largest impact
    raised: list[str]  # output entries
    lowered: list[str]  # output entries
    main: str  # the tensor with the largest part of its squared norm
    shares: list[float]  # fraction of its squared norm per column


class Table(NamedTuple):
    """The rows, and which of their values are known."""

    columns: list[str]  # names of tensors, the columns of `Row.shares`
    rows: list[Row]
    has_ratio: bool  # some row has an intervention ratio
    acts: str  # header for `Row.acts`; "" if the rows have none


def make_table(
    d: Subnetworks,
    rates: Sequence[float] | None,
    described: Mapping[str, Any],
    prefix: str = "",
    ratios: Mapping[int, float] | None = None,
) -> Table:
    """Return one row per subnetwork.

    rates: [K] activation rates. described: the result of `l3d.describe`, or an empty dict. prefix: removed from the
    tensors' names. ratios: intervention ratios by subnetwork; they replace those in `described`.
    """
    names = [name.removeprefix(prefix) for name in d.parameter_names]
    shares = squared_shares(d)
    largest = sorted(shares.sum(0).argsort(descending=True, stable=True)[:MAX_COLUMNS].tolist())
    main = shares.argmax(1).tolist()
    shown = shares[:, largest]
    columns = [names[j] for j in largest]
    if len(largest) < len(names):
        columns.append("others")
        shown = torch.cat([shown, 1 - shown.sum(1, keepdim=True)], dim=1).clamp_min(0)
    rows = []
    each = described.get("subnetworks") or [{}] * d.n_subnetworks
    for i, (seen, row) in enumerate(zip(each, shown.tolist(), strict=True)):
        raised, lowered = (
            [entry_name(described, entry) for entry, _ in seen.get(side, ())[:N_MOVES]]
            for side in ("raised", "lowered")
        )
        ratio = (ratios or {}).get(i, seen.get("intervention_ratio"))
        rate = None if rates is None else rates[i]
        words = acts_on(described, seen)
        rows.append(Row(i, rate, seen.get("impact"), ratio, words, raised, lowered, names[main[i]], row))
    has_ratio = any(row.ratio is not None for row in rows)
    label = {"tokens": "acts after", "text": "acts on rows of", "image": "acts on images of", "point": "acts on"}
    header = label.get(described.get("entries", ""), label.get(described.get("kind", ""), ""))
    return Table(columns, rows, has_ratio, header)


def acts_on(described: Mapping[str, Any], seen: Mapping[str, Any]) -> list[str]:
    """Return a few words for what a subnetwork acts on, those of largest impact first: tokens, classes or inputs."""
    places, kind = seen.get("top", ()), described.get("kind")
    if described.get("entries") == "tokens":
        marked = [place["tokens"][place["position"] - place["first"]] for place in places]
        return list(dict.fromkeys(visible(described["tokens"][str(token)]) for token in marked))[:N_WORDS]
    if kind in ("text", "image"):
        counts = Counter(place["predicted"] for place in places if "predicted" in place)
        return [entry_name(described, entry) for entry, _ in counts.most_common(2)]
    if kind == "point" and places:
        entries = [described["rows"][str(place["row"])]["point"] for place in places]
        points = torch.tensor(entries, dtype=torch.float32, device="cpu").abs().mean(0)
        order = points.argsort(descending=True).tolist()
        return [f"input {i}" for i in order if points[i] >= 0.5 * points.max() > 0][:2]
    return []


def entry_name(described: Mapping[str, Any], entry: int) -> str:
    """Return the name of an output entry: a token, a class, or its number."""
    names = described.get("tokens" if described.get("entries") == "tokens" else "classes") or {}
    name = names.get(str(entry))
    return f"output {entry}" if name is None else visible(name)


def visible(token: str) -> str:
    """Return a token's text with visible signs for line breaks, tabs and empty text."""
    return token.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "·"


@torch.no_grad()
def squared_shares(d: Subnetworks) -> torch.Tensor:
    """Return the fraction of each subnetwork's squared norm that lies in each tensor: [K, tensors] float64."""
    factors = ([factor.double() for factor in piece.factors()] for _, piece in d.decoder.items())
    squares = torch.stack([((u @ u.mT) * (v @ v.mT)).sum((1, 2)) for u, v in factors], dim=1)
    return squares / squares.sum(1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


def common_prefix(names: Sequence[str]) -> str:
    """Return the dotted prefix that all names share, with its last dot."""
    modules = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, modules))
