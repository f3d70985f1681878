"""Select a user's parameters by name and run the model as a fixed function, leaving its state unchanged."""

import contextlib
import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3d.data.batch import describe, on_tensors

Params = str | Sequence[str] | None


def select_parameters(model: nn.Module, params: Params) -> dict[str, nn.Parameter]:
    """Return the parameters whose names match a glob or a list of globs, or all (None), in the model's order.

    A tied parameter appears once, under its first name, whichever name matched; parameters without entries are left
    out. Raises ValueError for a pattern that matches nothing, listing near matches, for a parameter that is not
    floating-point, and for two parameters in the same memory.
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
        if other != name:  # a change of one would change the other
            raise ValueError(
                f"params: {other!r} and {name!r} are two parameters in the same memory; make them one (assign the "
                "parameter, not its .data), or choose one of them"
            )
    return selected


def model_output(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Run the model on a tensor, or on a mapping of keyword arguments, and return its output tensor or `.logits`.

    The model gets copies, since some models change their inputs in place (a first nn.ReLU(inplace=True)). torch's fast
    path for attention is off: torch takes it only without autograd, and its values at padding differ.

    Raises ValueError for keys that the model does not take or needs, and for an output that is no tensor.
    """
    # autograd refuses tensors made in inference mode; it accepts copies of them
    inputs, fast = on_tensors(inputs, Tensor.clone), torch.backends.mha.get_fastpath_enabled()
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
    """Call the model with keyword arguments; a TypeError about the keys becomes a ValueError that names them."""
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
    """Return a glob that matches only this parameter's name.

    >>> exact_pattern("layers[0].*")
    'layers[[]0].[*]'
    """
    return re.sub(r"[*?[]", r"[\g<0>]", name)


def run_fixed(model: nn.Module, inputs: Any) -> Tensor:
    """Run the model's forward pass and check that it is a fixed function; return its output tensor.

    Raises ValueError if the pass draws random numbers, changes a parameter or buffer in place, fails on the inputs'
    shape or type, or gives an output that is not finite. The random state is restored in every case.
    """
    states = _random_states(model)
    tensors = [(name, t, t._version) for name, t in (*model.named_parameters(), *model.named_buffers())]
    try:
        with warnings.catch_warnings():
            # reentrant checkpointing without a differentiable input drops its parameters' gradients
            warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
            output = model_output(model, inputs)
        drawn = not all(map(torch.equal, states, _random_states(model)))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError) as error:
        if isinstance(inputs, (Tensor, Mapping)):  # the error is the model's own
            raise
        got = type(inputs).__name__
        raise ValueError(f"data: expected batches that are a tensor or a mapping of tensors, got {got}") from error
    except (RuntimeError, IndexError) as error:  # sizes that do not fit, an index outside a table
        reason = " ".join(str(error).split())
        raise ValueError(f"data: the model failed on inputs of shape {describe(inputs)}: {reason}") from error
    except UserWarning as warning:
        # another warning, which the user's own filters turn into an error
        if "None of the inputs have requires_grad" not in str(warning):
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
    """Return the states of the CPU's random generator and of the model's GPU, if it is on one."""
    states = [torch.get_rng_state()]
    if (device := _device_of(model)).type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU if it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def check_fixed(model: nn.Module) -> None:
    """Raise ValueError for dropout or batch norm in training mode and for embeddings with max_norm.

    Such a model is not a fixed function: its output is random, or a forward pass changes it.
    """
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
    """Set requires_grad for the given parameters only while the block runs; every flag is restored on exit."""
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
