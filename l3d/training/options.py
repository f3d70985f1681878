"""Declare what a run can be asked for: a dataclass for each group of options, an explanation under each field.

`decompose`, the command line, config.yaml and the reference pages are all made from these fields. Importing this file
does not import torch, so that `l3d --help` is quick.
"""

import ast
import functools
import inspect
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

Result = TypeVar("Result")


def option(default: Any, values: str, least: int | None = None, **more: Any) -> Any:
    """Declare an option: its default, the values that --help shows, and the least value of a whole number."""
    metadata = {"values": values, "least": least, **more}
    if isinstance(default, dict):  # which a dataclass takes from a factory only
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def _check_whole(name: str, value: Any) -> None:
    from l3d.data.arguments import check_whole  # imports numpy, which --help should not wait for

    check_whole(name, value)


def explanations(group: type) -> dict[str, str]:
    """Return the explanation that stands under each field of a group."""
    (definition,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for declared in pairwise(definition.body):
        match declared:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                found[name] = " ".join(str(text).split())
    return found


@dataclass(frozen=True)
class Learning:
    """What is learned."""

    params: list[str] | str | None = option(None, "GLOB")
    """Tensors to decompose, by name, as 'h.4.attn.*', or several patterns. null: all."""
    n_subnetworks: int = option(100, "K", least=1)
    """Number of directions in parameter space to learn."""
    rank: int | Literal["auto"] | dict[str, int | list[int]] | None = option(None, "R|auto|{GLOB:R}|{GLOB:[R,R]}", 1)
    """Rank of each direction in each tensor: one number; auto, the least rank that holds nine tenths of single
    gradients' squared norm in each tensor, at most 16; or one per tensor, as '{"*.q_proj.*": 8, "*": 4}', where the
    first match counts and a list gives one number per axis. Vectors are always stored whole. null: 8, or as much as a
    smaller tensor allows."""
    k: float = option(0.1, "FRACTION")
    """Fraction of a batch's coefficients (samples × subnetworks) that is kept: above 0, at most 1."""
    divergence: Literal["mse", "kl", "mse_published"] | None = option(
        None, "mse|kl|mse_published|python:MODULE:FUNCTION"
    )
    """What is differentiated. mse: for regression; kl: for classifiers and language models; mse_published: the
    divergence of the published toy code, whose gradient is not the MSE's (compare no errors across them);
    or a function of (output [S, ...], reference [S, ...]) that returns [S], on the command line by its name. null: kl
    where the outputs have .logits [B, T, V], as language models' do, else mse."""
    reference: Literal["sample", "mean", "uniform", "pair"] = option("sample", "sample|mean|uniform|pair")
    """The output that each output is compared with: another random sample's, the batch's mean, the uniform one, or that
    of the row's own partner (data that yield pairs). In Python also a tensor: one output for all samples."""
    positions: Literal["all", "last"] | int = option("all", "all|last|N", least=1)
    """Which output positions of a sequence are samples (kl): all, the last, or N drawn at random."""
    preset: Literal["default", "published"] = option("default", "default|published")
    """The training recipe: this package's, or the publication's. In Python also a `Preset` of your own."""


@dataclass(frozen=True)
class Training:
    """How it is trained."""

    steps: int | None = option(None, "N", least=1)
    """Training steps. null: 2000, or 1000 epochs with the published preset."""
    batch_size: int = option(16, "ROWS", least=1)
    """Rows of the data (texts, images, points) in a step."""
    lr: float | None = option(None, "RATE")
    """Adam's step size at the start, relative to each factor's typical entry (published: absolute). null: 0.1
    (published: 0.01)."""
    warm_start: int | None = option(None, "STEPS", least=0)
    """Steps at the start over which the kept fraction falls from 1 to k (published: stays 1). null: a tenth."""
    n_restarts: int = option(1, "N", least=1)
    """Trainings from different starts, side by side on the same batches; the one of least error is kept."""
    seed: int = option(0, "SEED")
    """Seed of everything that is random; the same seed on the same machine gives the same bits."""
    checkpoint_every: int | None = option(None, "STEPS", least=1)
    """Steps between the checkpoints that `l3d resume` goes on from. null: ten in all."""


@dataclass(frozen=True)
class Machine:
    """Where and in which precision it runs."""

    device: str | None = option(None, "DEVICE")
    """Where to train: cpu, cuda, cuda:1, ... null: where the model is."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = option(None, "float32|bfloat16|float64")
    """Type of the learned directions. bfloat16: of the gradients' factors too, for half of their memory; sums are
    float32. null: the model's, at least float32."""
    backend: Literal["auto", "torch", "triton"] = option("auto", "auto|torch|triton")
    """Implementation of the operations. auto: the faster one, chosen for each."""


@dataclass(frozen=True)
class GradientCache:
    """Gradients kept on disk, for this run and others on the same model and data."""

    folder: str | Path | None = option(None, "DIR")
    """Keep the batches' gradients here; the first n_references epochs then repeat. A folder with gradients of anything
    else is refused."""
    n_references: int = option(1, "N", least=1)
    """Epochs of different batches and references that repeat."""
    reads: Literal["auto", "on", "off"] = option("auto", "auto|on|off")
    """Read stored gradients instead of extracting them again: always, never, or (auto) where the first batches show it
    to be faster. The result is the same to the bit."""

    def __post_init__(self) -> None:
        _check_whole("n_references", self.n_references)
        if self.reads not in ("auto", "on", "off"):
            raise ValueError(f"cache: reads: expected auto, on or off, got {self.reads!r}")
        if self.folder is None and (self.n_references, self.reads) != (1, "auto"):
            raise ValueError("cache: n_references and reads need the cache's folder, got none")


@dataclass(frozen=True)
class Memory:
    """Less memory for more time; what is learned stays the same but for the order of summation."""

    micro_batch_size: int | None = option(None, "ROWS", least=1)
    """Rows that are extracted and projected at a time; batch top-k still sees the whole batch. null: all."""
    recompute: bool = option(False, "")
    """With micro_batch_size: extract every micro-batch twice rather than hold the whole batch's gradients."""

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None:
            _check_whole("micro_batch_size", self.micro_batch_size)


@dataclass(frozen=True)
class GradientOptions:
    """Which gradients are decomposed."""

    shuffle: bool = option(False, "")
    """A control: deal the parts of the gradients out anew over the samples of each batch, tensor by tensor, so that no
    sample's own gradient is left."""

    def __post_init__(self) -> None:
        if not isinstance(self.shuffle, bool):
            raise ValueError(f"shuffle: expected True or False, got {self.shuffle!r}")


@dataclass(frozen=True)
class Replacement:
    """When dead subnetworks are restarted and redundant ones replaced, while k is at its value."""

    enabled: bool = option(True, "true|false")
    """Every 200 steps restart dead subnetworks from badly reconstructed samples; every 100 replace redundant ones by
    directions learned from the residuals."""
    restart_every: int = 200
    """Steps without being kept after which a subnetwork is dead, and between restarts."""
    replace_every: int = 100
    """Steps between replacements of redundant subnetworks."""
    until: float = 0.8
    """Fraction of the run after which nothing is restarted or replaced."""
    restarts_at_once: int = 4
    """Restarts (`n_restarts`) looked at in one replacement; with more they take turns, so that the cost has a bound."""
    samples_per_subnetwork: int = 64
    """Active samples of a subnetwork that should be looked at; half of them are learned from."""
    most_samples: int = 512
    """Samples looked at, at most, but for the last batch."""
    most_batches: int = 20
    """Batches they come from, at most."""
    samples_of_small_models: int = 1024
    """Samples looked at where there are so few parameters that this costs nothing."""
    multiplied_out: int = 1 << 24
    """Entries of the samples' gradients up to which they are multiplied out."""
    candidates: int = 16
    """Directions learned from the residuals at a time."""
    steps_alone: int = 4
    """Power steps of a candidate for its one starting sample alone."""
    steps: int = 14
    """Power steps in all."""
    refit_steps: int = 4
    """Steps of conjugate gradients that fit the kept coefficients anew before two codes are compared."""
    least_curvature: float = 1e-4
    """Relative curvature below which those steps stop: only rounding is left."""
    standard_errors: float = 1.0
    """Standard errors, over the samples, by which the squared residual must fall for a replacement to be confirmed."""
    margin: float = 1.1
    """What a candidate must gain, relative to what the subnetwork it replaces is worth, to be considered."""

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise ValueError(f"replacement: enabled: expected True or False, got {self.enabled!r}")
        for each in fields(self):
            if each.type is int and getattr(self, each.name) != each.default:
                _check_whole(f"replacement: {each.name}", getattr(self, each.name))


@dataclass(frozen=True)
class Preset:
    """A training recipe; make one of your own with `dataclasses.replace(l3d.PRESETS["default"], ...)`."""

    name: str
    """What the saved settings call it."""
    lr: float
    """Adam's step size at the start."""
    relative_lr: bool
    """Take steps relative to each factor's typical entry, or as they are."""
    schedule: Literal["cosine", "step"]
    """How the step size falls: by a cosine to a hundredth, or times 0.8 after every tenth of the run."""
    rest: bool
    """Leave subnetworks alone that a batch does not keep: Adam's moments neither move them nor fade."""
    warm_start: Literal["anneal", "hold"]
    """Over the warm start the kept fraction falls from 1 to k geometrically, or stays 1."""
    epochs: int | None = None
    """Epochs of training where `steps` is not given. None: 2000 steps."""
    replacement: Replacement = Replacement()
    """When dead subnetworks are restarted and redundant ones replaced."""


_OFF = Replacement(enabled=False)
_DEFAULT = Preset("default", 0.1, relative_lr=True, schedule="cosine", rest=True, warm_start="anneal")
_PUBLISHED = Preset(
    "published", 0.01, relative_lr=False, schedule="step", rest=False, warm_start="hold", epochs=1000, replacement=_OFF
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in (_DEFAULT, _PUBLISHED)})


def documented(function: Callable[..., Result]) -> Callable[..., Result]:
    """Put the explanations of the options into a docstring, in the place of {options}."""
    text = inspect.cleandoc(function.__doc__ or "")  # from Python 3.13 on the indentation is gone already
    lines = []
    for group in (Learning, Training, Machine):
        for name, explanation in explanations(group).items():
            explanation = explanation.replace("null:", "None:")  # as a configuration file and Python spell it
            lines.append(textwrap.fill(f"{name}: {explanation}", 112, subsequent_indent="    "))
    function.__doc__ = text.replace("{options}", textwrap.indent("\n".join(lines), " " * 4).lstrip())
    return function


def older_names(function: Callable[..., Result]) -> Callable[..., Result]:
    """Take arguments by the names they had before they were grouped, and say the new ones in a DeprecationWarning."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Result:
        old = {name: kwargs.pop(name) for name in tuple(kwargs) if name in _OLDER}
        if old:
            said = "; ".join(f"{name} is now {_OLDER[name]}" for name in old)
            warnings.warn(f"decompose: {said}", DeprecationWarning, stacklevel=2)
            _regroup(old, kwargs)
        return function(*args, **kwargs)

    return called


_OLDER = {
    "progress": "callbacks=[] (silent) or None (a bar)",
    "overwrite": 'existing="overwrite"',
    "resume": 'existing="resume"',
    "cache_reads": "cache=GradientCache(folder, reads=..)",
    "n_references": "cache=GradientCache(folder, n_references=..)",
    "micro_batch_size": "memory=Memory(micro_batch_size=..)",
    "recompute": "memory=Memory(recompute=..)",
    "revive": "preset=Preset(.., replacement=Replacement(enabled=..))",
    "shuffle": "gradients=GradientOptions(shuffle=..)",
}


def _regroup(old: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Put arguments by their older names where they belong now; raise ValueError where both are given."""
    for name, value in old.items():
        new = _OLDER[name].partition("=")[0]
        given = kwargs.get(new)
        is_group = new in ("existing", "memory", "gradients") or isinstance(given, GradientCache)
        if value and given is not None and is_group:
            raise ValueError(f"{name}: {new} is given too; use {new} alone")
    if old.get("progress") is False and kwargs.get("callbacks") is None:
        kwargs["callbacks"] = []
    if old.get("overwrite") and old.get("resume"):
        raise ValueError("resume: expected no overwrite beside it")
    for name in ("overwrite", "resume"):
        if old.get(name):
            kwargs["existing"] = name
    cache = {name.removeprefix("cache_"): old[name] for name in ("cache_reads", "n_references") if name in old}
    if cache:
        kwargs["cache"] = GradientCache(kwargs.get("cache"), **cache)
    memory = {name: old[name] for name in ("micro_batch_size", "recompute") if name in old}
    if memory:
        kwargs["memory"] = Memory(**memory)
    if old.get("shuffle") is not None:
        kwargs["gradients"] = GradientOptions(shuffle=old["shuffle"])
    if old.get("revive") is not None:
        preset = kwargs.get("preset", "default")
        preset = PRESETS[preset] if isinstance(preset, str) else preset
        kwargs["preset"] = replace(preset, replacement=replace(preset.replacement, enabled=old["revive"]))
