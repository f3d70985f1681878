"""Select a user's parameters by name, and call the model on a batch."""

import copy
import difflib
import fnmatch
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Params = str | Sequence[str] | None


def check_model(model: Any) -> None:
    """Raise ValueError, with what to pass instead, for a model that is no module, and for one without parameters."""
    if not isinstance(model, nn.Module):
        got, advice = type(model).__name__, "a module"
        if isinstance(model, type):
            got, advice = f"the class {model.__name__}", f"an instance, {model.__name__}(..)"
        elif isinstance(model, Mapping):
            advice = "the module itself, after its load_state_dict"
        elif callable(model):
            advice = "the module whose parameters it uses"
        raise ValueError(f"model: expected a torch.nn.Module, got {got}; pass {advice}")
    if next(model.parameters(), None) is None:
        raise ValueError("model: has no parameters to decompose")


def select_parameters(model: nn.Module, params: Params) -> dict[str, nn.Parameter]:
    """Return the parameters whose names match a glob or a list of globs, or all (None), in the model's order.

    A tied parameter appears once, under its first name, whichever name matched; parameters without entries are left
    out. Raises ValueError for a pattern that matches nothing, listing near matches, for a parameter that is not
    floating-point, and for two parameters in the same memory.
    """
    check_model(model)
    every = list(model.named_parameters(remove_duplicate=False))
    listed = params if isinstance(params, (list, tuple)) else None
    strange = [type(each).__name__ for each in listed or () if not isinstance(each, str)]
    if strange or not (listed is not None or params is None or isinstance(params, str)):
        got = f"a list that holds {strange[0]}" if strange else type(params).__name__
        raise ValueError(f"params: expected a pattern of names or a list of such texts, got {got}")
    patterns = ["*"] if params is None else [params] if isinstance(params, str) else list(params)
    if not patterns:
        raise ValueError("params: expected at least one pattern, got an empty list; use None for all parameters")
    chosen: set[int] = set()
    for pattern in patterns:
        hits = [p for name, p in every if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            names = [name for name, _ in every]
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
            quoted = ",".join(f'"{each.strip()}"' for each in pattern.split(","))
            hint = f"; several patterns are a list: [{quoted}]" if "," in pattern else ""
            raise ValueError(f"params: no parameter matches {pattern!r}; near matches: {', '.join(near)}{hint}")
        chosen.update(id(p) for p in hits)
    selected = {name: p for name, p in model.named_parameters() if id(p) in chosen and p.numel()}
    held: dict[int, str] = {}
    for name, p in selected.items():
        if not p.is_floating_point():
            raise ValueError(f"params: {name!r} is {p.dtype}; only real floating-point parameters have gradients")
        own_memory = type(p) in (nn.Parameter, Tensor) and p.device.type in ("cpu", "cuda")  # a DTensor has none
        other = held.setdefault(p.data_ptr(), name) if own_memory else name
        if other != name:  # a change of one would change the other
            raise ValueError(
                f"params: {other!r} and {name!r} are two parameters in the same memory; make them one (assign the "
                "parameter, not its .data), or choose one of them"
            )
    return selected


def model_output(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Run the model on a tensor, or on a mapping of keyword arguments, and return its output tensor or `.logits`.

    Raises ValueError as `call_model` and `output_tensor` do.
    """
    return output_tensor(call_model(model, inputs))


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Run the model on a tensor, or on a mapping of keyword arguments, and return whatever it returns.

    The model gets copies, since some models change their inputs in place (a first nn.ReLU(inplace=True)). torch's fast
    path for attention is off: torch takes it only without autograd, and its values at padding differ.

    Raises ValueError for keys that the model does not take or needs.
    """
    inputs, fast = _copied(inputs), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # code that torch.compile made has one backward pass per forward pass, and a graph without the parameters' uses
    compiles = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
            return _called_by_keys(model, inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def output_tensor(output: Any) -> Tensor:
    """Return what a model returned if it is a tensor, or its logits. Raises ValueError for anything else."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise ValueError(f"model: expected a tensor or something with .logits, got {type(output).__name__}")
    if output.is_nested or output.layout != torch.strided:
        kind = "nested" if output.is_nested else str(output.layout).removeprefix("torch.")
        raise ValueError(f"model: expected an output that is an ordinary tensor, got a {kind} one; pad it to one size")
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


def _copied(inputs: Any) -> Any:
    """Copy a batch: the model may change it, as a cache of keys and values among the inputs grows.

    autograd refuses tensors made in inference mode; it accepts copies of them.
    """
    if isinstance(inputs, Tensor):
        return inputs.clone()
    if isinstance(inputs, Mapping):
        return {key: _copied(value) for key, value in inputs.items()}
    if inputs is None or isinstance(inputs, (bool, int, float, str)):
        return inputs
    try:
        return copy.deepcopy(inputs)
    except Exception as error:  # whatever a stranger's class raises
        kind = type(inputs).__name__
        raise ValueError(
            f"data: {kind} cannot be copied, and the model may change it ({' '.join(str(error).split())})"
        ) from error
