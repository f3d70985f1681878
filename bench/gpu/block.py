"""What a whole step is timed on: an attention block between an embedding and a head, and l3d's step on it in phases.

The block's four matrices are decomposed, every position of every text is a sample.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PHASES = ("extract", "select", "loss", "backward", "update")


class StepSizes(NamedTuple):
    """A block and its decomposition, on B texts of T positions: S = B * T samples."""

    name: str
    width: int
    heads: int
    vocabulary: int
    K: int
    R: int
    kept: float
    B: int = 16
    T: int = 16

    @property
    def S(self) -> int:
        return self.B * self.T

    @property
    def n_kept(self) -> int:
        return max(1, int(self.kept * self.S * self.K + 0.5))


BLOCKS = (
    StepSizes("TinyStories-8M", 256, 16, 50257, K=100, R=25, kept=0.1),
    StepSizes("width 2048", 2048, 16, 32000, K=1000, R=8, kept=0.02),
    StepSizes("width 4096", 4096, 32, 32000, K=4000, R=4, kept=0.005),
)


class Block(nn.Module):
    """Embedding, norm, causal attention with a residual, norm, head. `returned` are the outputs of q, k and v."""

    def __init__(self, z: StepSizes) -> None:
        super().__init__()
        self.heads = z.heads
        self.embedding, self.head = nn.Embedding(z.vocabulary, z.width), nn.Linear(z.width, z.vocabulary, bias=False)
        self.before, self.after = nn.LayerNorm(z.width), nn.LayerNorm(z.width)
        self.q, self.k, self.v, self.out = (nn.Linear(z.width, z.width, bias=False) for _ in range(4))
        self.returned: tuple[Tensor, ...] = ()

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the head's input: [B, T, width]."""
        h = self.embedding(tokens)
        seen = self.before(h)
        self.returned = (self.q(seen), self.k(seen), self.v(seen))
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.returned)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.after(h + self.out(mixed.transpose(1, 2).flatten(2)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def matrices(self) -> dict[str, Tensor]:
        return {f"{name}.weight": getattr(self, name).weight for name in ("q", "k", "v", "out")}


class Step:
    """A step that can be taken phase by phase, with what it works on."""

    def __init__(self, z: StepSizes, dtype: torch.dtype, device: torch.device, backend: str) -> None:
        from l3d.decomposition.directions import Directions
        from l3d.gradients.extract import Extractor
        from l3d.training.optimizer import RelativeAdam

        self.z, self.backend = z, backend
        torch.manual_seed(0)
        with torch.device(device):
            self.model = Block(z).eval().to(dtype)
            self.tokens = torch.randint(z.vocabulary, (z.B, z.T))
            shapes = {name: p.shape for name, p in self.model.matrices().items()}
            ranks = dict.fromkeys(shapes, (z.R,))
            self.encoder, self.decoder = (Directions(shapes, ranks, z.K).to(dtype) for _ in range(2))
        self.extractor = Extractor(self.model, "kl", "sample", list(shapes))
        self.optimizer = RelativeAdam([*self.encoder.parameters(), *self.decoder.parameters()], lazy=True)
        self.generator = torch.Generator().manual_seed(0)

    def take(self, mark: Callable[[str], Any] = lambda name: None) -> Tensor:
        """Take a step and return its loss; `mark` is told each phase as it ends. As `Run.take_step` does."""
        from l3d.decomposition.costs import Plan
        from l3d.decomposition.objective import energy, keep, residual_norms
        from l3d.training.optimizer import update

        mark("start")
        self.gradients = self.extractor(self.tokens, self.generator)
        mark("extract")
        plan = Plan(self.backend, small=False).for_batch(self.gradients, self.encoder, self.z.n_kept)
        self.paths = plan.paths
        self.kept, overlap = keep(self.gradients, self.encoder, self.decoder, self.z.n_kept, plan)
        mark("select")
        norms = self.gradients.squared_norm_in_range(self.backend)
        energies = energy(self.kept, self.decoder, plan)
        loss = residual_norms(norms, self.kept, overlap, energies).sum() / norms.sum()
        mark("loss")
        grads = torch.autograd.grad(loss, self.optimizer.parameters)
        mark("backward")
        update(self.optimizer, self.decoder, grads, 0.01, self.kept.columns, self.backend)
        mark("update")
        return loss.detach()

    def bare(self) -> None:
        """Run the passes that extraction cannot do without: one forward, one backward for each position."""
        model, samples = self.model, self.z.S
        for p in model.parameters():
            p.requires_grad_(False)
        for p in model.matrices().values():
            p.requires_grad_(True)
        hidden = model.hidden(self.tokens)
        with torch.no_grad():
            p = model.head(hidden).softmax(-1).view(samples, -1)
            d_hidden = ((p - p.roll(1, 0)) @ model.head.weight).view_as(hidden)
        for position in range(self.z.T):
            alone = torch.zeros_like(d_hidden)
            alone[:, position] = d_hidden[:, position]
            torch.autograd.grad(hidden, model.returned, alone, retain_graph=True)
