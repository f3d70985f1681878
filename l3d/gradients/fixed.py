"""Run a model as one fixed function of each row of a batch, and leave it as it was.

A decomposition describes one function. So a model that draws numbers, keeps a state from call to call or mixes the rows
of a batch is refused here, as is a parameter that the output depends on behind autograd's back.
"""

import contextlib
import copy
import operator
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

from l3d.data.arguments import warn
from l3d.data.batch import describe, rows_in, rows_of, tensors_of
from l3d.gradients.model import call_model, check_model, model_output, output_tensor

_calm: WeakIdKeyDictionary = WeakIdKeyDictionary()  # models whose forward pass was seen to assign no attribute


class NotFiniteRowsError(ValueError):
    """Some rows of a batch hold NaN or infinity."""


def run_fixed(
    model: nn.Module, inputs: Any, look: Callable[[Any], None] | None = None, check_values: bool = True
) -> Tensor:
    """Run the model's forward pass and check that it is a fixed function; return its output tensor.

    look: is called with what the model returned, of which the output tensor may be a part. check_values: read whether
    the output is finite, for which a GPU is waited for.

    Raises ValueError if the pass draws random numbers, changes a parameter or buffer in place, fails on the inputs'
    shape or type, or gives an output that is not finite. The random state is restored in every case, and so are
    attributes, buffers and containers of the model that the pass assigned anew or filled.
    """
    if isinstance(inputs, Tensor) and inputs.layout != torch.strided and not inputs.is_nested:
        raise ValueError(f"data: expected an ordinary tensor, got one of layout {inputs.layout}; pass data.to_dense()")
    states = _random_states(model)
    noted = [] if model in _calm else _note(model)
    tensors = [(name, t, t._version) for name, t in (*model.named_parameters(), *model.named_buffers())]
    try:
        with warnings.catch_warnings():
            # reentrant checkpointing without a differentiable input drops its parameters' gradients
            warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
            raw = call_model(model, inputs)
            output = output_tensor(raw)
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
        if noted and not _restore(noted):
            _calm[model] = True
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
    if check_values and not torch.isfinite(output).all():
        raise _not_finite(model, inputs)
    if look is not None:
        look(raw)
    return output


def _not_finite(model: nn.Module, inputs: Any) -> ValueError:
    """Return the error that names what makes an output NaN or infinite."""
    n_rows = rows_in(inputs)
    for tensor in tensors_of(inputs):
        if tensor.is_floating_point() and tensor.ndim and len(tensor) == n_rows:
            rows = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
            if rows.any():
                return NotFiniteRowsError(f"data: row {int(rows.nonzero()[0])} of the batch holds NaN or infinity")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not torch.isfinite(tensor).all():
            return ValueError(f"model: {name!r} holds NaN or infinity, and so does the output")
    return ValueError("model: its output holds NaN or infinity although inputs and weights do not: it overflows")


Noted = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]


def _note(model: nn.Module) -> Noted:
    """Note the attributes of every module, and what those of them hold that are containers."""
    noted = []
    for module in model.modules():
        own = dict(vars(module))
        held = {name: copy.copy(value) for name, value in own.items() if type(value) in (list, dict, set, deque)}
        noted.append((module, own, held))
    return noted


def _restore(noted: Noted) -> bool:
    """Give modules their attributes and the containers their contents back; tell whether any had changed."""
    changed = False
    for module, own, held in noted:
        now = vars(module)
        if len(now) != len(own) or any(now.get(name, noted) is not value for name, value in own.items()):
            changed = True
            now.clear()
            now.update(own)
        for name, before in held.items():
            value = own[name]
            if type(value) is dict:
                if list(value) != list(before) or any(value[key] is not before[key] for key in before):
                    changed = True
                    value.clear()
                    value.update(before)
            elif len(value) != len(before) or any(map(operator.is_not, value, before)):
                changed = True
                value.clear()
                value.update(before) if type(value) is set else value.extend(before)
    return changed


def differ(a: Tensor, b: Tensor) -> bool:
    """Tell whether two outputs of the same rows differ by more than rounding, which depends on the batch's size."""
    if a.shape != b.shape:
        return True
    dtype = torch.bfloat16 if torch.is_autocast_enabled(a.device.type) or not a.is_floating_point() else a.dtype
    tolerance = min(0.03, 1000 * torch.finfo(dtype).eps)
    return bool((a - b).abs().max() > tolerance * b.abs().max()) if a.numel() else False


def check_repeats(model: nn.Module, inputs: Any, output: Tensor) -> None:
    """Raise ValueError unless a batch gives the same output again. output: what the model gave for `inputs`."""
    try:
        with torch.no_grad():  # a second graph would double the memory
            again = run_fixed(model, inputs)
    except ValueError:  # a model that differentiates in its forward pass
        again = run_fixed(model, inputs).detach()
    if differ(again, output.detach()):
        raise ValueError(
            "model: the same batch gives another output when it is run again, so it is not a fixed function; it keeps "
            "a state between calls, or draws numbers that torch's global generator does not see"
        )


@torch.no_grad()
def check_rows_apart(model: nn.Module, inputs: Any, why: str) -> None:
    """Raise ValueError if a row's output depends on the other rows of its batch; why: says what needs to cut it."""
    output, n_rows = run_fixed(model, inputs), rows_in(inputs)
    if n_rows is None or n_rows != len(output) or n_rows == 1:
        return
    try:
        halves = [run_fixed(model, rows_of(inputs, half)) for half in (slice(n_rows // 2), slice(n_rows // 2, n_rows))]
    except ValueError:  # it takes batches of one size alone
        halves = [output[:0]]
    if differ(torch.cat(halves), output):
        raise ValueError(
            "model: a row's output depends on the other rows of its batch (batch norm without running statistics, a "
            f"mean or scale over the batch?), so batches cannot be cut into parts; {why}"
        )


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
    """Raise ValueError for a model that is not one fixed function, as far as its modules and weights show.

    So for dropout or batch norm in training mode, for embeddings with max_norm, and for weights that are not there yet
    (lazy modules, the meta device), one flat tensor (FullyShardedDataParallel), or cached.
    """
    check_model(model)
    check_evaluating(model)
    refuse_cached()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"model: {name!r} has no shape yet (a lazy module); run one batch through the model first")
        if tensor.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device, without values; load the weights first")
        if type(tensor).__name__ == "FlatParameter":
            raise ValueError(
                f"model: {name!r} is FullyShardedDataParallel's flat tensor of all weights; wrap the model with "
                "use_orig_params=True, or use fully_shard"
            )


def refuse_cached() -> None:
    """Raise ValueError inside torch's `parametrize.cached()`, where the model does not see that weights change."""
    if parametrize._cache_enabled:
        raise ValueError("model: parametrize.cached() is on, so computed weights stay as they are; leave that block")


def check_evaluating(model: nn.Module) -> None:
    """Raise ValueError for dropout or batch norm in training mode and for embeddings with max_norm."""
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


def forget(model: nn.Module) -> None:
    """Look at a model's attributes again in its next pass, as for one that was never run."""
    _calm.pop(model, None)


@contextlib.contextmanager
def disturbed(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Add noise of some ten times their size to parameters while the block runs; autograd's graphs stay valid."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        for parameter, values in kept:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float32, device="cpu").to(values)
            parameter.data.add_(noise * (10 * values.abs().mean() + 1))
        torch.clear_autocast_cache()  # torch.autocast caches casted copies of the weights
        yield
    finally:
        for parameter, values in kept:
            parameter.data.copy_(values)
        torch.clear_autocast_cache()


@torch.no_grad()
def check_seen(model: nn.Module, inputs: Any, output: Tensor, unseen: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the output depends on a parameter that is not in its autograd graph, naming it.

    output: what the model gave for `inputs`; unseen: the parameters that its graph lacks. Where the output stays the
    same while they are disturbed, their gradients are truly zero.
    """

    def moves_output(names: Iterable[str]) -> bool:
        with disturbed(unseen[name] for name in names):
            try:
                return differ(model_output(model, inputs), output)
            except Exception:  # the model fails on these values, so it reads them
                return True

    if not moves_output(unseen):
        if output.grad_fn is not None:
            few = [repr(name) for name in sorted(unseen)]
            more = f" and {len(few) - 5} more" if len(few) > 5 else ""
            warn(f"params: the output does not depend on {', '.join(few[:5])}{more} here: zero gradients")
        return
    name = next((name for name in unseen if moves_output([name])), next(iter(unseen)))
    raise ValueError(
        f"params: the output depends on {name!r}, but autograd does not see it: a wrapper holds other tensors in its "
        "place, or it is detached on the way; give the unwrapped model, or leave it out of params"
    )


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


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `fully_shard` or FullyShardedDataParallel have split some of a model's weights over processes."""
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return not names.isdisjoint(("FSDPModule", "FullyShardedDataParallel"))


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Hold the weights of a model that `is_sharded` as whole tensors while the block runs.

    All processes must enter together. The wrappers' own work in a forward pass is put aside: they would split the
    weights again after each layer, and add up gradients over processes.
    """
    wrappers = [m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]
    shards = [m for m in model.modules() if "FSDPModule" in (kind.__name__ for kind in type(m).__mro__)]
    with contextlib.ExitStack() as stack:
        if wrappers:
            kind: Any = type(wrappers[0])
            stack.enter_context(kind.summon_full_params(model, writeback=False))
        for module in wrappers:
            module.__dict__["forward"] = module.module
            stack.callback(module.__dict__.pop, "forward")
        for module in shards:
            module.unshard()  # type: ignore[operator]
            stack.callback(module.reshard)  # type: ignore[arg-type]
            state = module._get_fsdp_state()  # type: ignore[operator]
            for hooks, own in (
                (module._forward_pre_hooks, state._pre_forward_hook_handle),
                (module._forward_hooks, state._post_forward_hook_handle),
            ):
                stack.callback(hooks.update, dict(hooks))  # runs after the next, which empties them
                stack.callback(hooks.clear)
                hooks.pop(own.id, None)
        yield


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise ValueError if a model's weights are split over processes, which only `extract_gradients` takes."""
    check_model(model)
    if is_sharded(model):
        raise ValueError(f"model: {what} does not take weights that are split over processes; extract_gradients does")
