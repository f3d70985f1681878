"""Check that settings, threshold and identity of a decomposition survive torch's own ways of copying a module."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import l3d

DATA = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def trained(**changes: Any) -> l3d.Decomposition:
    own: dict[str, Any] = {"n_subnetworks": 5, "rank": 1, "k": 0.3, "divergence": "kl", "steps": 6, "callbacks": []}
    return l3d.decompose(network(), DATA, **{**own, **changes})


def empty(rank: int = 1, n_subnetworks: int = 5) -> l3d.Decomposition:
    return l3d.Decomposition({name: p.shape for name, p in network().named_parameters()}, n_subnetworks, rank)


def loaded(state: dict[str, Any], **options: Any) -> l3d.Decomposition:
    d = empty()
    d.load_state_dict(state, **options)
    return d


def through_a_file(d: l3d.Decomposition) -> l3d.Decomposition:
    file = io.BytesIO()
    torch.save(d.state_dict(), file)
    file.seek(0)
    return loaded(torch.load(file, weights_only=True))


def inside_another(d: l3d.Decomposition) -> l3d.Decomposition:
    other = nn.ModuleDict({"d": empty()})
    other.load_state_dict(nn.ModuleDict({"d": d}).state_dict())
    return other["d"]  # type: ignore[return-value]


WAYS: dict[str, Callable[[l3d.Decomposition], l3d.Decomposition]] = {
    "state_dict": lambda d: loaded(d.state_dict()),
    "not strict": lambda d: loaded(d.state_dict() | {"more": torch.zeros(1)}, strict=False),
    "assigned": lambda d: loaded(d.state_dict(), assign=True),
    "torch.save": through_a_file,
    "safetensors": lambda d: loaded(load(save(d.state_dict()))),
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "deepcopy": copy.deepcopy,
    "of a state dict": lambda d: loaded(copy.deepcopy(d.state_dict())),
    "dtypes": lambda d: d.to(torch.float64).to(torch.float32),
    "inside another": inside_another,
}


@pytest.mark.parametrize("divergence", ["kl", "mse_published"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_decomposition_knows_survives(way: str, divergence: str) -> None:
    """Settings, threshold, identity: so it is evaluated as it was trained, and other weights are refused."""
    d = trained(divergence=divergence, seed=3)
    found = WAYS[way](copy.deepcopy(d))
    assert (found.settings, found.threshold, found.base_model) == (d.settings, d.threshold, d.base_model)
    assert list(found.settings) == list(d.settings)  # of several patterns of a rank the first counts
    ours, theirs = found.evaluate(network(), DATA), d.evaluate(network(), DATA)
    assert (ours.error, ours.kept_per_sample) == (theirs.error, theirs.kept_per_sample)
    assert torch.equal(found.impact(network(), DATA, 2), d.impact(network(), DATA, 2))
    by_threshold = [each.evaluate(network(), DATA, selection="threshold").error for each in (found, d)]
    assert by_threshold[0] == by_threshold[1]
    other = network()
    other[0].weight.data.mul_(1.001)
    with pytest.raises(ValueError, match=r"'0.weight' has other values"):
        found.evaluate(other, DATA)


@pytest.mark.parametrize("rank", [1, {"0.*": 2, "*": [1, 1]}])
def test_state_dicts_of_equal_runs_are_equal(rank: Any) -> None:
    """All of them are tensors, without a time or a history; those of another seed differ."""
    a, b, other = (trained(rank=rank, seed=seed).state_dict() for seed in (0, 0, 1))
    assert list(a) == list(b)
    assert all(isinstance(value, Tensor) for value in a.values())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["_extra_state"], other["_extra_state"])


def test_an_untrained_decomposition_has_a_state_too() -> None:
    """Its threshold is not a number, which JSON cannot hold; the state dict is equal to another's all the same."""
    a, b = (loaded(empty().state_dict()) for _ in range(2))
    assert a.threshold != a.threshold
    assert (a.settings, a.base_model) == ({}, {})
    assert torch.equal(a.get_extra_state(), b.get_extra_state())


def test_an_older_state_dict_is_said_to_lack_it() -> None:
    """By torch's own error; loaded all the same, nothing is evaluated by settings that nobody chose."""
    state = trained().state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "_extra_state"'):
        loaded(state)
    d = loaded(state, strict=False)
    model = network()
    with pytest.raises(ValueError, match=r"^divergence: not known.* no settings .*; pass divergence=, k= or set"):
        d.evaluate(model, DATA)
    with pytest.raises(ValueError, match=r"^k: not known.*; pass k= or set decomposition.settings$"):
        d.evaluate(model, DATA, divergence="kl")
    for use in (d.impact, lambda *given: l3d.top_samples(d, *given), lambda *given: l3d.describe(d, *given)):
        with pytest.raises(ValueError, match=r"^divergence: not known.*; pass divergence= or set"):
            use(model, DATA)
    assert d.evaluate(model, DATA, divergence="kl", k=0.3).error == trained().evaluate(model, DATA).error
    d.settings = trained().settings
    assert d.evaluate(model, DATA).error == trained().evaluate(model, DATA).error


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"{}",
        b"[]",
        b'{"settings": 1, "threshold": null, "base_model": {}}',
        b'{"settings": {}, "threshold": "high", "base_model": {}}',
        b"\xff",
    ],
)
def test_another_modules_state_is_refused(state: bytes) -> None:
    """In one line, and nothing is taken over."""
    d = trained()
    before = (d.settings, d.base_model, d.threshold)
    extra = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^state_dict: '_extra_state' is not a decomposition's") as error:
        d.load_state_dict(d.state_dict() | {"_extra_state": extra})
    assert "\n" not in str(error.value)
    assert (d.settings, d.base_model, d.threshold) == before


def test_settings_that_json_cannot_hold_are_named() -> None:
    """As `save` does."""
    d = empty()
    d.settings["k"] = float("nan")
    with pytest.raises(ValueError, match=r"^settings: cannot be saved as json"):
        d.state_dict()
