"""Call decompose by its older argument names: the same run as by the new ones, and a warning that spells those."""

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import l3d
from l3d import GradientCache, GradientOptions, Memory

from training_runs import Net, assert_same_bits, interrupt, points, recipe

pytestmark = pytest.mark.usefixtures("one_batch_at_a_time")

QUICK: dict[str, Any] = {"n_subnetworks": 3, "rank": 1, "k": 0.4, "steps": 6, "batch_size": 8, "seed": 3}
NEW_NAMES = {
    "progress": "callbacks=[] (silent) or None (a bar)",
    "overwrite": 'existing="overwrite"',
    "resume": 'existing="resume"',
    "cache_reads": "cache=GradientCache(folder, reads=..)",
    "n_references": "cache=GradientCache(folder, n_references=..)",
    "micro_batch_size": "memory=Memory(micro_batch_size=..)",
    "recompute": "memory=Memory(recompute=..)",
    "revive": "preset=Preset(.., replacement=Replacement(enabled=..))",
    "shuffle": "gradients=GradientOptions(shuffle=..)",
}


def by_new(**arguments: Any) -> l3d.Decomposition:
    """Train; the new names do not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        return l3d.decompose(Net(), points(), **{**QUICK, **arguments})


def by_old(**arguments: Any) -> l3d.Decomposition:
    """Train; one warning says the new spelling of every older name, at the caller's line."""
    with pytest.warns(DeprecationWarning, match=r"^decompose: ") as caught:
        d = l3d.decompose(Net(), points(), **{**QUICK, **arguments})
    (warning,) = caught
    said = "; ".join(f"{name} is now {NEW_NAMES[name]}" for name in arguments if name in NEW_NAMES)
    assert str(warning.message) == f"decompose: {said}"
    assert warning.filename == __file__
    return d


def assert_same_run(a: l3d.Decomposition, b: l3d.Decomposition) -> None:
    assert a.settings == b.settings
    assert_same_bits(a, b)


@pytest.mark.parametrize(
    "old, new",
    [
        ({"progress": False}, {"callbacks": []}),
        ({"progress": True}, {"callbacks": None}),
        ({"overwrite": False, "resume": False}, {"existing": "refuse"}),
        ({"revive": False}, {"preset": recipe(enabled=False)}),
        ({"revive": True}, {"preset": "default"}),
        ({"revive": None}, {"preset": "default"}),
        ({"revive": True, "preset": "published"}, {"preset": recipe("published", enabled=True)}),
        ({"revive": False, "preset": recipe(restart_every=3)}, {"preset": recipe(restart_every=3, enabled=False)}),
        ({"shuffle": True}, {"gradients": GradientOptions(shuffle=True)}),
        ({"shuffle": False}, {"gradients": None}),
        ({"micro_batch_size": 3}, {"memory": Memory(micro_batch_size=3)}),
        ({"micro_batch_size": None, "recompute": False}, {"memory": None}),
        ({"micro_batch_size": 3, "recompute": True}, {"memory": Memory(micro_batch_size=3, recompute=True)}),
    ],
    ids=lambda each: ",".join(each),
)
def test_an_older_name_is_the_same_run(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Settings and bits are those of the new spelling."""
    assert_same_run(by_old(**old), by_new(**new))


@pytest.mark.parametrize("old", [{"cache_reads": "on"}, {"n_references": 2}, {"cache_reads": "off", "n_references": 2}])
def test_older_names_of_the_cache_are_the_same_run(old: dict[str, Any], tmp_path: Path) -> None:
    """They join the folder given as `cache`: each run trains on the other's store without a refusal."""
    n_references, reads = old.get("n_references", 1), old.get("cache_reads", "auto")
    new = GradientCache(tmp_path / "new", n_references, reads)
    a = by_old(cache=tmp_path / "old", steps=12, **old)
    assert_same_run(a, by_new(cache=new, steps=12))
    assert_same_run(a, by_new(cache=GradientCache(tmp_path / "old", n_references, reads), steps=12))


def test_overwrite_replaces_a_run(tmp_path: Path) -> None:
    for name, arguments in (("old", {"overwrite": True}), ("new", {"existing": "overwrite"})):
        by_new(out=tmp_path / name, seed=1)
        train = by_old if name == "old" else by_new
        train(out=tmp_path / name, **arguments)
    assert_same_run(l3d.load(tmp_path / "old"), l3d.load(tmp_path / "new"))
    assert_same_run(l3d.load(tmp_path / "old"), by_new())


def test_resume_goes_on_with_a_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        l3d.decompose(Net(5, interrupt), points(), out=tmp_path / "run", checkpoint_every=2, **QUICK)
    assert_same_run(by_old(out=tmp_path / "run", checkpoint_every=2, resume=True), by_new())


def test_resume_and_overwrite_together_are_refused(tmp_path: Path) -> None:
    """As they always were; the run in the folder stays."""
    run = by_new(out=tmp_path / "run")
    with (
        pytest.warns(DeprecationWarning, match="resume is now existing"),
        pytest.raises(ValueError, match=r"^resume: expected no overwrite beside it$"),
    ):
        l3d.decompose(Net(), points(), out=tmp_path / "run", resume=True, overwrite=True, **QUICK)
    assert_same_run(l3d.load(tmp_path / "run"), run)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"revive": "yes"}, "replacement: enabled: expected True or False, got 'yes'"),
        ({"shuffle": "yes"}, "shuffle: expected True or False, got 'yes'"),
        ({"micro_batch_size": 0}, "micro_batch_size: expected a positive whole number, got 0"),
        ({"cache_reads": "maybe"}, "cache: reads: expected auto, on or off, got 'maybe'"),
        ({"n_references": 2}, "cache: n_references and reads need the cache's folder, got none"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_values_are_refused_as_those_of_the_new_names(bad: dict[str, Any], message: str) -> None:
    with (
        pytest.warns(DeprecationWarning, match=f"{next(iter(bad))} is now"),
        pytest.raises(ValueError, match=rf"^{re.escape(message)}$"),
    ):
        l3d.decompose(Net(), points(), **QUICK, **bad)


@pytest.mark.parametrize("name", ["weight_decay", "updates", "start", "on_start", "model_name", "stepz"])
def test_names_that_never_were_or_are_gone_are_a_type_error(name: str) -> None:
    """Without a warning: nothing has their place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'"):
            l3d.decompose(Net(), points(), **QUICK, **{name: 1})


def test_the_signature_shows_the_new_names_only() -> None:
    assert not set(inspect.signature(l3d.decompose).parameters) & set(NEW_NAMES)


@pytest.mark.parametrize(
    "both",
    [
        {"overwrite": True, "existing": "resume"},
        {"recompute": True, "memory": Memory(2)},
        {"shuffle": True, "gradients": GradientOptions()},
        {"cache_reads": "on", "cache": GradientCache("store")},
    ],
    ids=lambda each: ",".join(each),
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_older_name_beside_the_new_one_is_refused(both: dict[str, Any]) -> None:
    """Neither silently wins."""
    old, new = both
    with pytest.raises(ValueError, match=f"^{old}: {new} is given too; use {new} alone"):
        l3d.decompose(Net(), points(), **{**QUICK, **both})
