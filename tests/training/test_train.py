"""Train whole runs: the same bits from the same seed, what a run returns, every kind of data, dtypes, real models."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import l3d
from l3d.data.batches import mix
from l3d.data.sources import load_data, load_model
from l3d.training import history
from l3d.training.history import COLUMNS
from l3d.zoo import resnet20

from helpers import assert_relative
from training_runs import ARGUMENTS, Net, assert_same_bits, differ, interrupt, points, train

pytestmark = pytest.mark.usefixtures("one_batch_at_a_time")


# --- determinism ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["sample", "mean", "uniform"])
@pytest.mark.parametrize("preset", ["default", "published"])
def test_same_seed_same_bits(preset: str, reference: str) -> None:
    """Two runs with one seed agree in every bit, whatever torch's global generator holds; it is left alone."""
    model = Net()
    torch.manual_seed(1)
    first = train(model, preset=preset, reference=reference)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = train(model, preset=preset, reference=reference)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(first, second)


def test_another_seed_is_another_run() -> None:
    """The seed decides the start, the order and the references; each seed is another run."""
    runs = [train(seed=seed) for seed in (0, 1, 2)]
    assert all(differ(a, b) for a, b in itertools.combinations(runs, 2))
    assert len({run.history["error"][0] for run in runs}) == 3


def test_references_are_drawn_anew_at_every_step() -> None:
    """With the same batch at every step and no learning, only drawn references make steps differ."""
    still = {"data": [points(8)], "lr": 1e-12, "warm_start": 0}
    assert len(set(train(reference="sample", **still).history["error"])) == 20
    assert len({round(error, 5) for error in train(reference="mean", **still).history["error"]}) == 1


def test_checkpoints_do_not_change_the_run(tmp_path: Path) -> None:
    """Writing checkpoints, often or not at all, leaves the training the same to the bit."""
    plain = train()
    assert_same_bits(plain, train(out=tmp_path / "a", checkpoint_every=1))
    assert_same_bits(plain, train(out=tmp_path / "b", checkpoint_every=100))
    assert_same_bits(plain, l3d.load(tmp_path / "a"))


# --- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, records, rows", [(20, 1000, 20), (45, 10, 9), (46, 10, 9), (7, 3, 2), (10, 1, 1)])
def test_history_is_bounded_and_its_columns_equally_long(
    steps: int, records: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of steps, at most RECORDS rows are held, evenly spaced, every column of one length."""
    monkeypatch.setattr(history, "RECORDS", records)
    d = train(steps=steps)
    assert set(d.history) == set(COLUMNS)
    assert {len(values) for values in d.history.values()} == {rows}
    assert rows <= records
    every = -(-steps // records)
    assert d.history["step"] == [every * (i + 1) for i in range(rows)]
    assert all(math.isfinite(value) for values in d.history.values() for value in values)


def test_history_averages_over_its_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coarser history holds the means of the finer one's errors."""
    fine = train(steps=20).history["error"]
    monkeypatch.setattr(history, "RECORDS", 5)
    coarse = train(steps=20).history["error"]
    assert coarse == pytest.approx([sum(fine[i : i + 4]) / 4 for i in range(0, 20, 4)], rel=1e-12)


def test_what_a_run_returns() -> None:
    """Unit norms, the settings it was trained with, a threshold, timing, and the model's parameter names."""
    d = train(params=["second.*", "first.weight"], seed=5)
    assert d.parameter_names == ["first.weight", "second.weight", "second.bias"]
    assert_relative(d.decoder.squared_norm(), torch.ones(4), 1e-5)
    expected = {"k": 0.3, "batch_size": 8, "steps": 20, "seed": 5, "divergence": "mse", "reference": "sample"}
    assert {name: d.settings[name] for name in expected} == expected
    assert 0 < d.threshold < math.inf
    assert d.timing["seconds"] > 0
    assert d.timing["steps_per_second"] == pytest.approx(20 / d.timing["seconds"])


def test_error_falls_on_a_toy() -> None:
    """On the toy model of superposition a short run lowers the error to a fraction of where it began."""
    generator = torch.Generator().manual_seed(0)
    model = l3d.toys.Superposition(5, 2)
    with torch.no_grad():
        angles = torch.arange(5) * (2 * math.pi / 5)  # the known solution: a pentagon
        model.W_in.weight.copy_(torch.stack([angles.cos(), angles.sin()]))
        model.W_out.weight.copy_(model.W_in.weight.mT)
        model.W_out.bias.fill_(-0.3)
    data = l3d.toys.sparse_features(1000, 5, generator)
    d = l3d.decompose(model.eval(), data, 5, rank=1, k=0.1, batch_size=32, steps=300, callbacks=[])
    errors = d.history["error"]
    assert sum(errors[-30:]) / 30 < 0.4 * max(errors[30:60])


@pytest.mark.parametrize("n_restarts", [1, 3])
def test_restarts_keep_the_best_and_report_all(n_restarts: int, tmp_path: Path) -> None:
    """Restarts are trained side by side; the one of least final error is returned and saved, with its own history."""
    d = train(n_restarts=n_restarts, seed=4, out=tmp_path / "run")
    assert len(d.restart_errors) == n_restarts
    assert len(set(d.restart_errors)) == n_restarts
    assert d.n_subnetworks == ARGUMENTS["n_subnetworks"]
    assert sum(d.history["error"][-2:]) / 2 == pytest.approx(min(d.restart_errors), rel=1e-12)
    assert_same_bits(l3d.load(tmp_path / "run"), d)
    assert l3d.load(tmp_path / "run").restart_errors == d.restart_errors


@pytest.mark.parametrize("k", [0.3, 1.0])
@pytest.mark.parametrize("stream", [False, True], ids=["tensor", "iterator"])
def test_a_restart_is_the_run_it_would_be_alone(
    k: float, stream: bool, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    """Each of three restarts, trained alone from its own start on the same batches, goes through the same errors."""

    def data() -> Any:
        return iter([points(8, seed) for seed in range(21)]) if stream else points()

    together = train(data=data(), n_restarts=3, k=k)
    for i, error in enumerate(together.restart_errors):
        with monkeypatch.context() as patch:  # the start of restart i, everything else that of the run
            patch.setattr(
                "l3d.training.run.mix", lambda *numbers, i=i: mix(*((i, 1) if numbers == (0, 1) else numbers))
            )
            alone = train(data=data(), k=k)
        assert alone.restart_errors == pytest.approx([error], rel=1e-9)
        if error == min(together.restart_errors):
            assert alone.history["error"] == pytest.approx(together.history["error"], rel=1e-9)
            assert alone.history["dead_fraction"] == together.history["dead_fraction"]
            assert alone.history["kept_per_sample"] == together.history["kept_per_sample"]
            assert alone.threshold == pytest.approx(together.threshold, rel=1e-9)
            for name, tensor in alone.named_parameters():
                assert_relative(together.get_parameter(name), tensor, 1e-8)


# --- data -------------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """A Dataset of (input, label)."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], index


class Stream(IterableDataset):
    """An iterable of batches that starts over, though it also says how long it is."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x) // 8

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.x.split(8)


def test_datasets_are_read_as_tensors_are() -> None:
    """A Dataset's rows are drawn in the order a tensor's are, and labels are ignored: the same bits."""
    x = points()
    expected = train(data=x)
    for data in (TensorDataset(x), TensorDataset(x, torch.arange(40)), Rows(x)):
        assert_same_bits(train(data=data), expected)


def test_streams_are_read_in_their_own_order() -> None:
    """Lists of batches, loaders and iterables that can start over give the same run, labels or not."""
    x = points()
    expected = train(data=list(x.split(8)))
    labelled = TensorDataset(x, torch.arange(40))
    for data in (
        DataLoader(x, batch_size=8),
        DataLoader(labelled, batch_size=8),
        [(batch, torch.zeros(8)) for batch in x.split(8)],
        Stream(x),
        (x[8 * (i % 5) : 8 * (i % 5) + 8] for i in range(20)),
    ):
        assert_same_bits(train(data=data), expected)


def test_batches_of_keyword_arguments() -> None:
    """A batch may be a mapping, which the model gets as keyword arguments."""
    expected = train(data=list(points().split(8)))
    assert_same_bits(train(data=[{"x": batch} for batch in points().split(8)]), expected)


@pytest.mark.parametrize("n_batches", [0, 1, 7])
def test_an_exhausted_stream_is_an_error(n_batches: int) -> None:
    """A generator that ends before the last step says after how many batches."""
    stream = (points(8, seed) for seed in range(n_batches))
    with pytest.raises(ValueError, match=rf"data: the iterable ended after {n_batches} batches"):
        train(data=stream)


@pytest.mark.parametrize("kind", ["dataset", "list", "loader"])
def test_pair_reference_differentiates_towards_the_partner(kind: str) -> None:
    """With reference="pair" the second of each row is the contrast: another contrast is another run."""
    x = points()
    runs = []
    for contrast in (points(40, 1), points(40, 1), points(40, 2)):
        rows = TensorDataset(x, contrast)
        batches = list(zip(x.split(8), contrast.split(8), strict=True))
        data = {"dataset": rows, "list": batches, "loader": DataLoader(rows, batch_size=8)}[kind]
        runs.append(train(data=data, reference="pair"))
    assert_same_bits(runs[0], runs[1])
    assert differ(runs[0], runs[2])


def test_pairs_of_identical_rows_have_nothing_to_reconstruct() -> None:
    """Where every input is its own contrast all gradients are zero, which is an error that says so."""
    with pytest.raises(ValueError, match=r"gradients: all zero in this batch"):
        train(data=TensorDataset(points(), points()), reference="pair")


# --- device, dtype, the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_dtype, asked, expected",
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float32, "float64", torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, "float32", torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_of_the_decomposition(model_dtype: torch.dtype, asked: Any, expected: torch.dtype) -> None:
    """The decomposition has the dtype asked for, else the model's but at least float32; the model keeps its own."""
    model = Net().to(model_dtype)
    d = train(model, points().to(model_dtype), dtype=asked, device="cpu")
    assert {p.dtype for p in d.parameters()} == {expected}
    assert {p.dtype for p in model.parameters()} == {model_dtype}
    assert all(p.isfinite().all() for p in d.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    """Bits, flags, modes, hooks and .grad are as before, also after an interruption."""
    model = Net(7 if fails else None, interrupt)
    model.first.bias.requires_grad_(False)
    model.second.weight.grad = torch.ones(3, 6)
    model.second.train()  # harmless: nothing in it acts in training mode
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = {name: id(p) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    if fails:
        with pytest.raises(KeyboardInterrupt):
            train(model)
    else:
        train(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.second.weight.grad, torch.ones(3, 6))
    assert model.first.weight.grad is None
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_a_run_is_silent_off_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """With the progress bar asked for but no terminal, nothing is printed but the divergence that was left open."""
    train(callbacks=None, divergence="mse")
    assert capfd.readouterr() == ("", "")
    train(callbacks=None)
    assert capfd.readouterr() == ("", "divergence: mse, as the model's outputs have no .logits [B, T, V]\n")
    train()
    assert capfd.readouterr() == ("", "")


# --- real models ------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_error_falls_on_a_language_model(data_dir: Path) -> None:
    """Thirty steps on the attention of a small real language model lower the error on its own texts."""
    spec = f"hf:{data_dir / 'stories260k'}"
    model = load_model(spec)
    texts = load_data(f"text:{data_dir / 'stories.txt'}", model_spec=spec, max_rows=64)
    d = l3d.decompose(
        model, texts, 20, rank=6, k=0.1, params="model.layers.2.self_attn.*", divergence="kl", steps=30,
        batch_size=4, warm_start=0, callbacks=[],
    )  # fmt: skip
    assert len(d.parameter_names) == 4
    errors = d.history["error"]
    assert d.history["kept_per_sample"] == [2.0] * 30
    assert sum(errors[-5:]) / 5 < 0.95 * errors[0]


@pytest.mark.data
def test_error_falls_on_a_convolutional_network(data_dir: Path) -> None:
    """Thirty steps on convolutions and batch norms of a real image classifier lower the error."""
    model = resnet20(str(data_dir / "resnet20-cifar10.safetensors"))
    images = load_data(
        f"npz:{data_dir / 'cifar10-2000.npz'}", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], max_rows=64
    )
    d = l3d.decompose(
        model, images, 20, rank=3, k=0.1, params="layer2.0.*", divergence="kl", steps=30, batch_size=8,
        warm_start=0, callbacks=[],
    )  # fmt: skip
    assert sorted(d.parameter_names) == [f"layer2.0.{n}" for n in (
        "bn1.bias", "bn1.weight", "bn2.bias", "bn2.weight", "conv1.weight", "conv2.weight"
    )]  # fmt: skip
    errors = d.history["error"]
    assert sum(errors[-5:]) / 5 < 0.95 * errors[0]
