"""Make decompose's signature, its docstring and --help from the groups of options, each field of which is explained."""

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

import pytest

import l3d
from l3d.cli import options as cli
from l3d.cli.main import main
from l3d.training import options
from l3d.training.options import (
    PRESETS,
    GradientCache,
    GradientOptions,
    Learning,
    Machine,
    Memory,
    Preset,
    Replacement,
    Training,
    explanations,
)

ARGUMENTS = (Learning, Training, Machine)  # groups whose fields are arguments of decompose
OBJECTS = {"cache": GradientCache, "memory": Memory, "gradients": GradientOptions}  # groups that are one argument
OWN = {"model", "data", "out", "cache", "memory", "callbacks", "existing", "gradients"}
OF_THE_COMMAND_LINE = (
    cli.Source, cli.Results, cli.Control, cli.Toy, cli.Sweep, cli.ExistingRun, cli.RunCopy, cli.Reloaded,
    cli.Intervention, cli.Paper,
)  # fmt: skip


def unspaced(text: str) -> str:
    """Return a text without its spaces, which line breaks differ in."""
    return "".join(text.split())


@pytest.mark.parametrize(
    "group", [*ARGUMENTS, *OBJECTS.values(), Replacement, Preset, *OF_THE_COMMAND_LINE], ids=lambda each: each.__name__
)
def test_every_field_has_an_explanation(group: type) -> None:
    """And every group a docstring of its own, not the signature that a dataclass makes."""
    found = explanations(group)
    assert list(found) == [each.name for each in fields(group)]  # type: ignore[arg-type]
    assert all(text.endswith(".") for text in found.values())
    assert group.__doc__
    assert not group.__doc__.startswith(f"{group.__name__}(")


def test_every_group_is_looked_at() -> None:
    """A group that is added to the two files of options is added above."""
    looked_at = {*ARGUMENTS, *OBJECTS.values(), Replacement, Preset, *OF_THE_COMMAND_LINE}
    there = {
        each
        for module in (options, cli)
        for each in vars(module).values()
        if inspect.isclass(each) and each.__module__ == module.__name__ and hasattr(each, "__dataclass_fields__")
    }
    assert there == looked_at


def test_decompose_s_parameters_are_the_fields_of_the_groups() -> None:
    """With equal defaults; few enough to be read."""
    parameters = inspect.signature(l3d.decompose).parameters
    declared = {each.name: each.default for group in ARGUMENTS for each in fields(group)}
    assert set(parameters) - OWN == set(declared)
    assert set(parameters) >= OWN
    assert {name: parameters[name].default for name in declared} == declared
    assert len(parameters) <= 26
    groups: dict[str, Any] = {name: parameters[name].default for name in OBJECTS}
    assert groups == dict.fromkeys(OBJECTS)


def test_the_docstring_holds_each_explanation() -> None:
    """In the words of Python: None for what a configuration file writes as null."""
    text = l3d.decompose.__doc__ or ""
    assert "{options}" not in text
    for group in ARGUMENTS:
        for name, explanation in explanations(group).items():
            assert unspaced(f"\n{name}: {explanation.replace('null:', 'None:')}") in unspaced(text)
    named = {each.name for group in ARGUMENTS for each in fields(group)}
    assert set(re.findall(r"(?m)^    (\w+): ", text)) == OWN | named
    assert max(map(len, text.splitlines())) <= 120


def test_help_shows_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`l3d decompose --help` shows the values and the explanation, without its sentences on Python alone."""
    assert main(["decompose", "--help"]) == 0
    text = re.sub(r"(--[\w.]+),--[\w.]+\+", r"\1", unspaced(capsys.readouterr().out))  # a list's other name
    named = [("", group) for group in ARGUMENTS] + [(f"{name}.", group) for name, group in OBJECTS.items()]
    for prefix, group in named:
        found = explanations(group)
        for each in fields(group):
            explanation = found[each.name].partition(" In Python also")[0]
            values = each.metadata["values"]
            assert unspaced(f"--{prefix}{each.name} {values}") in text
            assert unspaced(explanation) in text
    assert "--replacement.enabled" in text
    assert unspaced(explanations(Replacement)["enabled"]) in text
    assert "InPythonalso" not in text


def test_defaults_of_the_command_line_are_those_of_the_fields() -> None:
    for each in cli.DECOMPOSE:
        assert each.default == inspect.signature(l3d.decompose).parameters[each.name].default
    for prefix, group in OBJECTS.items():
        own = {option.name: option.default for option in (*cli.MEMORY, *cli.CHOSEN_GRADIENTS)}
        assert {f"{prefix}.{each.name}": each.default for each in fields(group)}.items() <= own.items()


def test_groups_and_presets_cannot_be_changed() -> None:
    """A run's options are the same from its start to its end; a preset of one's own is a copy."""
    for group in (*OBJECTS.values(), Replacement):
        made = group()
        for each in fields(group):
            assert each.default is not MISSING
            with pytest.raises(AttributeError):
                setattr(made, each.name, each.default)
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["default"]  # type: ignore[index]
    assert {name: preset.name for name, preset in PRESETS.items()} == {"default": "default", "published": "published"}
