"""Convert a model's inputs and outputs for display: tokens to text, images to thumbnails, outputs to names."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from l3d.analysis.png import encode_png
from l3d.data.batch import without_label
from l3d.data.readers import array_names, read_array

THUMBNAIL = 64  # pixels along the longer side, at most
MAX_POINT = 64  # numbers in a row that is shown as a point


@dataclass(frozen=True)
class View:
    """How inputs and outputs are displayed; each part may be missing.

    Attributes:
        tokens: function from token ids to their texts, one text per id.
        classes: names of the outputs.
        mean, std: per channel, the mean and deviation that normalised images in [0, 1]; thumbnails undo it.
    """

    tokens: Callable[[Sequence[int]], list[str]] | None = None
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def kind_of(inputs: Tensor) -> str:
    """Return how a batch of inputs [n, ...] is displayed: as text, image, point or row."""
    if inputs.ndim == 2 and not inputs.is_floating_point():
        return "text"
    if inputs.ndim == 4 and inputs.shape[1] in (1, 3):
        return "image"
    return "point" if inputs.ndim == 2 and inputs.shape[1] <= MAX_POINT else "row"


def plain_inputs(batch: Any) -> Tensor:
    """Return the input tensor of a batch, which is a tensor, (input, label) or {"input_ids": ..}."""
    batch = without_label(batch)
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids", next(iter(batch.values())))
    if not isinstance(batch, Tensor):
        raise ValueError(f"data: expected tensors, got {type(batch).__name__}")
    return batch


def token_texts(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """Return a function from token ids to their texts, with the spaces and line breaks that they have in a text."""

    def texts(ids: Sequence[int]) -> list[str]:
        pieces = tokenizer.convert_ids_to_tokens(list(ids))
        return [_piece(tokenizer, token, piece) for token, piece in zip(ids, pieces, strict=True)]

    return texts


def _piece(tokenizer: Any, token: int, piece: str | None) -> str:
    if piece is None:
        return f"#{token}"  # an unused row of the vocabulary
    if "\u2581" in piece:  # SentencePiece's space, which decoding a lone token drops
        return piece.replace("\u2581", " ")
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    if byte:
        return chr(int(byte[1], 16)) if int(byte[1], 16) < 128 else piece
    return tokenizer.decode([token]) or piece


def thumbnails(images: Tensor, view: View) -> list[str]:
    """Return images [n, 1 or 3, H, W] as small PNGs in base64.

    If the view does not know the normalisation, and values lie outside [0, 1], each image is scaled from its smallest
    value to its largest.
    """
    x = images.detach().float().cpu()
    if view.mean is not None or view.std is not None:
        for values, undo in ((view.std, torch.mul), (view.mean, torch.add)):
            if values is not None:
                x = undo(x, torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None])
    elif x.min() < 0 or x.max() > 1:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = (x - low) / (high - low).clamp_min(1e-12)
    longest = max(x.shape[2:])
    if longest > THUMBNAIL:
        size = [max(1, round(side * THUMBNAIL / longest)) for side in x.shape[2:]]
        x = F.interpolate(x, size, mode="area")
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [base64.b64encode(encode_png(image)).decode() for image in pixels]


def load_view(
    data_spec: str | None, model_spec: str | None, arguments: Mapping[str, Any], data: Any, model: nn.Module
) -> View:
    """Return the view for a data source and a model, both given by specs such as "npz:FILE"; see `l3d.data.sources`.

    It is the attribute `view` of the data or the model, if that is a `View`. Else the tokenizer is that of `arguments`,
    or that of an "hf:" model. An npz archive of images may hold the outputs' names in an array `classes`; other data
    may have an attribute `classes`.
    """
    while isinstance(data, Subset):
        data = data.dataset
    for owner in (data, model):
        if isinstance(own := getattr(owner, "view", None), View):
            return own
    mean, std = arguments.get("mean"), arguments.get("std")
    scheme, _, target = (data_spec or "").partition(":")
    if scheme == "npz":
        path = Path(target).expanduser()
        found = read_array(path, "classes", kinds="USfiubc") if "classes" in array_names(path) else None
        classes = found.tolist() if found is not None and found.dtype.kind == "U" else None
    else:
        classes = getattr(data, "classes", None)
    names = [str(name) for name in classes] if isinstance(classes, (list, tuple)) else None
    return View(_load_tokens(model_spec, arguments.get("tokenizer")), names, mean, std)


def _load_tokens(model_spec: str | None, tokenizer: str | None) -> Callable[[Sequence[int]], list[str]] | None:
    """Return `token_texts` of a tokenizer by name, or of an "hf:" model's; None if none can be loaded."""
    name = tokenizer or (model_spec if (model_spec or "").startswith("hf:") else None)
    if name is None:
        return None
    try:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(Path(name.removeprefix("hf:")).expanduser()))
    except (ImportError, OSError, ValueError, KeyError, TypeError):
        return None  # a text source would have failed earlier; these data are token ids, and are shown as numbers
    return token_texts(found)
