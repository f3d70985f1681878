"""Write the site's generated pages: every public name and command, the table of compiled kernels, and the notebooks.

MkDocs runs this file as a hook (`hooks:` in mkdocs.yml). It adds pages to the build and writes nothing into docs/.
Python entries are `::: name` lines, which mkdocstrings fills from the docstrings without importing the code. Pages of
commands walk the parser of `l3d.cli.parser`, so they list exactly the options that the command line takes.
"""

import argparse
import base64
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import getdoc, isfunction, ismodule
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
sys.path.insert(0, str(ROOT))


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the files of the site (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leave out of a fence what only the tests read, such as `sh no-run` (an event of MkDocs)."""
    return re.sub(r"^( *```\w+) [\w-]+$", r"\1", markdown, flags=re.M)


def pages() -> dict[str, str | bytes]:
    """Return every generated page, by its path in the site's sources."""
    written: dict[str, str | bytes] = {}
    for package in ("l3d", "l3d_kernels"):
        module = import_module(package)
        written[f"reference/{package}.md"] = python_page(module)
        for name in module.__all__:
            if ismodule(getattr(module, name)):
                written[f"reference/{package}.{name}.md"] = python_page(getattr(module, name))
    written["reference/commands.md"] = command_page()
    written["benchmarks/forms.md"] = import_module("bench.gpu.forms").page()
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        written |= notebook_pages(notebook)
    return written


class Docstrings(griffe.Extension):
    """Show docstrings and defaults as they are once the code has run (an extension of Griffe, which runs nothing)."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fill in a docstring that is completed on import, and keep Markdown from reading marks into it."""
        if obj.docstring is None:
            return
        if "{options}" in obj.docstring.value:
            obj.docstring.value = getdoc(getattr(import_module(obj.module.path), obj.name)) or ""
        obj.docstring.value = plain(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Show a field's comment as its text, and the default of one that is declared as option(default, ...)."""
        comment = (
            re.search(r"  # (?!noqa|fmt|type)(.+)", attr.lines[-1]) if attr.lines and attr.docstring is None else None
        )
        if comment is not None and attr.parent is not None and attr.parent.is_class:
            attr.docstring = griffe.Docstring(plain(comment[1]), parent=attr)
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "option":
            attr.value = attr.value.arguments[0]


# --- Python -------------------------------------------------------------------------------------------------------


def public_names(module: ModuleType) -> list[str]:
    """Return a module's `__all__`, or else the classes and functions that it defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted((name for name in own if not name.startswith("_")), key=str.lower)


def first_sentence(name: str) -> str:
    """Return the first sentence of the docstring at a dotted path, for a table."""
    package, *rest = name.split(".")
    item: Any = griffe_package(package)
    for part in rest:
        item = item[part]
    if item.docstring is None:
        return f"`{item.annotation}`" if item.is_attribute else ""
    text = item.docstring.value
    return plain(text.split("\n\n")[0]).replace("\n", " ").replace("|", r"\|")


@cache
def griffe_package(name: str) -> Any:
    """Read a package's docstrings without importing it."""
    return griffe.load(name, search_paths=[ROOT], resolve_aliases=True)


def plain(text: str) -> str:
    """Write a docstring so that Markdown takes <a, b> for no tag, *.weight for no emphasis and >>> for code.

    >>> plain("|<Vin_k, g_s>| < 1, of '*.weight' and `*.bias`")
    "|⟨Vin_k, g_s⟩| < 1, of '\\\\*.weight' and `*.bias`"
    """
    text = re.sub(r"<([^<>\n]{1,40}, ?[^<>\n]{1,40})>", r"⟨\1⟩", text)
    parts = re.split(r"^(>>> (?:.+\n?)+)", text, flags=re.M)  # prose, example, prose, ...
    parts[::2] = [re.sub(r"(`[^`]*`)|(?<=\S)\*|(?<=\s)\*(?=\S)", escaped, prose) for prose in parts[::2]]
    parts[1::2] = [f"```pycon\n{example.rstrip()}\n```\n" for example in parts[1::2]]
    return "".join(parts)


def escaped(found: re.Match[str]) -> str:
    """Escape an asterisk, and leave code between backticks alone."""
    return found[1] or r"\*"


def python_page(module: ModuleType) -> str:
    """Write a module's page: a table of its public names, then an entry for each."""
    rows, entries = [], []
    for name in public_names(module):
        item, path = getattr(module, name), f"{module.__name__}.{name}"
        target = f"{path}.md" if ismodule(item) else f"#{path}"
        rows.append(f"| [`{name}`]({target}) | {first_sentence(path)} |")
        if not ismodule(item):
            entries.append(f"::: {path}\n    options:\n      heading: {path}\n      toc_label: {name}\n")
    table = "\n".join(["| name | what it does |", "|---|---|", *rows])
    summary = plain((getdoc(module) or "").split("\n\n")[0])
    return f"# {module.__name__}\n\n{summary}\n\n{table}\n\n{for_all(module)}\n\n" + "\n".join(entries)


def for_all(module: ModuleType) -> str:
    """Return what holds for all functions of a package: its files' docstrings; nothing if some lie deeper."""
    homes = {item.__module__ for item in (getattr(module, name) for name in public_names(module)) if isfunction(item)}
    if any(home.rpartition(".")[0] != module.__name__ for home in homes):
        return ""
    return "\n\n".join(plain(getdoc(import_module(home)) or "") for home in sorted(homes))


# --- the command line ---------------------------------------------------------------------------------------------


def subparsers() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Return the command line's commands: name -> (summary, parser)."""
    from l3d.cli.parser import _parser

    action = next(each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {name: (summaries.get(name, ""), parser) for name, parser in action.choices.items()}


def cell(text: str) -> str:
    """Write a text so that Markdown shows it as it is, inside a table's cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|*_\[\]`\\])", r"\\\1", text)


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Yield a parser's groups that show an option: (title, options)."""
    for group in parser._action_groups:
        shown = [each for each in group._group_actions if each.help != argparse.SUPPRESS]
        if shown:
            yield group.title or "", shown


def long_name(action: argparse.Action) -> str:
    """Return how an option is spelt in full, or the name of a positional argument."""
    return next((each for each in action.option_strings if each[:2] == "--" and each[-1] != "+"), action.dest.upper())


def option_row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Write an option's row: how it is spelt, what it takes, what it does."""
    name = long_name(action)
    metavar = action.metavar if action.nargs != 0 and action.option_strings else None
    values = " ".join(metavar) if isinstance(metavar, tuple) else metavar or ""
    values = re.sub(r"[\x00-\x1f]", "", values)  # jsonargparse hides a backspace in one
    gap = "" if not values or values.startswith("[=") else " "
    spelt = f"`{name}{gap}{values}`".replace("|", r"\|")
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"| {spelt} | {cell(text)} |"


def command_page() -> str:
    """Write the page of all commands, with every option."""
    parts = ["# Command line\n", "`l3d COMMAND`, or `python -m l3d COMMAND`. Every command takes `--help`.\n"]
    commands = subparsers()
    parts.append("| command | what it does |\n|---|---|")
    parts += [f"| [`l3d {name}`](#l3d-{name}) | {cell(summary)} |" for name, (summary, _) in commands.items()]
    for name, (_, parser) in commands.items():
        parts.append(f"\n## l3d {name}\n\n{cell(parser.description or '')}\n")
        parts.append(f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```\n")
        for title, actions in options(parser):
            parts.append(f"| {cell(title)} | |\n|---|---|")
            parts += [option_row(parser, action) for action in actions]
            parts.append("")
        examples = (parser.epilog or "").partition("\n")[2]
        if examples:
            lines = "\n".join(line.removeprefix("  ") for line in examples.splitlines())
            parts.append(f"```sh\n{lines}\n```\n")
    return "\n".join(parts) + "\n"


# --- notebooks ----------------------------------------------------------------------------------------------------


def notebook_pages(path: Path) -> dict[str, str | bytes]:
    """Write a notebook as a page, with the outputs that are stored in it, and its pictures as files."""
    name = f"notebooks/{path.stem}"
    parts: list[str] = []
    written: dict[str, str | bytes] = {}
    for cell_ in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell_["source"])
        if cell_["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell_["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                picture = f"{name}-{len(written)}.png"
                written[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{text or 'a plot'}]({Path(picture).name})")
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f"[Download this notebook]({path.name})")
    return written | {f"{name}.md": "\n\n".join(parts) + "\n"}
