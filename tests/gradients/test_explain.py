"""Say how every use of a parameter is differentiated; test_rules.py compares that with what is done."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d

from layer_checks import Net
from small_models import OneWay, Tiny


class Einsum(nn.Module):
    """Two products of einsum, which autograd records as batched products over a leading 1, and a tensor without use."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.unused = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,io->bto", x, self.w)


def test_a_language_model_has_rules_and_the_table_has_a_line_for_each_use() -> None:
    """A tied tensor has a line for each of its uses."""
    found = l3d.explain(Tiny().eval(), torch.randint(11, (4, 7)))
    assert found.slow == ()
    assert [use.operation for use in found.uses if use.parameter == "embed.weight"] == ["Mm 1", "Embedding 0"]
    assert repr(found).splitlines()[0].split() == ["parameter", "operation", "layout", "rule"]
    assert len(repr(found).splitlines()) == 1 + len(found.uses)


def test_reasons() -> None:
    """No rule, no use, a custom function, a hook, rows that cannot be told apart."""
    found = l3d.explain(Einsum(), torch.randn(4, 3, 5))
    assert [(use.parameter, use.layout, use.why) for use in found.uses] == [
        ("w", "dim1", "no rule for it, after View, Permute, Permute, Unsqueeze, Unsqueeze"),
        ("unused", "", "the output does not depend on it"),
    ]
    assert [use.parameter for use in found.slow] == ["w"]
    custom = l3d.explain(OneWay().eval(), torch.randn(4, 4), params="*.weight")
    assert {use.why for use in custom.slow} == {"a custom autograd.Function in the model may hide uses"}
    hooked: Any = nn.Linear(3, 2)
    hooked.weight.register_hook(lambda grad: grad)
    (use,) = l3d.explain(hooked, torch.randn(4, 3)).slow
    assert (use.parameter, use.why) == ("weight", "it has a hook, which only autograd's engine calls")
    moved = Net(lambda self, x: self.layer(x).roll(1, 0), layer=nn.Linear(3, 2))
    first, _ = l3d.explain(moved, torch.randn(4, 3)).slow
    assert first.layout == "unknown"
    assert first.why.startswith("the batch's rows lie in no known layout in its output")
    with pytest.raises(ValueError, match="the model's output depends on none of unused"):
        l3d.explain(Einsum(), torch.randn(4, 3, 5), params="unused")
