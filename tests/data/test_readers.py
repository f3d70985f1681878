"""Read texts as rows of tokens and images as a network's numbers; refuse what does not fit."""

import io
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l3d.data.readers import read_array, token_rows
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


# --- files that are not what they say ---------------------------------------------------------------------------

LONG = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little")
PREFIX = b"\x93NUMPY\x01\x00"


def array_file(shape: str, kind: str = "<f8", body: bytes = bytes(64), start: bytes = PREFIX) -> bytes:
    """An .npy file with any header."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return start + len(header).to_bytes(4 if start[6] > 1 else 2, "little") + header + body


def archive_file(content: bytes, method: int = zipfile.ZIP_STORED, name: str = "a.npy", times: int = 1) -> bytes:
    """An .npz file with one member, or several of one name."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for _ in range(times):
            archive.writestr(name, content)
    return buffer.getvalue()


def many_members() -> bytes:
    """An archive whose list of 400,000 members alone would fill hundreds of megabytes."""
    entry = b"PK\x01\x02" + bytes(24) + (1).to_bytes(2, "little") + bytes(16) + b"a"
    listed = entry * 400_000
    return listed + b"PK\x05\x06" + bytes(4) + b"\xff" * 4 + len(listed).to_bytes(4, "little") + bytes(6)


ZEROS = PREFIX + array_file("(300, 1000000)", "|u1", b"")[8:] + bytes(300_000_000)

BOMBS: dict[str, tuple[str, bytes, str]] = {
    "a huge shape": ("npy", array_file("(1000000000, 1000)"), r"float64 \[1000000000, 1000\] is more than the file"),
    "a shape beyond 64 bits": ("npy", array_file("(4611686018427387904, 4)"), "is more than the file"),
    "one row too many": ("npy", array_file("(9,)"), "is more than the file's"),
    "a size below zero": ("npy", array_file("(-1, 4)"), "is more than the file"),
    "a huge text": ("npy", array_file("(2,)", "<U9999999"), "is more than the file"),
    "objects": ("npy", array_file("(2,)", "|O"), "Object arrays cannot be loaded when allow_pickle=False"),
    "a long header": ("npy", LONG + bytes(99), "a header of 2,147,483,648 bytes"),
    "a deep header": ("npy", array_file("(" * 500), "cannot be read"),
    "a header that runs": ("npy", array_file("__import__('os').getpid()"), "cannot be read"),
    "no array": ("npy", b"PK" * 40, "not an .npy array"),
    "another version": ("npy", b"\x93NUMPY\x09\x00" + bytes(99), "not an .npy array of version 1 or 2"),
    "nothing": ("npy", b"", "not an .npy array"),
    "packed zeros": ("npz", archive_file(ZEROS, zipfile.ZIP_DEFLATED), "300,000,0.. bytes packed into few"),
    "packed zeros of no array": ("npz", archive_file(bytes(300_000_000), zipfile.ZIP_DEFLATED, "a"), "packed into few"),
    "packed by bzip2": ("npz", archive_file(bytes(10**6), zipfile.ZIP_BZIP2), "not compressed as numpy does it"),
    "packed by lzma": ("npz", archive_file(bytes(10**6), zipfile.ZIP_LZMA), "not compressed as numpy does it"),
    "a huge shape in an archive": ("npz", archive_file(array_file("(1000000000, 1000)")), "is more than the file's"),
    "one name twice": ("npz", archive_file(array_file("(8,)"), times=2), "two arrays have one name"),
    "many members": ("npz", many_members(), "its list of members is too long"),
    "cut short": ("npz", archive_file(array_file("(8,)"))[:-30], "not an .npz archive"),
    "no file": ("npz", b"", "not an .npz archive"),
}  # fmt: skip


@pytest.mark.parametrize("suffix, content, message", BOMBS.values(), ids=BOMBS)
def test_sizes_are_compared_with_the_file(suffix: str, content: bytes, message: str, tmp_path: Path) -> None:
    """One line, before memory is asked for: at most twice the file and 200 MB of it, touched or not."""
    (tmp_path / f"a.{suffix}").write_bytes(content)
    tracemalloc.start()  # numpy's memory counts among Python's
    try:
        with pytest.raises(ValueError, match=message) as refusal:
            load_data(f"npz:{tmp_path / 'a'}.{suffix}")
        assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + 200 * 2**20
    finally:
        tracemalloc.stop()
    assert str(refusal.value).startswith(f"npz:{tmp_path / 'a'}.{suffix}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", [">f4", ">i8", "|b1", "<u2", "<f2"])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_of_any_numbers_are_read(suffix: str, kind: str, tmp_path: Path) -> None:
    """Also those of the other byte order, in Fortran's order and packed."""
    array = np.asfortranarray(np.arange(12).reshape(3, 4).astype(kind))
    path = tmp_path / f"a.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez_compressed(path, array)
    assert read_array(path, None).tolist() == array.tolist()
    assert read_array(path, None).dtype.isnative


def test_an_array_that_was_packed_in_good_faith_is_read(tmp_path: Path) -> None:
    """A mask of zeros and ones, a hundred times smaller in its file: 50 MB are within the margin."""
    mask = np.zeros((50, 1_000_000), dtype=np.uint8)
    mask[::7, ::1000] = 1
    np.savez_compressed(tmp_path / "a.npz", mask)
    assert (tmp_path / "a.npz").stat().st_size < 1_000_000
    assert np.array_equal(read_array(tmp_path / "a.npz", None), mask)
