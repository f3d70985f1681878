"""Say what each JSON file of ours holds, and check a file's content against that.

A schema looks like the content it describes: {"name": s, "other?": s} is an object with these fields, of which those
with "?" may be missing (fields it does not name are let through), {str: s} an object of any names, [s] a list, (s, t)
one of several, `Fixed` a list of so many different entries, `Number` a finite number within bounds, a class any value
of it, None null.
"""

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Number:
    """A finite number within bounds, both included."""

    least: float = -LARGEST
    most: float = LARGEST
    whole: bool = False

    def fits(self, value: Any) -> bool:
        """Tell whether a JSON value is such a number; true and false are none."""
        kind = type(value)
        return (kind is int or (kind is float and not self.whole)) and self.least <= value <= self.most


class Fixed:
    """A list of as many entries as schemas, each of its own kind."""

    def __init__(self, *each: Any) -> None:
        self.each = each


def whole(least: int = 0, most: float = 2**63 - 1) -> Number:
    """Return the schema of a whole number, from 0 on unless told otherwise."""
    return Number(least, most, True)


NUMBER, ANY_NUMBER, COUNT = Number(), (None, Number()), whole()
_LIST, _SHARE = [ANY_NUMBER], (None, Number(0, 1))

SETTINGS = {
    "k?": ANY_NUMBER, "divergence?": (None, str), "reference?": (None, str), "positions?": (None, str, whole(1)),
    "batch_size?": (None, whole(1)), "seed?": (None, whole(-(2**63))), "steps?": (None, COUNT),
}  # fmt: skip
DECOMPOSITION = {
    "n_subnetworks": whole(1), "shapes": {str: [COUNT]}, "ranks": {str: [whole(1)]}, "settings": SETTINGS,
    "history": {str: [(Number(), [Number()])]}, "timing": {str: Number()}, "threshold": (None, Number(0, 1e200)),
    "restart_errors": _LIST, "first_error?": (None, Number(0)),
    "base_model?": {"name?": str, "revision?": (None, str), "parameters?": {str: str}},
}  # fmt: skip
STATE = {  # of a checkpoint
    "step": COUNT, "exponent?": whole(-126, 126), "optimizer": {"count": COUNT},
    "recorder": {"thresholds": _LIST, "last_kept": [COUNT], "pending": Fixed([Number()], Number(), COUNT),
                 "first_errors?": [Number()]},
    "seen?": {"data": Fixed((None, COUNT), (None, str)), "reference": (None, str), "rows?": (None, str),
              "model?": (None, str), "cache?": (None, COUNT), "norm?": ANY_NUMBER},
}  # fmt: skip
METRICS = {
    "activation_rate?": [Number(0, 1)],
    **{f"{name}?": ANY_NUMBER for name in (
        "error", "held_out_error", "kept_per_sample", "dead_fraction", "seconds", "steps_per_second", "mmcs",
        "mmcs_own", "features_found", "r2", "peak_memory_bytes", "cuda_peak_memory_bytes",
    )},
}  # fmt: skip
_MOVES = {"raised?": [Fixed(COUNT, ANY_NUMBER)], "lowered?": [Fixed(COUNT, ANY_NUMBER)]}
_PLACE = {"row": COUNT, "position?": COUNT, "first?": COUNT, "tokens?": [COUNT], "predicted?": COUNT, **_MOVES}
SUBNETWORKS = {
    "kind": str, "entries": str, "moved": str, "n_rows": COUNT,
    "subnetworks": [{"activation_rate?": _SHARE, "impact?": ANY_NUMBER, "intervention_ratio?": ANY_NUMBER,
                     "top?": [_PLACE], **_MOVES}],
    "rows?": {str: {"point?": _LIST, "png?": str}}, "tokens?": {str: str}, "classes?": {str: str},
}  # fmt: skip
INTERVENTIONS = {"subnetworks": [COUNT], "ratio": _LIST}
OWNER = {"host": str, "process": whole(1), "started?": (None, COUNT)}  # of a run folder, as its lock says
SWEEP = {"base": {str: object}}


def check(value: Any, schema: Any, where: str) -> None:
    """Raise ValueError, which starts with `where` and names the field, if a JSON value does not fit a schema."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise _refusal(where, "expected named values", value)
        if str in schema:
            for name, each in value.items():
                check(each, schema[str], f"{where}: {name}")
            return
        for name, each in schema.items():
            plain = name.removesuffix("?")
            if plain in value:
                check(value[plain], each, f"{where}: {plain}")
            elif plain == name:
                raise _refusal(where, f"{plain}: missing")
    elif isinstance(schema, Fixed):
        if not isinstance(value, list) or len(value) != len(schema.each):
            raise _refusal(where, f"expected {_told(schema)}", value)
        for i, (item, each) in enumerate(zip(value, schema.each, strict=True)):
            check(item, each, f"{where} {i}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise _refusal(where, f"expected {_told(schema)}", value)
        if isinstance(schema[0], (dict, list, Fixed)):
            for i, item in enumerate(value):
                check(item, schema[0], f"{where} {i}")
        elif not all(_fits(item, schema[0]) for item in value):
            raise _refusal(where, f"expected {_told(schema)}")
    elif not _fits(value, schema):
        raise _refusal(where, f"expected {_told(schema)}", value)


def check_decomposition(header: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if the content of a decomposition.json does not fit `DECOMPOSITION`, or contradicts itself."""
    check(header, DECOMPOSITION, where)
    shapes, ranks = header["shapes"], header["ranks"]
    if not shapes or not ranks.keys() <= shapes.keys():
        raise _refusal(where, "ranks: expected those of the parameters in shapes")
    for name in ranks:
        shape = shapes[name]
        most = [] if len(shape) < 2 else [min(shape)] if len(shape) == 2 else shape
        if len(ranks[name]) != len(most) or any(rank > d for rank, d in zip(ranks[name], most, strict=True)):
            raise _refusal(f"{where}: ranks: {name}", f"expected {len(most)} of at most {most}", ranks[name])
    history = header["history"]
    if len({len(column) for column in history.values()}) > 1 or (history and not {"step", "error"} <= history.keys()):
        raise _refusal(where, "history: expected columns of one length, with step and error among them")
    for name, column in history.items():  # a run of several restarts has a list of figures in each row of some
        widths = {len(row) if isinstance(row, list) else 0 for row in column} or {0}
        if len(widths) > 1 or (widths != {0} and name not in ("error", "dead_fraction")):
            raise _refusal(where, f"history: {name}: expected a list of numbers")


def check_subnetworks(described: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a description does not fit `SUBNETWORKS`, or mentions rows or tokens that it lacks."""
    check(described, SUBNETWORKS, where)
    tokens, rows = described.get("tokens", {}), described.get("rows", {})
    widths = set()
    for k, seen in enumerate(described["subnetworks"]):
        for place in seen.get("top", ()):
            at = place.get("position", -1) - place.get("first", 0)
            if described["entries"] == "tokens":
                shown = place.get("tokens", [])
                if not 0 <= at < len(shown) or str(shown[at]) not in tokens:
                    raise _refusal(where, f"subnetworks {k}: top: expected the text of the token at its position")
            elif described["kind"] == "point":
                widths.add(len(rows.get(str(place["row"]), {}).get("point", ())))
    if len(widths) > 1 or 0 in widths:
        raise _refusal(where, "rows: expected a point of one length for every row in top")


def _fits(value: Any, schema: Any) -> bool:
    """Tell whether a value fits a schema that is no object."""
    if isinstance(schema, Number):
        return schema.fits(value)
    if isinstance(schema, tuple):
        return any(_fits(value, each) for each in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(_fits(item, schema[0]) for item in value)
    return value is None if schema is None else isinstance(value, schema)


def _told(schema: Any) -> str:
    """Say in words what a schema expects."""
    if isinstance(schema, Number):
        kind = "a whole number" if schema.whole else "a number"
        kind += f" from {schema.least:g}" if schema.least > (-(2**63) if schema.whole else -LARGEST) else ""
        return kind + (f" to {schema.most:g}" if schema.most < 2**62 else "")
    if isinstance(schema, tuple):
        return " or ".join(_told(each) for each in schema if each is not None)
    if isinstance(schema, Fixed):
        return f"a list of {len(schema.each)} values"
    if isinstance(schema, list):
        first = next(each for each in schema[0] if each is not None) if isinstance(schema[0], tuple) else schema[0]
        if isinstance(first, Number):
            return "a list of whole numbers" if first.whole else "a list of numbers"
        return "a list of texts" if first is str else "a list"
    return {str: "a text", bool: "true or false"}.get(schema, "a value")


def _refusal(where: str, problem: str, *got: Any) -> ValueError:
    found = "".join(f", got {reprlib.repr(value)}" for value in got)
    return ValueError(f"{one_line(where)}: {one_line(problem + found)}")


def one_line(text: object) -> str:
    """Return a text, which may come from a file or a library, in one line of bounded length."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:220]} .. {line[-60:]}"
