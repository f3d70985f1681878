"""Share small models: a language model, a classifier, and one without a forward-mode derivative."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tiny(nn.Module):
    """A causal language model of one attention block, with a head tied to the embedding and keyword inputs."""

    def __init__(self, n_tokens: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_tokens, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return {"logits": self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))}


class Classifier(nn.Module):
    """Convolution, batch norm in evaluation mode, an activation in place, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)
        with torch.no_grad():
            self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.norm(self.conv(x)), inplace=True).mean((2, 3)))


class Square(torch.autograd.Function):
    """x², without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * d


class OneWay(nn.Module):
    """A model that holds such a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Square.apply(self.first(x)))


def mlp(seed: int = 0) -> nn.Module:
    """Make a network of two layers, 4 inputs to 3 outputs, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
