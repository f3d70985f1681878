"""Refuse, or extract rightly, models that are not what they seem: no gradient is wrong or zero without a word."""

import random
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize

import l3d
from l3d.gradients.extract import Extractor

from helpers import assert_relative

LIBRARY = torch.library.Library("l3d_test_fixed", "DEF")  # for as long as its name: torch 2.11 compiles nothing without


class Net(nn.Module):
    """A small model with a forward pass of the test's own."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b, self.w = nn.Linear(6, 6), nn.Linear(6, 5), nn.Parameter(torch.ones(6))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.register_buffer("state", torch.zeros(6))
        self.calls, self.seen, self.held = 0, [], {}  # type: ignore[var-annotated]
        self.own = torch.Generator().manual_seed(1)
        self.step = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def truth(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean square of the output per row, by torch.func in float64."""
    double = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, {**double, **parameters}, (row[None],)).square().mean()

    return vmap(grad(loss), (None, 0))({name: double[name] for name in names}, x.double())


def rows(n: int = 7) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(2))


# --- a parameter that the output's graph does not hold --------------------------------------------------------------

HIDDEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "detached": lambda self, x: self.b(x + self.w.detach()),
    "without grad": lambda self, x: self.b(x * torch.no_grad()(lambda: self.w * 2)()),
    "by numpy": lambda self, x: self.b(x + torch.from_numpy(self.w.detach().numpy() * 2)),
    "by its data": lambda self, x: self.b(x).sin() * self.w.data.mean(),
    "by a number": lambda self, x: self.b(x) * float(self.w.mean()),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_parameter_behind_autograds_back_is_named(kind: str) -> None:
    """The output depends on w, but autograd does not see it: refused, not zero; without w it is extracted."""
    net = Net(HIDDEN[kind])
    kept = net.w.detach().clone()
    with pytest.raises(ValueError, match=r"params: the output depends on 'w', but autograd does not see it"):
        l3d.extract_gradients(net, rows(), params=["w", "b.*"])
    with pytest.raises(ValueError, match="w"):
        l3d.extract_gradients(net, rows(), params="w")
    assert torch.equal(net.w, kept)
    assert float(l3d.extract_gradients(net, rows(), params="b.*").squared_norm().min()) > 0


def test_an_operation_without_a_derivative_is_named() -> None:
    """autograd only warns of it, and drops what is below."""
    LIBRARY.define("twice(Tensor x) -> Tensor")
    LIBRARY.impl("twice", lambda x: torch.from_numpy(x.detach().numpy() * 2), "CPU")
    twice = torch.ops.l3d_test_fixed.twice
    with pytest.raises(ValueError, match=r"params: the output depends on 'a\.\w+' through an operation that registers"):
        l3d.extract_gradients(Net(lambda self, x: self.b(twice(self.a(x)))), rows(), params=["a.*", "b.*"])
    found = l3d.extract_gradients(Net(lambda self, x: self.b(twice(self.a(x)))), rows(), params="b.*")
    assert float(found.squared_norm().min()) > 0


def test_what_the_output_does_not_depend_on_is_zero_with_a_word() -> None:
    """A parameter that is truly unused has zero gradients; which one is said once."""
    extractor = Extractor(Net(lambda self, x: self.b(self.a(x).tanh())), "mse", "uniform")
    with pytest.warns(UserWarning, match=r"the output does not depend on 'w' here"):
        assert not extractor(rows()).materialize()["w"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor(rows(5))


SHARDED = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch, torch.distributed as dist, l3d
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
rank, size, port = map(int, sys.argv[1:])
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
    def forward(self, ids):
        return self.head(self.norm(self.body(self.table(ids))))

def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).eval()

def whole(gradients):
    return {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in gradients.materialize().items()}

def sharded(kind, make, inputs, params=None):
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model, mesh = make(), init_device_mesh("cpu", (size,))
    if kind == "each layer":
        for layer in model.children():
            if any(True for _ in layer.parameters(recurse=False)):
                fully_shard(layer, mesh=mesh)
    if kind == "wrapped":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        fully_shard(model, mesh=mesh)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = l3d.extract_gradients(plain, inputs, "kl", "uniform", params).materialize()
    for _ in range(2):
        found = whole(l3d.extract_gradients(model, inputs, "kl", "uniform", params))
        assert set(found) == set(expected), (set(found), set(expected))
        for name, grad in expected.items():
            error = float((found[name] - grad).norm() / grad.norm())
            assert error < 1e-6, (kind, name, error)
    for name, p in model.named_parameters():
        value = p.to_local() if hasattr(p, "to_local") else p
        kept = before[name].to_local() if hasattr(before[name], "to_local") else before[name]
        assert torch.equal(value, kept)
    for what in (lambda: l3d.decompose(model, inputs, 2, rank=1, steps=2, callbacks=[]),):
        try: what()
        except ValueError as error: assert "split over processes" in str(error), error
        else: raise AssertionError("not refused")
    d = l3d.decompose(plain, inputs, 2, rank=1, steps=2, callbacks=[]) if size == 1 else None
    for what in (lambda: l3d.intervene(model, d, {0: 1.0}).__enter__(), lambda: d.evaluate(model, inputs)):
        if d is not None:
            try: what()
            except ValueError as error: assert "split over processes" in str(error), error
            else: raise AssertionError("not refused")

x, ids = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)), torch.arange(20).reshape(4, 5) % 11
for kind in ("whole", "each layer", "wrapped"):
    sharded(kind, mlp, x)
    sharded(kind, mlp, x, "0.weight")
sharded("whole", lambda: Tied().eval(), ids)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.parametrize("n", [1, 2])
def test_sharded_models_are_extracted_as_plain_ones(n: int, tmp_path: Path) -> None:
    """fully_shard and FullyShardedDataParallel, in one and two processes: equal to the plain model to 1e-6."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(tmp_path / "sharded.py")]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(n), port], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(n)
    ]
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert output.endswith("equal\n")


# --- models that are not one fixed function -------------------------------------------------------------------------


def assigned(self: Any, x: Tensor) -> Tensor:
    h = torch.tanh(self.a(x) + self.state)
    self.state = self.state + h.detach().mean(0)
    return self.b(h)


def counted(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.b(self.a(x) * self.calls)


def appended(self: Any, x: Tensor) -> Tensor:
    self.seen.append(float(x.mean()))
    return self.b(self.a(x) * len(self.seen))


def cached(self: Any, x: Tensor) -> Tensor:
    scale = self.held.setdefault("scale", x.detach().abs().mean())
    return self.b(self.a(x) / scale)


@pytest.mark.parametrize("forward", [assigned, counted, appended, cached])
def test_what_a_forward_pass_keeps_is_put_back(forward: Callable[[Any, Tensor], Tensor]) -> None:
    """Buffers and attributes assigned anew and containers that grow: every call gives the first one's gradients."""
    net, fresh = Net(forward), Net(forward)
    once = l3d.extract_gradients(fresh, rows(), "mse", "uniform", "b.*").materialize()
    for x in (rows(), rows(5), rows()):
        found = l3d.extract_gradients(net, x, "mse", "uniform", params="b.*")
    again = l3d.extract_gradients(net, rows(), "mse", "uniform", "b.*").materialize()
    assert all(torch.equal(again[name], expected) for name, expected in once.items())
    assert not net.state.any()
    assert (net.calls, net.seen, net.held) == (0, [], {})
    assert found.n_samples == 7


def in_place(self: Any, x: Tensor) -> Tensor:
    self.state.add_(x.mean(0))
    return self.b(x)


SHAKEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer in place": in_place,
    "torch's generator": lambda self, x: self.b(x + torch.rand(6)),
    "a generator of its own": lambda self, x: self.b(x + torch.rand(6, generator=self.own)),
    "numpy's": lambda self, x: self.b(x + float(np.random.rand())),
    "Python's": lambda self, x: self.b(x + random.random()),
    "a list inside a tuple": lambda self, x: (TALLY.append(1), self.b(x * len(TALLY)))[1],
}
TALLY: list[int] = []


@pytest.mark.parametrize("kind", SHAKEN)
def test_what_is_no_fixed_function_is_refused(kind: str) -> None:
    """Randomness and states, wherever they are kept."""
    with pytest.raises(ValueError, match=r"model: .*not a fixed function"):
        l3d.extract_gradients(Net(SHAKEN[kind]), rows())


def test_a_cache_among_the_inputs_does_not_grow() -> None:
    """The caller's cache of keys and values is what it was, and every call gives the same."""

    class Cache:
        def __init__(self) -> None:
            self.keys = [torch.ones(4, 2, 6)]

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor, past: Cache, more: list[Tensor]) -> Tensor:
            past.keys.append(x)
            more.append(x)
            keys = torch.cat(past.keys, 1)
            return (self.a(x) @ keys.mT).softmax(-1) @ keys * len(more)

    torch.manual_seed(0)
    model, batch = Attends().eval(), {"x": torch.randn(4, 3, 6), "past": Cache(), "more": []}
    norms = [l3d.extract_gradients(model, batch, "mse", "uniform").squared_norm() for _ in range(3)]
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])
    assert len(batch["past"].keys) == 1
    assert batch["more"] == []


# --- rows that are not independent ----------------------------------------------------------------------------------


def quantised(x: Tensor) -> Tensor:
    scale = x.detach().abs().max() / 7
    return x + ((x / scale).round() * scale - x).detach()


MIXING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "batch norm": lambda self, x: self.b(nn.functional.batch_norm(self.a(x), None, None, training=True)),
    "centred": lambda self, x: self.b(self.a(x) - self.a(x).mean(0)),
    "a scale over the batch": lambda self, x: self.b(self.a(x) / self.a(x).detach().norm()),
    "quantised over the batch": lambda self, x: self.b(quantised(self.a(x))),
}


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("size", [1, 4])
def test_batches_of_rows_that_mix_are_not_cut(kind: str, size: int) -> None:
    """In whole batches they are differentiated exactly (test_row_order); micro-batches would change the result."""
    net = Net(MIXING[kind])
    memory = l3d.Memory(micro_batch_size=size)
    with pytest.raises(ValueError, match=r"a row's output depends on the other rows .* leave out micro_"):
        l3d.decompose(net, rows(64), 3, rank=1, steps=2, params="b.*", memory=memory, callbacks=[])
    plain = Net(lambda self, x: self.b(self.a(x).tanh()))
    l3d.decompose(plain, rows(64), 3, rank=1, steps=2, params="b.*", memory=memory, callbacks=[])


# --- interventions that the model does not see ----------------------------------------------------------------------


class Merged(nn.Module):
    """Computes its weight once, as merged adapters and cached parametrizations do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.how = nn.Linear(6, 5, bias=False), how
        self.merged: Any = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.merged is None:
            self.merged = weight.detach().numpy().copy() if self.how == "numpy" else weight.detach().clone()
        if self.how == "compiled":
            return TRACED(x)
        return x @ torch.as_tensor(self.merged).mT if self.how != "live" else x @ weight.mT


torch.manual_seed(0)
TRACED = torch.jit.freeze(torch.jit.trace(nn.Linear(6, 5, bias=False).eval(), torch.zeros(1, 6)))


@pytest.mark.parametrize("how", ["tensor", "numpy", "compiled", "live"])
def test_an_intervention_that_has_no_effect_is_refused(how: str) -> None:
    """In the first forward pass of the block; a model that reads its weights gives what the moved weights give."""
    live = Merged("live").eval()
    d = l3d.decompose(live, rows(64), 2, rank=1, steps=5, callbacks=[])
    model = Merged(how).eval()
    before = model(rows())
    if how == "live":
        with l3d.intervene(model, d, {0: 0.5}):
            moved = model(rows())
        change = rows() @ (0.5 * d.subnetwork(0)["layer.weight"]).mT
        assert_relative(moved - before, change, 1e-4)
        return
    said = r"model: its output does not depend on layer\.weight"
    with pytest.raises(ValueError, match=said), l3d.intervene(model, d, {0: 0.5}):
        model(rows())
    assert torch.equal(model.layer.weight, live.layer.weight)


def test_cached_parametrizations_are_refused() -> None:
    """parametrize.cached() keeps a computed weight, for gradients and interventions alike."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5))).eval()
    d = l3d.decompose(model, rows(64), 2, rank=1, steps=5, params="*weight*", callbacks=[])
    with parametrize.cached():
        model(rows())
        with pytest.raises(ValueError, match=r"parametrize.cached\(\) is on"), l3d.intervene(model, d, {0: 0.5}):
            pass
        with pytest.raises(ValueError, match=r"parametrize.cached\(\) is on"):
            l3d.extract_gradients(model, rows())


# --- compiled models ------------------------------------------------------------------------------------------------


class Inside(nn.Module):
    """Compiles a part of itself, in the ways that models do."""

    def __init__(self, how: str, backend: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.middle = torch.compile(torch.tanh, backend=backend) if how == "function" else torch.tanh
        if how == "layer":
            self.a.compile(backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x)))


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("how", ["model", "layer", "function"])
def test_compiled_models_at_any_batch_size(how: str, backend: str) -> None:
    """They are run uncompiled, so that every rule applies and no batch size is compiled again."""
    torch.manual_seed(0)
    net = Inside(how, backend).eval()
    model = torch.compile(net, backend=backend) if how == "model" else net
    model(rows())
    compiled = torch._dynamo.utils.counters["frames"]["ok"]
    for n in (7, 5, 1, 8):
        found = l3d.extract_gradients(model, rows(n), "mse", "uniform").materialize()
        plain = Inside("plain", backend).eval()
        plain.load_state_dict(net.state_dict())
        for name, expected in truth(plain, rows(n)).items():
            assert_relative(found[f"_orig_mod.{name}" if how == "model" else name], expected, 1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] == compiled


def test_nested_outputs_are_refused() -> None:
    """One line, not an AttributeError."""
    ragged = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged)
    with pytest.raises(ValueError, match="ordinary tensor, got a nested one"):
        l3d.extract_gradients(nn.Linear(6, 5), ragged)


# --- scale ----------------------------------------------------------------------------------------------------------

SCALES = [1e-30, 1e-25, 1e-21, 1e-12, 1e12, 1e21, 1e30]


def scaled(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, reference: factor * (output - reference).square().mean(1)


@pytest.mark.parametrize("factor", SCALES)
def test_a_factor_on_the_divergence_changes_no_ratio(factor: float) -> None:
    """Extraction, loss, evaluate and decompose agree with those at scale 1 to 1e-3, in float32."""
    net, x = Net(lambda self, x: self.b(self.a(x).tanh() + self.w)), rows(256)
    how: dict[str, Any] = {"rank": 1, "k": 0.3, "batch_size": 32, "steps": 150, "callbacks": []}
    plain = l3d.decompose(net, x, 4, divergence=scaled(1.0), **how)
    d = l3d.decompose(net, x, 4, divergence=scaled(factor), **how)
    assert_relative(d.history["error"][-1], plain.history["error"][-1], 1e-3)
    assert_relative(d.threshold / factor, plain.threshold, 1e-3)
    one = l3d.extract_gradients(net, x[:32], scaled(1.0), "mean")
    found = l3d.extract_gradients(net, x[:32], scaled(factor), "mean")
    for name, expected in one.materialize().items():
        assert_relative(found.materialize()[name].double() / factor, expected, 1e-3)
    assert_relative(found.squared_norm().double() / factor / factor, one.squared_norm(), 1e-3)
    assert_relative(plain.loss(found), plain.loss(one), 1e-3)
    for selection in ("batch", "threshold"):
        for refit in (False, True):
            scores = [
                each.evaluate(net, x, divergence=scaled(by), selection=selection, refit=refit).error
                for each, by in ((plain, 1.0), (d, factor))
            ]
            assert_relative(scores[1], scores[0], 1e-3)


def test_vanishing_gradients_of_a_deep_model() -> None:
    """Not the divergence but the weights make the gradients small."""
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).eval()
    small = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).eval()
    small.load_state_dict({name: value * 1e-5 for name, value in deep.state_dict().items()})
    how: dict[str, Any] = {"rank": 1, "steps": 100, "params": "0.*", "callbacks": []}
    errors = [l3d.decompose(net, rows(64), 3, **how).history["error"][-1] for net in (deep, small)]
    assert_relative(errors[1], errors[0], 1e-3)


def test_float16_that_loses_entries_says_so() -> None:
    """Once, with what to do; a float16 model that loses none is silent."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).eval().half(), rows().half()
    extractor = Extractor(model, scaled(1e-6), "mean")
    with pytest.warns(UserWarning, match=r"float16 loses \d+ entries .* use model.float"):
        extractor(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor(x)
        Extractor(model, scaled(100.0), "mean")(x)


# --- weights that are not there, numbers that are not finite --------------------------------------------------------

ABSENT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (lambda: nn.Linear(6, 5).to("meta"), "'weight' is on the meta device"),
    "meta buffer": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, device="meta", affine=False)),
        "meta device",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(5)), "'0.weight' has no shape yet"),
    "lazy norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LazyBatchNorm1d()), "has no shape yet"),
}


@pytest.mark.parametrize("kind", ABSENT)
def test_weights_that_are_not_there_are_named(kind: str) -> None:
    """By extraction and decompose alike, in one line."""
    make, said = ABSENT[kind]
    for call in (
        lambda m: l3d.extract_gradients(m, rows()),
        lambda m: l3d.decompose(m, rows(64), 2, rank=1, steps=2, callbacks=[]),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            call(make().eval())
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["data", "weight", "buffer", "neither"])
def test_what_is_not_finite_is_named(where: str, bad: float) -> None:
    """The row of the data, the tensor of the model, or the model's own arithmetic."""
    net, x = Net(lambda self, x: self.b(self.a(x) + self.state) * (bad if where == "neither" else 1.0)), rows(64)
    said = {"data": r"data: row 23 ", "weight": "'a.bias'", "buffer": "'state'", "neither": "it overflows"}[where]
    if where == "data":
        x[23, 1] = bad
    elif where == "weight":
        net.a.bias.data[2] = bad
    elif where == "buffer":
        net.state[1] = bad
    for call in (
        lambda: l3d.extract_gradients(net, x),
        lambda: l3d.decompose(net, x, 2, rank=1, steps=9, callbacks=[]),
    ):
        with pytest.raises(ValueError, match=said):
            call()
