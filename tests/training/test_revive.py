"""Revive dead subnetworks: at which steps, from which samples, and what of the optimizer is reset."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from l3d.api import Decomposition
from l3d.training import start
from l3d.training.run import Run

from helpers import assert_relative
from training_runs import Net, assert_same_bits, interrupt, points, train

pytestmark = pytest.mark.usefixtures("one_batch_at_a_time")


@pytest.fixture
def dead_after(monkeypatch: pytest.MonkeyPatch) -> int:
    """Count a subnetwork as dead after 5 batches instead of 200."""
    for module in ("l3d.training.history", "l3d.training.run"):
        monkeypatch.setattr(f"{module}.DEAD_AFTER", 5)
    return 5


def stillborn(monkeypatch: pytest.MonkeyPatch, rows: list[int]) -> None:
    """Start some subnetworks of a run dead: their encoders are zero, and have no gradient."""
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
    """Only the dead one is reset, to the same direction in encoder and decoder; then it is kept as others are."""
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
    """With revive=False, as in the preset published, a dead subnetwork stays as it is to the end."""
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
        ({"steps": 25, "warm_start": 0}, [5, 10, 15, 20]),  # 0.8 of 25 is 20
        ({"steps": 24, "warm_start": 0}, [5, 10, 15]),
        ({"steps": 4, "warm_start": 0}, []),
    ],
    ids=str,
)
def test_the_dead_are_looked_for_at_certain_steps(
    arguments: dict[str, int], expected: list[int], updates: int, dead_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every DEAD_AFTER steps, once k has been at its value for as many, and not in the last fifth of the run."""
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
    """Each restart draws samples by its own residuals of the step's batch, as many as it has dead subnetworks."""
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
