"""What the package asks of a user's model: names of parameters, an output tensor, and to be left as it was."""

import contextlib
import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3d.data.batch import describe

Params = str | Sequence[str] | None


def select_parameters(model: nn.Module, params: Params) -> dict[str, nn.Parameter]:
    """Return the parameters whose names match a glob, a list of globs, or all of them (None), in model order.

    A tied parameter appears once, under the first of its names, whichever of them matched. Raises ValueError for
    a pattern that matches nothing, with near matches.
    """
    every = list(model.named_parameters(remove_duplicate=False))
    if not every:
        raise ValueError("model: has no parameters")
    patterns = ["*"] if params is None else [params] if isinstance(params, str) else list(params)
    if not patterns:
        raise ValueError("params: expected at least one pattern, got an empty list; use None for all parameters")
    chosen: set[int] = set()
    for pattern in patterns:
        hits = [p for name, p in every if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            names = [name for name, _ in every]
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"params: no parameter matches {pattern!r}; near matches: {', '.join(near)}")
        chosen.update(id(p) for p in hits)
    selected = {name: p for name, p in model.named_parameters() if id(p) in chosen and p.numel()}
    held: dict[int, str] = {}
    for name, p in selected.items():
        if not p.is_floating_point():
            raise ValueError(f"params: {name!r} is {p.dtype}; only real floating-point parameters have gradients")
        other = held.setdefault(p.data_ptr(), name) if p.device.type in ("cpu", "cuda") else name
        if other != name:  # a move of the one would move the other
            raise ValueError(
                f"params: {other!r} and {name!r} are two parameters in the same memory; make them one (assign the "
                "parameter, not its .data), or choose one of them"
            )
    return selected


def model_output(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Run the model on a tensor, or on a mapping of keyword arguments, and return its output tensor or `.logits`.

    The model is given copies, since some write into what they are given (a first nn.ReLU(inplace=True)), and attention
    in its plain form: torch's fast path, taken where nothing is differentiated, gives other values at padding.

    Raises ValueError for keys that the model does not take, or lacks.
    """
    inputs, fast = _copied(inputs), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        output = _called_by_keys(model, inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise ValueError(f"model: expected a tensor or something with .logits, got {type(output).__name__}")
    return output


def _called_by_keys(model: Callable[..., Any], inputs: Mapping[Any, Any]) -> Any:
    keys = ", ".join(map(str, inputs))
    try:
        return model(**inputs)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '([^']+)'", str(error))
        if unknown and unknown[1] in inputs:
            raise ValueError(
                f"data: its rows have the key {unknown[1]!r}, which the model does not take; leave it out "
                f"(keys: {keys})"
            ) from error
        missing = re.search(r"missing \d+ required positional arguments?: (.*)", str(error))
        if missing and "forward()" in str(error):
            raise ValueError(f"data: its rows lack {missing[1]}, which the model needs (keys: {keys})") from error
        if not all(isinstance(key, str) for key in inputs):
            raise ValueError(
                f"data: expected rows whose keys are names of the model's arguments, got {keys}"
            ) from error
        raise


def exact_pattern(name: str) -> str:
    """Return a glob that matches this parameter's name and no other.

    >>> exact_pattern("layers[0].*")
    'layers[[]0].[*]'
    """
    return re.sub(r"[*?[]", r"[\g<0>]", name)


def run_fixed(model: nn.Module, inputs: Any) -> Tensor:
    """Run the model as a fixed function: a forward pass that draws no random number and changes no tensor of its.

    Random state is put back in any case. Raises ValueError otherwise, and where the output is not finite.
    """
    states = _random_states(model)
    tensors = [(name, t, t._version) for name, t in (*model.named_parameters(), *model.named_buffers())]
    try:
        with warnings.catch_warnings():
            # reentrant checkpointing without a differentiable input drops the gradients of all it holds
            warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
            output = model_output(model, inputs)
        drawn = not all(map(torch.equal, states, _random_states(model)))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError) as error:
        if isinstance(inputs, (Tensor, Mapping)):  # then it is the model's own
            raise
        got = type(inputs).__name__
        raise ValueError(f"data: expected batches that are a tensor or a mapping of tensors, got {got}") from error
    except (RuntimeError, IndexError) as error:  # sizes that do not fit, an index beyond a table
        reason = " ".join(str(error).split())
        raise ValueError(f"data: the model failed on inputs of shape {describe(inputs)}: {reason}") from error
    except UserWarning as warning:
        if "None of the inputs have requires_grad" not in str(warning):  # one of the user's, whose filters raise it
            raise
        raise ValueError(f"model: {warning} Use checkpointing with use_reentrant=False, or none") from warning
    finally:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], _device_of(model))
    if drawn:
        raise ValueError(
            "model: its forward pass drew random numbers (dropout in training mode?), so it is not a fixed function; "
            "switch the randomness off, usually by model.eval()"
        )
    for name, tensor, version in tensors:
        if tensor._version != version:
            raise ValueError(f"model: its forward pass changed {name!r} in place, so it is not a fixed function")
    if not torch.isfinite(output).all():
        raise ValueError("model: its output holds NaN or infinity; check the inputs and the weights")
    return output


def _random_states(model: nn.Module) -> list[Tensor]:
    """Return the state of the CPU's generator, and of that of the GPU that the model is on."""
    states = [torch.get_rng_state()]
    if (device := _device_of(model)).type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _copied(inputs: Any) -> Any:
    """Copy a batch's tensors; copies of those made in inference mode, which autograd refuses, it takes."""
    if isinstance(inputs, Tensor):
        return inputs.clone()
    if isinstance(inputs, Mapping):
        return {key: _copied(value) for key, value in inputs.items()}
    return inputs


def check_fixed(model: nn.Module) -> None:
    """Refuse a model that is not a fixed function: dropout or batch norm in training mode, embeddings with max_norm."""
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"model: {name or 'the model'!r} has max_norm, which changes its weights as it runs")
        if not module.training:
            continue
        dropout = getattr(module, "dropout", None) if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) else None
        if isinstance(module, nn.modules.dropout._DropoutNd):
            dropout = module.p
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm) or (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        )
        if dropout or norm:
            kind = type(module).__name__
            raise ValueError(f"model: {name or 'the model'!r} ({kind}) is in training mode; call model.eval() first")


@contextlib.contextmanager
def only_trainable(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Let autograd record the chosen parameters only; every flag is put back on exit."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in parameters.values()}
    try:
        for p, flag in before:
            if flag != (id(p) in wanted):
                p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, flag in before:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
