"""Match two decompositions one to one as scipy does, and measure their similarity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from l3d.analysis.consistency import Consistency, consistency, match
from l3d.api import Decomposition

from helpers import assert_relative

SHAPES = {"a": torch.Size([6, 5]), "b": torch.Size([6]), "c": torch.Size([4, 3, 2])}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 6), st.integers(0, 10**6), st.booleans())
def test_the_match_is_the_best_there_is(n_rows: int, more: int, seed: int, ties: bool) -> None:
    """One to one, and of the same total as scipy's, also with equal and negative scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_rows, n_rows + more, generator=generator, dtype=torch.float64)
    scores = scores.round() if ties else scores
    columns = match(scores)
    assert len(set(columns.tolist())) == n_rows
    rows, best = linear_sum_assignment(scores.numpy(), maximize=True)
    total = scores[torch.arange(n_rows), columns].sum()
    assert_relative(total + 100, scores.numpy()[rows, best].sum() + 100, 1e-12)


def test_two_decompositions_are_matched_whatever_order_sign_and_scale() -> None:
    """A permuted, flipped and rescaled copy is found again with |cos| 1; another one by the cosines multiplied out."""
    first, other = (
        Decomposition(SHAPES, 5, {"a": 2, "c": [2, 2, 1]}, generator=torch.Generator().manual_seed(seed)).double()
        for seed in (0, 1)
    )
    second = Decomposition(SHAPES, 5, {"a": 2, "c": [2, 2, 1]}).double()
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        for target, source in zip(second.parameters(), first.parameters(), strict=True):
            target.copy_(source[order])
        second.decoder.pieces[0].left.mul_(-3)
        second.decoder.pieces[1].vector.mul_(-3)
        second.decoder.pieces[2].core.mul_(-3)
    same = consistency(first, second)
    assert_relative(same.cosines, torch.ones(5), 1e-6)
    assert torch.equal(order[same.partners], torch.arange(5))
    flat = [
        torch.stack([torch.cat([t.flatten() for t in d.subnetwork(k).values()]) for k in range(5)])
        for d in (first, other)
    ]
    cosines = torch.nn.functional.normalize(flat[0]) @ torch.nn.functional.normalize(flat[1]).mT
    rows, best = linear_sum_assignment(cosines.abs().numpy(), maximize=True)
    found = consistency(first, other)
    assert_relative(found.cosines, cosines.abs()[torch.from_numpy(rows), torch.from_numpy(best)], 1e-6)
    assert found.mean == pytest.approx(float(found.cosines.mean()))


def test_what_cannot_be_matched_is_refused() -> None:
    """More rows than columns, scores that are no numbers, other parameters."""
    with pytest.raises(ValueError, match=r"scores: expected \[rows, columns\]"):
        match(torch.ones(3, 2))
    with pytest.raises(ValueError, match="scores: holds NaN"):
        match(torch.tensor([[float("nan")]]))
    small, large = Decomposition(SHAPES, 2, 1), Decomposition(SHAPES, 3, 1)
    with pytest.raises(ValueError, match="first: expected no more subnetworks"):
        consistency(large, small)
    with pytest.raises(ValueError, match="second: expected a decomposition of the same parameters"):
        consistency(small, Decomposition({"a": torch.Size([6, 5])}, 3, 1))


def test_a_consistency_is_shown_in_one_line() -> None:
    """The number of pairs and their |cos|, never the arrays."""
    found = Consistency(torch.tensor([0.25, 1.0, 0.5]), torch.arange(3))
    assert repr(found) == "Consistency(3 pairs; |cos| mean 0.5833, median 0.5, min 0.25)"
