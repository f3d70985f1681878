"""Run every Python block of docs/tour.md, and its commands with fewer steps."""

import os
import re
import shlex
from pathlib import Path

import pytest

from l3d.cli.main import main

BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (Path(__file__).parents[2] / "docs" / "tour.md").read_text(encoding="utf-8"), re.S | re.M
)
COMMANDS = [text.replace("\\\n", " ").strip() for language, text in BLOCKS if language == "sh"]


def test_python_runs_and_moves_its_own_samples_most() -> None:
    """The blocks run one after another, and what the last one prints is the several times that the page says."""
    space: dict = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "docs/tour.md", "exec"), space)
    ratio = space["moved"][space["own"]].mean() / space["moved"][~space["own"]].mean()
    assert float(ratio) > 2


@pytest.mark.data
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[1:3]))
def test_command_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    """Each command runs to its end with ten steps and leaves a report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L3D_DATA", str(data_dir))
    arguments = shlex.split(os.path.expandvars(command))[1:]
    assert main([*arguments, "--steps", "10", "--evaluate_rows", "32", "--describe", "16"]) == 0
    assert (tmp_path / arguments[arguments.index("--out") + 1] / "report.html").is_file()
