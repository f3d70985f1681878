"""Read YAML without surprises: a run's config.yaml, other configuration files, and values on the command line."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml

MOST_BYTES = 2**20
_DEEPEST = 100
_MOST_ENTRIES = 100_000  # values in a configuration; aliases of aliases would make more than fit into memory


class _Loader(yaml.SafeLoader):
    """YAML without surprises: no key twice, no octal numbers (010), no base 60 (10:20), no dates; 1e-3 is a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Read a node. Raises ComposerError for an alias of what it lies in."""
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        if alias is not None and alias.anchor in self.anchors and self.anchors[alias.anchor].end_mark is None:
            raise yaml.composer.ComposerError(None, None, f"*{alias.anchor} contains itself", alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Make a dict. Raises ConstructorError for a key that is given twice."""
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: Any) -> Any:
        """Make a whole number. Raises ConstructorError for one beyond all numbers with a point."""
        value = self.construct_yaml_int(node)
        if abs(value) > sys.float_info.max:
            raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
        return value

    def construct_octal(self, node: Any) -> Any:
        """Refuse a number that YAML would read to the base of 8."""
        plain = node.value.lstrip("+-0") or "0"
        advice = f"{node.value}: write {plain}, or '{node.value}' with quotes for a text"
        raise yaml.constructor.ConstructorError(None, None, advice, node.start_mark)

    def refuse_tag(self, node: Any) -> Any:
        """Refuse what is no text, number, list or mapping, as a configuration that is written again would lose it."""
        advice = f"{node.tag.rpartition(':')[2]!r} is not read; write it as a plain value"
        raise yaml.constructor.ConstructorError(None, None, advice, node.start_mark)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)",
    "tag:yaml.org,2002:float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "!octal": r"[-+]?0[0-9_]+",
}
for _tag, _form in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_form})\Z"), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("!octal", _Loader.construct_octal)
for _tag in ("binary", "timestamp", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.refuse_tag)


def read_yaml(path: Path) -> Any:
    """Read a YAML file. Raises ValueError, with the file's name and one line, for what `load_yaml` refuses."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES:,} bytes")
        return load_yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.constructor.ConstructorError as error:
        raise ValueError(f"{path}: Problems parsing config: {in_words(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as YAML ({in_words(error)})") from error


def load_yaml(text: str) -> Any:
    """Read a text as YAML without surprises.

    Raises YAMLError for what is no YAML, a key that is given twice, a number written like 010, a value that contains
    itself, and one that aliases make larger than any configuration.
    """
    _check_depth(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if _entries(node, {}) > _MOST_ENTRIES:
            raise yaml.YAMLError(f"more than {_MOST_ENTRIES} values")
        return None if node is None else loader.construct_document(node)
    except (OverflowError, UnicodeError, ValueError) as error:  # a number of too many digits
        raise error if isinstance(error, yaml.YAMLError) else yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """Raise YAMLError for lists in lists in lists ..; quickly, and without a call for each level."""
    depth = 0
    with suppress(yaml.MarkedYAMLError):  # the loader says it better
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise yaml.YAMLError("nested too deeply")


def _entries(node: Any, known: dict[int, int]) -> int:
    """Count a node's values, those of an alias each time."""
    if id(node) not in known:
        held = () if not isinstance(node, yaml.CollectionNode) else node.value
        flat = [each for item in held for each in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_entries(each, known) for each in flat)
    return known[id(node)]


def in_words(error: Exception) -> str:
    """Say what YAML finds wrong, and in which line, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    what = ", ".join(filter(None, [error.context, error.problem]))
    return what if mark is None else f"line {mark.line + 1}: {what}"
