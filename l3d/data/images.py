"""Scale, resize and normalise uint8 images into the rows a network takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset


class ImageRows(Dataset):
    """Resize images as they are read: a whole set at the larger size could fill the memory.

    Args:
        images: uint8 [n, C, H, W].
        size: height and width to resize to; bilinear, antialiased when it shrinks.
        mean, std: [C, 1, 1], of the images divided by 255.

    A row is float32 [C, *size].
    """

    def __init__(self, images: Tensor, size: tuple[int, int], mean: Tensor, std: Tensor) -> None:
        self.images, self.size, self.mean, self.std = images, size, mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        image = self.images[row][None].to(torch.float32) / 255
        image = F.interpolate(image, self.size, mode="bilinear", align_corners=False, antialias=True)
        return (image[0] - self.mean) / self.std


def array_rows(
    array: np.ndarray, mean: list[float] | None, std: list[float] | None, size: int | list[int] | None = None
) -> Tensor | ImageRows:
    """Turn uint8 images [n, H, W, C] into float32 rows (image / 255 - mean) / std [n, C, H, W].

    Args:
        array: the images; an array of another dtype is returned unchanged, as a tensor.
        mean, std: one number per channel; None for 0 and 1.
        size: pixels of a side, or [height, width]; rows are then resized as they are read. None: not resized.

    Raises ValueError for arguments that do not fit the array.
    """
    rows = torch.from_numpy(np.ascontiguousarray(array))
    if rows.dtype != torch.uint8:
        for name, value in (("mean, std", mean or std), ("size", size)):
            if value is not None:
                raise ValueError(f"{name}: only for uint8 images; this array is {array.dtype}")
        return rows
    if rows.ndim != 4:
        raise ValueError(f"key: expected uint8 images [n, H, W, C], got {list(array.shape)}")
    rows = rows.permute(0, 3, 1, 2)
    center = _per_channel("mean", mean, rows.shape[1], 0.0)
    scale = _per_channel("std", std, rows.shape[1], 1.0)
    if not bool((scale > 0).all()):
        raise ValueError(f"std: expected positive numbers, got {std}")
    if size is not None:
        return ImageRows(rows.contiguous(), _height_and_width(size), center, scale)
    return rows.to(torch.float32).div_(255).sub_(center).div_(scale).contiguous()


def _height_and_width(size: Any) -> tuple[int, int]:
    """Return (height, width) for a number of pixels or a pair; raises ValueError for anything else."""
    both = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(both) != 2 or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in both):
        raise ValueError(f"size: expected a number of pixels, or [height, width], got {size!r}")
    return both


def _per_channel(name: str, values: list[float] | None, channels: int, default: float) -> Tensor:
    """Return one number per channel as a tensor [C, 1, 1]; raises ValueError if their number differs."""
    if values is None:
        return torch.full((channels, 1, 1), default, dtype=torch.float32, device="cpu")
    try:
        channel = torch.tensor(values, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError):
        channel = torch.empty(0, device="cpu")
    if channel.shape != (channels,):
        raise ValueError(f"{name}: expected {channels} numbers, one per channel, got {values!r}")
    return channel[:, None, None]
