"""Declare the options of the command line; those that `l3d.decompose` has too are in `l3d.training.options`.

Only data, and quick to import: importing this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from jsonargparse.typing import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
    restricted_string_type,
)

from l3d.training.options import (
    GradientCache,
    GradientOptions,
    Learning,
    Machine,
    Memory,
    Replacement,
    Training,
    explanations,
    option,
)

POSITIONAL = {"positional": True}
Whole = restricted_number_type("Whole", int, (">=", -(2**63)))  # int itself would read 1:30 as 90


class Option(NamedTuple):
    """One option of the command line, which is also a key of a configuration file."""

    name: str
    type: Any
    default: Any
    values: str  # in the help, and where a value is refused: "expected VALUES"
    help: str
    positional: bool = False


@dataclass(frozen=True)
class Source:
    """Where the model and the data come from."""

    model: str | None = option(None, "SPEC")
    """hf:DIR_OR_ID, a causal language model of transformers, or python:pkg.module:factory, a function that returns a
    torch module. Loading runs code: name only what you trust. Required."""
    model_args: dict[str, Any] = option({}, "VALUE")
    """Arguments of the loader, each as --model_args.KEY VALUE. hf: dtype, revision, ...; python: the factory's."""
    data: str | None = option(None, "SPEC")
    """text:FILE_OR_FOLDER, dataset:FOLDER_OR_FILE_OR_ID (Hugging Face), tokens:FILE (ids, .npy or .npz), npz:FILE, or
    python:pkg.module:factory, a function that returns a tensor, Dataset or iterable. Required."""
    data_args: dict[str, Any] = option({}, "VALUE")
    """Arguments of the loader, each as --data_args.KEY VALUE. text: length (tokens a row, 16), separator
    ('<|endoftext|>'), start (every|first window of a text), short (drop|pad: tails), tokenizer, max_rows. dataset: the
    same without separator, and split (train), column (text), name, revision. tokens: key, max_rows. npz: key (images),
    size (pixels to resize to), mean, std (per channel: '[0.5,0.5,0.5]'), max_rows. All: rows, a slice
    (--data_args.rows=-200: is the last 200)."""
    held_out: int = option(0, "N", least=0)
    """Keep the last N rows out of training and report the error on them. 0: off."""


@dataclass(frozen=True)
class Results:
    """What is made of a run once it has been trained."""

    evaluate_rows: int = option(1000, "N", least=1)
    """Evaluate on at most this many of the training rows, evenly spaced."""
    describe: int | None = option(None, "N", least=0)
    """Look at N rows of the training data for what each subnetwork acts on and moves, for the report's cards. 0: off.
    null: a twentieth of the rows trained on, within 256 and 1000."""
    log: Literal["tensorboard", "wandb"] | None = option(None, "tensorboard|wandb")
    """Follow the run there: TensorBoard writes to DIR/tensorboard; Weights & Biases is set up by its own environment
    variables, as WANDB_MODE=offline."""
    out: str | None = option(None, "DIR")
    """Run folder to make: config.yaml, decomposition, checkpoints, metrics.json, report.html."""
    overwrite: bool = option(False, "")
    """Replace the run folder if it exists."""
    dry_run: bool = option(False, "")
    """Only say what the run would take: parameters, bytes, time of a step, each tensor's path. Writes nothing."""


@dataclass(frozen=True)
class Control:
    """A run whose model has learned nothing."""

    random_weights: bool = option(False, "")
    """A control: decompose the model with the chosen weights redrawn, normal with their mean and deviation."""
    weights_seed: int | None = option(None, "SEED")
    """Seed that --random_weights redraws with. null: that of --seed."""


@dataclass(frozen=True)
class Toy:
    """Which toy."""

    name: str = option(None, "NAME", **POSITIONAL)
    """The toy model: tms, tms_parallel, tms_40_10, tmcs, high_rank, squared; or all, the recovery suite."""
    toy_seed: int | None = option(None, "SEED")
    """Seed of the toy's network and points. null: that of --seed."""
    seeds: int | None = option(None, "N", least=1)
    """all: seeds to run, from --seed on; each is another set of toy networks. null: 10."""
    readme: str | None = option(None, "FILE")
    """all: write the table into this file too, between the lines <!-- toys --> and <!-- /toys -->."""


@dataclass(frozen=True)
class Sweep:
    """Which runs."""

    over: dict[str, list[Any]] = option({}, "[VALUE,..]")
    """What to sweep over, each as --over.NAME '[VALUE,VALUE]': k, n_subnetworks, rank, seed; every combination
    is run."""
    toy: str | None = option(None, "NAME")
    """In the place of --model and --data: a toy, with its own settings where none are given."""
    random_weights: bool = option(False, "")
    """Beside each run a control: the same with the decomposed weights redrawn, normal with their mean and deviation."""


@dataclass(frozen=True)
class ExistingRun:
    """The run to work on."""

    run: str = option(None, "RUN", **POSITIONAL)
    """Run folder that `l3d toy` or `l3d decompose` made."""


@dataclass(frozen=True)
class RunCopy:
    """Where the results go."""

    out: str | None = option(None, "DIR")
    """Work on a copy of RUN made here, and leave RUN as it is."""


@dataclass(frozen=True)
class Reloaded:
    """What may differ from the run's own settings."""

    device: str | None = option(None, "DEVICE")
    """cpu, cuda, cuda:1, ..."""
    any_weights: bool = option(False, "")
    """Go on where the model's weights are others than those that were decomposed."""


@dataclass(frozen=True)
class Intervention:
    """What is measured."""

    rows: int = option(256, "N", least=1)
    """Rows of the data to look for active samples in, evenly spaced."""
    samples: int = option(32, "N", least=1)
    """Number of active samples, and of inactive ones, to measure per subnetwork."""
    control: str | None = option(None, "RUN")
    """Another run of the same model to measure beside it, such as one made with --gradients.shuffle."""


@dataclass(frozen=True)
class Paper:
    """Which figures."""

    name: str = option(None, "NAME", **POSITIONAL)
    """Whose figures: tms, tmcs, high_rank or squared."""
    seed: int = option(0, "SEED")
    """Of the toy network, its data and its decomposition."""
    out: str | None = option(None, "DIR")
    """Folder of the results."""
    overwrite: bool = option(False, "")
    """Replace the folder if it exists."""


def options_of(group: type, prefix: str = "", only: Iterable[str] | None = None) -> tuple[Option, ...]:
    """Make options of a group's fields, or of `only` some: types, defaults, values and explanations."""
    hints, help_of = get_type_hints(group), explanations(group)
    return tuple(
        Option(
            prefix + each.name,
            _checked_type(hints[each.name], each.metadata["least"]),
            {} if each.default is MISSING else each.default,
            each.metadata["values"],
            help_of[each.name].partition(" In Python also")[0],
            each.metadata.get("positional", False),
        )
        for each in fields(group)
        if "values" in each.metadata and (only is None or each.name in only)
    )


def _checked_type(hint: Any, least: int | None) -> Any:
    """Return a type that accepts whole numbers from `least` on, and numbers above 0, in the place of int and float."""
    if hint is float:
        return PositiveFloat
    if hint is int:
        return Whole if least is None else PositiveInt if least == 1 else NonNegativeInt
    if hint is Path or get_origin(hint) is Literal or not get_args(hint):
        return hint
    parts = tuple(_checked_type(part, least) for part in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(part for part in parts if part is not Path)]  # noqa: UP007  # of a tuple
    return get_origin(hint)[parts]


def unset(options: Iterable[Option]) -> list[Option]:
    """Return options that may all be left open (None), for a command that has the values from elsewhere."""
    return [
        each._replace(type=each.type | None, default=None, help=each.help.removesuffix(" Required."))
        for each in options
    ]


def placed(options: Iterable[Option], default: str) -> list[Option]:
    """Return options whose `out` says where the results go by default."""
    return [each._replace(help=f"{each.help} Default: {default}.") if each.name == "out" else each for each in options]


DIVERGENCE = restricted_string_type("Divergence", "mse|kl|mse_published|python:[^:]+:[^:]+") | None
LEARNED = tuple(each._replace(type=DIVERGENCE) if each.name == "divergence" else each for each in options_of(Learning))
TRAINING, MACHINE = options_of(Training), options_of(Machine)
CHOSEN_GRADIENTS = options_of(GradientOptions, "gradients.")
REPLACEMENT = tuple(
    each._replace(type=bool | None, default=None, help=f"{each.help} null: true (published: false).")
    for each in options_of(Replacement, "replacement.")
)
MEMORY = (*options_of(GradientCache, "cache."), *options_of(Memory, "memory."))  # of `decompose` alone
DECOMPOSE = (*LEARNED, *TRAINING, *MACHINE)  # arguments of `l3d.decompose` of the same names
GROUPS = {"cache": GradientCache, "memory": Memory, "gradients": GradientOptions}  # arguments that are a group
SOURCE, RESULTS, CONTROL = options_of(Source), options_of(Results), options_of(Control)
