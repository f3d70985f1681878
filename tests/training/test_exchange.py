"""Exchange subnetworks: what each is worth, what a candidate gains, and runs cut off before an exchange."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.training.candidates import NO_CHUNKS, ProbeGradients
from l3d.training.checkpoints import save
from l3d.training.exchange import Code, Probe, choose, confirmed, exchange, refitted, worths
from l3d.training.options import Replacement
from l3d.training.settings import Settings, resolve


def settings(**changes: object) -> Settings:
    return resolve({"n_subnetworks": 4, "rank": 1, "k": 0.25, "steps": 1000, "backend": "torch", **changes}, 64)


def coded(directions: Tensor, gradients: Tensor, values: Tensor) -> Code:
    return Code(values, gradients @ directions.mT, directions @ directions.mT)


def test_worth_is_what_the_residuals_grow_by() -> None:
    """Against residuals formed in full, each sample then left to the best single other subnetwork."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(20, 9, generator=generator, dtype=torch.float64)
    v = nn.functional.normalize(torch.randn(5, 9, generator=generator, dtype=torch.float64), dim=1)
    c = torch.randn(20, 5, generator=generator, dtype=torch.float64) * (torch.rand(20, 5, generator=generator) < 0.4)
    code = coded(v, g, c)
    found = worths(code, code.residual_overlaps(), torch.tensor([True] * 4 + [False]))
    assert found[4] == torch.inf  # no member, and no help to those that are
    r = g - c @ v
    for k in range(4):
        expected = 0.0
        for s in c[:, k].nonzero()[:, 0].tolist():
            freed = r[s] + c[s, k] * v[k]
            help_ = max(float(freed @ v[j]) ** 2 for j in range(4) if j != k)
            expected += float(freed @ freed - r[s] @ r[s]) - help_
        assert float(found[k]) == pytest.approx(expected, rel=1e-9)


def test_a_double_gives_way_to_what_nothing_reconstructs() -> None:
    """Two subnetworks share one circuit, a third circuit has none: one of the two is exchanged, and no other."""
    e = torch.eye(3, dtype=torch.float64)
    directions = torch.stack([e[0], e[0], e[1], e[2], e[1]])  # three subnetworks, two candidates
    gradients = e.repeat_interleave(10, 0)
    values = torch.zeros(30, 5, dtype=torch.float64)
    values[:5, 0] = values[5:10, 1] = values[10:20, 2] = 1
    pairs = choose(coded(directions, gradients, values), 3)
    assert [new for _, new in pairs] == [0]
    assert pairs[0][0] in (0, 1)


def least_squares(g: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Each sample's best values for the kept directions, by a solver, sample by sample: [S, K]."""
    values = torch.zeros(kept.shape, dtype=g.dtype)
    for s in range(len(g)):
        values[s, kept[s]] = torch.linalg.lstsq(v[kept[s]].mT, g[s, :, None]).solution[:, 0]
    return values


def test_refitted_values_are_those_of_least_squares() -> None:
    """As many steps as a sample has values are enough; none may go astray where two directions are one and the same."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(30, 9, generator=generator, dtype=torch.float64)
    v = nn.functional.normalize(torch.randn(4, 9, generator=generator, dtype=torch.float64), dim=1)
    kept = torch.rand(30, 4, generator=generator) < 0.6
    start = torch.randn(30, 4, generator=generator, dtype=torch.float64) * kept
    found = refitted(start, kept, g @ v.mT, v @ v.mT)
    torch.testing.assert_close(found, least_squares(g, v, kept), rtol=1e-9, atol=1e-9)
    twice = torch.cat([v, v]).float()
    both = torch.cat([kept, kept], 1)
    values = refitted(torch.zeros(30, 8), both, g.float() @ twice.mT, twice @ twice.mT)
    torch.testing.assert_close(values @ twice, (found @ v).float(), rtol=1e-4, atol=1e-4)


def test_what_the_largest_coefficients_do_not_confirm_is_dropped() -> None:
    """Against the loss with the batch's n largest coefficients, refitted by a solver, for every pair by itself."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    v = nn.functional.normalize(torch.randn(12, 9, generator=generator, dtype=torch.float64), dim=1)
    encoder = v[:5] + 0.1 * torch.randn(5, 9, generator=generator, dtype=torch.float64)
    code = coded(v, g, torch.zeros(40, 12, dtype=torch.float64))

    def left(columns: list[int], encoders: Tensor) -> Tensor:
        c = (g @ encoders.mT).abs()
        keep = c >= c.flatten().sort(descending=True).values[49]  # a quarter of 40 x 5
        return (g - least_squares(g, v[columns], keep) @ v[columns]).square().sum(1)

    before, answers = left([0, 1, 2, 3, 4], encoder), set()
    for old in range(5):
        for taken in range(7):
            columns, encoders = [0, 1, 2, 3, 4], encoder.clone()
            columns[old], encoders[old] = 5 + taken, v[5 + taken]
            less = before - left(columns, encoders)
            helps = bool(less.sum() > Replacement.standard_errors * less.square().sum().sqrt())
            answers.add(helps)
            assert confirmed([(old, taken)], code, g @ encoder.mT, 0.25) == ([(old, taken)] if helps else [])
    assert answers == {True, False}


def four_circuits(held: list[int]) -> tuple[ProbeGradients, l3d.Decomposition, Tensor]:
    """Samples of four orthogonal circuits of rank 1 and a little noise; subnetworks that hold some; all: [4, 6, 5]."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64)).Q.mT
    right = torch.linalg.qr(torch.randn(5, 4, generator=generator, dtype=torch.float64)).Q.mT
    circuits = left[:, :, None] * right[:, None, :]
    present = torch.arange(200) % 4
    gradients = circuits[present] * (0.5 + torch.rand(200, 1, 1, generator=generator, dtype=torch.float64))
    gradients = gradients + 0.02 * torch.randn(200, 6, 5, generator=generator, dtype=torch.float64)
    decomposition = l3d.Decomposition({"w": torch.Size([6, 5])}, len(held), 1, {}).double()
    with torch.no_grad():
        for side in (decomposition.encoder, decomposition.decoder):
            for parameter, factor in zip(side.parameters(), (left, right), strict=True):
                parameter.copy_(factor[held, None])
    return ProbeGradients(NO_CHUNKS, gradients.flatten(1), "torch"), decomposition, circuits


def test_an_exchange_finds_the_circuit_that_is_missing() -> None:
    """Two of four subnetworks hold the same circuit: one of them becomes the fourth's, encoder and decoder alike."""
    samples, d, circuits = four_circuits([0, 1, 2, 2])
    (changed,) = exchange(samples, d, 0.25, torch.Generator().manual_seed(1)).tolist()
    assert changed in (2, 3)
    for side in (d.encoder, d.decoder):
        assert abs(float((side.tensors(changed)["w"].detach() * circuits[3]).sum())) > 0.999


def test_what_the_exchanged_one_leaves_behind_is_not_forgotten() -> None:
    """No residual by itself is worth a place, but the residual and what a poor subnetwork holds are, together."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.zeros(200, 6, dtype=torch.float64)
    gradients[:100, 0], gradients[:100, 1], gradients[100:, 2] = 1, 0.5, 2
    gradients += 0.01 * torch.randn(200, 6, generator=generator, dtype=torch.float64)
    d = l3d.Decomposition({"w": torch.Size([6])}, 2, 1, {}).double()
    with torch.no_grad():
        for side, size in ((d.encoder, 0.5), (d.decoder, 1.0)):  # the encoder reads the first circuit at half its size
            (vectors,) = side.parameters()
            vectors.zero_()
            vectors[0, 0], vectors[1, 2] = size, 1
    samples = ProbeGradients(NO_CHUNKS, gradients, "torch")
    assert exchange(samples, d, 0.5, torch.Generator().manual_seed(1)).tolist() == [0]
    circuit = nn.functional.normalize(torch.tensor([1, 0.5, 0, 0, 0, 0], dtype=torch.float64), dim=0)
    assert abs(float(d.decoder.tensors(0)["w"].detach() @ circuit)) > 0.94  # nearer than what was there, at .894


def test_a_probe_is_the_last_batches_before_an_exchange() -> None:
    """As many as give each subnetwork samples enough; a run that goes on asks for those it missed."""
    probe = Probe(settings(), 16, n_entries=10**6)  # 64 / .25 = 256 samples
    assert probe.length == 16
    assert [step for step in range(1001) if probe.due(step)] == list(range(200, 801, Replacement.replace_every))
    assert probe.missed(195) == range(184, 195)
    assert not any(probe.missed(step) for step in (50, 150, 184, 200, 850, 1000))
    assert Probe(settings(), 4096, n_entries=10**6).length == 1
    assert Probe(settings(), 16, n_entries=100).length == 64  # 1,024 samples of a few parameters
    assert not any(Probe(settings(preset="published"), 16, n_entries=100).due(step) for step in range(1001))


def test_many_restarts_take_turns() -> None:
    """Up to four are all looked at every time; of ten each is within three exchanges."""
    probe = Probe(settings(), 16, n_entries=100)
    assert [probe.turn(200, n) for n in (1, 2, 4)] == [[0], [0, 1], [0, 1, 2, 3]]
    assert all(len(probe.turn(step, 10)) == 4 for step in range(200, 1000, Replacement.replace_every))
    for step in range(200, 800, Replacement.replace_every):
        assert {i for later in range(3) for i in probe.turn(step + later * Replacement.replace_every, 10)} == set(
            range(10)
        )


def test_a_run_cut_off_before_an_exchange_ends_in_the_same_bits(tmp_path: Path) -> None:
    """The checkpoint lies among the batches that the exchange looks at."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(64, 6)

    def run(out: Path, resume: bool = False) -> l3d.Decomposition:
        arguments = {"n_subnetworks": 5, "rank": 1, "k": 0.2, "steps": 160, "warm_start": 0, "checkpoint_every": 95}
        return l3d.decompose(model, data, **arguments, callbacks=[], out=out, existing="resume" if resume else "refuse")  # type: ignore[arg-type]

    whole = run(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:

        def save_and_stop(*arguments: object) -> None:
            save(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        patch.setattr("l3d.train.save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    again = run(tmp_path / "cut", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
