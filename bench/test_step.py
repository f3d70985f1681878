"""One training step, ours beside the published method: `make bench`.

Each pair runs in one process on the same batch and start; the loss of the two is compared before anything is timed.
"""

from collections.abc import Callable

import pytest
import torch

from bench import published
from l3d.data import mix
from l3d.decomposition import Decomposition
from l3d.divergence import kl, mse, reference_outputs
from l3d.extract import Extractor
from l3d.objective import n_kept, objective
from l3d.optimizer import RelativeAdam
from l3d.toys import make, one_thread
from l3d.train import decompose


class Case:
    """A model, a batch and a decomposition's start, with a step by either method."""

    def __init__(self, model, inputs, n_subnetworks, rank, k, divergence, params=None):
        self.model, self.inputs, self.k = model, inputs, k
        self.kl = divergence == "kl"
        self.extractor = Extractor(model, divergence, "sample", params)
        self.shapes = {name: p.shape for name, p in self.extractor.parameters.items()}
        start = torch.Generator().manual_seed(0)
        self.decomposition = Decomposition(self.shapes, n_subnetworks, rank, generator=start)
        self.optimizer = RelativeAdam(self.decomposition.parameters())

    def ours(self) -> torch.Tensor:
        """The loss by l3d."""
        gradients = self.extractor(self.inputs, torch.Generator().manual_seed(mix(0)))
        return objective(gradients, self.decomposition.encoder, self.decomposition.decoder, self.k).loss

    def published(self) -> torch.Tensor:
        """The loss by the published method, on the same references."""

        def losses(output):
            flat = output.flatten(0, 1) if self.kl else output
            generator = torch.Generator().manual_seed(mix(0))
            references = reference_outputs("sample", flat.detach(), None, self.kl, generator)
            return (kl if self.kl else mse)(flat, references)

        gradient = published.gradients(self.model, self.inputs, list(self.shapes), losses)
        d = self.decomposition
        return published.loss(gradient, d.encoder, d.decoder, n_kept(self.k, len(gradient), d.n_subnetworks))

    def step(self, loss: Callable[[], torch.Tensor]) -> None:
        """Take one training step."""
        self.optimizer.step(torch.autograd.grad(loss(), self.optimizer.parameters), 0.01)
        self.decomposition.normalize_()


def tms() -> Case:
    """The toy model of superposition as published: 5 subnetworks of rank 1, 32 points a step."""
    toy = make("tms")
    return Case(toy.model, toy.data[:32], 5, 1, 0.1, "mse")


def language_model() -> Case:
    """stories260k's shape with random weights: layer-2 attention, K=100, rank 6, 16 texts of 16 tokens."""
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
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    return Case(model, torch.randint(512, (16, 16)), 100, 6, 0.1, "kl", "model.layers.2.self_attn.*")


CASES = {"tms": tms, "language model": language_model}


@pytest.mark.parametrize("method", ["l3d", "published"])
@pytest.mark.parametrize("case", CASES)
def test_step(benchmark, case, method):
    """Time one step; the two methods' losses agree first."""
    benchmark.group = f"one step: {case}"
    made = CASES[case]()
    loss = made.ours()
    assert torch.allclose(loss, made.published(), rtol=1e-4)
    chosen = made.ours if method == "l3d" else made.published
    rounds = 3 if (case, method) == ("language model", "published") else 20
    benchmark.pedantic(lambda: made.step(chosen), rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("n_restarts", [1, 10])
def test_restarts(benchmark, n_restarts):
    """Time 200 steps of the toy model of superposition, alone and as ten restarts side by side."""
    benchmark.group = "200 steps: tms"
    toy = make("tms")
    own = {**toy.settings, "steps": 200, "n_restarts": n_restarts}
    with one_thread():
        d = benchmark.pedantic(lambda: decompose(toy.model, toy.data, progress=False, **own), rounds=3, warmup_rounds=1)
    assert len(d.restart_errors) == n_restarts
