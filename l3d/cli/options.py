"""The options of the command line: their names, types, defaults and help. Only data, and quick to import."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class Option(NamedTuple):
    """One option of the command line, which is also a key of a configuration file."""

    name: str
    type: Any
    default: Any
    values: str  # in the help, and where a value is refused: "expected VALUES"
    help: str
    positional: bool = False


# Options of the same name in l3d.decompose.
LEARNED = (
    Option(
        "params",
        list[str] | str | None,
        None,
        "GLOB",
        "Tensors to decompose, by name, as 'h.4.attn.*'; --params+ adds a pattern, a YAML file may list "
        "several. null: all.",
    ),
    Option("n_subnetworks", PositiveInt, 100, "K", "Number of directions in parameter space to learn."),
    Option(
        "rank",
        PositiveInt | Literal["auto"] | dict[str, PositiveInt | list[PositiveInt]] | None,
        None,
        "R|auto|{GLOB:R}|{GLOB:[R,R]}",
        "Rank of each direction in each tensor: one number; auto, what holds nine tenths of single gradients' squared "
        "norm in each, at most 16; or one per tensor, as "
        '\'{"*.q_proj.*": 8, "*": 4}\', the first match counts and a list gives one number per axis. '
        "Vectors are always stored whole. null: 8, or as much as a smaller tensor allows.",
    ),
    Option(
        "k",
        PositiveFloat,
        0.1,
        "FRACTION",
        "Share of a batch's coefficients (samples × subnetworks) that is kept: above 0, at most 1.",
    ),
    Option(
        "divergence",
        Literal["mse", "kl", "mse_published"],
        "mse",
        "mse|kl|mse_published",
        "What is differentiated. mse: for regression; kl: for classifiers and language models; "
        "mse_published: that of the published toy code, whose gradient is not the MSE's (compare no errors "
        "across them).",
    ),
    Option(
        "reference",
        Literal["sample", "mean", "uniform", "pair"],
        "sample",
        "sample|mean|uniform|pair",
        "The output that each output is compared with: that of another random sample, the batch's mean, the "
        "uniform one, or that of the row's own partner (python: data that yields pairs).",
    ),
    Option(
        "positions",
        Literal["all", "last"] | PositiveInt,
        "all",
        "all|last|N",
        "Which output positions of a sequence are samples (kl): all, the last, or N drawn at random.",
    ),
    Option(
        "preset",
        Literal["default", "published"],
        "default",
        "default|published",
        "Whose training settings hold where none are given: this package's, or those of the publication.",
    ),
)
TRAINING = (
    Option("steps", PositiveInt | None, None, "N", "Training steps. null: 2000, or 1000 epochs where published."),
    Option("batch_size", PositiveInt, 16, "ROWS", "Rows of the data (texts, images, points) in a step."),
    Option(
        "lr",
        PositiveFloat | None,
        None,
        "RATE",
        "Adam's step size at the start, relative to each factor's typical entry (published: absolute). null: "
        "0.1 (published: 0.01).",
    ),
    Option(
        "weight_decay",
        NonNegativeFloat,
        0.0,
        "RATE",
        "Decay of all factors, apart from the gradients: above 0, Adam is AdamW.",
    ),
    Option(
        "warm_start",
        NonNegativeInt | None,
        None,
        "STEPS",
        "Steps at the start over which the kept share falls from 1 to k (published: stays 1). null: a tenth.",
    ),
    Option(
        "n_restarts",
        PositiveInt,
        1,
        "N",
        "Trainings from different starts, side by side on the same batches; the one of least error is kept.",
    ),
    Option(
        "updates",
        PositiveInt,
        1,
        "N",
        "Optimiser steps per batch, on the same gradients.",
    ),
    Option(
        "start",
        Literal["random", "data"],
        "random",
        "random|data",
        "Directions to start from: random ones, or low-rank parts of single samples' gradients.",
    ),
    Option(
        "revive",
        bool | None,
        None,
        "true|false",
        "Start subnetworks anew that no batch has kept for 200 steps, from badly reconstructed samples, or that others "
        "can stand in for. null: true (published: false).",
    ),
    Option(
        "shuffle",
        bool,
        False,
        "true|false",
        "A control: learn from gradients whose parts are dealt out anew over the samples of each batch.",
    ),
    Option("seed", int, 0, "SEED", "Seed of everything that is random."),
    Option(
        "checkpoint_every",
        PositiveInt | None,
        None,
        "STEPS",
        "Steps between the checkpoints that `l3d resume` goes on from. null: ten in all.",
    ),
)
# Of `decompose` alone: a toy needs none of them.
MEMORY = (
    Option(
        "cache",
        str | None,
        None,
        "DIR",
        "Keep the batches' gradients here, for this run and others on the same model and data; the first "
        "n_references epochs then repeat. A store of anything else is refused.",
    ),
    Option(
        "cache_reads",
        Literal["auto", "on", "off"],
        "auto",
        "auto|on|off",
        "Read stored gradients instead of extracting them. auto: where the first batches show it to be faster.",
    ),
    Option(
        "micro_batch_size",
        PositiveInt | None,
        None,
        "ROWS",
        "Rows that are extracted and projected at a time, for less memory; what is learned stays the same. null: all.",
    ),
    Option(
        "recompute",
        bool,
        False,
        "",
        "With --micro_batch_size: extract every micro-batch twice rather than hold the whole batch's gradients.",
    ),
    Option("n_references", PositiveInt, 1, "N", "With --cache: epochs of different batches and references."),
)
MACHINE = (
    Option(
        "device",
        str | None,
        None,
        "DEVICE",
        "Where to train: cpu, cuda, cuda:1, ... null: where the model is loaded.",
    ),
    Option(
        "dtype",
        Literal["float32", "bfloat16", "float64"] | None,
        None,
        "float32|bfloat16|float64",
        "Type of the learned directions. bfloat16: of the gradients' factors too, all sums in float32. null: the "
        "model's, at least float32.",
    ),
    Option(
        "backend",
        Literal["auto", "torch", "triton"],
        "auto",
        "auto|torch|triton",
        "Implementation of the operations. auto: the faster one, chosen for each.",
    ),
)
DECOMPOSE = (*LEARNED, *TRAINING, *MACHINE)

# What the command line adds: where things come from and where they go.
MODEL = (
    Option(
        "model",
        str | None,
        None,
        "SPEC",
        "hf:DIR_OR_ID, a causal language model of transformers, or python:pkg.module:factory, a "
        "function that returns a torch module. Loading runs code: name only what you trust. Required.",
    ),
    Option(
        "model_args",
        dict[str, Any],
        {},
        "VALUE",
        "Arguments of the loader, each as --model_args.KEY VALUE. hf: dtype, revision, ...; python: the factory's.",
    ),
)
DATA = (
    Option(
        "data",
        str | None,
        None,
        "SPEC",
        "text:FILE_OR_FOLDER, dataset:FOLDER_OR_FILE_OR_ID (Hugging Face), tokens:FILE (ids, .npy or .npz), "
        "npz:FILE, or python:pkg.module:factory, a function that returns a tensor, Dataset or iterable. Required.",
    ),
    Option(
        "data_args",
        dict[str, Any],
        {},
        "VALUE",
        "Arguments of the loader, each as --data_args.KEY VALUE. text: length (tokens a row, 16), separator "
        "('<|endoftext|>'), start (every|first window of a text), short (drop|pad: tails), tokenizer, max_rows. "
        "dataset: the same without separator, and split (train), column (text), name, revision. tokens: key, "
        "max_rows. npz: key (images), size (pixels to resize to), mean, std (per channel: '[.5,.5,.5]'), max_rows. "
        "All: rows, a slice (--data_args.rows=-200: is the last 200).",
    ),
)
HELD_OUT = Option(
    "held_out",
    NonNegativeInt,
    0,
    "N",
    "Keep the last N rows out of training and report the error on them. 0: off.",
)
EVALUATE_ROWS = Option(
    "evaluate_rows",
    PositiveInt,
    1000,
    "N",
    "Evaluate on at most so many of the training rows, evenly spaced.",
)
DRY_RUN = Option(
    "dry_run",
    bool,
    False,
    "",
    "Only say what the run would take: parameters, bytes, time of a step, each tensor's path. Writes nothing.",
)
DESCRIBE = Option(
    "describe",
    NonNegativeInt | None,
    None,
    "N",
    "Look at N rows of the training data for what each subnetwork acts on and moves, for the report's cards. 0: do "
    "not. null: a twentieth of the rows trained on, within 256 and 1000.",
)
LOG = Option(
    "log",
    Literal["tensorboard", "wandb"] | None,
    None,
    "tensorboard|wandb",
    "Follow the run there: TensorBoard writes to DIR/tensorboard; Weights & Biases is set up by its own environment "
    "variables, as WANDB_MODE=offline.",
)
OVERWRITE = Option("overwrite", bool, False, "", "Replace the run folder if it exists.")
ANY_WEIGHTS = Option(
    "any_weights", bool, False, "", "Go on where the model's weights are others than those that were decomposed."
)
COPY = Option("out", str | None, None, "DIR", "Work on a copy of RUN made here, and leave RUN as it is.")
TOY = Option(
    "name",
    str,
    None,
    "NAME",
    "The toy model: tms, tms_parallel, tms_40_10, tmcs, high_rank, squared; or all, the recovery suite.",
    positional=True,
)
SEEDS = Option(
    "seeds",
    PositiveInt | None,
    None,
    "N",
    "all: seeds to run, from --seed on; each is another set of toy networks. null: 10.",
)
README = Option(
    "readme",
    str | None,
    None,
    "FILE",
    "all: write the table into this file too, between the lines <!-- toys --> and <!-- /toys -->.",
)
TOY_MODEL = Option(
    "toy",
    str | None,
    None,
    "NAME",
    "In the place of --model and --data: a toy, with its own settings where none are given.",
)
OVER = Option(
    "over",
    dict[str, list[Any]],
    {},
    "[VALUE,..]",
    "What to sweep over, each as --over.NAME '[VALUE,VALUE]': k, n_subnetworks, rank, seed; every combination is run.",
)
REDRAWN = Option(
    "random_weights",
    bool,
    False,
    "",
    "A control: decompose the model with the chosen weights redrawn, normal with their mean and deviation.",
)
TOY_SEED = Option(
    "toy_seed",
    int | None,
    None,
    "SEED",
    "Seed of the toy's network and points. null: that of --seed.",
)
WEIGHTS_SEED = Option(
    "weights_seed",
    int | None,
    None,
    "SEED",
    "Seed that --random_weights redraws with. null: that of --seed.",
)
RANDOM_WEIGHTS = Option(
    "random_weights",
    bool,
    False,
    "",
    "Beside each run a control: the same with the decomposed weights redrawn, normal with their mean and deviation.",
)
PAPER = Option("name", str, None, "NAME", "Whose figures: tms, tmcs, high_rank or squared.", positional=True)
PAPER_SEED = Option("seed", int, 0, "SEED", "Of the toy network, its data and its decomposition.")
INTERVENE_ROWS = Option("rows", PositiveInt, 256, "N", "Rows of the data to look for active samples in, evenly spaced.")
SAMPLES = Option("samples", PositiveInt, 32, "N", "Samples per subnetwork: so many it is active for, and of the rest.")
CONTROL = Option(
    "control",
    str | None,
    None,
    "RUN",
    "Another run of the same model to measure beside it, such as one made with --shuffle.",
)
RUN = Option("run", str, None, "RUN", "Run folder that `l3d toy` or `l3d decompose` made.", positional=True)
DEVICE = Option("device", str | None, None, "DEVICE", "cpu, cuda, cuda:1, ...")


def out(default: str) -> Option:
    """Return the option that says where a run folder is made."""
    text = "Run folder to make: config.yaml, decomposition, checkpoints, metrics.json, report.html."
    return Option("out", str | None, None, "DIR", f"{text} Default: {default}.")


def folder(default: str) -> Option:
    """Return the option that names a folder of results."""
    return Option("out", str | None, None, "DIR", f"Folder of the results. Default: {default}.")


def unset(options: Iterable[Option]) -> list[Option]:
    """Return options that may all be left open (None), for a command that has the values from elsewhere."""
    return [
        option._replace(
            type=option.type | None,
            default=None,
            help=option.help.removesuffix(" Required."),
        )
        for option in options
    ]


def expected(name: str) -> str | None:
    """Say what values an option takes; None for an unknown one."""
    studies = (TOY_MODEL, OVER, RANDOM_WEIGHTS, PAPER, INTERVENE_ROWS, SAMPLES, CONTROL)
    added = (*studies, *MEMORY, DRY_RUN, DESCRIBE, LOG, TOY_SEED, WEIGHTS_SEED)
    every = (*DECOMPOSE, *MODEL, *DATA, HELD_OUT, EVALUATE_ROWS, OVERWRITE, COPY, TOY, SEEDS, README, RUN, *added)
    option = next((option for option in every if option.name == name), None)
    if option is None:
        return None
    kinds = [kind for kind in get_args(option.type) if kind is not type(None)]
    kind = kinds[0] if len(kinds) == 1 and type(None) in get_args(option.type) else option.type
    numbers = {
        PositiveInt: "a whole number above 0",
        NonNegativeInt: "a whole number from 0",
        int: "a whole number",
    }
    return {**numbers, PositiveFloat: "a number above 0"}.get(kind, option.values)
