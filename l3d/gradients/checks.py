"""Check token ids before the forward pass, and logits before the KL divergence; errors name what to change."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def check_tokens(model: nn.Module, inputs: Any) -> None:
    """Raise ValueError for token ids outside a transformers model's vocabulary, and for rows longer than it takes.

    On a GPU such an id fails an assertion that ends the process; a model with rotary positions would compute nonsense
    for rows that are too long. Models without a `config`, and inputs that are not ids [B, T], pass.
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
    """Raise ValueError for outputs [S, ...] that are not logits, which KL needs: a single entry, or probabilities.

    The softmax of a single entry is always 1; the softmax of probabilities is nearly uniform for any model.
    Log-probabilities are logits and pass.
    """
    if outputs.shape[-1] < 2:
        raise ValueError(
            "divergence: 'kl' compares distributions over the outputs' last dimension, which has "
            f"{outputs.shape[-1]} entry; return logits of two or more classes, or use 'mse'"
        )
    values = outputs.detach().float()
    if bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError(
            "divergence: 'kl' takes logits, but the model's outputs are probabilities (none is negative, and they sum "
            "to 1); return the logits before the softmax"
        )
