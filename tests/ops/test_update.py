"""The ops that change tensors in place: against their definitions, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import l3d_kernels as lk
from l3d_kernels import reference

from helpers import assert_relative
from op_cases import IN_PLACE

SHAPES = [(4, 3, 5), (4, 7), (4, 2, 3, 2)]


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def arguments(name: str = "adam_step") -> dict[str, Any]:
    """Return arguments that fit; the third slice rests."""
    moves = torch.tensor([1, 1, 0, 1]).double()
    if name == "rescale":
        norms = torch.tensor([4, 0.25, 9, 1e-6]).double()
        return {"parameters": draw(0), "squared_norms": norms, "shares": [2, 1, 4], "moves": moves}
    grads = [g * moves.view(-1, *[1] * (g.ndim - 1)) for g in draw(1)]
    scales = [each[:, :1].flatten(1)[:, :1].abs().view(4, *[1] * (each.ndim - 1)) for each in draw(2)]
    lists = {"parameters": draw(0), "grads": grads, "first": draw(3), "second": [v.square() for v in draw(4)]}
    return {**lists, "scales": scales, "counts": torch.tensor([1.0, 7, 2, 900]).double(), "moves": moves, "lr": 0.1}


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9), "eps": 1e-3}], ids=str)
def test_a_step_is_its_definition(options: dict[str, Any]) -> None:
    """Parameters, moments and Gram matrices to 1e-12; the slice that rests keeps its bits."""
    own, defined, before = arguments(), arguments(), arguments()
    grams = lk.adam_step(**own, grams=3, **options)
    assert lk.adam_step(**arguments(), **options) == []
    for a, b in zip(grams, reference.adam_step(**defined, grams=3, **options), strict=True):
        assert_relative(a, b, 1e-12)
    for key in ("parameters", "first", "second"):
        for a, b, old in zip(own[key], defined[key], before[key], strict=True):
            assert_relative(a, b, 1e-12)
            assert torch.equal(a[2], old[2])
            assert not torch.equal(a, old)
    for parameter, gram in zip(own["parameters"], grams, strict=True):
        rows = parameter.flatten(2) if parameter.ndim > 2 else parameter[:, None]
        assert_relative(gram, torch.einsum("krd,ksd->krs", rows, rows), 1e-12)


@pytest.mark.parametrize("rests", [True, False])
def test_rescaling_is_its_definition(rests: bool) -> None:
    """n tensors that share a norm are divided by its 2n-th root each, to 1e-12; None moves all."""
    own = arguments("rescale")
    own["moves"] = own["moves"] if rests else None
    lk.rescale(**own)
    for p, old, n in zip(own["parameters"], draw(0), (2, 1, 4), strict=True):
        factor = own["squared_norms"] ** (-1 / (2 * n))
        assert_relative(p, old * factor.view(-1, *[1] * (p.ndim - 1)) if not rests else p, 1e-12)
        assert torch.equal(p[2], old[2]) == rests
        assert_relative(p[3], old[3] * factor[3], 1e-12)
    defined = arguments("rescale") | {"moves": own["moves"]}
    reference.rescale(**defined)
    for a, b in zip(own["parameters"], defined["parameters"], strict=True):
        assert_relative(a, b, 1e-12)


def in_list(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """Change the second tensor of a list, or a lone tensor."""
    return lambda value: [value[0], change(value[1]), *value[2:]] if isinstance(value, list) else change(value)


WRONG: dict[str, Callable[[Any], Any]] = {
    "None": lambda _: None,
    "a number": lambda _: 3,
    "a tensor or a list too much": lambda value: value[0] if isinstance(value, list) else [value],
    "one too few": lambda value: value[:-1],
    "another dtype": in_list(lambda t: t.float()),
    "integers": in_list(lambda t: t.long()),
    "another device": in_list(lambda t: t.to("meta")),
    "one dimension more": in_list(lambda t: t[None]),
    "an array": in_list(lambda t: t.numpy()),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", IN_PLACE)
def test_arguments_of_a_wrong_kind(name: str, wrong: str) -> None:
    """One ValueError line that begins with an argument's name, and nothing is changed."""
    for key, value in arguments(name).items():
        if key == "lr" or (key == "moves" and wrong == "None" and name == "rescale"):
            continue
        if key == "shares":
            bad: Any = [2.0, 1, 4] if wrong == "another dtype" else [2, 0, 4] if wrong == "integers" else [1]
        else:
            bad = WRONG[wrong](value)
        own = arguments(name) | {key: bad}
        with pytest.raises(ValueError, match=":") as error:
            getattr(lk, name)(**own)
        assert "\n" not in str(error.value)
        assert str(error.value).split(":")[0].split("[")[0] in own, error.value
        if key != "parameters":
            assert all(torch.equal(a, b) for a, b in zip(own["parameters"], draw(0), strict=True))


@pytest.mark.parametrize("key", ["parameters", "first", "second"])
def test_tensors_with_gaps_are_refused(key: str) -> None:
    """What is written must be contiguous; a gradient need not be."""
    own = arguments()
    expected = arguments()
    lk.adam_step(**expected)
    own["grads"] = [torch.stack([g, g], -1)[..., 0] for g in own["grads"]]
    lk.adam_step(**own)
    assert all(torch.equal(a, b) for a, b in zip(own["parameters"], expected["parameters"], strict=True))
    with pytest.raises(ValueError, match=rf"{key}\[0\]: expected a contiguous tensor"):
        lk.adam_step(**own | {key: [torch.stack([t, t], -1)[..., 0] for t in own[key]]})


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("transform", [vmap, grad, lambda f: lambda c: jvp(f, (c,), (c,))], ids=["vmap", "grad", "jvp"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_transforms_are_refused(name: str, transform: Any, backend: str) -> None:
    """One line that names the op, whatever the backend."""

    held = arguments(name)

    def call(factor: Tensor) -> Tensor:
        own = held | {"parameters": [p * factor for p in held["parameters"]]}
        getattr(lk, name)(**own, backend=backend)
        return own["parameters"][0].sum()

    with pytest.raises(RuntimeError, match=f"^{name}: cannot run under torch.func"):
        transform(call)(torch.ones(3).double() if transform is vmap else torch.ones(()).double())


@pytest.mark.parametrize("name", IN_PLACE)
def test_no_slices(name: str) -> None:
    """Tensors of no slices are left as they are; a list of no tensors is refused."""
    with pytest.raises(ValueError, match=r"^parameters: expected at least 1 tensors, got 0"):
        lk.rescale([], torch.zeros(4), [])
    own = {k: [t[:0] for t in v] if isinstance(v, list) and k != "shares" else v for k, v in arguments(name).items()}
    own |= {k: v[:0] for k, v in own.items() if isinstance(v, Tensor)}
    getattr(lk, name)(**own)
    assert [p.shape for p in own["parameters"]] == [(0, *shape[1:]) for shape in SHAPES]
