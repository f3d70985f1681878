"""Load models, configurations and tokenizers through transformers, from a folder or the hub; errors are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l3d.data.extras import import_extra


def _source_of(spec: str, target: str, needed: str | None) -> str:
    """Return the folder or hub ID that `target` names.

    needed: a file that a folder must hold; None for none. Raises ValueError for a folder without it and for a file,
    FileNotFoundError for a path that does not exist.
    """
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


def from_pretrained(
    spec: str, class_name: str, target: str, needed: str | None = "config.json", **arguments: Any
) -> Any:
    """Call transformers.CLASS.from_pretrained with the folder or hub ID `target`.

    needed: a file that a folder must hold; None for none. Raises FileNotFoundError for a folder that does not exist,
    ImportError if transformers is not installed, and ValueError if it or the hub fails: nothing found, no network, no
    permission, a truncated file.
    """
    source = _source_of(spec, target, needed)
    transformers = import_extra("transformers", "hf", f"{spec}: transformers is not installed")
    try:
        return getattr(transformers, class_name).from_pretrained(source, **arguments)
    except Exception as error:  # its class varies with the versions of transformers, hub client, HTTP library
        raise ValueError(f"{spec}: transformers cannot load it: {first_line(error)}") from error


def causal_lm(spec: str, target: str, **arguments: Any) -> Any:
    """Load a causal language model. Raises ValueError for a file that lacks weights: they would be random."""
    model, loading = from_pretrained(spec, "AutoModelForCausalLM", target, output_loading_info=True, **arguments)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"{spec}: its file lacks {len(missing)} of the model's tensors, {missing[0]!r} first: it holds another "
            "kind of model, or only a part of this one"
        )
    model.config.use_cache = False  # a cache of keys and values is not used here, and would keep the graph in memory
    return model


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the rest can fill a screen.

    >>> first_line(OSError("no such model\\n\\nIf this is a private repository, ..."))
    'no such model'
    """
    return (str(error).strip() or type(error).__name__).split("\n")[0]
