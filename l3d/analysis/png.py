"""Encode images as PNG without an image library."""

import struct
import zlib

from torch import Tensor


def encode_png(pixels: Tensor) -> bytes:
    """Return an image as the bytes of a PNG file.

    pixels: uint8 [H, W, C], with C 1 for grey or 3 for colour. Raises ValueError for another shape or dtype.
    """
    if pixels.dtype.is_floating_point or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.numel():
        raise ValueError(f"pixels: expected uint8 [H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}")
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, -1).cpu().numpy().tobytes()
    stride = width * channels
    lines = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))  # filter 0: none
    head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
