"""Compare the versions that pyproject.toml allows with those that are tested, and with those that are installed."""

import contextlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINTERS = ("ruff", "mypy", "import-linter")  # held to one series, and no part of what runs


def least_versions() -> dict[str, str]:
    """Return the least version of every package that pyproject.toml names outside `docs`, by its name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    listed = listed[: listed.index("docs = [")] + listed[listed.index("test = [") :]
    found = re.findall(r'"([A-Za-z0-9_-]+)(?:\[\w+\])?>=([0-9.]+)', listed)
    return {name: least for name, least in found if name not in LINTERS}


def held_versions() -> dict[str, str]:
    """Return the versions that the Makefile and constraints-oldest.txt hold packages to."""
    rule = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ntest-oldest:")[2].partition("\n\n")[0]
    lines = re.findall(r"=(\w+==[0-9.]+)", rule)
    lines += (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def numbers(text: str) -> tuple[int, ...]:
    """Read a version, without the zeros at its end and a local part."""
    found = [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def test_the_oldest_versions_are_those_of_the_bounds() -> None:
    """`make test-oldest` holds every package of pyproject.toml to the least version that it allows."""
    least, held = least_versions(), held_versions()
    assert len(least) > 15
    assert list(held) == list(least)
    assert {name: numbers(each) for name, each in held.items()} == {name: numbers(each) for name, each in least.items()}


def test_what_is_installed_is_allowed() -> None:
    """In every environment of the Makefile: the bounds hold, or the package is absent."""
    for name, least in least_versions().items():
        with contextlib.suppress(PackageNotFoundError):
            assert numbers(version(name)) >= numbers(least), name
