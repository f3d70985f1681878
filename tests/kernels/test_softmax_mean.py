"""`softmax_mean` as kernels: both passes, any number of programs or pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.decode import softmax_mean
from l3d_kernels.kernels.shared import common

from tools import DTYPES, assert_kernel, assert_same_twice, launches, normal, strided

SIZES = {"odd": (5, 37, 7), "several tiles": (18, 50, 33), "one of everything": (1, 1, 1)}  # S, V, D
PASSES = {"narrow": ("softmax_mean_narrow",), "pieces": ("softmax_logits", "softmax_exponentials")}


def make(name: str, biased: bool = True) -> dict[str, Any]:
    S, V, D = SIZES[name]
    bias = normal(V, seed=3) if biased else None
    return {"hidden": normal(S, D, seed=1), "weight": normal(V, D, seed=2), "bias": bias}


def run(i: dict[str, Any], backend: str) -> Tensor:
    return lk.softmax_mean(i["hidden"], i["weight"], i["bias"], backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("way", PASSES)
def test_values(way: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is at most twice the twin's, in every dtype, with sums in registers and in pieces."""
    if way == "pieces":
        monkeypatch.setattr(softmax_mean, "WIDEST", 0)
    assert_kernel(run, make(name, biased=name != "odd"), (), dtype, *PASSES[way])


@pytest.mark.parametrize("programs", [1, 2, 264])
def test_sharing_the_vocabulary_changes_nothing(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share the vocabulary, the value is the twin's."""
    monkeypatch.setattr(common, "PROGRAMS", programs)
    inputs = make("several tiles")
    torch.testing.assert_close(run(inputs, "triton"), run(inputs, "torch"), rtol=1e-12, atol=1e-12)


def test_pieces_of_any_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of a few columns gives the value of the whole vocabulary at once."""
    monkeypatch.setattr(softmax_mean, "WIDEST", 0)
    monkeypatch.setattr(common, "WORKSPACE", 70)
    inputs = make("odd")
    with launches() as seen:
        value = run(inputs, "triton")
    assert seen["softmax_logits"] == 3
    torch.testing.assert_close(value, run(inputs, "torch"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [slice(0, 34), slice(17, 50)])
@pytest.mark.parametrize("way", PASSES)
def test_a_masked_vocabulary_weighs_nothing(way: str, masked: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of bias -inf count as if they were not there, also where a whole tile, program or piece is masked."""
    if way == "pieces":
        monkeypatch.setattr(softmax_mean, "WIDEST", 0)
        monkeypatch.setattr(common, "WORKSPACE", 18 * 10)
    inputs = make("several tiles")
    inputs["bias"][masked] = -torch.inf
    left = inputs["bias"].isfinite()
    expected = run(
        {"hidden": inputs["hidden"], "weight": inputs["weight"][left], "bias": inputs["bias"][left]}, "torch"
    )
    with launches() as seen:
        value = run(inputs, "triton")
    assert set(seen) == set(PASSES[way])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", PASSES)
def test_large_logits_strides_and_bits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits beyond the exponential's range do not overflow; gaps change no bit; two runs give the same bits."""
    if way == "pieces":
        monkeypatch.setattr(softmax_mean, "WIDEST", 0)
    inputs = make("odd")
    steep = inputs | {"hidden": 1e4 * inputs["hidden"]}
    torch.testing.assert_close(run(steep, "triton"), run(steep, "torch"), rtol=1e-12, atol=1e-12)
    gaps = {key: strided(value) for key, value in inputs.items()}
    assert torch.equal(run(gaps, "triton"), run(inputs, "triton"))
    assert_same_twice(run, inputs, ())


def test_the_way_follows_the_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 33 doubles are narrow, but not where registers hold half as much."""
    with launches(*PASSES["narrow"]):
        run(make("several tiles"), "triton")
    monkeypatch.setattr(softmax_mean, "kind_of", lambda device: "gfx1100")
    with launches(*PASSES["pieces"]):
        run(make("several tiles"), "triton")


def test_nothing_to_do() -> None:
    """No samples give no rows."""
    assert lk.softmax_mean(normal(0, 3), normal(4, 3), backend="triton").shape == (0, 3)


def test_bindings() -> None:
    """The operator keeps torch's contract; torch.compile(fullgraph=True), vmap and autocast agree with eager."""
    inputs = make("odd")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.l3d.softmax_mean, tuple(inputs.values()), test_utils=tests)
    compiled = torch.compile(lambda i: run(i, "triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), run(inputs, "triton"))

    both = torch.stack([inputs["hidden"], 2 * inputs["hidden"]])
    mapped = torch.vmap(lambda hidden: run(inputs | {"hidden": hidden}, "triton"))(both)
    assert torch.equal(mapped, torch.stack([run(inputs | {"hidden": hidden}, "triton") for hidden in both]))

    single = {key: value.float() for key, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value = run(single, "triton")
    assert torch.equal(value, run({key: value.bfloat16() for key, value in single.items()}, "triton"))
