"""Compare a small model's per-sample gradients with torch.func's, one row at a time, in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients

from helpers import assert_relative

TOLERANCE = 1e-10


class Net(nn.Module):
    """A model made of a function of (self, x) and the parameters, buffers and modules it names."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def layer(module: nn.Module) -> Net:
    """Make a model of one layer and a sine, so that the output gradient differs everywhere."""
    return Net(lambda self, x: torch.sin(self.layer(x)), layer=module)


def weight(*shape: int) -> nn.Parameter:
    """Draw a parameter from the standard normal distribution."""
    return nn.Parameter(torch.randn(shape))


def scrambled(module: nn.Module) -> nn.Module:
    """Give every parameter and floating buffer random values: ones and zeros hide mistakes."""
    for p in module.parameters():
        nn.init.normal_(p)
    for name, b in module.named_buffers():
        if b.is_floating_point():
            b.copy_(torch.rand_like(b) + 0.5 if "var" in name else torch.randn_like(b))
    return module


def indices(high: int, *shape: int) -> Tensor:
    """Draw whole numbers below `high`."""
    return torch.randint(high, shape)


def mean_square(output: Tensor, reference: Tensor) -> Tensor:
    """Return the divergence "mse" of one sample, written with torch's own."""
    return (output - reference).square().mean()


def truth(model: nn.Module, inputs: Tensor, references: Tensor, whole_batch: bool = False) -> dict[str, Tensor]:
    """Compute each sample's gradient with torch.func, its row alone in the batch (or in the whole batch)."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], row: int) -> Tensor:
        batch, place = (inputs, row) if whole_batch else (inputs[row : row + 1], 0)
        return mean_square(functional_call(model, params, (batch,))[place], references[row])

    grads = [torch.func.grad(loss)(params, row) for row in range(len(references))]
    return {name: torch.stack([grad[name] for grad in grads]) for name in params}


def check(
    model: nn.Module,
    inputs: Tensor,
    whole_batch: bool = False,
    twin: nn.Module | None = None,
    extractor: Extractor | None = None,
    zero: tuple[str, ...] = (),
    tolerance: float = TOLERANCE,
) -> Gradients:
    """Compare the extracted gradients and their squared norm with torch.func's.

    Args:
        whole_batch: rows depend on one another, so the truth needs the whole batch.
        twin: a model with the same parameters for torch.func, where it cannot run this one.
        extractor: one that has seen other batches.
        zero: the parameters whose gradient is exactly zero; every other's must not be.
    """
    model.eval()
    output = model(inputs).detach()
    references = torch.randn_like(output)
    if extractor is None:
        extractor = Extractor(model, "mse", references)
    extractor.reference = references
    gradients = extractor(inputs)
    squared_norm = gradients.squared_norm()  # before anything is multiplied out
    actual = gradients.materialize()
    if twin is not None:
        twin.load_state_dict(model.state_dict())
        twin.eval()
    expected = truth(twin or model, inputs, references, whole_batch)
    assert list(actual) == list(expected)
    for name, grad in expected.items():
        assert bool(grad.any()) == (name not in zero), f"{name}: a gradient that cannot tell right from wrong"
        assert_relative(actual[name], grad, tolerance)
    total = sum(grad.reshape(len(references), -1).square().sum(1) for grad in expected.values())
    assert_relative(squared_norm, total, tolerance)
    return gradients


class Multiply(torch.autograd.Function):
    """x @ w as a custom function, whose inside the graph does not show."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy @ w.mT, (x.mT @ dy).sum_to_size(w.shape)
