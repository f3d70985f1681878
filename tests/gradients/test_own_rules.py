"""Register rules of one's own: their order, what is refused of them, and how a rule knows a weight's orientation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.gradients import rules
from l3d.gradients.factors import Dense, Rows
from l3d.gradients.graph.graph import read_graph
from l3d.gradients.rules import per_sample, rule

from layer_checks import Net, check, weight

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules of a test are those of no other."""
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))


def powers_rule(use: Any, layout: Any, dy: Tensor, shape: torch.Size) -> Any:
    """One exponent per channel."""
    y, base = use.node._saved_result.detach(), use.node._saved_self.detach()
    return Dense((dy * per_sample(layout.split(y * base.log()), dy)).flatten(1, -2).sum(1))


def powers() -> Net:
    """A layer without a rule of its own: |x| to the power of p."""
    return Net(lambda self, x: (x.abs() + 0.1) ** self.p, p=weight(5))


def used_rules(model: nn.Module, x: Tensor) -> list[str]:
    """The rules that explain names, one per use."""
    return [use.rule for use in l3d.explain(model.eval(), x).uses]


def test_where_a_rule_returns_none_the_earlier_ones_are_asked() -> None:
    """A rule for a pair that has one comes first and takes nothing away; the last registered is asked first."""
    asked = []
    linear, x = nn.Linear(5, 3, bias=False), torch.randn(4, 5)

    def picky(use: Any, layout: Any, dy: Tensor, shape: torch.Size) -> Any:
        asked.append("picky")

    def wide(use: Any, layout: Any, dy: Tensor, shape: torch.Size) -> Any:
        asked.append("wide")
        if shape[0] == 7:
            return Rows(layout.split(use.node._saved_self).detach(), 2 * dy, 1)  # twice: told from the package's
        return None

    rule(("Mm", 1))(picky)
    rule(("Mm", 1))(wide)
    assert used_rules(linear, x) == ["matrix"]
    assert asked == ["wide", "picky"]
    check(linear, x)
    double = nn.Linear(5, 7, bias=False)
    assert used_rules(double, x) == ["wide"]
    (found,) = l3d.extract_gradients(double, x, divergence="mse", reference="mean").materialize().values()
    rules.RULES["Mm", 1].pop(0)
    (single,) = l3d.extract_gradients(double, x, divergence="mse", reference="mean").materialize().values()
    torch.testing.assert_close(found, 2 * single)


def test_a_rule_registered_again_replaces_itself() -> None:
    """A notebook's cell runs again: its rule counts once. Rules made by a function, and partials, are all kept."""
    first: Any = lambda use, layout, dy, shape: None  # noqa: E731
    again: Any = lambda use, layout, dy, shape: None  # noqa: E731
    for function in (first, again):
        function.__module__, function.__qualname__ = "__main__", "mine"
        rule(("Mm", 1), ("Pow", 1))(function)
    assert rules.RULES["Mm", 1] == [again, rules.matrix]
    assert rules.RULES["Pow", 1] == [again]
    made: list[Any] = [partial(lambda each, *_: each, None) for _ in range(2)]
    made += [(lambda each: lambda *_: each)(None) for _ in range(2)]
    for each in made:
        rule(("Pow", 1))(each)
    assert rules.RULES["Pow", 1] == [*reversed(made), again]
    assert used_rules(powers(), torch.randn(4, 3, 5)) == [""]


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "positions": (lambda use, dy, x: Dense(dy), r"Dense: expected grad \[S, \*shape\] = \[4, 5\], got \[4, 1, 3, 5\]"),
    "tensor": (lambda use, dy, x: dy.sum((1, 2)), r"expected Rows\(x, dy, x_axis\), Dense\(grad\) or None, got Tensor"),
    "whole numbers": (lambda use, dy, x: Dense(dy.sum((1, 2)).long()), r"got \[4, 5\] torch.int64"),
    "list": (lambda use, dy, x: Dense([1.0]), r"= \[4, 5\], got list"),
    "missing": (lambda use, dy, x: use.node._saved_nothing, r"AttributeError: .*_saved_nothing"),
    "shapes": (lambda use, dy, x: dy @ dy[:2], r"RuntimeError: "),
    "axis": (lambda use, dy, x: Rows(x, dy, 2), r"Rows: expected x_axis 0 or 1, got 2"),
    "matrix": (
        lambda use, dy, x: Rows(x.flatten(1, 2), dy.flatten(1, 2), 1),
        r"expected x \[B, T, I\] = \[4, 3, 1\] and dy \[S, T, O\] = \[4, 3, 5\] for x_axis=1 and \[5\], "
        r"got x \[4, 3, 5\] and dy \[4, 3, 5\]",
    ),
    "rows": (lambda use, dy, x: Rows(x[:3, 0, :, :1], dy[:, 0], 1), r"= \[4, 3, 1\] .* got x \[3, 3, 1\]"),
    "no positions": (
        lambda use, dy, x: Rows(x, dy[:, 0, 0], 1),
        r"= \[4, T, 1\] .*, got x \[4, 1, 3, 5\] and dy \[4, 5\]",
    ),
    "row numbers": (
        lambda use, dy, x: Rows(torch.full((4, 3), 5), dy[:, 0, :, :1], 0),
        r"expected row numbers x from 0 to 4, got 5 to 5",
    ),
    "small whole numbers": (
        lambda use, dy, x: Rows(torch.zeros(4, 3, dtype=torch.int32), dy[:, 0, :, :1], 0),
        r"got x \[4, 3\] torch.int32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_rule_names_it(name: str) -> None:
    """What it raises, and what it returns that is no part of the parameter; one line in extraction and in explain."""
    returned, message = WRONG[name]

    @rule(("Pow", 1))
    def broken(use: Any, layout: Any, dy: Tensor, shape: torch.Size) -> Any:
        return returned(use, dy, layout.split(use.node._saved_self.detach()))

    x = torch.randn(4, 3, 5)
    where = rf"^rule \S*test_own_rules.broken for Pow 1, parameter 'p': .*{message}.*$"
    with pytest.raises(ValueError, match=where):
        l3d.extract_gradients(powers(), x, divergence="mse", reference="mean")
    with pytest.raises(ValueError, match=where):
        l3d.explain(powers(), x)


def test_a_rule_that_forgets_the_samples_is_named_where_there_are_more_samples_than_rows() -> None:
    """With one sample a row `per_sample` changes nothing; with three it is missed, and with it all is right."""

    @rule(("Pow", 1))
    def short(use: Any, layout: Any, dy: Tensor, shape: torch.Size) -> Any:
        values = layout.split((use.node._saved_result * use.node._saved_self.log()).detach())
        return Dense((dy[: len(values)] * values).flatten(1, -2).sum(1))

    x = torch.randn(4, 3, 5)
    check(powers(), x)
    with pytest.raises(ValueError, match=r"short .* = \[12, 5\], got \[4, 5\]"):
        l3d.extract_gradients(powers(), x, divergence="kl", reference="mean")
    rule(("Pow", 1))(powers_rule)
    check(powers(), x)
    assert l3d.extract_gradients(powers(), x, divergence="kl", reference="mean").n_samples == 12


def test_out_of_memory_stays_what_it_is() -> None:
    """Where a rule runs out of memory the batch is too large, and nothing is wrong with the rule."""

    @rule(("Pow", 1))
    def large(use: Any, layout: Any, dy: Tensor, shape: torch.Size) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        l3d.extract_gradients(powers(), torch.randn(4, 3, 5), divergence="mse", reference="mean")


ORIENTATIONS = {  # of a square weight: the shape of x, and the axes in the order in which the product takes them
    "bti,io->bto": ((4, 3, 5), (0, 1)),
    "bti,oi->bto": ((4, 3, 5), (1, 0)),
    "bit,oi->bot": ((4, 5, 3), (1, 0)),
    "bit,io->bot": ((4, 5, 3), (0, 1)),
    "bi,oi->bo": ((4, 5), (1, 0)),
    "bi,io->bo": ((4, 5), (0, 1)),
}


@pytest.mark.parametrize("equation", ORIENTATIONS)
def test_einsum_with_a_rule_that_asks_for_the_axes(equation: str) -> None:
    """One rule for both orientations: a square weight's gradient equals torch.func's."""

    @rule(("Bmm", 1))
    def product(use: Any, layout: Any, dy: Tensor, shape: torch.Size) -> Any:
        if use.axes not in ((0, 1), (1, 0)) or layout.kind != "dim1":
            return None
        return Rows(layout.split(use.node._saved_self.detach()).clone(), dy, x_axis=use.axes.index(0) and 1)

    shape, axes = ORIENTATIONS[equation]
    model, x = Net(lambda self, x: torch.einsum(equation, x, self.w).sin(), w=weight(5, 5)), torch.randn(shape)
    (use,) = read_graph(model(x).grad_fn, {"w": model.w}, 4).uses
    assert use.axes == axes
    assert used_rules(model, x) == ["product"]
    check(model, x)


CHAINS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], tuple[int, ...] | None]] = {
    "as stored": ((5, 5), lambda w: w, (0, 1)),
    "t": ((5, 5), lambda w: w.t(), (1, 0)),
    "transposed from behind": ((5, 5), lambda w: w.mT, (1, 0)),
    "there and back": ((5, 5), lambda w: w.t().clone().mT, (0, 1)),
    "added dimensions": ((5, 5), lambda w: w[None].permute(2, 0, 1)[:, :, None].reshape(5, 1, 5), (1, 0)),
    "three": ((2, 2, 2), lambda w: w.permute(2, 0, 1), (2, 0, 1)),
    "three, contiguous": ((2, 2, 2), lambda w: w.permute(-1, 0, 1).contiguous().view(1, 2, 2, 2), (2, 0, 1)),
    "a column": ((5, 1), lambda w: w.t().unsqueeze(0).squeeze(0), (1, 0)),
    "merged": ((2, 3, 5), lambda w: w.flatten(1), None),
    "split": ((4, 4), lambda w: w.view(4, 2, 2), None),
    "other rows": ((2, 3), lambda w: w.view(3, 2), None),
    "a part": ((7, 5), lambda w: w[:5], None),
    "one of them": ((7, 5), lambda w: w[3], None),
    "repeated": ((5, 1), lambda w: w.expand(5, 4), None),
    "strided": ((5, 5), lambda w: w.as_strided((5, 5), (1, 5)), None),
}


@pytest.mark.parametrize("name", CHAINS)
def test_axes(name: str) -> None:
    """The parameter's own axes in this order are what the node sees, dimensions of size 1 apart; None otherwise."""
    shape, change, expected = CHAINS[name]
    w = weight(*shape)
    seen = change(w)
    (use,) = read_graph(seen.sin().sum().grad_fn, {"w": w}, 1).uses  # type: ignore[arg-type]
    assert use.axes == expected
    if expected is not None:
        torch.testing.assert_close(w.permute(expected).squeeze(), seen.squeeze(), rtol=0, atol=0)
