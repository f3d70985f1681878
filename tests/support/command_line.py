"""Run command lines that must be refused; for tests/cli."""

import pytest

from l3d.cli.main import main


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command line that must fail with status 2 and one line; return the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if "Loading weights" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("l3d: error: ")
    return lines[0].removeprefix("l3d: error: ")
