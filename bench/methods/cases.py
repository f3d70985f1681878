"""What is timed: a model, a batch and a decomposition's start, with the loss of a step by three methods.

* l3d: ours, a step of the run that `l3d.decompose` trains;
* published: bench/methods/published.py, the method as published;
* afternoon: bench/methods/afternoon.py, vmap(grad) and dense products.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.methods import afternoon, published
from l3d.data.batches import mix
from l3d.decomposition.objective import n_kept, objective
from l3d.estimate import plan
from l3d.gradients.divergence import kl, mse, reference_outputs
from l3d.gradients.fixed import run_fixed
from l3d.toys import make
from l3d.train import turn

METHODS = ("l3d", "afternoon", "published")
STEPS = 1_000_000  # of a run that is never finished


class Case:
    """A model, data and a decomposition's start; each method trains a copy of its own.

    Args:
        model: to decompose.
        data: rows; a batch is the first `batch_size` of them, ours draws its own.
        batch_size: rows in a step.
        n_subnetworks, rank, k, divergence, params: as in `l3d.decompose`.
        chunk: how many gradients a baseline computes at once.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Tensor,
        batch_size: int,
        n_subnetworks: int,
        rank: int,
        k: float,
        divergence: str,
        params: str | None = None,
        chunk: int | None = None,
    ) -> None:
        self.model, self.inputs, self.k, self.chunk = model, data[:batch_size], k, chunk
        self.kl = divergence == "kl"
        choices = {"n_subnetworks": n_subnetworks, "rank": rank, "k": k, "divergence": divergence, "params": params}
        # every step is one after the warm start, in which everything is kept
        self.run = plan(model, data, batch_size=batch_size, steps=STEPS, warm_start=0, **choices)
        self.extractor = self.run.extractor
        self.shapes = {name: p.shape for name, p in self.extractor.parameters.items()}
        self.decomposition = self.run.decomposition

    @cached_property
    def as_published(self) -> published.Training:
        """The published loop's state, made when it is asked for: a process that does not should not hold it."""
        return published.Training(self.decomposition.encoder, self.decomposition.decoder)

    @cached_property
    def by_afternoon(self) -> afternoon.Training:
        """The afternoon's."""
        return afternoon.Training(self.decomposition.encoder, self.decomposition.decoder)

    def loss(self, method: str) -> Tensor:
        """Return the first batch's loss by one of METHODS, on the same references, at the start of our decomposition.

        Differentiable in its parameters.
        """
        sides = self.decomposition.encoder, self.decomposition.decoder
        if method == "published":
            return published.loss(self.jacobian(), *map(published.factors_of, sides), self.n_kept())
        if method == "afternoon":
            return afternoon.loss(self.vectors(), *map(afternoon.pairs_of, sides), self.n_kept())
        gradients = self.extractor(self.inputs, torch.Generator().manual_seed(mix(0)))
        return objective(gradients, *sides, self.k).loss

    def step(self, method: str) -> None:
        """Take one training step."""
        if method == "published":
            self.as_published.step(self.jacobian(), self.n_kept())
        elif method == "afternoon":
            self.by_afternoon.step(self.vectors(), self.n_kept())
        else:
            turn(self.run, self.run.gradients(self.run.step))

    def together(self, method: str) -> int:
        """Return over how many steps a method spreads its work: a time must be that of so many, from a multiple on."""
        if method != "l3d" or self.run.ahead is None:
            return 1
        self.run.gradients(0)
        return self.run.ahead.width

    def n_kept(self) -> int:
        """Count the coefficients that a batch keeps."""
        n_samples = len(self.inputs) * (self.inputs.shape[1] if self.kl else 1)
        return n_kept(self.k, n_samples, self.decomposition.n_subnetworks)

    def jacobian(self) -> dict[str, Tensor]:
        """Return the materialised gradients by jacrev over the batch's losses: {name: [S, *shape]}."""

        def losses(output: Tensor) -> Tensor:
            flat = output.flatten(0, 1) if self.kl else output
            return self.divergence(flat, self.references(flat.detach()))

        return published.gradients(self.model, self.inputs, list(self.shapes), losses, self.chunk)

    def vectors(self) -> Tensor:
        """Return the materialised gradients by vmap(grad), a sample at a time: [S, all parameters]."""
        with torch.no_grad():
            output = run_fixed(self.model, self.inputs)
        references = self.references(output.flatten(0, 1) if self.kl else output)
        per_row = len(references) // len(self.inputs)
        samples = torch.arange(len(references))

        def loss(output: Tensor, position: Tensor, reference: Tensor) -> Tensor:
            own = output[0].index_select(0, position[None]) if self.kl else output
            return self.divergence(own, reference[None])[0]

        rows = self.inputs[samples // per_row]
        names = list(self.shapes)
        return afternoon.gradients(self.model, rows, names, loss, samples % per_row, references, chunk=self.chunk)

    def divergence(self, outputs: Tensor, references: Tensor) -> Tensor:
        """Return every sample's divergence [S]."""
        return (kl if self.kl else mse)(outputs, references)

    def references(self, outputs: Tensor) -> Tensor:
        """Draw the references of all samples [S, ...], those that the l3d loss draws."""
        generator = torch.Generator().manual_seed(mix(0))
        return reference_outputs("sample", outputs, None, self.kl, generator)


def tms() -> Case:
    """The toy model of superposition as published: 5 subnetworks of rank 1, 32 points a step."""
    toy = make("tms")
    return Case(toy.model, toy.data, 32, 5, 1, 0.1, "mse")


def stories(n_texts: int = 16) -> Case:
    """stories260k's shape with random weights: layer-2 attention, K=100, rank 6, texts of 16 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **_plain(),
    )
    model = LlamaForCausalLM(config).eval()
    texts = torch.randint(512, (8 * n_texts, 16))
    return Case(model, texts, n_texts, 100, 6, 0.1, "kl", "model.layers.2.self_attn.*", 64)


def tinystories(n_texts: int = 16) -> Case:
    """TinyStories-8M's shape with random weights: GPT-Neo, block 4's attention, K=100, rank 25, texts of 16 tokens."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=50257,
        hidden_size=256,
        num_layers=8,
        attention_types=[[["global", "local"], 4]],
        num_heads=16,
        max_position_embeddings=2048,
        **_plain(),
    )
    model = GPTNeoForCausalLM(config).eval()
    texts = torch.randint(50257, (2 * n_texts, 16))
    return Case(model, texts, n_texts, 100, 25, 0.1, "kl", "transformer.h.4.attn.*", 16)


def _plain() -> dict[str, Any]:
    return {"use_cache": False, "attn_implementation": "eager"}


CASES: dict[str, Callable[[], Case]] = {"tms": tms, "stories": stories, "tinystories": tinystories}
