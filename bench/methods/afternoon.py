"""What a good engineer would write in an afternoon, for comparison: vmap(grad) and dense matrix products.

Every gradient by torch.func.vmap over torch.func.grad, so that a text goes through the model once per target position;
directions multiplied out, dense products, autograd and Adam. tests/bench/test_baselines.py holds loss and gradients
against ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from l3d.decomposition.directions import Directions


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


Pairs = list[tuple[Tensor, Tensor] | Tensor]  # by parameter: left [K, R, O] and right [K, R, I], or vectors [K, d]


def materialise(pairs: Pairs) -> Tensor:
    """Multiply all directions out: [K, all parameters]."""
    rows = [pair if isinstance(pair, Tensor) else (pair[0].mT @ pair[1]).flatten(1) for pair in pairs]
    return torch.cat(rows, dim=1)


def loss(gradient: Tensor, encoder: Pairs, decoder: Pairs, n: int) -> Tensor:
    """Return Σ‖g − ĝ‖² / Σ‖g‖² with the n largest coefficients kept, from gradients [S, all parameters]."""
    coefficients = gradient @ materialise(encoder).T
    threshold = coefficients.detach().abs().flatten().topk(n).values.min()
    kept = coefficients * (coefficients.detach().abs() >= threshold)
    return (gradient - kept @ materialise(decoder)).square().sum() / gradient.square().sum()


def pairs_of(directions: Directions) -> Pairs:
    """Read our directions as pairs of factors, or vectors."""
    return [tuple(held) if len(held) == 2 else held[0] for held in (list(p.parameters()) for p in directions.pieces)]


class Training:
    """The loop's state: its own copy of the directions, fused Adam, and the rescaling of the decoder."""

    def __init__(self, encoder: Directions, decoder: Directions) -> None:
        self.encoder, self.decoder = own_copy(pairs_of(encoder)), own_copy(pairs_of(decoder))
        self.parameters = [each for side in (self.encoder, self.decoder) for pair in side for each in tensors(pair)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3, fused=True)

    def step(self, gradient: Tensor, n: int) -> None:
        """Take one step on a batch's gradients."""
        self.optimizer.zero_grad()
        loss(gradient, self.encoder, self.decoder, n).backward()
        self.optimizer.step()
        with torch.no_grad():
            norms = materialise(self.decoder).norm(dim=1)
            for pair in self.decoder:
                first = tensors(pair)[0]
                first.div_(norms.view(-1, *[1] * (first.ndim - 1)))


def tensors(pair: tuple[Tensor, Tensor] | Tensor) -> list[Tensor]:
    """List one parameter's factors."""
    return [pair] if isinstance(pair, Tensor) else list(pair)


def own_copy(pairs: Pairs) -> Pairs:
    """Copy factors into leaves of their own."""
    copied = [[each.detach().clone().requires_grad_() for each in tensors(pair)] for pair in pairs]
    return [(each[0], each[1]) if len(each) == 2 else each[0] for each in copied]
