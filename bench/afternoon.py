"""What a good engineer would write in an afternoon, for comparison: vmap(grad) and dense matrix products.

Every sample's gradient by torch.func.vmap over torch.func.grad, so that a text goes through the model once per target
position; then the dense loss of bench/published.py. tests/test_bench.py holds its loss against ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def gradients(
    model: nn.Module,
    inputs: Tensor,
    names: list[str],
    loss: Callable[..., Tensor],
    *per_sample: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Return the gradients of loss(model(inputs[s : s + 1]), *(each[s] for each of per_sample)): [S, parameters]."""
    fixed = {name: p.detach() for name, p in model.named_parameters()}

    def of(chosen: dict[str, Tensor], row: Tensor, *rest: Tensor) -> Tensor:
        output = torch.func.functional_call(model, {**fixed, **chosen}, (row[None],))
        return loss(getattr(output, "logits", output), *rest)

    chosen = {name: fixed[name] for name in names}
    in_dims = (None, 0, *[0] * len(per_sample))
    found = torch.func.vmap(torch.func.grad(of), in_dims, chunk_size=chunk)(chosen, inputs, *per_sample)
    return torch.cat([found[name].flatten(1) for name in names], dim=1)
