"""Load what transformers loads, from a folder or the hub; whatever goes wrong becomes one line that says what."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def source_of(spec: str, target: str, needed: str | None = "config.json") -> str:
    """Return the folder or hub ID that `target` means, having checked a folder for the file it needs."""
    path = Path(target).expanduser()
    if path.is_dir():
        if needed is not None and not (path / needed).is_file():
            raise ValueError(f"{spec}: folder without {needed}")
        return str(path)
    if path.exists():
        raise ValueError(f"{spec}: expected a folder, got a file")
    if target[0] in "/.~" or target.count("/") > 1:
        raise FileNotFoundError(f"{spec}: no such folder")
    return target


def from_pretrained(spec: str, class_name: str, source: str, **arguments: Any) -> Any:
    """Call transformers.CLASS.from_pretrained(source).

    Raises ImportError without transformers, ValueError for whatever it or the hub refuses: nothing there, no
    network, no permission, a file cut short.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{spec}: transformers is not installed: pip install 'l3d[hf]'") from error
    try:
        return getattr(transformers, class_name).from_pretrained(source, **arguments)
    except Exception as error:  # of transformers, the hub's client, its HTTP library or safetensors, by version
        raise ValueError(f"{spec}: transformers cannot load it: {first_line(error)}") from error


def causal_lm(spec: str, source: str, **arguments: Any) -> Any:
    """Load a causal language model, whole: one whose file lacks weights would get random ones instead."""
    model, loading = from_pretrained(spec, "AutoModelForCausalLM", source, output_loading_info=True, **arguments)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"{spec}: its file lacks {len(missing)} of the model's tensors, {missing[0]!r} first: it holds another "
            "kind of model, or not all of this one"
        )
    model.config.use_cache = False  # a cache of keys and values is of no use here and holds the graph
    return model


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line: such a message can fill a screen, its first line says what was wrong.

    >>> first_line(OSError("no such model\\n\\nIf this is a private repository, ..."))
    'no such model'
    """
    text = str(error).strip() or type(error).__name__
    return text.split("\n")[0]
