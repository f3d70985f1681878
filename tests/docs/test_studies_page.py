"""Run every Python block of docs/studies.md in order, and its commands with few steps."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import l3d
from l3d.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "studies.md"
BLOCKS = re.findall(r"^```([\w ]+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
WITH_DATA = [text for kind, text in BLOCKS if kind == "python data"]
SHELL = [text for kind, text in BLOCKS if kind == "sh"]


def commands(text: str) -> list[list[str]]:
    lines = os.path.expandvars(text.replace("\\\n", " ")).splitlines()
    return [shlex.split(line)[1:] for line in lines]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, from an empty folder; what the page says of their results holds."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    for code in PYTHON:
        exec(compile(re.sub(r"steps=\d{4}", "steps=400", code), str(PAGE), "exec"), space)
        seen |= {name: space[name] for name in ("found", "before", "after", "far") if name in space}
    assert len(PYTHON) == 7
    assert seen["found"].share_above_random == 1.0
    assert seen["after"] < 0.6 * seen["before"]
    near, *_, far = (seen["far"].active / seen["far"].rest).median(0).values
    assert near > 3 * far
    assert (tmp_path / "merged.safetensors").is_file()


def test_pairs_isolate_the_feature_that_differs() -> None:
    """The page's pairs: one subnetwork, the circuit of the feature that differs; with samples it is another's."""
    toy = l3d.toys.make("tms")
    code = next(text for text in PYTHON if 'reference in ("pair"' in text)
    found = {}
    space = {"l3d": l3d, "torch": torch, "toy": toy, "TensorDataset": torch.utils.data.TensorDataset}
    code = code.replace("print(reference, toy", "found(reference, toy")
    exec(code, space | {"found": found.__setitem__})
    assert int(found["pair"].argmax()) == 3
    assert float(found["pair"][3]) > 0.85
    assert float(found["pair"].sort().values[-2]) < 0.3
    assert float(found["sample"][3]) < 0.3


@pytest.mark.data
def test_pairs_of_texts_isolate_a_behaviour(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subnetworks of she/he pairs swing the pronoun by nats, and far beyond those of the ordinary reference."""
    monkeypatch.setenv("L3D_DATA", str(data_dir))
    space: dict[str, Any] = {}
    exec(WITH_DATA[0].replace("steps=200", "steps=60"), space)
    assert space["swing"]["pair"] > 4
    assert space["swing"]["pair"] > 3 * space["swing"]["sample"]


@pytest.mark.data
@pytest.mark.parametrize("text", SHELL, ids=["intervene", "sweep"])
def test_commands_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    """With ten steps each, one after another; each leaves the files that the page names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L3D_DATA", str(data_dir))
    for arguments in commands(text):
        fewer = ["--rows", "32", "--samples", "4"] if arguments[0] == "intervene" else ["--steps", "10"]
        fewer += ["--evaluate_rows", "64"] if arguments[0] != "intervene" else []
        assert main([*arguments, *fewer]) == 0
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"interventions.json", "interventions.svg"} <= names or {"table.md", "sweep.json", "error-kept.svg"} <= names
