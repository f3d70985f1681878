"""What can be told wrong with inputs and outputs before a gradient is taken, in one line each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_tokens(model: nn.Module, inputs: Any) -> None:
    """Refuse token ids beyond a transformers model's vocabulary, and rows longer than it takes.

    A GPU would answer the first with a failed assertion that ends the process, and a rotary model would answer the
    second with nonsense. Models without a `config`, and inputs that are no ids [B, T], pass.
    """
    config = getattr(model, "config", None)
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if config is None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        return
    vocabulary, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and ids.shape[1] > longest:
        raise ValueError(f"data: rows have {ids.shape[1]} tokens, the model takes at most {longest}")
    if ids.numel() and isinstance(vocabulary, int):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"data: holds token {low if low < 0 else high}, but the model's vocabulary has {vocabulary}: "
                "the tokenizer does not belong to this model"
            )


def check_logits(outputs: Tensor) -> None:
    """Refuse outputs [S, ..] that are no logits of a distribution, as KL takes them: one entry, or probabilities.

    The softmax of a single entry is always one; that of probabilities is nearly uniform, whatever the model says.
    Log-probabilities are logits.
    """
    if outputs.shape[-1] < 2:
        raise ValueError(
            "divergence: 'kl' compares distributions over the outputs' last dimension, which has "
            f"{outputs.shape[-1]} entry; return logits of two or more classes, or take 'mse'"
        )
    values = outputs.detach().float()
    if bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError(
            "divergence: 'kl' takes logits, but the model's outputs are probabilities (none is negative, and they sum "
            "to 1); return what its softmax is given"
        )


def describe(inputs: Any) -> str:
    """Write the shapes of a batch.

    >>> describe({"input_ids": torch.zeros(2, 3)})
    'input_ids [2, 3]'
    """
    if isinstance(inputs, Tensor):
        return str(list(inputs.shape))
    if isinstance(inputs, Mapping):
        return ", ".join(f"{key} {describe(value)}" for key, value in inputs.items())
    return type(inputs).__name__


def rows_in(batch: Any) -> int | None:
    """Count a batch's rows: the length of its first tensor; None where it holds none."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.ndim), None)


def count_rows_of(batch: Any) -> int:
    """Count a batch's rows. Raises ValueError where it holds no tensor."""
    n_rows = rows_in(batch)
    if n_rows is None:
        raise ValueError(f"data: a batch can only be split by rows where it holds tensors, got {type(batch).__name__}")
    return n_rows


def without_label(batch: Any) -> Any:
    """Return the inputs of a batch that may be (input, label) or its like."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def join(batches: Sequence[Any]) -> Any:
    """Append the rows of several batches: tensors, or mappings or tuples of tensors. None where they are not alike.

    >>> join([torch.zeros(2, 3), torch.zeros(1, 3)]).shape
    torch.Size([3, 3])
    """
    first = batches[0]
    if isinstance(first, Mapping):
        if not all(isinstance(batch, Mapping) and batch.keys() == first.keys() for batch in batches):
            return None
        joined: Any = {key: join([batch[key] for batch in batches]) for key in first}
        return joined if _have_as_many_rows(joined.values()) else None
    if isinstance(first, (tuple, list)):
        if not all(isinstance(batch, (tuple, list)) and len(batch) == len(first) for batch in batches):
            return None
        joined = tuple(map(join, zip(*batches, strict=True)))
        return joined if _have_as_many_rows(joined) else None
    if not all(isinstance(batch, Tensor) and batch.ndim for batch in batches):
        return None
    alike = all(batch.shape[1:] == first.shape[1:] and batch.dtype == first.dtype for batch in batches)
    return torch.cat(list(batches)) if alike else None


def _have_as_many_rows(parts: Iterable[Any]) -> bool:
    n_rows = {None if part is None else rows_in(part) for part in parts}
    return len(n_rows) == 1 and None not in n_rows


def tensors_of(batch: Any) -> list[Tensor]:
    """List the tensors of a batch: itself, or those of a mapping or tuple."""
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in tensors_of(value)]
    if isinstance(batch, (tuple, list)):
        return [tensor for value in batch for tensor in tensors_of(value)]
    return [batch] if isinstance(batch, Tensor) else []
