"""Refuse bad inputs and outputs in one line, before anything is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d import extract_gradients
from l3d.cli.main import main
from l3d.data.pretrained import causal_lm
from l3d.zoo import resnet20


class Config:
    vocab_size, max_position_embeddings = 7, 5


class Reader(nn.Module):
    """A language model of a configuration, without positions: nothing in it minds the length."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


@pytest.mark.parametrize("mapping", [False, True])
@pytest.mark.parametrize(
    "ids, message",
    [
        (
            torch.tensor([[0, 7], [1, 2]]),
            "holds token 7, but the model's vocabulary has 7: the tokenizer",
        ),
        (torch.tensor([[0, -1], [1, 2]]), "holds token -1"),
        (torch.zeros(2, 6, dtype=torch.int64), "rows have 6 tokens, the model takes at most 5"),
    ],
    ids=["beyond", "negative", "too long"],
)
def test_tokens_the_model_does_not_know(ids: Tensor, message: str, mapping: bool, tmp_path: Path) -> None:
    """Ids beyond the vocabulary and rows too long are named, and no run folder is left."""
    with pytest.raises(ValueError, match=f"^data: {message}"):
        extract_gradients(Reader(), {"input_ids": ids} if mapping else ids, "kl")
    if not mapping:
        with pytest.raises(ValueError, match=message):
            l3d.decompose(Reader(), ids, 2, 1, divergence="kl", steps=2, out=tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [(3, 1, 1), (1, 32, 32)])
def test_images_of_another_size(size: tuple[int, ...], tmp_path: Path) -> None:
    """What a network says about images that do not fit becomes one line with their shape."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = resnet20(), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(nn.functional.avg_pool2d(x, 2)))

    shape = [4, *size]
    with pytest.raises(ValueError, match="the model failed on inputs of shape") as refusal:
        l3d.decompose(Flat(), torch.zeros(shape), 2, 1, steps=2, out=tmp_path / "run", progress=False)
    assert str(shape) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(4, 1), "last dimension, which has 1 entry; return logits of two or more classes, or use 'mse'"),
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), "takes logits, but the model's outputs are probabilities"),
    ],
    ids=["regression", "probabilities"],
)
def test_heads_that_are_no_logits(model: nn.Module, message: str, tmp_path: Path) -> None:
    """KL of a single number, or of a softmax of probabilities, is not what anyone means; MSE takes both."""
    data = torch.randn(8, 4)
    with pytest.raises(ValueError, match=f"^divergence: 'kl' .*{message}"):
        l3d.decompose(model, data, 2, 1, divergence="kl", steps=2, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    extract_gradients(model, data, "mse")


def test_log_probabilities_are_logits() -> None:
    """The softmax of a log-softmax is the softmax itself."""
    model = nn.Linear(4, 3)
    data, references = torch.randn(8, 4), torch.randn(8, 3)
    plain = extract_gradients(model, data, "kl", references).materialize()
    logs = extract_gradients(nn.Sequential(model, nn.LogSoftmax(-1)), data, "kl", references).materialize()
    torch.testing.assert_close(logs["0.weight"], plain["weight"])


@pytest.mark.parametrize("damage", ["cut short", "a tensor missing", "of another size"])
def test_weights_that_are_not_the_models(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A corrupt download, and weights that would be filled up with random ones, are refused by the command line."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    settings: dict[str, Any] = {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8, "vocab_size": 9}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).save_pretrained(tmp_path / "model")
    assert causal_lm("hf:x", str(tmp_path / "model")).config.use_cache is False
    file = tmp_path / "model" / "model.safetensors"
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors = load_file(file)
        name = "transformer.h.0.attn.c_proj.weight"
        changed = {} if damage == "a tensor missing" else {name: torch.zeros(3, 3)}
        save_file({k: v for k, v in tensors.items() if k != name} | changed, file, metadata={"format": "pt"})
    (tmp_path / "texts.txt").write_text("text")
    command = ["decompose", "--model", f"hf:{tmp_path}/model", "--data", f"text:{tmp_path}/texts.txt"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"l3d: error: hf:{tmp_path}/model: ")
    if damage == "a tensor missing":
        assert "its file lacks 1 of the model's tensors, 'transformer.h.0.attn.c_proj.weight' first" in error
    assert not (tmp_path / "run").exists()


class Named(nn.Module):
    """Takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.layer(x + shift)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"x": torch.zeros(3), "shift": torch.zeros(3), "label": torch.tensor(1)},
            r"data: its rows have the key 'label', which the model does not take; .*\(keys: x, shift, label\)",
        ),
        ({"x": torch.zeros(3)}, r"data: its rows lack 'shift', which the model needs \(keys: x\)"),
        ({"x": torch.zeros(3), 1: torch.zeros(3)}, r"data: expected rows whose keys are names of .*, got x, 1"),
    ],
)
def test_keys_that_the_model_does_not_take_are_named(row: dict[Any, Tensor], message: str, tmp_path: Path) -> None:
    """Rows that are mappings are the model's arguments by name."""
    with pytest.raises(ValueError, match=message) as error:
        l3d.decompose(Named(), [{key: value[None] for key, value in row.items()}], 2, 1, out=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_type_error_of_the_models_own_stays_one() -> None:
    """What goes wrong inside the model is no matter of keys."""

    class Broken(Named):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.layer(x, wrong=shift)

    with pytest.raises(TypeError, match="wrong"):
        extract_gradients(Broken(), {"x": torch.zeros(2, 3), "shift": torch.zeros(2, 3)})
