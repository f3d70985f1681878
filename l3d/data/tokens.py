"""Load rows of token ids for language models: from texts, a Hugging Face dataset or an array of ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l3d.data.arguments import check_whole
from l3d.data.extras import import_extra
from l3d.data.pretrained import first_line, from_pretrained
from l3d.data.readers import TokenData, TokenRows, array_names, read_array, read_texts, token_rows

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}


def load_text(
    path: Path,
    model_spec: str | None,
    length: int = 16,
    separator: str | None = "<|endoftext|>",
    max_rows: int | None = None,
    tokenizer: str | None = None,
    start: str = "every",
    short: str = "drop",
) -> TokenData:
    """Read a text file, or all *.txt files of a folder; see `l3d.data.sources.load_data`."""
    return _cutter(model_spec, length, max_rows, tokenizer, start, short)(read_texts(path, separator))


def load_dataset(
    source: str,
    model_spec: str | None,
    split: str = "train",
    column: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    length: int = 16,
    max_rows: int | None = None,
    tokenizer: str | None = None,
    start: str = "every",
    short: str = "drop",
) -> TokenData:
    """Read a column of a Hugging Face dataset: texts, or lists of token ids; see `l3d.data.sources.load_data`."""
    cut = _cutter(model_spec, length, max_rows, tokenizer, start, short)
    try:
        return cut(_column(_open(source, split, name, revision), column))
    except (ValueError, ImportError):  # Arrow raises ValueErrors
        raise
    except StopIteration as error:
        raise ValueError("holds no text: the dataset has no rows") from error
    except Exception as error:  # its class varies with the versions of datasets, hub client, HTTP library, Arrow
        raise ValueError(f"datasets cannot read it: {first_line(error)}") from error


def load_tokens(path: Path, model_spec: str | None, key: str | None = None, max_rows: int | None = None) -> TokenData:
    """Read rows of token ids from an .npy or .npz file; see `l3d.data.sources.load_data`."""
    array = read_array(path, key, default="input_ids")
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"expected whole numbers [rows, length], got {array.dtype} {list(array.shape)}")
    if array.size and int(array.min()) < 0:
        raise ValueError(f"expected token ids from 0, got {int(array.min())}")
    ids = torch.from_numpy(array[:max_rows].astype(np.int64))
    mask = read_array(path, "attention_mask") if "attention_mask" in array_names(path) else None
    if mask is not None and mask.shape != array.shape:
        raise ValueError(f"attention_mask: expected the shape of the ids, {list(array.shape)}, got {list(mask.shape)}")
    config = _model_config(model_spec)
    if ids.numel():
        _check_length(config, ids.shape[1])
        _check_vocabulary(config, int(ids.max()), str(path.name))
    return ids if mask is None else TokenRows(ids, torch.from_numpy(mask[:max_rows].astype(np.int64)))


def _cutter(
    model_spec: str | None, length: int, max_rows: int | None, tokenizer: str | None, start: str, short: str
) -> Callable[[Iterable[Any]], TokenData]:
    """Check the arguments and return the function that cuts texts, or lists of ids, into rows.

    That raises ValueError for ids outside the model's vocabulary.
    """
    check_whole("length", length, 2)
    for name, value, known in (("start", start, ("every", "first")), ("short", short, ("drop", "pad"))):
        if value not in known:
            raise ValueError(f"{name}: expected {known[0]!r} or {known[1]!r}, got {value!r}")
    config = _model_config(model_spec)
    _check_length(config, length)

    def cut(texts: Iterable[Any]) -> TokenData:
        texts = iter(texts)
        first = next(texts, None)
        if first is None:
            raise ValueError("holds no text")
        chosen, encoder = _tokenizer(model_spec, tokenizer) if isinstance(first, str) else ("the data", None)
        data = token_rows(chain([first], texts), encoder, length, max_rows, start, short)
        ids = data.ids if isinstance(data, TokenRows) else data
        _check_vocabulary(config, int(ids.max()), chosen)
        return data

    return cut


def _model_config(model_spec: str | None) -> Any:
    """Load the configuration of an "hf:" model; None for any other."""
    model = _hf_name(model_spec)
    return None if model is None else from_pretrained(f"model {model}", "AutoConfig", model)


def _hf_name(model_spec: str | None) -> str | None:
    """Return the folder or hub ID of an "hf:" description; None for any other."""
    return model_spec.removeprefix("hf:") if model_spec and model_spec.startswith("hf:") else None


def _check_length(config: Any, length: int) -> None:
    """Raise ValueError if rows are longer than the model takes."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"length: the model takes at most {longest} tokens, got {length}")


def _check_vocabulary(config: Any, largest: int, source: str) -> None:
    """Raise ValueError if the largest id is outside the model's vocabulary."""
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"tokenizer: gives token {largest}, but the model's vocabulary has {vocabulary}: "
            f"{source} does not belong to this model"
        )


def _tokenizer(model_spec: str | None, tokenizer: str | None) -> tuple[str, Any]:
    """Load the given tokenizer, by default the model's, and return it after its folder or hub ID."""
    chosen = tokenizer.removeprefix("hf:") if tokenizer else _hf_name(model_spec)
    if chosen is None:
        raise ValueError("tokenizer: needed (a folder or hub ID), because the model is not an hf: one")
    return chosen, from_pretrained(f"tokenizer {chosen}", "AutoTokenizer", chosen, needed=None)


def _open(source: str, split: str, name: str | None, revision: str | None) -> Any:
    """Open a dataset without reading all of it: a folder, a file of rows, or a hub ID, which is streamed."""
    datasets = import_extra("datasets", "datasets", "datasets is not installed")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"expected a file of {', '.join(_BUILDERS)}, got {path.name}")
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"split: expected one of {', '.join(found)}, got {split!r}")
            found = found[split]
        return found
    if source[0] in "/.~" and not path.exists():
        raise ValueError("no such file or folder")
    source = str(path) if path.is_dir() else source
    return datasets.load_dataset(source, name, split=split, revision=revision, streaming=True)


def _column(dataset: Any, column: str | None) -> Iterator[Any]:
    """Return an iterator over the values of a column: non-empty texts or lists of ids. Raises ValueError if unclear."""
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise ValueError("holds no text: the dataset has no rows")
    texts = [name for name, value in first.items() if isinstance(value, str)]
    chosen = column or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if chosen not in first:
        problem = "which column?" if chosen is None else f"no column {chosen!r}"
        raise ValueError(f"column: {problem} (the dataset has: {', '.join(first)})")
    ids = isinstance(first[chosen], (list, tuple)) and all(isinstance(each, int) for each in first[chosen])
    if not (ids or isinstance(first[chosen], str)):
        raise ValueError(f"column: {chosen!r} holds neither texts nor lists of token ids")
    return (row[chosen] for row in chain([first], rows) if row[chosen] and (ids or row[chosen].strip()))
