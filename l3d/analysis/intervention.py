"""Move a model's weights along its subnetworks inside a block, and restore them on exit."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from l3d.data.arguments import check_index
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.fixed import disturbed, refuse_cached, refuse_sharded
from l3d.gradients.model import Params, model_output, select_parameters
from l3d.storage.identity import check_identity, moving


@contextmanager
def intervene(
    model: nn.Module,
    decomposition: Subnetworks,
    deltas: Mapping[int, float],
    params: Params = None,
    *,
    any_weights: bool = False,
) -> Iterator[nn.Module]:
    """Set the weights to W0 + Σ_k δ_k Vout_k inside the block; on exit they are restored bit by bit, errors included.

    Args:
        model: the decomposed model.
        decomposition: of the model's parameters.
        deltas: {subnetwork: δ}. A direction has unit norm over all tensors together, so δ is a distance.
        params: glob or globs of the parameters to move; None moves all decomposed parameters.
        any_weights: accept a model whose weights differ from the decomposed ones.

    Raises ValueError if a subnetwork does not exist, or the model has other parameters or other weights, and in the
    block's first forward pass (which is run twice) if the model's output does not depend on the moved weights.
    """
    refuse_sharded(model, "intervene")
    named = parameters_of(model, decomposition.shapes)
    if not any_weights:
        check_identity(decomposition.base_model, named)
    chosen = decomposed(decomposition, model, params)
    moves: dict[str, Tensor] = {}
    for index, delta in deltas.items():
        check_index(index, decomposition.n_subnetworks)
        for name, direction in decomposition.subnetwork(index).items():
            if name in chosen:
                moves[name] = moves.get(name, 0) + delta * direction
    refuse_cached()
    with shifted(model, moves), _watched(model, moves):
        yield model


def parameters_of(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, nn.Parameter]:
    """Return all parameters of a model, tied ones under each name; raise ValueError unless it has those of `shapes`."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in shapes.items():
        if name not in named or named[name].shape != shape:
            raise ValueError(f"model: has no parameter {name!r} of shape {list(shape)}")
    return named


def output_with(model: nn.Module, weights: dict[str, Tensor], inputs: Any) -> Tensor:
    """Return the model's output on a batch with other weights, by parameter name, in the place of its own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, weights, args, kwargs)

    return model_output(run, inputs)


def decomposed(decomposition: Subnetworks, model: nn.Module, params: Params) -> set[str]:
    """Return the names of the decomposed parameters that globs choose, all for None; raise ValueError for none."""
    chosen = set(decomposition.shapes if params is None else select_parameters(model, params))
    chosen &= set(decomposition.shapes)
    if not chosen:
        raise ValueError(f"params: {params!r} matches no decomposed parameter")
    return chosen


@contextmanager
def _watched(model: nn.Module, moves: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise ValueError in the block's first forward pass if its output is the same whatever the moved weights are."""
    named = dict(model.named_parameters(remove_duplicate=False))

    def check(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        handle.remove()
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        with torch.no_grad(), disturbed(named[name] for name in moves):
            try:
                again = tree_leaves(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
            except Exception:  # it cannot be run twice on these, or fails on such weights
                return
        again = [leaf for leaf in again if isinstance(leaf, Tensor)]
        if leaves and len(again) == len(leaves) and all(map(torch.equal, again, leaves)):
            raise ValueError(
                f"model: its output does not depend on {', '.join(moves)}, so an intervention has no effect; it keeps "
                "computed or compiled weights (a cache, freezing, merged adapters): renew them or use the plain model"
            )

    handle = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def shifted(model: nn.Module, moves: Mapping[str, Tensor]) -> Iterator[None]:
    """Add moves {parameter name: tensor of its shape} to the weights inside the block; restore the bits on exit."""
    named = dict(model.named_parameters(remove_duplicate=False))
    before = {name: named[name].detach().clone() for name in moves}
    try:
        with torch.no_grad():
            for name, move in moves.items():
                named[name].add_(move.to(named[name]))
        torch.clear_autocast_cache()  # torch.autocast caches casted copies of the weights
        with moving([named[name] for name in moves]):
            yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                named[name].copy_(values)
        torch.clear_autocast_cache()
