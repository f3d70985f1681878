"""Compute the divergence per sample between the model's output and a reference output, and its gradient.

Built in are "mse", "mse_published" and "kl"; the user may pass any callable
f(output [S, ...], reference [S, ...]) -> [S].
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from l3d.data.batch import sent
from l3d.gradients.samples import Samples

Divergence = Callable[[Tensor, Tensor], Tensor]


def mse(output: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error over everything after the sample dimension: [S].

    >>> mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    return (output - reference).reshape(output.shape[0], -1).square().mean(1)


def mse_published(output: Tensor, reference: Tensor) -> Tensor:
    """The published toy code's divergence, the mean of f·(f − y): [S]. Its gradient is (2f − y)/n, not the MSE's.

    Kept for comparison with published figures; errors under the two divergences cannot be compared.
    """
    return (output * (output - reference.detach())).reshape(output.shape[0], -1).mean(1)


def kl(output: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) ‖ softmax(output)) in nats over the last dimension, summed over any others: [S]."""
    log_p = reference.log_softmax(-1)
    return (log_p.exp() * (log_p - output.log_softmax(-1))).flatten(1).sum(1)


def _mse_gradient(output: Tensor, reference: Tensor) -> Tensor:
    return (output - reference) * (2 / output[0].numel())


def _mse_published_gradient(output: Tensor, reference: Tensor) -> Tensor:
    return (2 * output - reference) / output[0].numel()


def _kl_gradient(output: Tensor, reference: Tensor) -> Tensor:
    return output.softmax(-1) - reference.softmax(-1)


BY_NAME: dict[str, Divergence] = {"mse": mse, "mse_published": mse_published, "kl": kl}
# gradients with respect to the output, by formula: on a toy, autograd would cost more than the forward pass
GRADIENTS = ((mse, _mse_gradient), (mse_published, _mse_published_gradient), (kl, _kl_gradient))
REFERENCES = ("sample", "mean", "uniform", "pair")


def resolve_divergence(divergence: str | Divergence) -> Divergence:
    """Return the divergence with this name, or the callable of two arguments. Raises ValueError for anything else."""
    if isinstance(divergence, type):  # torch.nn.MSELoss: called, it would make an instance of the output
        raise ValueError(f"divergence: expected a function of (output, reference), got the class {divergence.__name__}")
    if callable(divergence):
        try:
            inspect.signature(divergence).bind("output", "reference")
        except TypeError as error:
            raise ValueError(f"divergence: expected a function of (output, reference): {error}") from error
        except ValueError:
            pass  # a built-in function without a signature
        return divergence
    if not isinstance(divergence, str) or divergence not in BY_NAME:
        raise ValueError(f"divergence: expected {', '.join(BY_NAME)} or a callable, got {divergence!r}")
    return BY_NAME[divergence]


def default_divergence(raw: Any) -> str:
    """Return the divergence that None means for what a model returned: "kl" for `.logits` [B, T, V], V > 1, else "mse".

    >>> default_divergence({"logits": torch.zeros(2, 3, 5)}), default_divergence(torch.zeros(2, 3, 5))
    ('kl', 'mse')
    """
    by_key = isinstance(raw, Mapping) and "logits" in raw
    logits = raw["logits"] if by_key else getattr(raw, "logits", None)
    is_logits = isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[2] > 1  # one entry has no distribution
    return "kl" if is_logits else "mse"


def default_note(name: str) -> str:
    """Say in one line which divergence was chosen by `default_divergence`."""
    return f"divergence: {name}, as the model's outputs have {'' if name == 'kl' else 'no '}.logits [B, T, V]"


def check_reference(reference: str | Tensor) -> str | Tensor:
    """Return the reference if it is a known name or a tensor; raise ValueError if not."""
    if isinstance(reference, Tensor) or (isinstance(reference, str) and reference in REFERENCES):
        return reference
    raise ValueError(f"reference: expected {', '.join(REFERENCES)} or a tensor, got {reference!r}")


def reference_outputs(
    reference: str | Tensor,
    outputs: Tensor,
    contrast: Tensor | None,
    is_kl: bool,
    generator: torch.Generator | None,
    samples: Samples | None = None,
) -> Tensor:
    """Return the reference output of every sample: [S, ...].

    Args:
        reference: "sample" (another sample's output, drawn at random), "mean" (the mean output; for kl, the mean of
            the probabilities), "uniform" (equal logits for kl, else zeros), "pair" (the contrast's outputs), or a
            tensor: [S, ...], [B, samples per row, ...], the model output's shape, or one sample's shape for all.
        outputs: [S, ...] the model's own outputs, detached.
        contrast: [S, ...] the contrast inputs' outputs, for "pair".
        is_kl: whether outputs are logits of a KL divergence.
        generator: CPU generator that draws for "sample".
        samples: which entries of the model's output are samples; needed for a tensor given by row.

    Raises ValueError for a tensor of another shape, and for "sample" with a single sample.
    """
    n_samples = outputs.shape[0]
    if isinstance(reference, Tensor):
        found = reference.expand_as(outputs) if reference.shape == outputs.shape[1:] else reference
        if reference.shape != outputs.shape and samples is not None and samples.positions is not None:
            if reference.shape == (samples.n_rows, samples.per_row, *samples.width):
                found = samples.of(reference.flatten(0, 1))
            elif reference.shape == samples.shape:
                found = samples.gather(reference)
        if found.shape != outputs.shape:
            raise ValueError(
                f"reference: expected outputs of shape {list(outputs.shape)} (samples first) or one of "
                f"{list(outputs.shape[1:])} for all, got {list(reference.shape)}"
            )
        return found.detach().to(outputs)
    if reference == "sample":
        if n_samples < 2:
            raise ValueError(
                "reference: 'sample' needs at least two samples in a batch, got 1; "
                "use a larger batch, or 'mean', 'uniform' or a tensor"
            )
        shift = torch.randint(1, n_samples, (n_samples,), generator=generator, device="cpu")
        index = (torch.arange(n_samples, device="cpu") + shift) % n_samples  # never the sample itself
        return outputs[sent(index, outputs.device)]
    if reference == "mean":
        if is_kl:
            return (outputs.log_softmax(-1).logsumexp(0, keepdim=True) - math.log(n_samples)).expand_as(outputs)
        return outputs.mean(0, keepdim=True).expand_as(outputs)
    if reference == "uniform":
        return torch.zeros_like(outputs)
    assert contrast is not None
    return contrast


def output_gradient(divergence: Divergence, outputs: Tensor, references: Tensor, check_values: bool = True) -> Tensor:
    """Return ∂D_s/∂f_s of every sample: [S, ...], the shape of `outputs`.

    Raises ValueError if the divergence does not return one number per sample, and where `check_values`, if the
    references or the gradient are not finite.
    """
    if check_values and not torch.isfinite(references).all():
        raise ValueError("reference: holds NaN or infinity")
    for known, known_gradient in GRADIENTS:
        if divergence is known:
            return known_gradient(outputs, references)
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        values = divergence(leaf, references)
        if not isinstance(values, Tensor) or values.shape != outputs.shape[:1]:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"divergence: expected one value per sample, shape [{outputs.shape[0]}], got {got}")
        if not values.requires_grad:
            return torch.zeros_like(outputs)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    if check_values and not torch.isfinite(gradient).all():
        raise ValueError("divergence: its gradient holds NaN or infinity")
    return gradient
