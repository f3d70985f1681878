"""Accept callers' modes, data that run out or shuffle, and models that write into their inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import l3d
from l3d.callbacks import Callback
from l3d.data.batches import Batches, in_order
from l3d.gradients.extract import Extractor
from l3d.training.exchange import Probe

from helpers import assert_relative

SETTINGS: dict[str, Any] = {"n_subnetworks": 4, "rank": 1, "steps": 30, "progress": False}


class Shifting(nn.Module):
    """A network that scales its input, by itself or in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(1.0).div_(2.0) if self.in_place else (x - 1) / 2
        return self.second(torch.tanh(self.first(x)))


def network() -> nn.Module:
    return Shifting(False)


def points(n: int = 64) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(2))


def trained(**changes: Any) -> l3d.Decomposition:
    return l3d.decompose(network(), points(), **(SETTINGS | changes))


# --- models that write into their input -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: list(x.split(16))], ids=["tensor", "batches"])
def test_data_are_left_as_they_were(kind: Callable[[Tensor], Any]) -> None:
    """A network that changes its input in place trains and scores as its twin does, and the caller keeps the data."""
    results = []
    for in_place in (False, True):
        model, x = Shifting(in_place), points()
        d = l3d.decompose(model, kind(x), **SETTINGS)
        results.append((d.history["error"][-1], d.impact(model, x), d.evaluate(model, x).error))
        assert torch.equal(x, points())
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


# --- data ---------------------------------------------------------------------------------------------------------


class Singles(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(points())


@pytest.mark.parametrize(
    "data", [list(points()), [(row, 0) for row in points()], Singles()], ids=["rows", "labelled", "stream"]
)
def test_rows_are_not_taken_for_batches(data: Any) -> None:
    """A row's entries are no rows, nor its outputs samples."""
    with pytest.raises(ValueError, match=r"^data: expected batches of rows, got a single row of 4 entries"):
        l3d.decompose(network(), data, **SETTINGS)


def test_rows_of_one_number_are_rows() -> None:
    """What takes a vector of numbers, or of ids, row by row, may be given one."""

    class Curve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -0.5, 0.3]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x, x**2, x**3], 1) @ self.weight

    assert l3d.extract_gradients(Curve(), points()[:, 0]).n_samples == 64
    assert l3d.extract_gradients(nn.Embedding(5, 3), torch.arange(5)).n_samples == 5


@pytest.mark.parametrize("as_mapping", [False, True])
def test_what_an_epoch_leaves_over(as_mapping: bool) -> None:
    """A last batch of one row is left out in training, and joins the one before where all rows are scored."""
    rows = points(33)

    class Keyed(Shifting):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs)

    model = Keyed(False)
    data = [{"inputs": batch} for batch in rows.split(16)] if as_mapping else DataLoader(TensorDataset(rows), 16)
    d = l3d.decompose(model, data, **SETTINGS)
    assert set(d.history["kept_per_sample"][5:]) == {6 / 16}  # floor(.1·16·4 + ½) of sixteen rows in every step
    assert d.evaluate(model, data).n_samples == 33
    assert d.impact(model, data).shape == (33, 4)


def test_single_rows_in_between_are_batches() -> None:
    """Only what an epoch leaves over at its end is left out; a long text alone in its batch is not."""
    rows = list(points(33).split([16, 1, 15, 1]))
    batches = Batches(rows, 16, 0)
    assert [len(batches[step]) for step in range(7)] == [16, 1, 15, 16, 1, 15, 16]
    assert [len(batch) for batch in in_order(rows, 16)] == [16, 1, 16]
    assert [len(batch) for batch in in_order(iter(rows[:1]), 16)] == [16]
    assert [len(batch) for batch in in_order([rows[1], rows[3]], 16)] == [1, 1]
    alone = Batches([rows[1]], 16, 0)
    assert [len(alone[step]) for step in range(3)] == [1, 1, 1]


def test_batches_without_gradients_are_passed_over(tmp_path: Path) -> None:
    """Rows that are all the same have no difference to explain: such a batch ends no run, unless it is the first."""
    same, others = points(1).repeat(16, 1), list(points().split(16))
    d = l3d.decompose(network(), [others[0], same, *others[1:]], **SETTINGS)
    without = l3d.decompose(network(), others, **(SETTINGS | {"steps": 24}))
    assert d.history["step"] == [step for step in range(1, 31) if step % 5 != 2]
    assert len(d.history["error"]) == len(without.history["error"]) == 24
    assert 0 < d.history["error"][-1] < 1
    with pytest.raises(ValueError, match=r"^step 0: gradients: all zero in this batch"):
        l3d.decompose(network(), [same, *others], out=tmp_path / "run", **SETTINGS)


class Interrupting(Callback):
    def on_step(self, step: int, figures: Mapping[str, float]) -> None:
        if step == 197:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [3, 9], ids=["in between", "when exchanges are due"])
def test_batches_without_gradients_among_those_of_an_exchange(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanges keep their time and look at as many batches, and an interrupted run goes on to the same bits."""
    looked_at: list[int] = []
    take = Probe.take
    monkeypatch.setattr(Probe, "take", lambda probe: looked_at.append(len(probe.batches)) or take(probe))
    batches = list(points(160).split(16))
    batches[at] = points(1).repeat(16, 1)
    chosen: dict[str, Any] = SETTINGS | {"steps": 400, "checkpoint_every": 45}
    whole = l3d.decompose(network(), batches, **chosen)
    assert looked_at == [64, 64]  # after 200 and 300 steps
    with pytest.raises(KeyboardInterrupt):
        l3d.decompose(network(), batches, out=tmp_path / "run", callbacks=[Interrupting()], **chosen)
    resumed = l3d.decompose(network(), batches, out=tmp_path / "run", resume=True, **chosen)
    assert set(looked_at) == {64}
    assert all(p.isfinite().all() for p in whole.parameters())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert whole.history["step"] == [step for step in range(1, 401) if step % 10 != (at + 1) % 10]


@pytest.mark.parametrize("small", [True, False])
def test_a_batch_without_gradients_moves_nothing(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the directions nor what Adam remembers, by either way of taking steps."""
    if not small:
        monkeypatch.setattr("l3d.decomposition.flat.SMALL", 0)
    same, batch = points(1).repeat(16, 1), points(16)
    chosen = SETTINGS | {"lr": 0.1, "warm_start": 0, "reference": "mean"}
    one, two = (
        l3d.decompose(network(), [batch, *rest], **(chosen | {"steps": 1 + len(rest)})) for rest in ([], [same])
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_mapping_of_tensors_is_rows() -> None:
    """As a tokenizer returns them."""

    class Named(Shifting):
        def forward(self, points: Tensor, scale: Tensor) -> Tensor:
            return super().forward(points * scale)

    data = {"points": points(), "scale": torch.ones(64, 1)}
    d = l3d.decompose(Named(False), data, **SETTINGS)
    assert d.history["error"] == trained().history["error"]
    assert d.evaluate(Named(False), data).n_samples == 64
    for bad in ({"points": points(), "scale": torch.ones(3, 1)}, {"points": points(), "scale": 1.0}, {}):
        with pytest.raises(ValueError, match=r"^data: expected a mapping of tensors with one row for each sample"):
            l3d.decompose(Named(False), bad, **SETTINGS)


@pytest.mark.parametrize("bad", [[[0.1, 0.2]], ["text"]], ids=["lists", "strings"])
def test_batches_of_no_tensors(bad: Any) -> None:
    """Whatever the model makes of them, one line says what batches are."""
    with pytest.raises(ValueError, match=r"^data: expected batches that are a tensor or a mapping of tensors, got"):
        l3d.decompose(network(), bad, **SETTINGS)


def test_samples_of_a_loader_that_shuffles_have_no_numbers() -> None:
    """Every pass over it has another order, and top samples would be anybody's."""
    d, loader = trained(), DataLoader(TensorDataset(points()), 16, shuffle=True)
    for function in (l3d.impact, l3d.top_samples):
        with pytest.raises(ValueError, match=r"^data: this DataLoader shuffles"):
            function(d, network(), loader)
    assert d.evaluate(network(), loader).n_samples == 64


def test_an_iterator_may_be_gone_over_once() -> None:
    """All references of a batch are drawn in one pass; a second pass finds nothing, and says why."""
    d = trained()
    batches = iter(points().split(16))
    assert torch.equal(d.impact(network(), batches), d.impact(network(), points()))
    with pytest.raises(ValueError, match="an iterator can be read only once"):
        d.impact(network(), batches)


def test_a_tensor_of_references_does_not_follow_shuffled_rows() -> None:
    """Refused, in training and over several batches; one output for all is not."""
    x = points()
    own = network()(x).detach()
    with pytest.raises(ValueError, match=r"^reference: rows are shuffled in training"):
        l3d.decompose(network(), x, reference=own, batch_size=64, **SETTINGS)
    d = l3d.decompose(network(), x, reference=own.mean(0), **SETTINGS)
    assert 0 < d.evaluate(network(), x, reference=own.mean(0)).error < 1
    with pytest.raises(ValueError, match=r"^reference: this tensor has one output per sample of a single batch"):
        d.evaluate(network(), x, reference=torch.zeros(16, 3))
    assert d.evaluate(network(), x, reference=torch.zeros(64, 3), batch_size=64).n_samples == 64


def test_one_output_for_all_is_the_same_in_parts() -> None:
    """In micro-batches it is still for all, though a micro-batch may have as many rows as the output entries."""
    whole, parts = (trained(reference=torch.arange(3.0), batch_size=6, micro_batch_size=m) for m in (None, 3))
    assert parts.history["error"] == pytest.approx(whole.history["error"], rel=1e-4)
    one, each = torch.arange(3.0), torch.arange(3.0).repeat(3, 1)
    g, h = (l3d.extract_gradients(network(), points(3), reference=r).materialize() for r in (one, each))
    assert all(torch.equal(g[name], h[name]) for name in g)


# --- masks --------------------------------------------------------------------------------------------------------


def test_a_decoder_has_a_mask_of_its_own() -> None:
    """An encoder's mask says nothing of the decoder's positions, which are the output's."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=37, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 37, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 3:] = 0
    for length in (6, 4):
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :length]}
        assert l3d.extract_gradients(model, inputs, "kl", "mean", params="*.q.*").n_samples == 3 * length
        inputs["decoder_attention_mask"] = mask[:, :length]
        n_samples = int(mask[:, :length].sum())
        assert l3d.extract_gradients(model, inputs, "kl", "mean", params="*.q.*").n_samples == n_samples
    seen = {"input_ids": ids, "attention_mask": torch.ones_like(mask), "decoder_input_ids": ids}
    generators = [torch.Generator() for _ in range(2)]
    extractor = Extractor(model, "kl", "mean", "*.q.*")
    assert extractor.several([seen, seen], generators) is not None  # which knows no padding, and says so
    assert extractor.several([seen | {"decoder_attention_mask": mask}] * 2, generators) is None


def test_masks_are_ones_and_zeros() -> None:
    """A mask to be added, 0 where there is a token, would be read the wrong way round."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.table(input_ids))

    ids = torch.randint(0, 7, (4, 5))
    added = torch.zeros(4, 5)
    added[0, 3:] = -1e9
    with pytest.raises(ValueError, match=r"^attention_mask: expected 1 at tokens and 0 at padding"):
        l3d.extract_gradients(Reader(), {"input_ids": ids, "attention_mask": added}, "kl")


class Padded(nn.Module):
    """An encoder whose padding goes by another name than `attention_mask`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(ids), src_key_padding_mask=padding))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@pytest.mark.parametrize("params", ["encoder.layers.1.*", "encoder.layers.1.linear1.*", "head.*"])
def test_torch_s_fast_attention_is_not_taken(params: str) -> None:
    """What lies before the chosen parameters runs without autograd; the gradients are those with it."""
    torch.manual_seed(0)
    model = Padded().eval()
    inputs = {"ids": torch.randint(1, 30, (8, 6)), "padding": torch.arange(6) >= torch.randint(2, 7, (8, 1))}
    reference = torch.randn(48, 3)
    whole = l3d.extract_gradients(model, inputs, "kl", reference).materialize()
    part = l3d.extract_gradients(model, inputs, "kl", reference, params=params).materialize()
    assert part
    for name, gradient in part.items():
        assert_relative(gradient, whole[name], 1e-5)
    assert torch.backends.mha.get_fastpath_enabled()
    d = l3d.Decomposition({name: p.shape for name, p in model.named_parameters()}, 2, rank=1)
    assert l3d.top_logits(model, d, 0, inputs, n=2).raised.shape == (8, 6, 2)


# --- parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixes", [False, True], ids=["by rule", "slowly"])
def test_hooks_on_parameters_act(mixes: bool) -> None:
    """A hook that freezes a row of a table does so for every sample."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
            self.table.weight.register_hook(lambda g: g * (torch.arange(11) != 3)[:, None])

        def forward(self, ids: Tensor) -> Tensor:
            held = torch.tanh(self.table(ids))
            return self.head(held - held.mean(0) if mixes else held)

    ids = torch.cat([torch.full((4, 5), 3), torch.randint(4, 11, (4, 5))])
    gradients = l3d.extract_gradients(Table(), ids, "kl").materialize()["table.weight"]
    assert (gradients[:, 3] == 0).all()
    assert (gradients[:, 4:] != 0).any()


@pytest.mark.parametrize("module", [nn.EmbeddingBag, nn.Embedding])
def test_sparse_tables(module: type[nn.Module]) -> None:
    """Gradients that autograd keeps sparse are those of the dense table."""

    class Table(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.table, self.head = module(11, 6, sparse=sparse), nn.Linear(6, 5)

        def forward(self, ids: Tensor) -> Tensor:
            held = self.table(ids)
            held = held.mean(1) if held.ndim == 3 else held
            return self.head(held - held.mean(0))

    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(4))
    sparse, dense = (l3d.extract_gradients(Table(s), ids, reference="uniform").materialize() for s in (True, False))
    for name, gradient in dense.items():
        assert_relative(sparse[name], gradient, 1e-6)


def test_parameters_in_the_same_memory() -> None:
    """Tied by their data, each would be moved by what the other is; tied as one parameter they are one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight.data = model[0].weight.data
    with pytest.raises(ValueError, match=r"^params: '0.weight' and '2.weight' are two parameters in the same memory"):
        l3d.extract_gradients(model, points())
    assert set(l3d.extract_gradients(model, points(), params=["0.weight", "2.bias"]).shapes) == {"0.weight", "2.bias"}
    model[2].weight = model[0].weight
    assert set(l3d.extract_gradients(model, points(), params="*weight").shapes) == {"0.weight"}


# --- modes --------------------------------------------------------------------------------------------------------


def wide() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A network too large for the steps in numpy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 30)).eval()
    return model, torch.randn(64, 64), {"n_subnetworks": 40, "rank": 2, "steps": 12, "batch_size": 32}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_the_caller_s_mode(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    """Training and fine-tuning under no_grad and in inference mode are what they are outside."""
    model, x, settings = wide()
    data = TensorDataset(x, torch.zeros(64, 30))

    def run() -> tuple[list[float], list[float]]:
        d = l3d.decompose(model, x, progress=False, **settings)
        return d.history["error"], l3d.finetune(model, d, data, nn.functional.mse_loss, [0, 1], steps=3).losses

    outside = run()
    with mode():
        assert run() == outside


def test_own_sums_are_not_cast() -> None:
    """Under autocast the model runs in bfloat16, and what is made of its gradients in their own dtype."""
    model, x, settings = wide()
    outside = l3d.decompose(model, x, progress=False, **settings)
    gradients = l3d.extract_gradients(model, x)
    codes, loss = outside.encode(gradients), outside.loss(gradients, k=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outside.encode(gradients), codes)
        assert torch.equal(outside.loss(gradients, k=0.5), loss)
        inside = l3d.decompose(model, x, progress=False, **settings)
        assert torch.is_autocast_enabled("cpu")
    # the model's own rounding is some thousandths of its gradients; uncast sums keep that from growing
    assert inside.history["error"] == pytest.approx(outside.history["error"], abs=2e-3)
    assert inside.history["error"] != outside.history["error"]
    assert_relative(inside.decoder.squared_norm(), torch.ones(40), 1e-5)


def test_weights_that_are_moved_are_seen_under_autocast() -> None:
    """Copies that autocast holds of the weights are not those of before."""
    model, x, settings = wide()
    d = l3d.decompose(model, x, progress=False, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with l3d.intervene(model, d, {0: 5.0}):
            moved = model(x)
        assert torch.equal(model(x), before)
    assert (moved - before).abs().max() > 0.05


# --- numbers ------------------------------------------------------------------------------------------------------


def test_numpy_s_numbers_are_numbers() -> None:
    """As loops over np.arange and np.linspace give them."""
    d = trained(
        n_subnetworks=np.int64(4),
        steps=np.int64(30),
        k=np.float64(0.1),
        seed=np.int32(0),
        rank=1,
        n_restarts=np.int64(1),
    )
    assert d.history["error"] == trained().history["error"]
    assert type(d.settings["steps"]) is int
