"""Training: reproducible to the bit, resumable to the bit, and refusing bad input before anything is written."""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import l3d
from l3d.data.batches import mix
from l3d.data.sources import load_data, load_model
from l3d.decomposition.objective import objective
from l3d.decomposition.subnetworks import Decomposition
from l3d.training import history as progress
from l3d.training import start
from l3d.training.history import COLUMNS
from l3d.training.run import Run
from l3d.training.settings import kept_fraction, learning_rate, resolve
from l3d.zoo import resnet20

from helpers import Root, assert_relative


class Net(nn.Module):
    """Two layers; counts its forward passes, and can do something unusual at one of them."""

    def __init__(self, at: int | None = None, act: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.calls, self.at, self.act = 0, at, act

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.second(torch.tanh(self.first(x)))
        return self.act(y) if self.calls == self.at and self.act is not None else y


@pytest.fixture(autouse=True)
def one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step run the model once, so that tests can interrupt a step by a call of the model's."""
    monkeypatch.setattr("l3d.gradients.ahead.MOST", 1)


def interrupt(_: Tensor) -> Tensor:
    raise KeyboardInterrupt


def nan(y: Tensor) -> Tensor:
    return y * float("nan")


def points(n: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


ARGUMENTS: dict[str, Any] = {"n_subnetworks": 4, "rank": 2, "k": 0.3, "steps": 20, "batch_size": 8, "progress": False}


def train(model: nn.Module | None = None, data: Any = None, **changes: Any) -> Decomposition:
    model, data = Net() if model is None else model, points() if data is None else data
    return l3d.decompose(model, data, **{**ARGUMENTS, **changes})


def assert_same_bits(a: Decomposition, b: Decomposition) -> None:
    """Assert that two runs agree in every tensor, the threshold and all of the history but the speed."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert a.threshold == b.threshold
    for column in set(COLUMNS) - {"samples_per_second"}:
        assert a.history[column] == b.history[column], column


def differ(a: Decomposition, b: Decomposition) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


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


# --- settings ---------------------------------------------------------------------------------------------------

CHOSEN: dict[str, Any] = {
    "n_subnetworks": 5,
    "rank": 1,
    "k": 0.1,
    "params": None,
    "divergence": "mse",
    "reference": "sample",
    "positions": "all",
    "steps": None,
    "batch_size": 32,
    "lr": None,
    "warm_start": None,
    "weight_decay": 0.0,
    "shuffle": False,
    "updates": 1,
    "start": "random",
    "revive": None,
    "seed": 0,
    "dtype": None,
    "backend": "auto",
}


@pytest.mark.parametrize(
    "n_rows, batch_size, steps",
    [(1000, 32, 32_000), (64, 32, 2000), (70, 32, 3000), (65, 32, 2000), (1, 32, 1000), (3, 1, 3000), (33, 32, 1000)],
)
def test_published_preset_is_the_paper_s_recipe(n_rows: int, batch_size: int, steps: int) -> None:
    """1000 epochs of the batches there are, Adam at an absolute .01 times .8 every tenth, everything kept at first."""
    settings = resolve("published", n_rows, **{**CHOSEN, "batch_size": batch_size})
    assert (settings.lr, settings.relative_lr, settings.schedule, settings.warm_shape) == (0.01, False, "step", "hold")
    rates = [learning_rate(settings, step) for step in range(0, settings.steps, settings.steps // 100)]
    assert rates == [0.8 ** (i // 10) for i in range(100)]
    assert learning_rate(settings, settings.steps // 10 - 1) == 1
    assert learning_rate(settings, settings.steps - 1) == 0.8**9
    assert settings.steps == steps


@pytest.mark.parametrize("steps", [10, 37, 100, 2000, 32_000])
def test_published_rate_falls_at_each_tenth_exactly(steps: int) -> None:
    """The rate has its j-th drop at the first step that is j tenths into the run, for every number of steps."""
    settings = resolve("published", None, **{**CHOSEN, "steps": steps})
    for step in range(steps):
        assert learning_rate(settings, step) == 0.8 ** (10 * step // steps)


def test_default_preset() -> None:
    """2000 steps at a relative .1 on a cosine that ends at a hundredth; k falls geometrically over a tenth."""
    settings = resolve("default", 1000, **CHOSEN)
    assert (settings.steps, settings.lr, settings.relative_lr, settings.schedule) == (2000, 0.1, True, "cosine")
    assert (settings.warm_start, settings.warm_shape) == (200, "anneal")
    rates = [learning_rate(settings, step) for step in range(2000)]
    assert rates[0] == 1
    assert all(a > b > 0.01 for a, b in itertools.pairwise(rates))
    assert rates[-1] < 0.0101


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize(
    "steps, warm_start, expected", [(100, None, 10), (100, 40, 40), (100, 0, 0), (100, 100, 100), (5, None, 0)]
)
def test_warm_start_schedule(preset: str, steps: int, warm_start: int | None, expected: int) -> None:
    """More than k is kept before `warm_start` and k from it on: held at 1, or falling steadily from 1."""
    settings = resolve(preset, None, **{**CHOSEN, "steps": steps, "warm_start": warm_start})
    fractions = [kept_fraction(settings, step) for step in range(steps)]
    assert settings.warm_start == expected
    assert fractions[expected:] == [0.1] * (steps - expected)
    warm = fractions[:expected]
    assert all(fraction > 0.1 for fraction in warm)
    if preset == "published":
        assert warm == [1.0] * expected
    elif warm:
        assert warm[0] == 1
        ratios = [b / a for a, b in itertools.pairwise([*warm, 0.1])]
        assert ratios == pytest.approx([0.1 ** (1 / expected)] * expected, rel=1e-12)


@pytest.mark.parametrize("preset", ["default", "published"])
def test_training_is_adam_on_the_objective(preset: str) -> None:
    """A run is, to 1e-9, a plain loop: loss of the batch, torch's Adam, unit norm, with the preset's k and rate.

    In the default preset every subnetwork has an Adam of its own, which steps when a batch keeps the subnetwork.
    """
    model, batch = Net().double(), points(8).double()
    run = train(model, [batch], preset=preset, reference="uniform", steps=30, seed=3, k=0.06)
    gradients = l3d.extract_gradients(model, batch, reference="uniform")
    d = Decomposition(gradients.shapes, 4, 2, generator=torch.Generator().manual_seed(mix(3, 1))).double()
    scales = [p.detach().square().mean().sqrt().item() if preset == "default" else 1.0 for p in d.parameters()]
    slices = [[nn.Parameter(row.clone()) for row in p.detach()] for p in d.parameters()]
    adams = [torch.optim.Adam([{"params": [rows[i]]} for rows in slices]) for i in range(4)]
    rested = 0
    for step in range(30):
        k = 0.06 if step >= 3 else 1.0 if preset == "published" else 0.06 ** (step / 3)
        rate = 0.01 * 0.8 ** (step // 3) if preset == "published" else 0.0
        if preset == "default":
            rate = 0.1 * (0.01 + 0.99 * (1 + math.cos(math.pi * step / 30)) / 2)
        result = objective(gradients, d.encoder, d.decoder, k)
        assert run.history["error"][step] == pytest.approx(result.loss.item(), rel=1e-9)
        assert run.history["lr"][step] == pytest.approx(rate, rel=1e-12)
        derivatives = torch.autograd.grad(result.loss, list(d.parameters()))
        for i, adam in enumerate(adams):
            if preset == "default" and i not in result.kept.columns:
                rested += 1
                continue
            for group, scale, rows, derivative in zip(adam.param_groups, scales, slices, derivatives, strict=True):
                group["lr"] = rate * scale
                rows[i].grad = derivative[i]
            adam.step()
        with torch.no_grad():
            for p, rows in zip(d.parameters(), slices, strict=True):
                p.copy_(torch.stack(rows))
            d.normalize_()
            for p, rows in zip(d.parameters(), slices, strict=True):
                for row, value in zip(rows, p, strict=True):
                    row.copy_(value)
    assert (rested > 0) == (preset == "default")  # or the two would be tested by the same
    for trained, expected in zip(run.parameters(), d.parameters(), strict=True):
        assert_relative(trained, expected, 1e-9)


@pytest.mark.parametrize("chosen", [None, False, True])
def test_the_presets_revive_unless_they_are_the_paper_s(chosen: bool | None) -> None:
    """Left open, dead subnetworks are revived by default and not as published; a choice counts in both."""
    for preset, default in (("default", True), ("published", False)):
        settings = resolve(preset, None, **{**CHOSEN, "revive": chosen})
        assert settings.revive is (default if chosen is None else chosen)


@pytest.mark.parametrize("k", [0.05, 0.3, 0.5, 1.0])
def test_k_is_kept_to_the_entry(k: float) -> None:
    """After the warm start each batch keeps floor(k·S·K + ½) coefficients, at least one."""
    d = train(k=k, warm_start=5)
    assert d.history["kept_per_sample"][5:] == [max(1, math.floor(k * 32 + 0.5)) / 8] * 15
    assert d.history["k"][5:] == [k] * 15
    assert min(d.history["kept_per_sample"]) == d.history["kept_per_sample"][-1]


# --- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, records, rows", [(20, 1000, 20), (45, 10, 9), (46, 10, 9), (7, 3, 2), (10, 1, 1)])
def test_history_is_bounded_and_its_columns_equally_long(
    steps: int, records: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of steps, at most RECORDS rows are held, evenly spaced, every column of one length."""
    monkeypatch.setattr(progress, "RECORDS", records)
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
    monkeypatch.setattr(progress, "RECORDS", 5)
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
    d = l3d.decompose(model.eval(), data, 5, rank=1, k=0.1, batch_size=32, steps=300, progress=False)
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
            for name, tensor in alone.state_dict().items():
                assert_relative(together.state_dict()[name], tensor, 1e-8)


# --- starting from data -----------------------------------------------------------------------------------------


def test_a_start_from_data_is_reproducible_and_another() -> None:
    """The seed decides it; it differs from the random start and from that of another seed, and restarts differ."""
    runs = [train(start="data", steps=3, seed=seed) for seed in (0, 0, 1)]
    assert_same_bits(runs[0], runs[1])
    assert differ(runs[0], runs[2])
    assert differ(runs[0], train(start="random", steps=3))
    assert_same_bits(train(start="random", steps=3), train(steps=3))
    assert len(set(train(start="data", steps=3, n_restarts=3).restart_errors)) == 3


@pytest.mark.parametrize("n_subnetworks", [1, 5, 19])
def test_a_start_from_data_is_gradients_of_samples(
    n_subnetworks: int, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    """Without the random part and at full rank every subnetwork is some sample's gradient, in encoder and decoder."""
    monkeypatch.setattr("l3d.training.start.NOISE", 0.0)
    x = points(8).double()
    arguments = {"reference": "mean", "steps": 1, "lr": 1e-12, "rank": {"first.weight": 4, "second.weight": 3}}
    d = train(Net().double(), x, n_subnetworks=n_subnetworks, start="data", **arguments)
    gradients = l3d.extract_gradients(Net().double(), x, reference="mean").materialize()
    flat = torch.cat([grad.flatten(1) for grad in gradients.values()], 1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    for side in (d.encoder, d.decoder):
        directions = [torch.cat([t.flatten() for t in side.tensors(k).values()]) for k in range(n_subnetworks)]
        cosines = torch.stack(directions).detach() @ flat.mT  # of their own sign
        assert_relative(cosines.amax(1), torch.ones(n_subnetworks), 1e-9)
        used = cosines.argmax(1).bincount(minlength=8)
        assert used.max() - used.min() <= 1 or n_subnetworks < 8  # none again before all have been


@pytest.mark.parametrize("kind", ["list", "loader", "generator", "dataset"])
def test_every_kind_of_data_can_be_started_from(kind: str) -> None:
    """Streams of batches are as good as rows, and no batch of them is lost: a list and a generator agree."""
    x = points()
    data = {
        "list": lambda: list(x.split(8)),
        "loader": lambda: DataLoader(x, batch_size=8),
        "generator": lambda: (x[8 * (i % 5) : 8 * (i % 5) + 8] for i in range(20)),
        "dataset": lambda: TensorDataset(x),
    }
    d = train(data=data[kind](), start="data")
    assert d.history["step"][-1] == 20
    assert_same_bits(d, train(data=x if kind == "dataset" else list(x.split(8)), start="data"))


def test_a_start_from_data_is_better_than_a_random_one() -> None:
    """The first error of training, with everything kept, is lower than from a random start."""
    first = {start: train(start=start, steps=2, warm_start=1).history["error"][0] for start in ("random", "data")}
    assert first["data"] < first["random"]


@pytest.mark.parametrize("n_restarts", [1, 2])
def test_resuming_a_run_that_started_from_data(n_restarts: int, tmp_path: Path) -> None:
    """The start is not drawn again over what was learned: the same bits as in one go."""
    arguments = {"start": "data", "checkpoint_every": 4, "n_restarts": n_restarts}
    with pytest.raises(KeyboardInterrupt):
        train(Net(14, interrupt), out=tmp_path / "run", **arguments)
    assert_same_bits(train(out=tmp_path / "run", resume=True, **arguments), train(**arguments))


# --- reviving ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dead_after(monkeypatch: pytest.MonkeyPatch) -> int:
    """A subnetwork counts as dead after five batches instead of two hundred."""
    for module in ("l3d.training.history", "l3d.training.run"):
        monkeypatch.setattr(f"{module}.DEAD_AFTER", 5)
    return 5


def stillborn(monkeypatch: pytest.MonkeyPatch, rows: list[int]) -> None:
    """Let some subnetworks of a run's start see nothing: their encoders are zero, and have no gradient."""
    original = Decomposition.side_by_side.__func__

    def start(cls: type[Decomposition], parts: Any) -> Decomposition:
        whole = original(cls, parts)
        with torch.no_grad():
            for parameter in whole.encoder.parameters():
                parameter[rows] = 0
        return whole

    monkeypatch.setattr(Decomposition, "side_by_side", classmethod(start))


class Revival(NamedTuple):
    """What changed when dead subnetworks were looked for after a step."""

    step: int
    rows: list[int]  # whose tensors changed
    encoder_is_decoder: bool  # in those rows
    moments: list[bool]  # per row: whether any is not zero


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Revival]:
    """Record what a run's revivals change; steps without any leave no record."""
    revivals: list[Revival] = []
    original = Run._revive

    def revive(run: Run, *arguments: Any) -> None:
        parameters = list(run.decomposition.parameters())
        before = [p.detach().clone() for p in parameters]
        original(run, *arguments)
        changed = torch.stack([(p != b).flatten(1).any(1) for p, b in zip(parameters, before, strict=True)])
        if not changed.any():
            return
        rows = changed.any(0).nonzero()[:, 0].tolist()
        d = run.decomposition
        sides = zip(d.encoder.parameters(), d.decoder.parameters(), strict=True)
        moments = [(m != 0).flatten(1).any(1) for m in (*run.optimizer.first, *run.optimizer.second)]
        alike = all(torch.equal(a[rows], b[rows]) for a, b in sides)
        revivals.append(Revival(run.step, rows, alike, torch.stack(moments).any(0).tolist()))

    monkeypatch.setattr(Run, "_revive", revive)
    return revivals


STILL: dict[str, Any] = {"warm_start": 0, "k": 0.3}  # from the first step on only what is not zero is kept


def test_a_dead_subnetwork_is_given_a_new_life(dead_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the dead one is set, alike in encoder and decoder; then it is kept as others are."""
    stillborn(monkeypatch, [2])
    revivals = watch(monkeypatch)
    d = train(revive=True, **STILL)
    assert [(revival.step, revival.rows, revival.encoder_is_decoder) for revival in revivals] == [(5, [2], True)]
    assert d.history["dead_fraction"][:4] == [0.0] * 4
    assert d.history["dead_fraction"][4:] == [0.25, *[0.0] * 15]
    assert d.evaluate(Net(), points()).activation_rate.min() > 0
    assert_relative(d.decoder.squared_norm(), torch.ones(4), 1e-5)


@pytest.mark.parametrize("updates", [1, 2])
def test_nothing_of_its_first_life_moves_what_is_revived(
    updates: int, dead_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subnetwork that has learned, and then dies, is revived without moments; those of the others stay."""
    revivals = watch(monkeypatch)
    original = Run.gradients

    def gradients(run: Run, step: int) -> Any:
        if 1 <= step < 10:  # after the first step, which keeps all, it sees nothing
            with torch.no_grad():
                for parameter in run.decomposition.encoder.parameters():
                    parameter[2] = 0
        return original(run, step)

    monkeypatch.setattr(Run, "gradients", gradients)
    train(revive=True, warm_start=1, k=0.3, params="*.weight", updates=updates)
    assert [(revival.step, revival.rows) for revival in revivals] == [(10, [2])]
    assert revivals[0].moments == [True, True, False, True]


def test_a_revived_subnetwork_is_not_dead_until_it_could_be(dead_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its revival counts as being kept: it is dead again only if none of as many batches has kept it since."""
    stillborn(monkeypatch, [2])
    monkeypatch.setattr("l3d.training.run.set_from_samples", lambda *_: None)  # it stays as it was
    d = train(revive=True, **STILL)
    assert d.history["dead_fraction"] == [*[0.0] * 4, *[0.25, 0.0, 0.0, 0.0, 0.0] * 3, 0.25]


def test_without_reviving_the_dead_stay_dead(dead_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """revive=False, which published is, leaves a subnetwork that sees nothing as it is to the end."""
    stillborn(monkeypatch, [2])
    revivals = watch(monkeypatch)
    for arguments in ({"revive": False}, {"preset": "published"}):
        d = train(**arguments, **STILL)
        assert d.history["dead_fraction"][4:] == [0.25] * 16
        assert not any(parameter[2].any() for parameter in d.encoder.parameters())
        assert d.evaluate(Net(), points()).activation_rate[2] == 0
    assert revivals == []


def test_reviving_changes_nothing_where_none_is_dead(dead_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without dead subnetworks is the same to the bit with and without, but for the setting."""
    revivals = watch(monkeypatch)
    assert_same_bits(train(revive=True, k=0.6), train(revive=False, k=0.6))
    assert revivals == []


def test_a_restart_s_dead_are_its_own(dead_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reviving a subnetwork of the second restart leaves the first restart's errors as they are."""
    stillborn(monkeypatch, [5])
    revivals = watch(monkeypatch)
    with_it, without = (train(revive=revive, n_restarts=2, **STILL).restart_errors for revive in (True, False))
    assert [revival.rows for revival in revivals] == [[5]]
    assert with_it[0] == pytest.approx(without[0], rel=1e-6)
    assert with_it[1] != pytest.approx(without[1], rel=1e-3)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"steps": 20, "warm_start": 0}, [5, 10, 15]),
        ({"steps": 20, "warm_start": 4}, [10, 15]),  # not before so many steps at k itself
        ({"steps": 20, "warm_start": 5}, [10, 15]),
        ({"steps": 20, "warm_start": 6}, [15]),
        ({"steps": 20, "warm_start": 20}, []),
        ({"steps": 25, "warm_start": 0}, [5, 10, 15, 20]),  # .8 of 25 is 20
        ({"steps": 24, "warm_start": 0}, [5, 10, 15]),
        ({"steps": 4, "warm_start": 0}, []),
    ],
    ids=str,
)
def test_the_dead_are_looked_for_at_certain_steps(
    arguments: dict[str, int], expected: list[int], updates: int, dead_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every so often, once k has been at its value for as long, and not in the last fifth of the run."""
    stillborn(monkeypatch, [1])
    found = []
    original = Run._revive

    def revive(run: Run, *given: Any) -> None:
        with monkeypatch.context() as patch:  # nothing is revived, so that it stays dead
            patch.setattr("l3d.training.run.set_from_samples", lambda *_: found.append(run.step))
            original(run, *given)

    monkeypatch.setattr(Run, "_revive", revive)
    # weights alone: a bias of zeros has a gradient where it is kept, as it is while k falls
    train(revive=True, k=0.3, params="*.weight", updates=updates, **arguments)
    assert found == expected


@pytest.mark.parametrize("n_restarts", [1, 2])
def test_the_badly_reconstructed_are_what_it_is_revived_from(
    n_restarts: int, dead_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are drawn by what each restart itself leaves of them in the step's batch, as many as it has dead."""
    stillborn(monkeypatch, [2] if n_restarts == 1 else [2, 5, 7])
    seen, drawn, moved = [], [], []
    original = Run._revive

    def revive(run: Run, gradients: Any, residual: Tensor) -> None:
        if run.step == 5:
            seen.append((gradients, residual.detach().reshape(8, n_restarts)))
        original(run, gradients, residual)

    def draw(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
        drawn.append((weights.clone(), n))
        return weights.argmax()[None].expand(n)

    def set_from_samples(sides: Any, columns: Tensor, gradients: Any, samples: Tensor, generator: Any) -> None:
        moved.append((columns.tolist(), samples.tolist()))
        assert gradients is seen[0][0]
        start.set_from_samples(sides, columns, gradients, samples, generator)

    monkeypatch.setattr(Run, "_revive", revive)
    monkeypatch.setattr("l3d.training.run.draw_samples", draw)
    monkeypatch.setattr("l3d.training.run.set_from_samples", set_from_samples)
    train(revive=True, n_restarts=n_restarts, **{**STILL, "steps": 9})
    ((_, residual),) = seen
    worst = residual.argmax(0).tolist()
    assert [n for _, n in drawn] == [1, 2][:n_restarts]
    for (weights, _), expected in zip(drawn, residual.mT, strict=True):
        assert torch.equal(weights, expected)
    assert moved == [([2], worst[:1]), ([5, 7], worst[1:] * 2)][:n_restarts]


@pytest.mark.parametrize("n_restarts", [1, 2])
@pytest.mark.parametrize("at", [6, 8, 12, 18])
def test_resuming_across_a_revival(
    at: int, n_restarts: int, dead_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before or after subnetworks were revived, and resumed: the same bits as in one go."""
    stillborn(monkeypatch, [1, 4 * n_restarts - 1])
    revivals = watch(monkeypatch)
    arguments = {"n_restarts": n_restarts, "checkpoint_every": 4, "revive": True, **STILL}
    whole = train(out=tmp_path / "whole", **arguments)
    assert revivals[0].step == 5
    assert set(revivals[0].rows) == {1, 4 * n_restarts - 1}
    with pytest.raises(KeyboardInterrupt):
        train(Net(at, interrupt), out=tmp_path / "run", **arguments)
    resumed = train(out=tmp_path / "run", resume=True, **arguments)
    assert_same_bits(resumed, whole)
    for name in ("decomposition.safetensors", "checkpoints/step000000020/optimizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_dead_are_revived_in_every_dtype(dtype: str, dead_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in another type than float32 does not end at its first dead subnetwork."""
    stillborn(monkeypatch, [2])
    d = train(revive=True, dtype=dtype, **STILL)
    assert d.history["dead_fraction"][-1] == 0


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
    """With the progress bar asked for but no terminal, nothing is printed."""
    train(progress=True)
    assert capfd.readouterr() == ("", "")


# --- interruption and resumption --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["tensor", "list of batches"])
@pytest.mark.parametrize("records", [1000, 7])
@pytest.mark.parametrize("n_restarts", [1, 2])
@pytest.mark.parametrize("at", [4, 8, 12, 19])
def test_resuming_reproduces_the_uninterrupted_run(
    at: int, n_restarts: int, records: int, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at any step, before the first checkpoint or after, and resumed: the same bits as in one go."""
    monkeypatch.setattr(progress, "RECORDS", records)
    data = list(points().split(8)) if stream else points()
    arguments = {"n_restarts": n_restarts, "checkpoint_every": 4}
    whole = train(data=data, out=tmp_path / "whole", **arguments)
    model = Net(at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, out=tmp_path / "run", **arguments)
    resumed = None
    if not (tmp_path / "run" / "checkpoints").exists():
        with pytest.raises(FileNotFoundError, match="out: nothing to resume"):
            train(data=data, out=tmp_path / "run", resume=True, **arguments)
        return
    resumed = train(data=data, out=tmp_path / "run", resume=True, **arguments)
    assert_same_bits(resumed, whole)
    assert resumed.restart_errors == whole.restart_errors
    for name in ("decomposition.safetensors", "checkpoints/step000000020/optimizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resuming_twice_and_when_all_is_done(tmp_path: Path) -> None:
    """A run interrupted twice ends in the same bits, and resuming a finished run changes none."""
    whole = train()
    for at in (9, 10):  # the second counts from the resumed step
        with pytest.raises(KeyboardInterrupt):
            train(Net(at, interrupt), out=tmp_path / "run", checkpoint_every=3, resume=at == 10)
    assert_same_bits(train(out=tmp_path / "run", checkpoint_every=3, resume=True), whole)
    model = Net()
    assert_same_bits(train(model, out=tmp_path / "run", checkpoint_every=3, resume=True), whole)
    assert model.calls <= 1  # the check of the arguments; nothing was trained


def test_only_the_last_checkpoint_is_held(tmp_path: Path) -> None:
    """Older checkpoints go when a newer one is whole, so a run folder does not grow with the steps."""
    train(out=tmp_path / "run", n_restarts=2, checkpoint_every=3)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step000000020"]
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_half_a_checkpoint_is_ignored(tmp_path: Path) -> None:
    """A checkpoint whose writing was interrupted is not resumed from: the one before it is."""
    with pytest.raises(KeyboardInterrupt):
        train(Net(12, interrupt), out=tmp_path / "run", checkpoint_every=4)
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step000000008", folder / "step000000012.partial")
    (folder / "step000000012.partial" / "state.json").write_text("{")
    assert_same_bits(train(out=tmp_path / "run", checkpoint_every=4, resume=True), train())


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0.2},
        {"lr": 0.01},
        {"steps": 30},
        {"seed": 1},
        {"rank": 1},
        {"n_subnetworks": 5},
        {"reference": "mean"},
        {"divergence": "mse_published"},
        {"params": "first.*"},
        {"preset": "published"},
        {"dtype": "float64"},
        {"batch_size": 16},
        {"start": "data"},
        {"revive": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_resuming_with_changed_arguments_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """A changed argument is named, and the interrupted run's checkpoint is left as it is."""
    with pytest.raises(KeyboardInterrupt):
        train(Net(12, interrupt), out=tmp_path / "run", checkpoint_every=4)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"resume: .*\b{next(iter(change))}\b.* differ from the interrupted run's"):
        train(out=tmp_path / "run", resume=True, **{"checkpoint_every": 4, **change})
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_resuming_another_model_is_refused(tmp_path: Path) -> None:
    """A model whose parameters have other shapes than the interrupted run's is refused in one line."""
    with pytest.raises(KeyboardInterrupt):
        train(Net(12, interrupt), out=tmp_path / "run", checkpoint_every=4)
    other = Net()
    other.second = nn.Linear(6, 2)
    with pytest.raises(ValueError, match="resume: ") as error:
        train(other, out=tmp_path / "run", checkpoint_every=4, resume=True)
    assert "\n" not in str(error.value)


def test_resuming_without_a_folder_is_refused(tmp_path: Path) -> None:
    """resume needs a run to go on from: without `out` it is an error, not a new run."""
    with pytest.raises(ValueError, match=r"resume: .*out"):
        train(resume=True)
    with pytest.raises(FileNotFoundError, match="out: nothing to resume"):
        train(resume=True, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- numbers that are not finite --------------------------------------------------------------------------------


def test_nan_in_the_output_names_the_step_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    """NaN from the model at step 10 says so; the checkpoint of step 8 loads, and resuming with a sane model works."""
    with pytest.raises(ValueError, match=r"^step 10: model: its output holds NaN or infinity") as error:
        train(Net(12, nan), out=tmp_path / "run", checkpoint_every=4)  # one call checks the arguments first
    assert "\n" not in str(error.value)
    checkpoint = l3d.load(tmp_path / "run" / "checkpoints" / "step000000008")
    assert all(p.isfinite().all() for p in checkpoint.parameters())
    assert checkpoint.history["step"] == list(range(1, 9))
    assert_same_bits(train(out=tmp_path / "run", checkpoint_every=4, resume=True), train())


@pytest.mark.parametrize("k", [0.1, 1.0])
def test_nan_in_a_gradient_names_the_tensor(k: float, tmp_path: Path) -> None:
    """A gradient that is not finite names the tensor and the step; other tensors are not blamed."""
    batches = list(points().split(8))
    batches[3] = batches[3].clone().index_fill(0, torch.tensor([5]), 0)
    with pytest.raises(ValueError, match=r"^step 3: gradients: NaN or infinity in those of 'before\.weight'"):
        train(Root(), batches, k=k, out=tmp_path / "run", checkpoint_every=2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step000000002"]
    assert train(Root(), batches, params="after.*", k=k).history["step"][-1] == 20


@pytest.mark.parametrize("start", ["random", "data"])
def test_a_first_batch_without_a_finite_gradient_names_the_tensor(start: str, tmp_path: Path) -> None:
    """Also where the run would start from that batch's gradients: one line that says so."""
    with pytest.raises(ValueError, match=r"gradients: NaN or infinity in those of 'before\.weight'") as error:
        train(Root(), torch.zeros(8, 4), start=start, out=tmp_path / "run", reference="uniform")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lr", [1e30, 1e38])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_run_that_diverges_is_never_returned(lr: float, steps: int, tmp_path: Path) -> None:
    """Directions that are not finite raise an error that advises a lower lr; no checkpoint holds them."""
    with pytest.raises(ValueError, match="lr"):
        train(lr=lr, steps=steps, out=tmp_path / "run", checkpoint_every=1)
    for path in (tmp_path / "run" / "checkpoints").glob("*"):
        assert all(p.isfinite().all() for p in l3d.load(path).parameters())


# --- refusals ---------------------------------------------------------------------------------------------------

X = points()
BAD: list[tuple[dict[str, Any], str]] = [
    ({"preset": "best"}, r"preset: expected one of default, published, got 'best'"),
    ({"k": 0}, r"k: expected a fraction in \(0, 1\], got 0"),
    ({"k": 1.01}, r"k: "),
    ({"k": float("nan")}, r"k: "),
    ({"k": "0.1"}, r"k: "),
    ({"n_subnetworks": 0}, r"n_subnetworks: expected a positive whole number, got 0"),
    ({"n_subnetworks": 2.5}, r"n_subnetworks: "),
    ({"batch_size": 0}, r"batch_size: expected a positive whole number, got 0"),
    ({"steps": 0}, r"steps: expected a positive whole number, got 0"),
    ({"steps": 1.5}, r"steps: "),
    ({"warm_start": 21}, r"warm_start: expected a number of steps in \[0, 20\], got 21"),
    ({"warm_start": -1}, r"warm_start: "),
    ({"lr": 0}, r"lr: expected a positive number, got 0"),
    ({"lr": float("nan")}, r"lr: "),
    ({"lr": float("inf")}, r"lr: "),
    ({"lr": "fast"}, r"lr: "),
    ({"start": "zeros"}, r"start: expected one of random, data, got 'zeros'"),
    ({"start": None}, r"start: expected one of random, data, got None"),
    ({"revive": "yes"}, r"revive: expected True, False or None, got 'yes'"),
    ({"revive": 1}, r"revive: expected True, False or None, got 1"),
    ({"n_restarts": 0}, r"n_restarts: expected a positive whole number, got 0"),
    ({"n_restarts": "2"}, r"n_restarts: "),
    ({"n_restarts": True}, r"n_restarts: expected a positive whole number, got True"),
    ({"n_subnetworks": True}, r"n_subnetworks: expected a positive whole number, got True"),
    ({"checkpoint_every": 0}, r"checkpoint_every: expected a positive whole number, got 0"),
    ({"seed": 1.5}, r"seed: "),
    ({"seed": "one"}, r"seed: "),
    ({"rank": 0}, r"rank: expected positive whole numbers for '\*', got 0"),
    ({"rank": 5}, r"rank: 5 exceeds 4, the most that 'first.weight' of shape \[6, 4\] allows"),
    ({"rank": {"third.*": 1, "*": 1}}, r"rank: no decomposed parameter matches 'third.\*'"),
    ({"rank": "many"}, r"rank: "),
    ({"params": "third.*"}, r"params: no parameter matches 'third.\*'; near matches: first"),
    ({"params": []}, r"params: expected at least one pattern"),
    ({"divergence": "l2"}, r"divergence: expected mse, mse_published, kl or a callable, got 'l2'"),
    ({"divergence": lambda f, y: (f - y).square().mean()}, r"divergence: expected one value per sample, shape \[8\]"),
    ({"reference": "median"}, r"reference: expected sample, mean, uniform, pair or a tensor, got 'median'"),
    (
        {"reference": torch.zeros(5, 3)},
        r"reference: expected outputs of shape \[8, 3\] \(samples first\) or one of \[3\] for all, got \[5, 3\]",
    ),
    ({"reference": "pair"}, r"reference: 'pair' needs data that yields \(input, contrast\), got single inputs"),
    ({"reference": "pair", "data": list(X.split(8))}, r"reference: 'pair' needs data that yields \(input, contrast\)"),
    ({"positions": 0}, r"positions: expected 'all', 'last' or a positive number, got 0"),
    ({"positions": "first"}, r"positions: "),
    ({"dtype": "int32"}, r"dtype: expected a floating dtype such as 'float32', got 'int32'"),
    ({"dtype": "float31"}, r"dtype: "),
    ({"device": "toaster"}, r"device"),
    ({"backend": "cuda"}, r"backend: expected one of auto, torch, triton, got 'cuda'"),
    ({"backend": "triton"}, r"backend='triton': "),
    ({"data": 3}, r"data: expected a tensor, Dataset, DataLoader or iterable, got int"),
    ({"data": None}, r"data: expected a tensor, Dataset, DataLoader or iterable, got NoneType"),
    ({"data": X[:0]}, r"data: expected at least one sample, got none"),
    ({"data": []}, r"data: "),
    ({"data": X.numpy()}, r"data: "),
    ({"data": X[:1]}, r"reference: 'sample' needs at least two samples in a batch, got 1"),
    ({"model": nn.Flatten()}, r"model: |params: "),
    ({"model": nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()}, r"model: '1' \(Dropout\) is in training mode"),
]


def with_bad(bad: dict[str, Any], **arguments: Any) -> Decomposition:
    """Train with arguments one of which is bad; the model and the data are among them."""
    arguments = {**ARGUMENTS, **arguments, **bad}
    return l3d.decompose(arguments.pop("model", Net()), arguments.pop("data", X), **arguments)


@pytest.mark.parametrize("bad, message", BAD, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_bad_arguments_are_refused_before_anything_is_written(
    bad: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bad argument raises one line that names it, and no run folder is made."""
    monkeypatch.setattr("l3d_kernels.registry.interpreted", lambda: False)  # the interpreter takes CPU tensors
    kinds = RuntimeError if bad in ({"device": "toaster"}, {"backend": "triton"}) else ValueError
    with pytest.raises(kinds, match=rf"^{message}" if kinds is ValueError else message) as error:
        with_bad(bad, out=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", [{"k": 2}, {"backend": "cuda"}, {"reference": "pair"}, {"rank": 99}], ids=str)
def test_a_refused_run_does_not_overwrite_another(bad: dict[str, Any], tmp_path: Path) -> None:
    """With overwrite, an old run is removed only once the new one's arguments hold."""
    old = train(out=tmp_path / "run")
    with pytest.raises(ValueError, match=next(iter(bad))):
        with_bad(bad, out=tmp_path / "run", overwrite=True)
    assert_same_bits(l3d.load(tmp_path / "run"), old)


def test_a_folder_in_use_is_refused_without_overwrite(tmp_path: Path) -> None:
    """A non-empty folder is refused; an empty one is taken; overwrite replaces a run and nothing beside it."""
    (tmp_path / "run").mkdir()
    first = train(out=tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^out: .* is not empty; choose another folder or pass overwrite"):
        train(out=tmp_path / "run", seed=1)
    assert_same_bits(l3d.load(tmp_path / "run"), first)
    second = train(out=tmp_path / "run", seed=1, overwrite=True)
    assert_same_bits(l3d.load(tmp_path / "run"), second)
    assert differ(first, second)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("names", [["notes.txt"], ["checkpoints/keep.txt"], ["decomposition.json"], ["config.yaml"]])
def test_overwrite_refuses_a_foreign_folder(names: list[str], tmp_path: Path) -> None:
    """A folder that no run wrote is not touched, even where its files have the names of a run's."""
    for name in names:
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"^out: .* holds no run"):
        train(out=tmp_path / "other", overwrite=True)
    assert all((tmp_path / "other" / name).read_text() == "mine" for name in names)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """A path to a file is refused and the file is left, with overwrite too."""
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"^out: .* is a file"):
            train(out=tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


def test_on_start_is_called_once_everything_holds(tmp_path: Path) -> None:
    """`on_start` gets the folder after the checks and before training, and not where they fail."""
    seen: list[tuple[Path, bool]] = []
    note = lambda path: seen.append((path, (path / "checkpoints").exists()))  # noqa: E731
    with pytest.raises(ValueError, match="k: "):
        train(out=tmp_path / "run", k=2, on_start=note)
    assert seen == []
    train(out=tmp_path / "run", on_start=note)
    assert seen == [(tmp_path / "run", False)]


# --- real models ------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_error_falls_on_a_language_model(data_dir: Path) -> None:
    """Thirty steps on the attention of a small real language model lower the error on its own texts."""
    spec = f"hf:{data_dir / 'stories260k'}"
    model = load_model(spec)
    texts = load_data(f"text:{data_dir / 'stories.txt'}", model_spec=spec, max_rows=64)
    d = l3d.decompose(
        model, texts, 20, rank=6, k=0.1, params="model.layers.2.self_attn.*", divergence="kl", steps=30,
        batch_size=4, warm_start=0, progress=False,
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
        warm_start=0, progress=False,
    )  # fmt: skip
    assert sorted(d.parameter_names) == [f"layer2.0.{n}" for n in (
        "bn1.bias", "bn1.weight", "bn2.bias", "bn2.weight", "conv1.weight", "conv2.weight"
    )]  # fmt: skip
    errors = d.history["error"]
    assert sum(errors[-5:]) / 5 < 0.95 * errors[0]
