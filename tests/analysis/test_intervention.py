"""Move a model along its subnetworks: exactly by the deltas inside the block, restored to the bit after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.api import Decomposition
from l3d.zoo import resnet20

from helpers import assert_relative


class Tied(nn.Module):
    """An embedding whose table is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def setup(model: nn.Module | None = None, K: int = 3) -> tuple[nn.Module, Decomposition]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Conv1d(1, 2, 3), nn.Flatten()) if model is None else model
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return model.eval(), Decomposition(shapes, K, {"*": 1}, generator=torch.Generator().manual_seed(1))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("deltas", [{0: 0.5}, {2: -3.0}, {0: 0.5, 1: -0.25, 2: 100.0}, {1: 0.0}, {}], ids=str)
def test_weights_are_moved_inside_and_back_outside(deltas: dict[int, float]) -> None:
    """Inside, every tensor is W0 + Σ δ_k V_k; outside, every bit is the old one."""
    model, d = setup()
    before = weights(model)
    ids = [id(p) for p in model.parameters()]
    with l3d.intervene(model, d, deltas) as moved:
        assert moved is model
        for name, p in model.named_parameters():
            move = sum((delta * d.subnetwork(k)[name].double() for k, delta in deltas.items()), torch.zeros(()))
            assert_relative(p, before[name].double() + move, 1e-6)
        assert [id(p) for p in model.parameters()] == ids
    assert_same_bits(model, before)


@pytest.mark.parametrize("delta", [1e8, 1e-8, 3.0])
def test_the_old_bits_return_whatever_was_lost(delta: float) -> None:
    """Moves so large or small that adding and subtracting would not cancel leave nothing behind."""
    model, d = setup()
    before = weights(model)
    for _ in range(3):
        with l3d.intervene(model, d, {0: delta, 1: -delta}):
            pass
    assert_same_bits(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_old_bits_return_after_an_exception(error: type[BaseException]) -> None:
    """An exception in the block passes through and leaves the old bits."""
    model, d = setup()
    before = weights(model)
    with pytest.raises(error), l3d.intervene(model, d, {0: 1.0}):
        raise error
    assert_same_bits(model, before)


def test_the_old_bits_return_after_training_inside() -> None:
    """Whatever the block does to the moved weights is undone."""
    model, d = setup()
    before = weights(model)
    with l3d.intervene(model, d, {0: 1.0}), torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    assert_same_bits(model, before)


def test_blocks_nest() -> None:
    """A block inside another adds to it, and each exit undoes its own move."""
    model, d = setup()
    before = weights(model)
    with l3d.intervene(model, d, {0: 1.0}):
        between = weights(model)
        with l3d.intervene(model, d, {0: 1.0, 1: 2.0}):
            expected = before["0.weight"].double() + 2 * d.subnetwork(0)["0.weight"] + 2 * d.subnetwork(1)["0.weight"]
            assert_relative(model[0].weight, expected, 1e-6)
        assert_same_bits(model, between)
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    "params, moved",
    [("0.*", {"0.weight", "0.bias"}), (["0.bias", "2.*"], {"0.bias", "2.weight", "2.bias"}), ("*", None)],
)
def test_only_chosen_parameters_move(params: Any, moved: set[str] | None) -> None:
    """With globs, matching tensors move as they would anyway and the others keep their bits."""
    model, d = setup()
    before = weights(model)
    with l3d.intervene(model, d, {1: 2.0}):
        everywhere = weights(model)
    with l3d.intervene(model, d, {1: 2.0}, params=params):
        for name, p in model.named_parameters():
            expected = everywhere if moved is None or name in moved else before
            assert torch.equal(p, expected[name])
            assert not torch.equal(everywhere[name], before[name])
    assert_same_bits(model, before)


def test_parameters_that_were_not_decomposed_stay() -> None:
    """A decomposition of some tensors moves those alone."""
    model, _ = setup()
    d = Decomposition({"2.weight": model[2].weight.shape}, 2, 1)
    before = weights(model)
    with l3d.intervene(model, d, {0: 1.0}):
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"2.weight"}


@pytest.mark.parametrize("params", [None, "embedding.weight", "head.weight", "*weight"])
def test_tied_weights_move_once(params: str | None) -> None:
    """A shared tensor is moved once, by whichever of its names it is chosen, and is still shared."""
    model, d = setup(Tied())
    assert "head.weight" not in d.parameter_names
    before = weights(model)
    with l3d.intervene(model, d, {0: 2.0}, params=params):
        expected = before["embedding.weight"].double() + 2 * d.subnetwork(0)["embedding.weight"]
        assert_relative(model.embedding.weight, expected, 1e-6)
        assert model.head.weight is model.embedding.weight
    assert_same_bits(model, before)


def test_the_model_s_output_moves_by_its_derivative() -> None:
    """For a small δ the output moves by δ times its derivative along the subnetwork."""
    model, d = setup()
    model, d = model.double(), d.double()
    x = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    _, derivative = torch.autograd.functional.jvp(
        lambda *values: torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)),
        tuple(p.detach() for p in model.parameters()),
        tuple(d.subnetwork(1)[name] for name in names),
    )
    plain = model(x)
    with l3d.intervene(model, d, {1: 1e-6}):
        moved = model(x)
    assert_relative((moved - plain) / 1e-6, derivative, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_model_s_dtype_stays(dtype: torch.dtype) -> None:
    """A model of another dtype than the decomposition's is moved in its own."""
    model, d = setup()
    model = model.to(dtype)
    before = weights(model)
    with l3d.intervene(model, d, {0: 1.0}):
        assert {p.dtype for p in model.parameters()} == {dtype}
        expected = before["0.weight"].double() + d.subnetwork(0)["0.weight"].double()
        assert_relative(model[0].weight, expected, torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-7)
    assert_same_bits(model, before)


def test_frozen_parameters_move_and_flags_stay() -> None:
    """requires_grad and .grad are left alone, and gradients can be taken inside the block."""
    model, d = setup()
    model[0].weight.requires_grad_(False)
    with l3d.intervene(model, d, {0: 1.0}):
        model(torch.ones(2, 1, 4)).sum().backward()
        assert model[0].weight.grad is None
        assert model[0].bias.grad is not None
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


@pytest.mark.parametrize("index", [-1, 3, 99])
def test_a_subnetwork_that_is_not_there_is_refused(index: int) -> None:
    """An index out of range raises before anything moves, also beside a good one."""
    model, d = setup()
    before = weights(model)
    with (
        pytest.raises(ValueError, match=rf"index: expected 0 <= index < 3, got {index}"),
        l3d.intervene(model, d, {0: 1.0, index: 1.0}),
    ):
        pytest.fail("the block ran")
    assert_same_bits(model, before)


def test_another_model_is_refused() -> None:
    """A model without a decomposed parameter, or with another shape, is named and refused."""
    _, d = setup()
    for other in (nn.Linear(4, 5), nn.Sequential(nn.Linear(4, 6))):
        with (
            pytest.raises(ValueError, match=r"model: has no parameter '0\.weight' of shape \[5, 4\]"),
            l3d.intervene(other, d, {0: 1.0}),
        ):
            pytest.fail("the block ran")


@pytest.mark.parametrize(
    "params, message",
    [
        ("nothing.*", r"params: no parameter matches 'nothing\.\*'"),
        ("0.bias", r"params: '0.bias' matches no decomposed parameter"),
    ],
)
def test_globs_that_match_nothing_are_refused(params: str, message: str) -> None:
    """A glob must match a parameter of the model, and one that was decomposed."""
    model, _ = setup()
    d = Decomposition({"2.weight": model[2].weight.shape}, 2, 1)
    with pytest.raises(ValueError, match=message), l3d.intervene(model, d, {0: 1.0}, params=params):
        pytest.fail("the block ran")


@pytest.mark.data
def test_a_real_network_answers_as_before_afterwards(data_dir: Path) -> None:
    """On a real image classifier an intervention changes the logits, and leaving it brings back the same bits."""
    model = resnet20(str(data_dir / "resnet20-cifar10.safetensors"))
    shapes = {name: p.shape for name, p in model.named_parameters() if name.startswith("layer2.0")}
    d = Decomposition(shapes, 2, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(x)
        with l3d.intervene(model, d, {0: 1.0, 1: -1.0}):
            inside = model(x)
        after = model(x)
    assert torch.equal(before, after)
    assert (inside - before).abs().max() > 1e-3
