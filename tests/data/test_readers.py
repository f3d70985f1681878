"""Read texts as rows of tokens and images as a network's numbers; refuse what does not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l3d.data.readers import token_rows
from l3d.data.sources import load_data

from helpers import Spelling


def test_windows_and_tails_rebuild_each_text() -> None:
    """Without BOS, the rows of a text joined are that text, less a tail shorter than a row."""
    texts = ["abcdefgh", "ab", "ijklmnopq"]
    rows = token_rows(texts, Spelling(None), 4, None, "every")
    assert ["".join(map(chr, row)) for row in rows.tolist()] == ["abcd", "efgh", "ijkl", "mnop"]
    assert rows.dtype == torch.int64


def test_every_window_starts_with_bos() -> None:
    """With BOS, each row is BOS and then length - 1 consecutive tokens."""
    rows = token_rows(["abcdefgh"], Spelling(1), 4, None, "every").tolist()
    assert rows == [[1, *map(ord, "abc")], [1, *map(ord, "def")]]


def test_first_takes_one_window_of_each_long_enough_text() -> None:
    """start="first" keeps each text's beginning, and max_rows the first such rows."""
    texts = ["abcdefgh", "ab", "ijklmnopq", "rstu"]
    rows = token_rows(texts, Spelling(None), 4, None, "first")
    assert ["".join(map(chr, row)) for row in rows.tolist()] == ["abcd", "ijkl", "rstu"]
    assert torch.equal(token_rows(texts, Spelling(None), 4, 2, "first"), rows[:2])


@pytest.mark.data
def test_first_windows_are_the_tokenizers_own_beginnings(data_dir: Path) -> None:
    """A first window is what the tokenizer gives for the text, cut off; a folder reads as its file does."""
    transformers = pytest.importorskip("transformers")
    folder = str(data_dir / "stories260k")
    first = load_data(f"text:{data_dir / 'stories.txt'}", model_spec=f"hf:{folder}", start="first", length=24)
    texts = (data_dir / "stories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    encoder = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [encoder.encode(text.strip())[:24] for text in texts if text.strip()]
    assert first.tolist() == [ids for ids in expected if len(ids) == 24]


def test_images_are_scaled_and_normalised(archive: Path) -> None:
    """uint8 [n, H, W, C] becomes (x/255 - mean)/std as float32 [n, C, H, W]; "images" is the default key."""
    images = load_data(f"npz:{archive}", mean=[0.5, 0.25], std=[0.5, 2])
    raw = np.load(archive)["images"].astype(np.float64)
    expected = ((raw / 255 - [0.5, 0.25]) / [0.5, 2]).transpose(0, 3, 1, 2)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    np.testing.assert_allclose(images.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_other_arrays_are_taken_as_they_are(tmp_path: Path, archive: Path) -> None:
    """Floats and integers keep type, shape and values; the only array needs no key."""
    floats = np.random.default_rng(0).normal(size=(4, 3))
    np.savez(tmp_path / "b.npz", anything=floats)
    loaded = load_data(f"npz:{tmp_path / 'b.npz'}")
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded, torch.from_numpy(floats))
    assert load_data(f"npz:{archive}", key="labels").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"key": "faces"}, r"key: no array 'faces' \(the file holds: images, labels\)"),
        ({"mean": [0.5]}, r"mean: expected 2 numbers, one per channel, got \[0.5\]"),
        ({"mean": "x"}, "mean: expected 2 numbers"),
        ({"std": [0.5, 0]}, r"std: expected positive numbers, got \[0.5, 0\]"),
        ({"key": "labels", "mean": [0.5]}, "mean, std: only for uint8 images; this array is int64"),
        ({"rows": "1"}, 'rows: expected "START:STOP"'),
        ({"rows": "9:"}, "no rows in '9:'"),
        ({"length": 3}, "arguments it takes: key, mean, std, max_rows, size"),
    ],
)
def test_array_arguments_that_do_not_fit_are_refused(archive: Path, arguments: dict[str, Any], message: str) -> None:
    """Every argument that the archive does not bear out is refused by name, after the file's."""
    with pytest.raises(ValueError, match=message) as refusal:
        load_data(f"npz:{archive}", **arguments)
    assert str(refusal.value).startswith(f"npz:{archive}: ")


def test_archives_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """A missing file, a foreign one, pickled objects (never loaded), and several arrays without a key."""
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    np.savez(tmp_path / "words.npz", a=np.array(["a", "b"]))
    np.savez(tmp_path / "flat.npz", images=np.zeros((2, 3), dtype=np.uint8))
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 3)))
    for name, message in {
        "missing": "no such file",
        "text": "not an .npz archive",
        "objects": "cannot be read: Object arrays cannot be loaded when allow_pickle=False",
        "two": r"key: which array\? \(the file holds: a, b\)",
        "words": "key: 'a' is not an array of numbers with rows",
        "flat": r"key: expected uint8 images \[n, H, W, C\], got \[2, 3\]",
        "none": "no rows",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_data(f"npz:{tmp_path / name}.npz")
