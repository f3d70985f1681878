"""Check that torch's default dtype and device, which are for the user's own tensors, change no bit of the results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import l3d
from l3d.gradients.fixed import check_rows_apart

from training_runs import recipe

OFTEN = recipe(restart_every=5, replace_every=4, samples_per_subnetwork=8)


class Rows(Dataset[tuple[Tensor, int]]):
    """Rows with a whole number as their label, of which a batch makes a new tensor."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return points()[row], row


class Texts(nn.Module):
    """A language model: embedding, one layer, and a head whose output is `.logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.layer(self.embed(input_ids))))}


def points() -> Tensor:
    return torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu")


def texts() -> Tensor:
    return torch.randint(9, (24, 5), generator=torch.Generator().manual_seed(1), device="cpu")


def filled(model: nn.Module) -> nn.Module:
    """Fill a model with the same weights of float32 on the CPU each time."""
    generator = torch.Generator().manual_seed(0)
    model = model.to_empty(device="cpu").float()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") / 2
    return model.eval()


def mlp() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


def convolution() -> nn.Module:
    return filled(nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Flatten(), nn.GELU()))


def trained(model: nn.Module, data: Any, **changes: Any) -> list[Tensor]:
    """Train, evaluate and look at impacts: all tensors of it."""
    own: dict[str, Any] = {"n_subnetworks": 6, "rank": 1, "k": 0.3, "steps": 24, "batch_size": 8, "preset": OFTEN}
    d = l3d.decompose(model, data, **{**own, **changes}, callbacks=[])
    scores = [d.evaluate(model, data, n_references=2, refit=refit) for refit in (False, True)]
    figures = [*d.history["error"], *d.history["dead_fraction"], d.threshold, *(each.error for each in scores)]
    numbers = torch.tensor(figures, dtype=torch.float64, device="cpu")
    return [*d.parameters(), numbers, *(each.activation_rate for each in scores), d.impact(model, data, 2)]


def extracted(model: nn.Module, data: Any, **arguments: Any) -> list[Tensor]:
    g = l3d.extract_gradients(model, data, generator=torch.Generator().manual_seed(3), **arguments)
    return [*g.materialize().values(), g.squared_norm()]


def resumed(folder: Path) -> list[Tensor]:
    """Interrupt a run with a cache, and go on."""

    class Stop(l3d.callbacks.Callback):
        def on_step(self, step: int, figures: Any) -> None:
            if step == 14:
                raise KeyboardInterrupt

    own: dict[str, Any] = {"n_subnetworks": 6, "rank": 1, "k": 0.3, "steps": 24, "batch_size": 8, "checkpoint_every": 5}
    own |= {"out": folder / "run", "cache": l3d.GradientCache(folder / "cache", reads="on"), "preset": OFTEN}
    with pytest.raises(KeyboardInterrupt):
        l3d.decompose(mlp(), points(), **own, callbacks=[Stop()])
    d = l3d.decompose(mlp(), points(), **own, callbacks=[], existing="resume")
    loaded = l3d.load(folder / "run")
    gradients = l3d.extract_gradients(mlp(), points(), reference="mean")
    return [*d.parameters(), *loaded.parameters(), loaded.code(gradients).values]


def measured() -> list[Tensor]:
    """Describe, intervene, fine-tune and redraw."""
    model = mlp()
    d = l3d.decompose(model, points(), 3, 1, 0.5, steps=5, callbacks=[])
    ratios = l3d.intervention_ratios(d, model, points(), n_samples=4, min_active=2)
    described = l3d.describe(d, model, points(), n_rows=12)
    places = [place["row"] for seen in described["subnetworks"] for place in seen["top"]]
    seen = torch.tensor(places, dtype=torch.float64, device="cpu")
    rows = [(x, x[:, :3]) for x in points().split(8)]
    tuned = l3d.finetune(model, d, rows, nn.functional.mse_loss, [0, 1], steps=3)
    return [*(each for each in ratios if isinstance(each, Tensor)), seen, *tuned.state_dict().values()]


def apart() -> list[Tensor]:
    """Look whether rows are independent, and whether an unseen weight counts, by noise."""
    model = mlp()
    check_rows_apart(model, points(), "")
    with pytest.warns(UserWarning, match="does not depend"):
        return extracted(Unused(), points())


class Unused(nn.Module):
    """Holds a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), convolution()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


MASK = {"input_ids": texts(), "attention_mask": (torch.arange(5) < (torch.arange(24) % 4 + 2)[:, None]).long()}
PIPELINES: dict[str, Callable[[Path], list[Tensor]]] = {
    "extract": lambda _: extracted(mlp(), points()),
    "extract positions": lambda _: extracted(filled(Texts()), texts(), positions=2),
    "extract padded": lambda _: extracted(filled(Texts()), MASK, positions="last"),
    "extract all padded": lambda _: extracted(filled(Texts()), MASK),
    "extract mean": lambda _: extracted(convolution(), points(), reference="mean", divergence="kl"),
    "small": lambda _: trained(mlp(), points()),
    "published": lambda _: trained(mlp(), points(), preset="published", steps=12),
    "restarts": lambda _: trained(mlp(), points(), n_restarts=2),
    "bfloat16": lambda _: trained(mlp(), points(), dtype="bfloat16"),
    "automatic ranks": lambda _: trained(filled(Texts()), texts(), rank="auto"),
    "convolution": lambda _: trained(convolution(), points(), rank={"*": [2, 1, 2, 2]}),
    "micro-batches": lambda _: trained(mlp(), points(), memory=l3d.Memory(micro_batch_size=3, recompute=True)),
    "shuffled": lambda _: trained(mlp(), points(), gradients=l3d.GradientOptions(shuffle=True)),
    "labelled rows": lambda _: trained(mlp(), Rows()),
    "resumed": resumed,
    "measured": lambda _: measured(),
    "unused": lambda _: apart(),
}


@contextmanager
def default(kind: str) -> Iterator[None]:
    """Change torch's default dtype, or its default device: none can be made on "meta" that has values."""
    before = torch.get_default_dtype()
    try:
        if kind == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, kind))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "meta"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_torch_defaults_change_no_bit(pipeline: str, kind: str, tmp_path: Path) -> None:
    """Everything that is drawn, divided or made anew has its dtype and device said."""
    run = PIPELINES[pipeline]
    (tmp_path / "plain").mkdir()
    plain = run(tmp_path / "plain")
    with default(kind):
        (tmp_path / "other").mkdir()
        other = run(tmp_path / "other")
    assert len(plain) == len(other) > 0
    for ours, theirs in zip(plain, other, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)
