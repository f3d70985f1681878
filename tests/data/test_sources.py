"""Load models and data from one-line descriptions; refuse bad ones in one line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from l3d.data.sources import absolute, load_data, load_model, take_rows

FACTORIES = """
import torch

NUMBER = 3

def linear(width=2, bias=True):
    return torch.nn.Sequential(torch.nn.Linear(width, 1, bias=bias), torch.nn.Dropout())

def points(n=6):
    return torch.arange(float(n))[:, None]

def stream():
    return iter([torch.zeros(1, 2)])

def word():
    return "word"
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of factories in the working directory, by its name."""
    name = f"factories_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


def test_python_model_is_in_evaluation_mode_and_gets_its_arguments(factories: str) -> None:
    """A factory's model comes with the arguments given, every module in evaluation mode."""
    model = load_model(f"python:{factories}:linear", width=4, bias=False)
    assert [tuple(p.shape) for p in model.parameters()] == [(1, 4)]
    assert not any(module.training for module in model.modules())


def test_a_factory_may_return_tensors_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tokenizer does, whose result is a mapping but no dict; rows are taken from all of them."""
    (tmp_path / "by_name.py").write_text(
        "import collections, torch\n"
        "def rows(n=4):\n"
        "    return collections.UserDict(input_ids=torch.arange(8).view(4, 2), attention_mask=torch.ones(n, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    found = load_data("python:by_name:rows", rows="1:3")
    assert isinstance(found, dict)
    assert found["input_ids"].tolist() == [[2, 3], [4, 5]]
    assert found["attention_mask"].shape == (2, 2)
    with pytest.raises(ValueError, match="expected a mapping of tensors with one row for each sample"):
        load_data("python:by_name:rows", n=3)


def test_python_search_leaves_the_path_as_it_was(factories: str) -> None:
    """The working directory is searched during the call only, also when the call fails."""
    before = list(sys.path)
    load_model(f"python:{factories}:linear")
    with pytest.raises(ValueError, match="has no 'nothing'"):
        load_model(f"python:{factories}:nothing")
    assert sys.path == before


@pytest.mark.parametrize(
    "spec, arguments, message",
    [
        ("nowhere", {}, "expected one of hf:DIR_OR_ID, python:pkg.module:factory"),
        ("onnx:file", {}, "expected one of hf:"),
        ("hf:", {}, "expected one of hf:"),
        ("hf:/no/such/folder", {}, "no such folder"),
        ("hf:.", {}, "folder without config.json"),
        ("python:FACTORIES", {}, "expected python:pkg.module:factory"),
        ("python:no_such_module_here:f", {}, "no module named 'no_such_module_here'"),
        ("python:FACTORIES:NUMBER", {}, "'NUMBER' is not callable"),
        ("python:FACTORIES:points", {}, "expected a torch.nn.Module, got Tensor"),
        ("python:FACTORIES:linear", {"depth": 3}, r"'depth' \(arguments it takes: width, bias\)"),
    ],
)
def test_models_that_cannot_be_loaded_say_why(
    factories: str, spec: str, arguments: dict[str, Any], message: str
) -> None:
    """Every description that names no model is refused in one line that names it."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        load_model(spec.replace("FACTORIES", factories), **arguments)
    assert "\n" not in str(refusal.value)


def test_a_module_that_fails_to_import_something_is_not_called_missing(factories: str, tmp_path: Path) -> None:
    """An import error inside the user's module is raised unchanged."""
    (tmp_path / "needs_more.py").write_text("import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_model("python:needs_more:f")


def test_missing_transformers_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transformers the error says what to install."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'l3d\[hf\]'"):
        load_model(f"hf:{tmp_path}")


def test_a_broken_hf_folder_is_one_line(tmp_path: Path) -> None:
    """What transformers says over many lines about a folder without weights becomes one."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="transformers cannot load it: ") as refusal:
        load_model(f"hf:{tmp_path}")
    assert "\n" not in str(refusal.value)


@pytest.mark.data
def test_hf_model_and_text_fit_together(data_dir: Path) -> None:
    """The model reads its own tokenizer's rows as what it was trained on, at a loss of about 1.3 nats."""
    spec = f"hf:{data_dir / 'stories260k'}"
    model = load_model(spec, dtype="float32")
    assert model.config.use_cache is False
    assert not model.training
    text = f"text:{data_dir / 'stories.txt'}"
    rows = load_data(text, model_spec=spec, length=256, start="first", max_rows=64)
    assert rows.shape == (64, 256)
    assert rows.dtype == torch.int64
    assert (rows[:, 0] == 1).all()
    with torch.no_grad():
        logits = model(rows).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    print(f"loss on 64 stories: {loss:.3f} nats a token")
    assert 1.1 < loss < 1.5


@pytest.mark.data
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 513}, "length: the model takes at most 512 tokens, got 513"),
        ({"length": 1}, "length: expected a whole number from 2, got 1"),
        ({"length": "x"}, "length: expected a whole number from 2, got 'x'"),
        ({"lenght": 8}, "arguments it takes: length, separator, max_rows, tokenizer, start, short"),
        ({"start": "last"}, "start: expected 'every' or 'first', got 'last'"),
        ({"max_rows": 0}, "max_rows: expected a positive whole number, got 0"),
        ({"rows": 620}, 'rows: expected "START:STOP"'),
        ({"rows": "5000000:"}, "no rows in '5000000:'"),
        ({"tokenizer": "/no/such/folder"}, "tokenizer /no/such/folder: no such folder"),
    ],
)
def test_text_arguments_that_do_not_fit_are_refused(data_dir: Path, arguments: dict[str, Any], message: str) -> None:
    """Every argument outside what the model and the text allow is refused by name, after the file's."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        load_data(f"text:{data_dir / 'stories.txt'}", model_spec=f"hf:{data_dir / 'stories260k'}", **arguments)
    assert str(refusal.value).startswith("text:")
    assert "\n" not in str(refusal.value)


@pytest.mark.data
def test_a_foreign_tokenizer_is_refused(data_dir: Path, tmp_path: Path) -> None:
    """Token ids beyond the model's vocabulary are noticed before the model would fail on them."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    arguments = {"model_spec": f"hf:{tmp_path}", "tokenizer": str(data_dir / "stories260k"), "max_rows": 50}
    with pytest.raises(ValueError, match=r"vocabulary has 300: .* does not belong to this model"):
        load_data(f"text:{data_dir / 'stories.txt'}", **arguments)


def test_texts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """A missing file, an empty one, an empty folder, bytes that are no text, no tokenizer: each is said."""
    (tmp_path / "empty.txt").write_text(" <|endoftext|>\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "some.txt").write_text("some text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt: no such file or folder"):
        load_data(f"text:{tmp_path}/nothing.txt")
    with pytest.raises(ValueError, match=r"empty\.txt: holds no text"):
        load_data(f"text:{tmp_path}/empty.txt")
    with pytest.raises(ValueError, match=r"folder: holds no \*\.txt file with text"):
        load_data(f"text:{tmp_path}/folder")
    with pytest.raises(ValueError, match=r"bytes\.txt is not UTF-8 text"):
        load_data(f"text:{tmp_path}/bytes.txt")
    with pytest.raises(ValueError, match="tokenizer: needed"):
        load_data(f"text:{tmp_path}/some.txt", model_spec="python:a:b")


@pytest.mark.parametrize(
    "rows, expected",
    [("-2:", [3, 4]), (":2", [0, 1]), ("1:4", [1, 2, 3]), (":-4", [0]), (":", [0, 1, 2, 3, 4])],
)
def test_rows_slice_as_python_does(archive: Path, rows: str, expected: list[int]) -> None:
    """rows="START:STOP" is x[START:STOP], and counts among the max_rows that were taken."""
    assert load_data(f"npz:{archive}", key="labels", rows=rows).tolist() == expected
    assert load_data(f"npz:{archive}", key="labels", rows="1:", max_rows=3).tolist() == [1, 2]


def test_python_data_comes_as_the_factory_returns_it(factories: str) -> None:
    """Tensors can be sliced, streams are handed through, and neither is copied into another type."""
    assert load_data(f"python:{factories}:points", n=4, rows="1:3").tolist() == [[1.0], [2.0]]
    assert next(iter(load_data(f"python:{factories}:stream"))).shape == (1, 2)
    with pytest.raises(ValueError, match="rows can only be chosen from a tensor or a Dataset"):
        load_data(f"python:{factories}:stream", rows="1:3")
    with pytest.raises(ValueError, match="expected a tensor, Dataset or iterable, got str"):
        load_data(f"python:{factories}:word")
    with pytest.raises(ValueError, match="no rows"):
        load_data(f"python:{factories}:points", n=0)


def test_rows_of_datasets() -> None:
    """A Dataset is cut like a tensor; what has only batches, like a DataLoader, is not."""
    dataset = TensorDataset(torch.arange(5))
    cut: Any = take_rows(dataset, slice(-2, None))
    assert [cut[i][0].item() for i in range(len(cut))] == [3, 4]
    with pytest.raises(ValueError, match="rows can only be chosen from a tensor or a Dataset"):
        take_rows(DataLoader(dataset, batch_size=2), slice(2))


def test_absolute_descriptions_hold_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that exists is written out; hub IDs and factories stay as they are."""
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert absolute("text:a.txt") == f"text:{tmp_path.resolve() / 'a.txt'}"
    assert absolute("hf:org/name") == "hf:org/name"
    assert absolute("python:a:b") == "python:a:b"
