"""Draw batches: every row once an epoch, in an order that only the seed and the epoch decide."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from l3d.data.batches import Batches, count_rows, in_order, mix, take


class Rows(Dataset):
    """A map-style Dataset of numbers."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        assert type(index) is int
        return torch.tensor(float(index))


class Endless(IterableDataset):
    """A stream that never ends and yet claims a length."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return itertools.repeat(torch.zeros(2, 3))


def numbers(n: int) -> Tensor:
    return torch.arange(n)


def epoch_of(batches: Batches, epoch: int) -> list[list[int]]:
    assert batches.per_epoch is not None
    first = epoch * batches.per_epoch
    return [[int(row) for row in batches[step]] for step in range(first, first + batches.per_epoch)]


@pytest.mark.parametrize("kind", [numbers, Rows], ids=["tensor", "dataset"])
@pytest.mark.parametrize("n, batch_size", [(12, 4), (14, 4), (3, 8), (8, 8), (2, 8), (5, 1), (1, 1)])
def test_an_epoch_covers_every_row_once(kind: Any, n: int, batch_size: int) -> None:
    """Batches are of the size asked for, the last maybe smaller, and hold every row exactly once an epoch."""
    batches = Batches(kind(n), batch_size, seed=0)
    for epoch in range(3):
        drawn = epoch_of(batches, epoch)
        assert all(drawn), "a batch without rows"
        assert sorted(itertools.chain(*drawn)) == list(range(n))
        assert [len(batch) for batch in drawn[:-1]] == [batch_size] * (len(drawn) - 1)


@pytest.mark.parametrize("n, batch_size", [(13, 4), (9, 8), (3, 2)])
def test_a_last_batch_of_one_row_is_left_out(n: int, batch_size: int) -> None:
    """One row has no other to refer to: it waits for another epoch, and each epoch leaves out another."""
    batches = Batches(numbers(n), batch_size, seed=0)
    left_out = set()
    for epoch in range(40):
        drawn = list(itertools.chain(*epoch_of(batches, epoch)))
        assert len(drawn) == len(set(drawn)) == n - 1
        left_out |= set(range(n)) - set(drawn)
    assert left_out == set(range(n))


def test_a_single_row_is_a_batch() -> None:
    """Where there is but one row it is not left out."""
    assert epoch_of(Batches(numbers(1), 4, seed=0), 0) == [[0]]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    """Any step can be asked for first, and again, whatever the global generator holds; seeds and epochs differ."""
    one, other = Batches(numbers(50), 8, seed=3), Batches(numbers(50), 8, seed=3)
    forward = [one[step].tolist() for step in range(30)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    backward = [other[step].tolist() for step in reversed(range(30))]
    assert forward == backward[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    epochs = [list(itertools.chain(*forward[7 * e : 7 * e + 7])) for e in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(50))
    assert Batches(numbers(50), 8, seed=4)[0].tolist() != forward[0]


def test_a_dataset_is_read_in_the_tensor_s_order() -> None:
    """Tensor and Dataset of one length and seed give the same rows in the same order."""
    tensor, dataset = Batches(numbers(20), 6, seed=1), Batches(Rows(20), 6, seed=1)
    assert [tensor[s].tolist() for s in range(8)] == [dataset[s].long().tolist() for s in range(8)]


@pytest.mark.parametrize(
    "stream",
    [
        [1, 2, 3],
        (1, 2, 3),
        DataLoader(numbers(6), batch_size=2),
        DataLoader(Rows(6), batch_size=2),
    ],
    ids=["list", "tuple", "loader of a tensor", "loader of a dataset"],
)
def test_streams_start_over_when_they_end(stream: Any) -> None:
    """Batches of an iterable come as they are, in order, again and again."""
    batches = Batches(stream, 4, seed=0)
    assert batches.per_epoch is None
    drawn = [batches[step] for step in range(7)]
    plain = [str(b.tolist() if isinstance(b, Tensor) else b) for b in drawn]
    assert plain == (plain[:3] * 3)[:7]
    assert len(set(plain)) == 3


def test_a_resumed_stream_skips_what_was_seen() -> None:
    """Asked for step 5 first, a stream gives its sixth batch, over its end too."""
    assert Batches([10, 11, 12, 13], 4, seed=0)[5] == 11
    generator = iter(range(100))
    assert Batches(generator, 4, seed=0)[5] == 5
    assert next(generator) == 6  # no more is read than asked for


@pytest.mark.parametrize("n", [0, 1, 3])
def test_an_exhausted_stream_says_how_far_it_came(n: int) -> None:
    """An iterator that cannot start over ends with the number of batches it gave."""
    batches = Batches(iter(range(n)), 4, seed=0)
    assert [batches[step] for step in range(n)] == list(range(n))
    with pytest.raises(ValueError, match=rf"data: the iterable ended after {n} batches"):
        _ = batches[n]


@pytest.mark.parametrize("kind", [numbers, Rows], ids=["tensor", "dataset"])
@pytest.mark.parametrize("n, batch_size", [(12, 4), (14, 4), (13, 4), (3, 8), (1, 4), (2, 1), (5, 1), (9, 8), (3, 2)])
def test_in_order_covers_everything_once(kind: Any, n: int, batch_size: int) -> None:
    """Every row comes once, in order; none is left out, and no batch but a lone row's has fewer than two."""
    batches = [[int(row) for row in batch] for batch in in_order(kind(n), batch_size)]
    assert list(itertools.chain(*batches)) == list(range(n))
    sizes = [len(batch) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert sizes[-1] <= batch_size + 1
    if n > 1 and batch_size > 1:
        assert min(sizes) > 1


def test_in_order_reads_a_stream_once_as_it_is() -> None:
    """Batches of an iterable pass through unchanged, once."""
    x = numbers(6)
    for stream in (list(x.split(2)), DataLoader(x, batch_size=2), (batch for batch in x.split(2))):
        assert [batch.tolist() for batch in in_order(stream, 100)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("batch_size", [0, -3])
def test_in_order_refuses_a_batch_size_below_one(batch_size: int) -> None:
    """A size that would yield nothing is an error that names it, not an empty pass."""
    with pytest.raises(ValueError, match="batch_size"):
        list(in_order(numbers(6), batch_size))


@pytest.mark.parametrize("empty", [torch.zeros(0, 3), Rows(0)], ids=["tensor", "dataset"])
def test_no_rows_are_refused(empty: Any) -> None:
    """Data without rows is refused by both readers, at once."""
    with pytest.raises(ValueError, match="data: expected at least one sample, got none"):
        Batches(empty, 4, seed=0)
    with pytest.raises(ValueError, match="data: expected at least one sample, got none"):
        list(in_order(empty, 4))


def test_no_batches_are_refused() -> None:
    """An iterable without batches is refused when it is read."""
    with pytest.raises(ValueError, match="data: expected at least one batch, got none"):
        list(in_order([], 4))


@pytest.mark.parametrize(
    "data, expected",
    [
        (torch.zeros(7, 2), 7),
        (torch.zeros(0), 0),
        (Rows(5), 5),
        (TensorDataset(torch.zeros(4, 1), torch.zeros(4)), 4),
        ([1, 2, 3], None),
        (DataLoader(Rows(5), batch_size=2), None),
        (iter([]), None),
        (Endless(), None),
        (3, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_count_rows(data: Any, expected: int | None) -> None:
    """Tensors and Datasets have rows; whatever is read as batches has none, an IterableDataset with a length too."""
    assert count_rows(data) == expected


@pytest.mark.parametrize("bad", [3, None, object(), 2.5], ids=lambda value: type(value).__name__)
def test_what_holds_no_data_is_refused(bad: Any) -> None:
    """Anything that is neither rows nor iterable is refused by its type's name."""
    with pytest.raises(ValueError, match=rf"data: expected .* got {type(bad).__name__}"):
        Batches(bad, 4, seed=0)


def test_a_batch_size_below_one_is_refused() -> None:
    """No batch is smaller than a row."""
    with pytest.raises(ValueError, match="batch_size: expected a positive whole number, got 0"):
        Batches(numbers(3), 0, seed=0)


def test_take_collects_rows_in_the_order_asked_for() -> None:
    """Rows of tensors and Datasets are gathered by number; rows of pairs become a pair of batches."""
    assert take(10 * numbers(5), torch.tensor([3, 0, 3])).tolist() == [30, 0, 30]
    assert take(Rows(5), torch.tensor([3, 0, 3])).tolist() == [3, 0, 3]
    x, y = take(TensorDataset(numbers(5), -numbers(5)), range(1, 3))
    assert (x.tolist(), y.tolist()) == ([1, 2], [-1, -2])


def test_mix_depends_on_every_number_and_its_place() -> None:
    """Seeds mixed from different numbers, orders or lengths differ, fit a generator, and are the same everywhere."""
    inputs = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**63,), (-1,), *((7, step) for step in range(2000))]
    seeds = [mix(*numbers) for numbers in inputs]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)
    assert mix(0) == 0xE220A8397B1DCDAF % 2**63  # splitmix64's first output for seed 0, as published


def test_a_tuple_of_two_tensors_says_how_to_pass_pairs_or_batches() -> None:
    """(x, labels) looks like two batches; as a list, or where the lengths differ, it is."""
    x, labels = torch.randn(6, 2), torch.zeros(6)
    for read in (count_rows, lambda data: Batches(data, 4, seed=0), lambda data: list(in_order(data, 4))):
        with pytest.raises(ValueError, match=r"data: a tuple of two tensors .*TensorDataset\(x, y\) for rows that are"):
            read((x, labels))
    assert len(list(in_order([x, x], 4))) == len(list(in_order((x, x[:4]), 4))) == 2
