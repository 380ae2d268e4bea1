from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structconv_cli.data.order import Shuffle, batch_indices

counts, sizes, worlds = st.integers(0, 60), st.integers(1, 20), st.integers(1, 4)
shuffles = st.none() | st.builds(Shuffle, st.integers(0, 2**40), st.integers(0, 99))


@given(counts, sizes, worlds, shuffles)
def test_ranks_share_an_epoch(count: int, size: int, world: int, shuffle: Shuffle | None):
    ranks = [
        batch_indices(count, size, shuffle=shuffle, rank=rank, world=world) for rank in range(world)
    ]
    taken = [index for batches in ranks for batch in batches for index in batch.tolist()]
    assert sorted(taken) == list(range(count))
    assert all(0 < len(batch) <= size for batches in ranks for batch in batches)


@given(counts, sizes, worlds, shuffles)
def test_ranks_train_in_step(count: int, size: int, world: int, shuffle: Shuffle | None):
    ranks = [
        batch_indices(count, size, shuffle=shuffle, rank=rank, world=world, drop_last=True)
        for rank in range(world)
    ]
    taken = [index for batches in ranks for batch in batches for index in batch.tolist()]
    assert len(set(taken)) == len(taken)
    lengths = {tuple(len(batch) for batch in batches) for batches in ranks}
    assert len(lengths) == 1
    expected = min(size, count // world)
    assert set(lengths.pop()) <= {expected}
    assert count - len(taken) < world * max(expected, 1)


def test_orders_are_those_of_seed_and_epoch():
    orders = [tuple(Shuffle(s, e).order(50).tolist()) for s, e in product(range(4), range(4))]
    assert len(set(orders)) == 16
    assert Shuffle(2, 1).order(50).tolist() == list(orders[9])
    # On every machine: else an interrupted training would go on with other batches.
    assert Shuffle(3, 5).order(8).tolist() == [2, 6, 5, 1, 7, 0, 4, 3]


def test_batch_seeds_differ():
    seeds = {Shuffle(s, e).batch_seed(t, r) for s, e, t, r in product(range(3), repeat=4)}
    assert len(seeds) == 81


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    batch_indices(20, 4, shuffle=Shuffle(0, 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("size", "rank", "world", "told"),
    [(0, 0, 1, "batch_size"), (1, 1, 1, "rank"), (1, -1, 2, "rank"), (1, 0, 0, "rank")],
)
def test_nonsense_is_refused(size: int, rank: int, world: int, told: str):
    with pytest.raises(ValueError, match=told):
        batch_indices(4, size, rank=rank, world=world)
