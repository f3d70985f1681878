"""Read YAML without surprises: what a person reads in a file is what the program gets, or it is refused in one line.

Refused are names given twice, numbers such as 010 (8 to YAML) and 1:30 (90), infinity and NaN, names that are no
texts (`on:` is true to YAML), tags, and whatever aliases make of a small file: too much, or something within itself.
A date is a text.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from l3d.storage.schema import one_line

MOST_BYTES, MOST_NODES, DEEPEST = 2**20, 100_000, 50
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = {_PREFIX + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_OCTAL = re.compile(r"[-+]?0[\d_]*\d")


class RefusedYAMLError(yaml.YAMLError, ValueError):
    """YAML that would be read as something else than what it looks like."""


def read_yaml(path: Path) -> Any:
    """Read a YAML file. Raises FileNotFoundError, or ValueError with the file's name and one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: not readable as YAML (larger than {MOST_BYTES:,} bytes)")
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("the file is empty")
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not readable as YAML ({one_line(error)})") from error


def parse_yaml(text: str) -> Any:
    """Return a YAML text's value. Raises yaml.YAMLError for what is none, or is refused."""
    if len(text) > MOST_BYTES:
        raise RefusedYAMLError(f"longer than {MOST_BYTES:,} characters")
    depth = 0
    for event in yaml.parse(text, Loader=_BASE):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:  # before anything calls itself for each level
            raise RefusedYAMLError(f"nested more than {DEEPEST} times")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, [0], 0)
        return loader.construct_document(node)
    except yaml.YAMLError:
        raise
    except (ValueError, OverflowError) as error:  # a number of too many digits, a surrogate
        raise RefusedYAMLError(str(error)) from error
    finally:
        loader.dispose()


_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_BASE):
    """Takes 1e-3 for a number and 2024-01-01 for a text, as the command line does."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in each if tag not in (_PREFIX + "timestamp", _PREFIX + "float")]
        for first, each in _BASE.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    _PREFIX + "float",
    re.compile(
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
        r"|[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _check(node: Any, count: list[int], depth: int) -> None:
    """Raise `RefusedYAMLError` for what a node, with all in it and what its aliases stand for, may not hold."""
    count[0] += 1
    if count[0] > MOST_NODES or depth > DEEPEST:
        raise RefusedYAMLError(f"more than {MOST_NODES:,} values, or something within itself")
    line = f"line {node.start_mark.line + 1}: "
    if node.tag not in _PLAIN:
        raise RefusedYAMLError(f"{line}{node.tag.removeprefix(_PREFIX)!r} is not read; write it as a plain value")
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            if key.tag != _PREFIX + "str":
                raise RefusedYAMLError(f"{line}expected a name, got {one_line(key.value)!r}; put it in quotes")
            if key.value in names:
                raise RefusedYAMLError(f"line {key.start_mark.line + 1}: {key.value!r} is given twice")
            names.add(key.value)
            _check(value, count, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _check(each, count, depth + 1)
    elif node.tag in (_PREFIX + "int", _PREFIX + "float"):
        if ":" in node.value or (node.tag == _PREFIX + "int" and _OCTAL.fullmatch(node.value)):
            taken = "another number in YAML; write it plainly, or in quotes if it is a text"
            raise RefusedYAMLError(f"{line}{node.value} is {taken}")
        if not node.value.startswith("0x") and not _is_finite(node.value):
            raise RefusedYAMLError(f"{line}expected a finite number, got {node.value[:40]}")


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace("_", "")))
    except ValueError:  # .inf, .nan, 0b1
        return "." not in text
