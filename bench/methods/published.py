"""The method as published, for comparison: every gradient materialised, everything dense, plain autograd.

Per-sample gradients by `torch.func.jacrev` over the batch's losses, so that every sample costs a backward pass of the
whole batch. A direction is a Tucker product per tensor, a core and one factor per mode; coefficients and
reconstructions are one `torch.einsum` a tensor over the gradients and these. Plain Adam, and after every step each
decoder direction is rescaled to unit norm. Written here from the description of the method;
tests/bench/test_baselines.py holds loss and gradients against ours.

torch.einsum contracts its operands from left to right (opt_einsum, where it is installed, is switched off). They stand
in an order in which the gradients meet one factor after the other: with the factors multiplied out first this part
would cost far less than the published code was measured to take for it (17 s a step of TinyStories-8M's shape).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from string import ascii_lowercase, ascii_uppercase

import torch
from torch import Tensor, nn

from l3d.decomposition.directions import Directions, LowRank, Tucker, Whole

Factors = dict[str, list[Tensor]]  # by parameter: core [K, r1..rn] and a factor [K, r_i, d_i] per mode; or [K, d] alone


def gradients(
    model: nn.Module, inputs: Tensor, names: list[str], losses: Callable[[Tensor], Tensor], chunk: int | None = None
) -> dict[str, Tensor]:
    """Return the materialised gradients of losses(model(inputs)) [S]: {name: [S, *shape]}."""
    fixed = {name: p.detach() for name, p in model.named_parameters()}

    def of(chosen: dict[str, Tensor]) -> Tensor:
        output = torch.func.functional_call(model, {**fixed, **chosen}, (inputs,))
        return losses(getattr(output, "logits", output))

    jacobian: dict[str, Tensor] = torch.func.jacrev(of, chunk_size=chunk)({name: fixed[name] for name in names})
    return jacobian


def factors_of(directions: Directions) -> Factors:
    """Read our directions as Tucker products: a matrix's core is the identity."""
    found: Factors = {}
    for name, piece in directions.items():
        if isinstance(piece, Whole):
            found[name] = [piece.vector]
        elif isinstance(piece, Tucker):
            found[name] = [piece.core, *piece.modes]
        else:
            assert isinstance(piece, LowRank)
            n_subnetworks, rank, _ = piece.left.shape
            core = torch.eye(rank, dtype=piece.left.dtype).expand(n_subnetworks, -1, -1).contiguous()
            found[name] = [core, piece.left, piece.right]
    return found


def loss(gradient: dict[str, Tensor], encoder: Factors, decoder: Factors, n: int) -> Tensor:
    """Return Σ‖g − ĝ‖² / Σ‖g‖² with the n largest coefficients kept."""
    with left_to_right():
        coefficients = torch.stack([encode(gradient[name], encoder[name]) for name in gradient]).sum(0)
        threshold = coefficients.detach().abs().flatten().topk(n).values.min()
        kept = coefficients * (coefficients.detach().abs() >= threshold)
        parts = [(gradient[name] - reconstruct(kept, decoder[name])).square().sum() for name in gradient]
    return torch.stack(parts).sum() / torch.stack([each.square().sum() for each in gradient.values()]).sum()


def encode(gradient: Tensor, factors: list[Tensor]) -> Tensor:
    """Return <V_k, g_s> of one tensor: [S, K] from gradients [S, *shape]."""
    modes, *terms = _terms(factors)
    return torch.einsum(f"s{modes},{','.join(terms[::-1])}->sk", gradient, *factors[::-1])


def reconstruct(kept: Tensor, factors: list[Tensor]) -> Tensor:
    """Return Σ_k c_sk V_k of one tensor: [S, *shape] from coefficients [S, K]."""
    modes, *terms = _terms(factors)
    return torch.einsum(f"sk,{','.join(terms)}->s{modes}", kept, *factors)


def _terms(factors: list[Tensor]) -> list[str]:
    """Spell an einsum over one tensor's factors: its modes, its core, and each mode's factor."""
    order = max(1, len(factors) - 1)
    modes, ranks = ascii_lowercase[:order], ascii_uppercase[:order]
    if len(factors) == 1:
        return [modes, f"k{modes}"]
    return [modes, f"k{ranks}", *(f"k{rank}{mode}" for rank, mode in zip(ranks, modes, strict=True))]


@contextmanager
def left_to_right() -> Iterator[None]:
    """Let einsum contract in the order it is written in, also where opt_einsum is installed."""
    if not torch.backends.opt_einsum.is_available():
        yield
        return
    before = torch.backends.opt_einsum.enabled
    torch.backends.opt_einsum.enabled = False
    try:
        yield
    finally:
        torch.backends.opt_einsum.enabled = before


class Training:
    """The published loop's state: its own copy of the directions, Adam, and the rescaling of the decoder."""

    def __init__(self, encoder: Directions, decoder: Directions) -> None:
        self.encoder, self.decoder = own_copy(factors_of(encoder)), own_copy(factors_of(decoder))
        self.parameters = [each for side in (self.encoder, self.decoder) for held in side.values() for each in held]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3)

    def step(self, gradient: dict[str, Tensor], n: int) -> None:
        """Take one step on a batch's gradients."""
        self.optimizer.zero_grad()
        loss(gradient, self.encoder, self.decoder, n).backward()
        self.optimizer.step()
        self.normalize_()

    @torch.no_grad()
    def normalize_(self) -> None:
        """Rescale every decoder direction to unit norm over all tensors."""
        squared = torch.stack([squared_norm(held) for held in self.decoder.values()]).sum(0)
        for held in self.decoder.values():
            held[0].div_(squared.sqrt().view(-1, *[1] * (held[0].ndim - 1)))


def squared_norm(factors: list[Tensor]) -> Tensor:
    """Return ‖V_k‖² of one tensor: [K], multiplied out."""
    modes, *terms = _terms(factors)
    whole = torch.einsum(f"{','.join(terms)}->k{modes}", *factors)
    return whole.flatten(1).square().sum(1)


def own_copy(factors: Factors) -> Factors:
    """Copy factors into leaves of their own."""
    return {name: [each.detach().clone().requires_grad_() for each in held] for name, held in factors.items()}
