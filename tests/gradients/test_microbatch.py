"""Extract in micro-batches of any size: the same kept set, loss and derivatives up to the order of summation."""

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.api import Decomposition
from l3d.data.batch import count_rows_of, rows_of
from l3d.decomposition.chunked import objective_in_chunks
from l3d.decomposition.costs import Plan
from l3d.decomposition.objective import objective
from l3d.gradients.chunks import Chunks
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Gradients, concatenate
from l3d.gradients.microbatch import Microbatches, in_chunks
from l3d.training import run
from l3d.training.options import GradientCache, Memory, Replacement

from helpers import assert_relative

pytestmark = pytest.mark.usefixtures("float64")


class Sequences(nn.Module):
    """Token sequences [B, 5] to logits [B, 5, 7]: an embedding, mixing along the sequence, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.norm = nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        hidden = self.norm(hidden + self.mix(hidden).cumsum(1).tanh())
        return hidden @ self.table.weight.T


def language() -> tuple[nn.Module, Any]:
    return Sequences(), torch.randint(7, (9, 5))


def images() -> tuple[nn.Module, Any]:
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(36, 3)]
    return nn.Sequential(*layers), torch.randn(9, 2, 7, 7)


def vectors() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (torch.randn(9, 4), torch.randn(9, 4))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "language, another sample": (language, {"divergence": "kl"}),
    "language, the mean": (language, {"divergence": "kl", "reference": "mean"}),
    "language, drawn positions": (language, {"divergence": "kl", "positions": 3}),
    "language, by row": (language, {"divergence": "kl", "reference": torch.randn(9, 5, 7)}),
    "images": (images, {"divergence": "kl"}),
    "images, uniform": (images, {"divergence": "kl", "reference": "uniform"}),
    "pairs": (vectors, {"reference": "pair"}),
    "by sample": (vectors, {"reference": torch.randn(9, 3)}),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("size", [1, 4, 20])
@pytest.mark.parametrize("case", CASES)
def test_the_same_gradients(case: str, size: int) -> None:
    """Chunks appended are the batch: references and positions are drawn for the whole of it."""
    make, choices = CASES[case]
    model, inputs = make()
    choices = {name: each.to(torch.float64) if isinstance(each, Tensor) else each for name, each in choices.items()}
    extractor = Extractor(model, **choices)
    expected = extractor(inputs, generator())
    chunks = Microbatches(extractor, inputs, generator, size, None)
    assert len(chunks) == -(-9 // size)
    found = concatenate([chunks(i) for i in range(len(chunks))])
    assert found.n_samples == expected.n_samples
    for (name, grad), wanted in zip(found.materialize().items(), expected.materialize().values(), strict=True):
        assert_relative(grad, wanted, 1e-12), name


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("k, n_groups", [(0.05, 1), (1.0, 1), (0.2, 3)])
@pytest.mark.parametrize("case", ["language, another sample", "images", "pairs"])
def test_the_same_objective(case: str, k: float, n_groups: int, size: int) -> None:
    """Kept set, loss, residuals and every derivative are those of the whole batch, restarts side by side too."""
    make, choices = CASES[case]
    model, inputs = make()
    extractor = Extractor(model, **choices)
    shapes = {name: p.shape for name, p in extractor.parameters.items()}
    d = Decomposition(shapes, 12, 2, generator=generator())
    with torch.no_grad():
        for p in d.encoder.parameters():  # no copy of the decoder
            p.add_(torch.randn(p.shape, generator=generator()) / 10)
    expected = objective(extractor(inputs, generator()), d.encoder, d.decoder, k, Plan(n_groups=n_groups))
    gradients = torch.autograd.grad(expected.loss.sum(), list(d.parameters()))
    chunks = Microbatches(extractor, inputs, generator, size, None)
    for batch in (Chunks(chunks, len(chunks)), Chunks.of(extractor(inputs, generator()), size * 5)):
        found, derivatives = objective_in_chunks(batch, d.encoder, d.decoder, k, Plan(n_groups=n_groups))
        assert torch.equal(found.kept.rows, expected.kept.rows)
        assert torch.equal(found.kept.columns, expected.kept.columns)
        assert_relative(found.loss, expected.loss, 1e-12)
        assert_relative(found.residual, expected.residual, 1e-11)
        for ours, wanted in zip(derivatives, gradients, strict=True):
            assert_relative(ours, wanted, 1e-10)


@pytest.mark.parametrize("changes", [{}, {"n_restarts": 2}, {"recompute": True}, {"cache": "c"}])
def test_the_same_run(changes: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run, subnetworks revived, is that of whole batches to rounding; a cached one reads slices."""
    monkeypatch.chdir(tmp_path)
    model, data = language()
    preset = dataclasses.replace(l3d.PRESETS["default"], replacement=Replacement(restart_every=4))
    arguments = {"n_subnetworks": 12, "rank": 2, "k": 0.02, "steps": 30, "batch_size": 4, "lr": 0.01}
    arguments |= {"warm_start": 2, "divergence": "kl", "callbacks": [], "preset": preset}
    changes = dict(changes)
    memory = Memory(micro_batch_size=3, recompute=changes.pop("recompute", False))
    whole = l3d.decompose(model, data, **arguments, **{k: v for k, v in changes.items() if k == "n_restarts"})
    parts = l3d.decompose(model, data, memory=memory, **arguments, **changes)
    if "cache" in changes:  # whose batches repeat
        whole = l3d.decompose(model, data, **arguments, cache=GradientCache("other", reads="on"))
    assert_relative(parts.history["error"], whole.history["error"], 1e-9)
    assert parts.history["dead_fraction"] == whole.history["dead_fraction"]
    assert max(whole.history["dead_fraction"]) > 0
    for ours, wanted in zip(parts.parameters(), whole.parameters(), strict=True):
        assert_relative(ours, wanted, 1e-7)


def test_bfloat16_factors_are_summed_in_the_wider_dtype() -> None:
    """Held in half the bytes, factors give what the same rounded numbers give when they are held wide."""
    model, data = language()
    wide = Extractor(model, "kl")(data, generator())
    narrow = wide.held_in(torch.bfloat16)
    floating = sum(t.nbytes for _, t in wide.tensors() if t.is_floating_point())
    assert wide.nbytes() - narrow.nbytes() == floating * 3 // 4  # of float64
    rounded = narrow.held_in(torch.float64)
    d = Decomposition(wide.shapes, 6, 2, generator=generator())
    for k in (0.1, 1.0):
        found, expected = (objective(g, d.encoder, d.decoder, k) for g in (narrow, rounded))
        assert_relative(found.loss, expected.loss, 1e-14)
        assert 1e-7 < abs((found.loss - objective(wide, d.encoder, d.decoder, k).loss).item()) < 1e-2
    chosen = torch.tensor([7, 0, 3])
    for a, b in zip(narrow.select(chosen).tensors(), rounded.select(chosen).tensors(), strict=True):
        assert torch.equal(a[1], b[1])


def test_recomputing_holds_one_chunk_at_a_time() -> None:
    """With recompute a chunk is extracted for each pass; held, once."""
    model, data = language()
    for keep, calls in ((True, 3), (False, 6)):
        made = []

        class Counting(Extractor):
            def __call__(self, *arguments: Any, made: list = made) -> Gradients:
                made.append(1)
                return super().__call__(*arguments)

        extractor = Counting(model, "kl")
        d = Decomposition({name: p.shape for name, p in extractor.parameters.items()}, 4, 1)
        chunks = in_chunks(Microbatches(extractor, data, generator, 3, None), keep, lambda gradients: gradients)
        objective_in_chunks(chunks, d.encoder, d.decoder, 0.5)
        assert len(made) == calls


def test_an_exchange_holds_no_more_with_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the chunks that an exchange looks at few are at hand at once; held, all are. The result is the same."""
    held, exchanged = run.Run._held, run.exchange
    alive: weakref.WeakValueDictionary[int, Gradients] = weakref.WeakValueDictionary()
    most, looked_at = [0], []

    def count(self: run.Run, gradients: Gradients) -> Gradients:
        gradients = held(self, gradients)
        alive[id(gradients)] = gradients
        most[0] = max(most[0], len(alive))
        return gradients

    def look(*arguments: Any) -> torch.Tensor:
        most[0] = 0
        changed = exchanged(*arguments)
        looked_at.append(max(most[0], len(alive)))
        return changed

    monkeypatch.setattr(run.Run, "_held", count)
    monkeypatch.setattr(run, "exchange", look)
    model, data = language()
    arguments = {"n_subnetworks": 6, "rank": 2, "k": 0.1, "steps": 12, "batch_size": 8, "warm_start": 0}
    preset = dataclasses.replace(l3d.PRESETS["default"], replacement=Replacement(multiplied_out=1, replace_every=8))
    arguments |= {"divergence": "kl", "callbacks": [], "preset": preset}
    errors = []
    for recompute in (False, True):
        d = l3d.decompose(model, data, memory=Memory(1, recompute), **arguments)
        errors.append(d.history["error"])
        del d
        gc.collect()
        alive.clear()
    assert_relative(errors[1], errors[0], 1e-9)
    all_of_them, few = looked_at
    assert all_of_them >= 8
    assert few <= 2


def test_rows_of_every_kind_of_batch() -> None:
    """Tensors, mappings with what is no tensor of rows, and pairs are cut; what has no rows is refused."""
    x = torch.arange(6)[:, None]
    assert rows_of(x, slice(2, 4)).tolist() == [[2], [3]]
    mapping = rows_of({"x": x, "mask": x[:3], "flag": True}, slice(1, 3))
    assert (mapping["x"].tolist(), len(mapping["mask"]), mapping["flag"]) == ([[1], [2]], 3, True)
    pair = rows_of((x, {"y": x}), slice(5, 6))
    assert (pair[0].tolist(), pair[1]["y"].tolist()) == ([[5]], [[5]])
    assert count_rows_of([x, 3]) == 6
    with pytest.raises(ValueError, match="data: a batch can only be split by rows if it holds tensors, got str"):
        count_rows_of("abc")


def test_a_senseless_size_is_refused() -> None:
    """As every size is, in one line."""
    model, data = language()
    for size in (0, -1, 2.5):
        with pytest.raises(ValueError, match=rf"micro_batch_size: expected a positive whole number, got {size}"):
            l3d.decompose(model, data, memory=Memory(size), divergence="kl", steps=1)


def test_padding_anywhere_in_a_batch_is_refused_by_every_part_of_it() -> None:
    """So that several processes refuse it alike, also those whose own rows have none."""

    class Masked(Sequences):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids)

    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[3, 4] = 0
    batch = {"input_ids": torch.zeros(4, 5, dtype=torch.int64), "attention_mask": mask}
    parts = Microbatches(Extractor(Masked().eval(), "kl", "uniform"), batch, torch.Generator, 2, None)
    for index in range(2):
        with pytest.raises(ValueError, match="attention_mask: a batch with padding cannot be split"):
            parts(index)
