"""Damage every file of the newest checkpoint: the one before is taken, and the run ends in the same bits."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import l3d
from l3d.storage.manifest import FILES, MANIFEST

from training_runs import assert_same_bits, train

EVERY = 4
LAST, BEFORE = "step000000012", "step000000008"
Damage = Callable[[Path, random.Random], object]


def flip(path: Path, draw: random.Random) -> None:
    """Flip one bit; of the manifest not in its white space, where that changes nothing."""
    content = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(content) if path.name != MANIFEST or not bytes([byte]).isspace()]
    content[draw.choice(places)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(1, len(content) - 2)])


def overwrite(path: Path, draw: random.Random) -> None:
    """Put zeros where a block of the disk was not written."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content) - 8)
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def swap(path: Path, draw: random.Random) -> None:
    """Swap it with another file of the checkpoint."""
    other = path.with_name(draw.choice([name for name in (*FILES, MANIFEST) if name != path.name]))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "flipped": flip,
    "truncated": truncate,
    "overwritten": overwrite,
    "swapped": swap,
    "emptied": lambda path, draw: path.write_bytes(b""),
    "the one before's": lambda path, draw: shutil.copy(path.parents[1] / BEFORE / path.name, path),
}


@pytest.fixture(scope="module")
def whole() -> l3d.Decomposition:
    return train(checkpoint_every=EVERY)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 12 of 20."""
    run = tmp_path_factory.mktemp("killed") / "run"

    class Stop(l3d.callbacks.Callback):
        def on_step(self, step: int, figures: object) -> None:
            if step == 14:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(out=run, checkpoint_every=EVERY, callbacks=[Stop()])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [BEFORE, LAST]
    return run


@pytest.mark.parametrize("times", [1, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_the_checkpoint_before_is_taken(
    name: str, damage: str, times: int, killed: Path, whole: l3d.Decomposition, tmp_path: Path
) -> None:
    """One warning names the damaged file; the run goes on from step 8, to the same bits; the damaged one is deleted."""
    draw = random.Random(f"{name} {damage}")
    for i in range(times if damage not in ("emptied", "the one before's") else 1):
        run = tmp_path / f"run{i}"
        shutil.copytree(killed, run)
        DAMAGES[damage](run / "checkpoints" / LAST / name, draw)
        with pytest.warns(UserWarning, match=f"{LAST}.*: damaged: .*; going on from the checkpoint before") as warned:
            d = train(out=run, checkpoint_every=EVERY, existing="resume")
        assert len(warned) == 1
        assert str(warned[0].message).endswith(f", {run / 'checkpoints' / BEFORE}")
        assert_same_bits(d, whole)
        assert_same_bits(l3d.load(run), whole)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step000000016", "step000000020"]
        shutil.rmtree(run)


def test_where_all_are_damaged_one_line_says_so(killed: Path, tmp_path: Path) -> None:
    """Nothing is deleted or renamed then, and nothing trained."""
    shutil.copytree(killed, tmp_path / "run")
    for name in (LAST, BEFORE):
        flip(tmp_path / "run" / "checkpoints" / name / "state.json", random.Random(0))
    with pytest.raises(ValueError, match=rf"{LAST}.state\.json: damaged: .*no older checkpoint is whole") as error:
        train(out=tmp_path / "run", checkpoint_every=EVERY, existing="resume")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [BEFORE, LAST]


def test_a_damaged_checkpoint_is_kept_until_the_next(killed: Path, tmp_path: Path) -> None:
    """A run that is killed again before it writes one does not warn again."""
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    flip(run / "checkpoints" / LAST / "state.json", random.Random(0))

    class Stop(l3d.callbacks.Callback):
        def on_step(self, step: int, figures: object) -> None:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="going on from"), pytest.raises(KeyboardInterrupt):
        train(out=run, checkpoint_every=EVERY, existing="resume", callbacks=[Stop()])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [BEFORE, f"{LAST}.damaged"]
    train(out=run, checkpoint_every=EVERY, existing="resume")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step000000016", "step000000020"]


@pytest.mark.parametrize("name", [*FILES[:3], "decomposition.json"])
def test_checkpoints_of_older_versions(name: str, killed: Path, whole: l3d.Decomposition, tmp_path: Path) -> None:
    """Without a manifest a checkpoint is taken with one warning, and one that cannot be read is not taken."""
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    for path in run.rglob(MANIFEST):
        path.unlink()
    shutil.copytree(run, tmp_path / "damaged")
    with pytest.warns(UserWarning, match=f"{LAST}: has no manifest") as warned:
        assert_same_bits(train(out=run, checkpoint_every=EVERY, existing="resume"), whole)
    assert len(warned) == 1
    truncate(tmp_path / "damaged" / "checkpoints" / LAST / name, random.Random(0))
    with pytest.warns(UserWarning, match="going on from the checkpoint before"):
        d = train(out=tmp_path / "damaged", checkpoint_every=EVERY, existing="resume")
    assert_same_bits(d, whole)
