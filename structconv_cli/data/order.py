"""Which examples make each batch of an epoch, and the seed of each batch's augmentation.

Both follow from (seed, epoch, step, rank) alone: an epoch can be repeated on any machine, with any
number of workers, without the epochs before it, and whatever else draws random numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shuffle:
    """The random order and augmentation of one epoch: equal ones give equal batches.

    Attributes:
        seed: of the whole training, at least 0.
        epoch: counted from 0.
    """

    seed: int
    epoch: int

    def order(self, count: int) -> Tensor:
        """Permute the indices 0 to `count` - 1: int64 (count,)."""
        generator = torch.Generator().manual_seed(self._state())
        return torch.randperm(count, generator=generator)

    def batch_seed(self, step: int, rank: int) -> int:
        """Seed of the augmentation of one batch."""
        return self._state(step, rank)

    def _state(self, *of: int) -> int:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, *of))
        # torch takes 64 bits, of which the highest is a sign.
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_indices(
    count: int,
    batch_size: int,
    *,
    shuffle: Shuffle | None = None,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
) -> list[Tensor]:
    """Indices of each batch that `rank` of `world` takes in one epoch, each int64 (B,).

    The ranks share no example, and together they have all. With `drop_last` every rank has equally
    many batches of `batch_size`, and fewer than `world` x `batch_size` examples are left out; where
    they do not even make one batch for each, there is one smaller batch for each.

    Raises:
        ValueError: `batch_size` or `world` is below 1, or `rank` is none of theirs.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, expected 0 to {world - 1}")
    order = torch.arange(count) if shuffle is None else shuffle.order(count)
    share = order[rank::world]
    if drop_last:
        least = count // world
        size = min(batch_size, least)
        share = share[: least // size * size if size else 0]
        return list(torch.split(share, size)) if size else []
    return list(torch.split(share, batch_size)) if len(share) else []
