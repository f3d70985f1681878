"""What the command line `l3d` accepts, what its --help says, and how it explains a value that it refuses."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from l3d.cli import options
from l3d.cli.options import Option, Whole, options_of, placed
from l3d.storage.schema import one_line
from l3d.storage.yaml_text import MOST_BYTES, in_words, load_yaml

_LOADER = "l3d-yaml"
_SLICE = re.compile(r"-?\d*:-?\d*")
_DESCRIPTION = """\
Decompose a neural network in parameter space into low-rank subnetworks, each active on few inputs
(local loss landscape decomposition)."""
_EPILOG = """\
start with:       l3d toy tms
options of each:  l3d COMMAND --help
after an error:   L3D_DEBUG=1 l3d ... shows where it came from"""
_CONFIG = "Read options from a YAML file; what stands after it on the command line overrides it."


class Command(NamedTuple):
    """One subcommand, as its --help shows it."""

    summary: str
    usage: str
    description: str
    groups: dict[str, Iterable[Option]]
    examples: str


TRAINED = {
    "what is learned": options.LEARNED,
    "training": (*options.TRAINING, *options.REPLACEMENT, *options.CHOSEN_GRADIENTS),
    "machine": options.MACHINE,
}
RUN, COPY = options_of(options.ExistingRun), options_of(options.RunCopy)

COMMANDS = {
    "toy": Command(
        "decompose a toy model whose true parts are known",
        "l3d toy NAME [options]",
        """\
Make a toy model whose true parts are known, decompose it, and say how well they were found: mmcs is the
mean over the true features of the largest |cosine| with a subnetwork; 1 is perfect. Where an option is not
given, the toy's own setting holds. NAME all runs every toy over several seeds and writes a table, with the
published figures beside the measured ones, to DIR/table.md and DIR/results.json.""",
        {
            "toy": (*options_of(options.Toy), *options.CONTROL),
            **{title: options.unset(group) for title, group in TRAINED.items()},
            "results": placed([each for each in options.RESULTS if each.name != "dry_run"], "runs/NAME"),
        },
        """\
examples:
  l3d toy tms
  l3d toy tms --preset published --out runs/tms-published
  l3d toy high_rank --rank 5 --out runs/groups
  l3d toy tms --steps 200 --seed 3 --out runs/quick --overwrite
  l3d toy all --seeds 10 --out runs/toys""",
    ),
    "decompose": Command(
        "decompose your model on your data",
        "l3d decompose --model SPEC --data SPEC [options]",
        """\
Decompose a model's parameters on data: learn directions in parameter space of which few are needed to
rebuild each sample's gradient of the divergence between its output and a reference output.
The error reported is sum ‖g - ĝ‖² / sum ‖g‖²: 0 is perfect, 1 is no better than nothing.""",
        {
            "model and data": (*options.SOURCE, *options.CONTROL),
            **TRAINED,
            "memory": options.MEMORY,
            "results": placed(options.RESULTS, "runs/decompose"),
        },
        """\
examples:
  l3d decompose --model hf:stories260k --data text:stories.txt --params 'model.layers.2.self_attn.*' \\
      --divergence kl --n_subnetworks 100 --rank 6 --steps 2000 --held_out 200 --out runs/attention
  l3d decompose --model python:l3d.zoo:resnet20 --model_args.weights resnet20.safetensors \\
      --data npz:cifar10.npz --data_args.mean '[.485,.456,.406]' --data_args.std '[.229,.224,.225]' \\
      --params 'layer3.*.conv*' --divergence kl --out runs/resnet
  l3d decompose --config runs/attention/config.yaml --seed 1 --out runs/attention-1
  l3d decompose --config runs/attention/config.yaml --batch_size 64 --dry_run
  torchrun --nproc_per_node 2 -m l3d decompose --config runs/attention/config.yaml --out runs/attention-2""",
    ),
    "evaluate": Command(
        "evaluate a decomposition again, also on other data",
        "l3d evaluate RUN [options]",
        """\
Load a run's model and data again, evaluate its decomposition, and put the figures into RUN/metrics.json.
This runs the code that RUN/config.yaml names: only evaluate run folders you trust.""",
        {
            "run": RUN,
            "instead of the run's own": (
                *options.unset(options_of(options.Source, only=("data", "data_args"))),
                *options.unset(options_of(options.Results, only=("evaluate_rows", "describe"))),
                *options_of(options.Reloaded),
            ),
            "results": COPY,
        },
        """\
examples:
  l3d evaluate runs/attention
  l3d evaluate runs/attention --data text:other.txt --data_args.length 16 --out runs/attention-other
  l3d evaluate runs/mine --data python:mine:data --data_args.rows=-200: --out runs/mine-last-200-rows""",
    ),
    "resume": Command(
        "go on with an interrupted run from its last checkpoint",
        "l3d resume RUN [options]",
        """\
Go on with an interrupted `l3d toy` or `l3d decompose` from its last checkpoint, with its own settings.
This runs the code that RUN/config.yaml names: only resume run folders you trust.""",
        {"run": RUN, "results": COPY},
        "example:\n  l3d resume runs/attention",
    ),
    "sweep": Command(
        "many runs over k, K, rank and seed",
        "l3d sweep --over.NAME '[VALUE,..]' (--toy NAME | --model SPEC --data SPEC) [options]",
        """\
Decompose one model many times: every combination of the values given by --over. Each is a run folder in
DIR/runs; DIR/table.md, sweep.json and error-kept.svg say what they come to. In the same --out finished
runs are kept, an interrupted one goes on, and values may be added. Runs that differ in the seed alone are
compared: alike is the mean |cosine| of subnetworks matched one to one.""",
        {
            "sweep": options_of(options.Sweep),
            "model and data": options.SOURCE,
            **{title: options.unset(group) for title, group in TRAINED.items()},
            "results": (
                *options_of(options.Results, only=("evaluate_rows",)),
                *placed(options_of(options.Paper, only=("out",)), "runs/sweep"),
            ),
        },
        """\
examples:
  l3d sweep --toy tms --over.k '[.05,.1,.2]' --over.seed '[0,1,2]' --random_weights
  l3d sweep --model hf:stories260k --data text:stories.txt --params 'model.layers.2.self_attn.*' \\
      --divergence kl --steps 500 --over.n_subnetworks '[50,100]' --over.rank '[4,auto]' --out runs/sizes""",
    ),
    "intervene": Command(
        "measure what moving along each subnetwork changes",
        "l3d intervene RUN [options]",
        """\
For each subnetwork: how far outputs move with the weights along it, on samples it is active for and on the
rest, over a sweep of distances; and the same for a random direction of its norm and rank. Writes
RUN/interventions.json and a plot, and the report again. This runs the code that RUN/config.yaml names.""",
        {
            "run": RUN,
            "what is measured": (
                *options_of(options.Intervention),
                *options_of(options.Reloaded, only=("any_weights",)),
            ),
            "results": COPY,
        },
        """\
examples:
  l3d intervene runs/attention
  l3d intervene runs/attention --control runs/attention-shuffled --samples 64""",
    ),
    "paper": Command(
        "make the paper's figures again",
        "l3d paper NAME [options]",
        """\
Make the figures of one of the paper's toy studies again: SVG and PNG files, figures.json with the numbers in
them, and index.html, a page of them all.""",
        {"figures": placed(options_of(options.Paper), "runs/paper-NAME")},
        "examples:\n  l3d paper tms\n  l3d paper squared --seed 1 --out runs/squared-1",
    ),
    "report": Command(
        "write a run's report.html again",
        "l3d report RUN [options]",
        "Write RUN/report.html again from what the run folder holds; neither model nor data are needed.",
        {"run": RUN, "results": COPY},
        "example:\n  l3d report runs/attention",
    ),
}


class _Help(DefaultHelpFormatter):
    """Keep the line breaks of descriptions and epilogs, and show values instead of Python types."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help or ""


class _Parser(ArgumentParser):
    """A parser whose configuration files are UTF-8 on every machine, and read as `load_yaml` reads."""

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Check a file and parse what it holds. Raises ValueError, naming the file, where it is no list of options."""
        try:
            if Path(path).stat().st_size > MOST_BYTES:
                raise yaml.YAMLError(f"larger than {MOST_BYTES:,} bytes")
            text = Path(path).read_text(encoding="utf-8-sig")
            found = load_yaml(text)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected text in UTF-8 ({error.reason} at byte {error.start})") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path}: Problems parsing config: {in_words(error)}") from error
        strange = [key for key in found if not isinstance(key, str)] if isinstance(found, dict) else []
        if strange or not isinstance(found, dict):
            kinds = {type(None): "nothing", str: "a text", list: "a list"}
            got = f"the name {strange[0]!r}" if strange else kinds.get(type(found), repr(found))
            raise ValueError(f"{path}: expected lines such as 'steps: 500', got {got}")
        return self.parse_string(text, str(path), *args, **kwargs)


_new_parser = partial(
    _Parser, prog="l3d", formatter_class=_Help, exit_on_error=False, parser_mode=_LOADER, default_env=False
)


def read_settings(command: str, run: Path) -> dict[str, Any]:
    """Read and check RUN/config.yaml as `l3d COMMAND --config` would."""
    path = run / "config.yaml"
    try:
        return parse([command, "--config", str(path)])[command]
    except argparse.ArgumentError as error:
        raise ValueError(f"{path}: {one_line(explain(error))}") from error


def parse(arguments: list[str]) -> dict[str, Any]:
    arguments = ["--dry_run" if argument == "--dry-run" else argument for argument in arguments]
    parsed = _parser().parse_args(arguments).as_dict()
    parsed[parsed["command"]].pop("config", None)
    return _plain(parsed)


def _plain(value: Any) -> Any:
    """Turn jsonargparse's own kinds of numbers and texts into Python's, which YAML and everything else can write."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (int, float, str):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def _parser() -> ArgumentParser:
    jsonargparse.set_loader(_LOADER, _load_value, exceptions=(yaml.YAMLError,))
    parser = _new_parser(usage="l3d COMMAND ...", description=_DESCRIPTION, epilog=_EPILOG)
    added = parser.add_subcommands(dest="command", required=True, title="commands")
    for name, command in COMMANDS.items():
        subparser = _new_parser(usage=command.usage, description=command.description, epilog=command.examples)
        subparser.add_argument("--config", action=ActionConfigFile, metavar="FILE", help=_CONFIG)
        for title, group in command.groups.items():
            _add(subparser.add_argument_group(title), group)
        added.add_subcommand(name, subparser, help=command.summary)
    return parser


def _add(group: Any, added: Iterable[Option]) -> None:
    for option in added:
        text = option.help.replace("%", "%%")
        if option.positional:
            group.add_argument(option.name, type=option.type, metavar=option.values, help=text)
        elif option.type is bool:
            group.add_argument(f"--{option.name}", action="store_true", help=text)
        else:
            text += "" if option.default in (None, {}) else " Default: %(default)s."
            name, kind = f"--{option.name}", option.type
            group.add_argument(name, type=kind, default=option.default, metavar=option.values, help=text)


def _load_value(text: str) -> Any:
    """Read an option's value as YAML, except for what YAML would mistake: slices (-200: is a mapping to it), globs."""
    stripped = text.strip()
    if _SLICE.fullmatch(stripped):
        return stripped
    value = load_yaml(text)
    if isinstance(value, dict) and value and all(each is None for each in value.values()):
        words = [word.strip() for word in stripped.strip("{}").split(",")]
        if stripped.rstrip(":") in value or words == list(value):  # 'model.layers:' and '{a,b}' are texts
            return text
    return text if value is None and stripped not in ("null", "~", "") else value


def explain(error: argparse.ArgumentError) -> str:
    """Put a message of jsonargparse, which can fill a screen, into one line that says what was expected."""
    message = str(error).removeprefix("argument command: ")
    if message.startswith('expected "command" to be one of'):
        return f"expected one of {', '.join(COMMANDS)}"
    if message.startswith("Unexpected config:"):
        return f"--config: expected a YAML file, got {message.partition(':')[2].strip()!r}"
    missing = re.search(r"arguments are required: (?:\w+\.)?(\w+)$", message)
    if missing:
        return f"{missing[1].upper()} is required"
    refused = re.match(rf'Parser key "(?:(?:{"|".join(COMMANDS)})\.)?([\w.]+)":\s*(.*)', message, re.DOTALL)
    if refused is None:
        return message
    name, reason = refused.groups()
    expected = _expected(name)
    given = re.findall(r"(?:Given|Got) value: (.*)", reason) or re.findall(r"(\S+) does not (?:conform|match)", reason)
    if expected is None or not given:
        return f"--{name}: {reason}"
    return f"--{name}: expected {expected}, got {given[-1]}"


def _expected(name: str) -> str | None:
    """Say what values an option takes; None for an unknown one."""
    every = (each for command in COMMANDS.values() for group in command.groups.values() for each in group)
    found = next((each for each in every if each.name == name), None)
    if found is None:
        return None
    kinds = [kind for kind in get_args(found.type) if kind is not type(None)]
    kind = kinds[0] if len(kinds) == 1 and type(None) in get_args(found.type) else found.type
    numbers = {PositiveInt: "a whole number above 0", NonNegativeInt: "a whole number from 0", Whole: "a whole number"}
    return {**numbers, PositiveFloat: "a number above 0"}.get(kind, found.values)
