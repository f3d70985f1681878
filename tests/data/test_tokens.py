"""Read rows of token ids from texts, datasets and arrays; refuse those that the model cannot take."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import l3d
from l3d.data.readers import TokenRows, token_rows
from l3d.data.sources import load_data

from helpers import Spelling

TEXTS = ["once upon a time", "the end", " ", "a cat sat on the mat and slept"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny Llama and of its tokenizer, which has a token for every byte."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("words")
    alphabet = {letter: i for i, letter in enumerate("?abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(alphabet, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def spell(rows: Any) -> list[str]:
    """Read rows of the alphabet's ids, without their padding."""
    pairs = [(r["input_ids"], r["attention_mask"]) if isinstance(r, dict) else (r, torch.ones_like(r)) for r in rows]
    return ["".join(" abcdefghijklmnopqrstuvwxyz "[i] for i in ids[mask == 1].tolist()) for ids, mask in pairs]


# --- padding ----------------------------------------------------------------------------------------------------


def test_short_tails_are_padded_if_asked() -> None:
    """short="pad" keeps every token of every text; rows that none is needed for stay a tensor."""
    rows = token_rows(["abcdef", "gh"], Spelling(1), 4, None, "every", "pad")
    assert isinstance(rows, TokenRows)
    assert len(rows) == 3
    read = [[i for i, m in zip(r["input_ids"].tolist(), r["attention_mask"].tolist(), strict=True) if m] for r in rows]
    assert read == [[1, *map(ord, "abc")], [1, *map(ord, "def")], [1, *map(ord, "gh")]]
    assert rows[2]["attention_mask"].tolist() == [1, 1, 1, 0]
    assert isinstance(token_rows(["abcdef"], Spelling(1), 4, None, "every", "pad"), torch.Tensor)


def test_padded_rows_train_and_evaluate(words: str) -> None:
    """Padding goes through shuffling, holding out, training and evaluation: it is counted nowhere."""
    from l3d.data.sources import load_model, take_rows

    rows = token_rows(["abcdefgh", "ij", "klmno"] * 4, Spelling(None), 4, None, "every", "pad")
    rows.ids -= ord("a") - 1
    model = load_model(f"hf:{words}", dtype="float32")
    assert isinstance(rows, TokenRows)
    d = l3d.decompose(
        model, take_rows(rows, slice(0, 12)), 3, 1, 0.5, "*o_proj*", "kl", batch_size=4, steps=3, progress=False
    )
    found = d.evaluate(model, rows)
    assert found.n_samples == int(rows.mask.sum()) == 4 * (4 + 4 + 2 + 4 + 1)
    assert d.impact(model, rows, n_references=1).shape == (found.n_samples, 3)


# --- sources ----------------------------------------------------------------------------------------------------


def write(kind: str, folder: Path) -> str:
    """Write the texts as some kind of dataset and return what names it."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        return str(folder / "a.jsonl")
    if kind == "parquet":
        made.to_parquet(str(folder / "a.parquet"))
        return str(folder / "a.parquet")
    if kind == "folder of parquet":
        made.to_parquet(str(folder / "train.parquet"))
    elif kind == "saved":
        made.save_to_disk(str(folder))
    else:
        datasets.DatasetDict({"train": made}).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder of parquet", "saved", "saved with splits"])
def test_datasets(kind: str, tmp_path: Path, words: str) -> None:
    """Every kind of local dataset gives the rows that its texts, in a file, give."""
    name = write(kind, tmp_path)
    rows = load_data(f"dataset:{name}", model_spec=f"hf:{words}", length=6, short="pad")
    assert spell(rows) == ["once u", "pon a ", "time", "the en", "d", "a cat ", "sat on", " the m", "at and", " slept"]
    assert spell(load_data(f"dataset:{name}", model_spec=f"hf:{words}", length=6, max_rows=2)) == ["once u", "pon a "]


def test_a_folder_of_texts_is_read_in_order(tmp_path: Path, words: str) -> None:
    """A folder's files come by name, whatever lies beside them."""
    for name, text in (("b.txt", TEXTS[1]), ("a.txt", TEXTS[0]), ("c.md", "not this")):
        (tmp_path / name).write_text(text)
    rows = load_data(f"text:{tmp_path}", model_spec=f"hf:{words}", length=6)
    assert spell(rows) == ["once u", "pon a ", "the en"]


def test_a_dataset_of_ids_needs_no_tokenizer(tmp_path: Path) -> None:
    """Lists of token ids are cut as they are; a dataset of Hugging Face is taken by decompose, too."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5], [6, 7]]})
    made.save_to_disk(str(tmp_path / "ids"))
    assert load_data(f"dataset:{tmp_path}/ids", column="input_ids", length=2).tolist() == [[1, 2], [3, 4], [6, 7]]
    whole = made.select([0]).with_format("torch")
    assert l3d.data.batches.count_rows(whole) == 1
    assert l3d.data.batches.take(whole, range(0, 1))["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="data: rows differ in shape; pad them to one shape"):
        l3d.data.batches.take(made.with_format("torch"), range(0, 2))


def test_arrays_of_ids(tmp_path: Path, words: str) -> None:
    """An array of token ids is rows as they are, with padding where a mask beside it says so."""
    ids = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(tmp_path / "a.npy", ids)
    np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=ids < 10)
    spec = {"model_spec": f"hf:{words}"}
    assert load_data(f"tokens:{tmp_path}/a.npy", **spec, rows="1:").tolist() == ids[1:].tolist()
    masked = load_data(f"tokens:{tmp_path}/a.npz", **spec)
    assert masked[2]["input_ids"].tolist() == [8, 9, 10, 11]  # type: ignore[index]
    assert masked[2]["attention_mask"].tolist() == [1, 1, 0, 0]  # type: ignore[index]


# --- what does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array, message",
    [
        (np.arange(4), r"expected whole numbers \[rows, length\], got int64 \[4\]"),
        (np.zeros((2, 4)), r"expected whole numbers \[rows, length\], got float64"),
        (np.array([[-1, 2]]), "expected token ids from 0, got -1"),
        (np.array([[1, 28]]), "gives token 28, but the model's vocabulary has 28"),
        (np.zeros((2, 17), dtype=int), "the model takes at most 16 tokens, got 17"),
        (np.zeros((0, 4), dtype=int), "no rows"),
    ],
    ids=["flat", "floats", "negative", "beyond the vocabulary", "too long", "empty"],
)
def test_arrays_that_do_not_fit_are_refused(array: np.ndarray, message: str, tmp_path: Path, words: str) -> None:
    """An array that holds no rows this model can read is refused in one line."""
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message) as refusal:
        load_data(f"tokens:{tmp_path}/a.npy", model_spec=f"hf:{words}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "write_to, arguments, message",
    [
        (lambda p: p.write_text(""), {}, "holds no text: the dataset has no rows"),
        (lambda p: p.write_text('{"text": " "}\n'), {}, "holds no text"),
        (lambda p: p.write_text('{"a": "x", "b": "y"}\n'), {}, r"which column\? \(the dataset has: a, b\)"),
        (lambda p: p.write_text('{"a": "x"}\n'), {"column": "c"}, r"no column 'c' \(the dataset has: a\)"),
        (lambda p: p.write_text('{"a": 3}\n'), {"column": "a"}, "'a' holds neither texts nor lists of token ids"),
        (lambda p: p.write_text('{"a": "x'), {}, "JSON parse error"),
        (lambda p: p.write_text('{"text": "ab"}\n'), {}, "none of the 1 texts fills a row of 16 tokens"),
        (lambda p: p.write_text('{"text": "ab"}\n'), {"short": "keep"}, "short: expected 'drop' or 'pad', got 'keep'"),
    ],
    ids=["empty", "blank", "which column", "no column", "numbers", "cut short", "too short", "argument"],
)
def test_datasets_that_do_not_fit_are_refused(
    write_to: Any, arguments: dict[str, Any], message: str, tmp_path: Path, words: str
) -> None:
    """An empty corpus, a column that is not there, a file cut short: each is one line that names the source."""
    pytest.importorskip("datasets")
    write_to(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=message) as refusal:
        load_data(f"dataset:{tmp_path}/a.jsonl", model_spec=f"hf:{words}", **arguments)
    assert str(refusal.value).startswith("dataset:")
    assert "\n" not in str(refusal.value)


def test_a_parquet_file_cut_short(tmp_path: Path, words: str) -> None:
    """A download that ended early is not read as a shorter dataset."""
    name = Path(write("parquet", tmp_path))
    name.write_bytes(name.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: Parquet magic bytes not found"):
        load_data(f"dataset:{name}", model_spec=f"hf:{words}")
    np.save(tmp_path / "b.npy", np.zeros((2, 4), dtype=int))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"array 'b\.npy' cannot be read"):
        load_data(f"tokens:{tmp_path}/b.npy", model_spec=f"hf:{words}")


def test_missing_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without datasets the error says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'l3d\[datasets\]'"):
        load_data("dataset:/nothing")
