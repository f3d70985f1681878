"""Choose the rows that a report shows, and write them as text or PNG: l3d.analysis.contexts, view and png."""

import base64
import struct
import zlib

import pytest
import torch
from torch import Tensor

from l3d.analysis.contexts import Contexts, top_contexts
from l3d.analysis.png import encode_png
from l3d.analysis.view import THUMBNAIL, View, kind_of, thumbnails, token_texts


def decode_png(data: bytes) -> Tensor:
    """Read a PNG of 8 bits without filters, checking every chunk."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + content)
        chunks[kind] = content
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    lines = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 3), (2, 7, 1)])
def test_a_png_holds_the_pixels(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    assert torch.equal(decode_png(encode_png(pixels)), pixels)


@pytest.mark.parametrize("pixels", [torch.rand(2, 2, 3), torch.zeros(2, 2, 4, dtype=torch.uint8)])
def test_what_is_no_picture_is_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \[H, W, 1 or 3\]"):
        encode_png(pixels)


def test_thumbnails_undo_the_normalisation() -> None:
    """The uint8 pixels that images were made of come back; large ones are shrunk, keeping their shape."""
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    x = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for image, encoded in zip(pixels, thumbnails(x, View(mean=mean, std=std)), strict=True):
        assert torch.equal(decode_png(base64.b64decode(encoded)), image.permute(1, 2, 0))
    (wide,) = thumbnails(torch.rand(1, 1, 100, 2 * THUMBNAIL), View())
    assert decode_png(base64.b64decode(wide)).shape == (50, THUMBNAIL, 1)
    (stretched,) = thumbnails(torch.tensor([[[[-3.0, 1.0, 5.0]]]]), View())
    assert decode_png(base64.b64decode(stretched)).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "inputs, kind",
    [
        (torch.zeros(2, 5, dtype=torch.int64), "text"),
        (torch.zeros(2, 3, 4, 4), "image"),
        (torch.zeros(2, 5), "point"),
        (torch.zeros(2, 500), "row"),
        (torch.zeros(2, 6, 4, 4), "row"),
    ],
)
def test_kinds_of_rows(inputs: Tensor, kind: str) -> None:
    assert kind_of(inputs) == kind


class Pieces:
    """A tokenizer of SentencePiece's kind, as transformers has them."""

    pieces = ("<s>", "\u2581once", "upon", "<0x0A>", "<0xE2>", None, "é")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.pieces[i] for i in ids]

    def decode(self, ids: list[int]) -> str:
        return str(self.pieces[ids[0]]).replace("\u2581", "")


def test_tokens_are_read_with_their_spaces_and_line_breaks() -> None:
    assert token_texts(Pieces())(range(7)) == ["<s>", " once", "upon", "\n", "<0xE2>", "#5", "é"]


def test_the_places_of_largest_impact_are_in_different_rows() -> None:
    """Against a plain search, for every subnetwork by itself."""
    impacts = torch.rand(9, 4, 3)
    found = top_contexts(impacts, 5)
    for k in range(3):
        best = sorted(((float(row.max()), i, int(row.argmax())) for i, row in enumerate(impacts[..., k])), reverse=True)
        places = zip(found.impacts[k].tolist(), found.rows[k].tolist(), found.positions[k].tolist(), strict=True)
        assert list(places) == best[:5]


def test_a_shared_beginning_counts_once_with_its_mean_impact() -> None:
    """What a causal model sees of two texts that begin alike is the same."""
    tokens = torch.tensor([[1, 5, 6], [1, 5, 7], [1, 8, 6]])
    impacts = torch.tensor([[9.0, 4.0, 1.0], [3.0, 6.0, 2.0], [6.0, 1.0, 2.0]])[..., None]
    found = top_contexts(impacts, 3, tokens)
    # the first token of all rows: mean 6, shown in row 0; after it row 0 has the shared 5: mean 5, hidden behind it
    assert found.rows[0].tolist() == [0, 1, 2]
    assert found.impacts[0].tolist() == [6.0, 2.0, 2.0]
    assert found.positions[0].tolist()[:2] == [0, 2]


def test_rows_that_are_all_the_same_are_shown_once() -> None:
    tokens = torch.ones(4, 3, dtype=torch.int64)
    found = top_contexts(torch.rand(4, 3, 2), 4, tokens)
    assert found.rows[:, 0].tolist() == [0, 0]
    assert found.impacts[:, 1:].eq(-torch.inf).all()


def test_padding_hides_no_other_rows_context() -> None:
    """Padding repeats a row's last token, and so may look like another row's beginning; that row's impact counts."""
    tokens = torch.tensor([[1, 2, 2], [1, 2, 2]])
    impacts = torch.tensor([[1.0, 3.0, -torch.inf], [1.0, 5.0, 8.0]])[..., None]
    found = top_contexts(impacts, 2, tokens)
    assert found.rows[0].tolist() == [1, 0]
    assert found.positions[0].tolist() == [2, 1]
    assert found.impacts[0].tolist() == [8.0, 4.0]


def test_contexts_are_shown_in_one_line() -> None:
    """Sizes and the largest impact, never the arrays."""
    places = torch.zeros(2, 3, dtype=torch.int64)
    shown = repr(Contexts(places, places, torch.tensor([[3.0, 2.0, 1.0], [0.5, 0.25, -torch.inf]])))
    assert shown == "Contexts(2 subnetworks, 3 samples each; largest impact 3)"
