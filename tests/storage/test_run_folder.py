"""Write a run folder's files whole or not at all; name foreign and broken folders in errors."""

import json
import math
from pathlib import Path

import pytest

from l3d.storage import run_folder


def test_metrics_come_back_as_they_were(tmp_path: Path) -> None:
    """What is written is read again, figures that are not finite as null, and no other file is left."""
    metrics = {"error": 0.25, "rates": [0.5, math.nan], "seconds": math.inf, "n_rows": 3}
    path = run_folder.write_metrics(tmp_path, metrics)
    assert run_folder.read_metrics(tmp_path) == {
        "error": 0.25,
        "rates": [0.5, None],
        "seconds": None,
        "n_rows": 3,
    }
    assert json.loads(path.read_text())["seconds"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """What cannot be written as JSON changes nothing."""
    run_folder.write_metrics(tmp_path, {"error": 0.25})
    with pytest.raises(TypeError):
        run_folder.write_metrics(tmp_path, {"error": object()})
    assert run_folder.read_metrics(tmp_path) == {"error": 0.25}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("text, message", [("{", "not readable as JSON"), ("[1]", "expected a JSON object, got list")])
def test_broken_metrics_are_named(tmp_path: Path, text: str, message: str) -> None:
    """A metrics.json that is none is refused with its path; a missing one is just empty."""
    assert run_folder.read_metrics(tmp_path) == {}
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=rf"metrics\.json: {message}"):
        run_folder.read_metrics(tmp_path)


@pytest.mark.parametrize("command, settings", [("toy", {"name": "tms"}), ("decompose", {"model": "hf:a"})])
def test_the_configuration_tells_its_command(tmp_path: Path, command: str, settings: dict[str, str]) -> None:
    """The command that made a run is known from its configuration."""
    run_folder.write_config(tmp_path, command, settings)
    assert run_folder.read_command(tmp_path) == command


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    """A missing folder, one without a configuration, and ones with a broken or foreign one are told apart."""
    with pytest.raises(FileNotFoundError, match="nothing: no such run folder"):
        run_folder.read_command(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"not a run folder of l3d: it has no config\.yaml"):
        run_folder.read_command(tmp_path)
    for text, message in {
        "a: [": r"config\.yaml: not readable as YAML",
        "a: 1": "names neither a toy nor a model",
        "- 1": "names neither a toy nor a model",
    }.items():
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=message) as refusal:
            run_folder.read_command(tmp_path)
        assert "\n" not in str(refusal.value)


def test_a_copy_is_whole_and_never_overwrites(tmp_path: Path) -> None:
    """A copy has the run's files, leaves the run alone, and refuses a folder that holds anything."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    (run / "inner").mkdir(parents=True)
    (run / "inner" / "file").write_text("x")
    run_folder.write_config(run, "toy", {"name": "tms"})
    run_folder.copy_run(run, copy)
    assert sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*")) == [
        "config.yaml",
        "inner",
        "inner/file",
    ]
    (copy / "inner" / "file").write_text("y")
    with pytest.raises(ValueError, match="not an empty folder"):
        run_folder.copy_run(run, copy)
    with pytest.raises(ValueError, match="lies inside the run folder"):
        run_folder.copy_run(run, run / "copy")
    assert (run / "inner" / "file").read_text() == "x"
    assert (copy / "inner" / "file").read_text() == "y"
