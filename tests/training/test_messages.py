"""Refuse arguments of the wrong kind in one line that names the argument; the model comes back as it was."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import l3d
from l3d.callbacks import Callback
from l3d.data.arguments import check_device, check_folder
from l3d.estimate import estimate

from training_runs import ARGUMENTS, Net, points

X, Y = points(), points()[:, 0]


class NoCallback:
    """Has a method of a callback, and is none."""

    def on_step(self, step: int, figures: Any) -> None: ...


def one_line(call: Any, start: str) -> str:
    """Run a call that must raise a ValueError of one line with this start; return the line."""
    with pytest.raises(ValueError, match=rf"^{re.escape(start)}") as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(name: str, value: Any, **changes: Any) -> list[str]:
    """Give an argument to `decompose` and `estimate`, which must refuse it and leave the model alone."""
    said = []
    for function in (l3d.decompose, estimate):
        arguments = {**ARGUMENTS, **changes, name: value}
        model = arguments.pop("model", Net())
        before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
        data = arguments.pop("data", X)
        said.append(one_line(lambda f=function, m=model, d=data, a=arguments: f(m, d, **a), f"{name}: "))
        for key, tensor in before.items():
            assert torch.equal(model.state_dict()[key], tensor)
    return said


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:99", "cuda:x", 3.5, "", -1, [], True, "meta", torch.device("meta"), "toaster"], ids=repr
)
def test_a_device_that_is_not_there(device: Any) -> None:
    """No device: one line, and the weights stay where they were, on the meta device they would be lost."""
    assert all("cuda, cuda:1" in line for line in refused("device", device))
    one_line(lambda: check_device(device, "--device"), "--device: ")


def test_a_device_that_is_there_is_taken() -> None:
    for device in ("cpu", torch.device("cpu")):
        assert check_device(device) == torch.device("cpu")
        assert estimate(Net(), X, **ARGUMENTS, device=device).n_samples == 8


SPARSE = X.to_sparse()
DATA = [
    ((X, Y), "a tuple of two tensors"),
    ((X, X), "a tuple of two tensors"),
    ((X, Y, Y), "a tuple of 3 tensors"),
    ((X, X, torch.arange(40)), "a tuple of 3 tensors"),
    (None, "expected a tensor, Dataset, DataLoader or iterable, got NoneType"),
    (X.numpy(), "pass torch.from_numpy"),
    ([X.numpy()], "got ndarray"),
    ({"x": X.numpy()}, "x ndarray"),
    ("stories.txt", "got str"),
    (b"stories", "got bytes"),
    (3, "got int"),
    (nn.Linear(4, 3), "got Linear"),
    (X[:0], "at least one sample"),
    ([X[:0]], "at least one sample"),
    ({}, "got none"),
    (torch.tensor(1.0), "a single number"),
    (torch.tensor(3), "a single number"),
    (SPARSE, "to_dense"),
    (torch.eye(4).to_sparse(), "to_dense"),
    (torch.arange(40), "got Long and Float"),
    (torch.randint(0, 5, (40, 4)), "got Long and Float"),
    (X.bool(), "got Bool and Float"),
    ([1.0, 2.0], "got float"),
    ([None], "got NoneType"),
]


@pytest.mark.parametrize("data, said", DATA, ids=[f"{i}" for i in range(len(DATA))])
def test_data_of_the_wrong_kind(data: Any, said: str) -> None:
    """Pairs in a tuple, arrays, texts, nothing, labels in the place of inputs: each is named with what to pass."""
    assert all(said in line for line in refused("data", data))


@pytest.mark.parametrize(
    "inputs", [None, X.numpy(), "text", SPARSE, 3, [[1.0]]], ids=lambda value: type(value).__name__
)
def test_inputs_of_the_wrong_kind(inputs: Any) -> None:
    one_line(lambda: l3d.extract_gradients(Net(), inputs), "data: ")


def test_batches_in_a_tuple_are_taken() -> None:
    """Three or more of one kind can only be batches; rows with labels in a Dataset are rows."""
    batches = tuple(X[:24].split(8))
    a, b = (l3d.decompose(Net(), data, **ARGUMENTS) for data in (batches, list(batches)))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    l3d.decompose(Net(), torch.utils.data.TensorDataset(X, Y), **ARGUMENTS)


@pytest.mark.parametrize(
    "model, said",
    [
        (nn.Linear, "got the class Linear; pass an instance, Linear(..)"),
        (Net, "got the class Net"),
        (Net().forward, "got method; pass the module"),
        (lambda x: x, "got function; pass the module"),
        (Net().state_dict(), "load_state_dict"),
        ({}, "load_state_dict"),
        ("hf:gpt2", "got str"),
        (None, "got NoneType"),
        ([Net()], "got list"),
        (torch.zeros(3), "got Tensor"),
    ],
)
def test_models_that_are_none(model: Any, said: str) -> None:
    """A class, a function, weights without their module: the line says what to pass."""
    for line in refused("model", model):
        assert line.startswith("model: expected a torch.nn.Module, got ")
        assert said in line
    for call in (l3d.extract_gradients, l3d.explain):
        assert said in one_line(lambda call=call: call(model, X), "model: ")
    d = l3d.decompose(Net(), X, **ARGUMENTS)
    looks = [d.evaluate, d.impact, lambda m, x: l3d.intervention_ratios(d, m, x)]
    for look in [*looks, lambda m, _: l3d.intervene(m, d, {0: 0.1}).__enter__()]:
        assert said in one_line(lambda look=look: look(model, X), "model: ")


def test_a_model_without_parameters() -> None:
    for model in (nn.Sequential(), nn.Flatten()):
        assert refused("model", model)[0] == "model: has no parameters to decompose"


@pytest.mark.parametrize(
    "params",
    [{"first.*": 1}, {}, 3, True, [3], ("first.*", None), [None], {"first.*"}, Net().first.weight, b"first", nn.ReLU()],
    ids=lambda value: type(value).__name__,
)
def test_params_of_the_wrong_kind(params: Any) -> None:
    refused("params", params)
    one_line(lambda: l3d.extract_gradients(Net(), X, params=params), "params: expected a pattern of names or a list")


@pytest.mark.parametrize(
    "callbacks",
    [print, [print], "bar", [NoCallback()], NoCallback(), [None], 3, True, False, {}, Callback(), [Callback]],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_that_are_none(callbacks: Any) -> None:
    """Found before training, not at the step that would call them."""
    refused("callbacks", callbacks)


NUMBERS = {
    "k": ["0.1", None, True, torch.tensor(0.1), [0.1], 1j, 0, 1.5, -0.1],
    "steps": [1.5, True, "3", [3], 1e3, float("inf")],
    "seed": [1.5, True, False, "1", None, [1], torch.tensor(3)],
    "batch_size": [0, -2, True, 1.5, "8", None],
    "n_subnetworks": [0, True, 2.0, "4", None],
    "rank": [0, -1, True, 2.0, "2", "Auto", 99, [2], {"*": True}, {"*": "2"}, {"*": [2, 2, 2]}, {3: 2}, {}],
    "n_restarts": [0, True, 1.5, "2", None],
    "warm_start": [-1, True, 1.5, "1", 21],
    "lr": [0, -1, True, "0.1", float("nan"), 1j],
    "positions": [0, True, "first", None, 1.5],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NUMBERS.items() for value in values])
def test_numbers_of_the_wrong_kind(name: str, value: Any) -> None:
    """Texts, fractions of a count, and True, which Python takes for 1."""
    refused(name, value)


CHOICES = {
    "preset": ["best", None, 3, [], {}, l3d.Replacement()],
    "divergence": ["l2", 3, [], {}, True, nn.MSELoss, Net, nn.MSELoss()],
    "reference": ["median", None, 3, [], np.zeros(3)],
    "dtype": ["int32", 3, True, "", float, torch.float16],
    "backend": ["cuda", None, 3, ""],
    "existing": ["replace", None, 3, [], True],
    "memory": [3, {}, True, "small"],
    "gradients": [True, {}, "shuffle", 0],
    "cache": [3, True, {}, "", "a\0b"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in CHOICES.items() for value in values])
def test_choices_that_there_are_not(name: str, value: Any) -> None:
    refused(name, value)


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    """No name, no path, below a file, too long: refused before training, for `out` and for the cache."""
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "run"
    for folder in ("", 3, True, b"run", [], "a\0b", below, str(below / "deeper"), tmp_path / ("x" * 300)):
        refused("out", folder)
        one_line(lambda folder=folder: check_folder("--out", folder), "--out: ")
        if isinstance(folder, (str, Path)):
            refused("cache", folder)
    assert "which is a file" in refused("out", below)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert check_folder("out", str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"


def test_an_argument_that_there_is_not() -> None:
    """`estimate` takes the arguments of `decompose` and no others."""
    for name in ("stepz", "ranks", "overwrit", "devices"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            estimate(Net(), X, **{name: 1})
