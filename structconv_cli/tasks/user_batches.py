"""The batches that a user's task file gives, and the model's inputs in them.

Repeatable: torch's random state (by the trainer), Python's and NumPy's are set before each epoch,
and a loader's `generator`; a sampler's `set_epoch(epoch)` is called if it has one.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from structconv_cli.errors import TaskError
from structconv_cli.tasks.hooks import Hooks, kind_of
from structconv_cli.tasks.task import Batch
from structconv_cli.world import World

_CALIBRATION_EXAMPLES = 2048
_CALIBRATION_EPOCH, _SAMPLES_EPOCH = 1 << 20, 1 << 21
"""Stand for the order in which such examples are drawn: no epoch has it."""


@dataclass(frozen=True, eq=False)
class UserBatches:
    """What the loaders of a task file give.

    Attributes:
        hooks: the file's functions.
        batch_size: examples per step in this process.
        seed: of all that is random.
        world: the processes that train together.
    """

    hooks: Hooks
    batch_size: int
    seed: int
    world: World

    @property
    def steps(self) -> int:
        """The training loader's length.

        Raises:
            TaskError: it has none, is empty, or another process's has another.
        """
        try:
            steps = len(self._loader)
        except TypeError:
            raise self.hooks.wrong(
                "train_loader",
                f"gives a {type(self._loader).__name__} without a length",
                "one with len(), such as a DataLoader of a dataset with __len__",
            ) from None
        size = self.world.size
        total, squares = self.world.sum(torch.tensor([steps, steps**2])).tolist()
        if total**2 != size * squares:
            raise self.hooks.wrong(
                "train_loader",
                f"gives {steps} batches to process {self.world.rank} of {size}, and other numbers "
                "to others",
                "as many for each",
            )
        if steps < 1:
            raise self._nothing()
        return steps

    def training(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        count, given = len(self._loader), 0
        _seed_others(self._epoch_seed(epoch))
        for batch in self._epoch(self._loader, epoch):
            yield batch
            given += 1
        if given < count:
            found = f"gives {given} batches in epoch {epoch + 1}, and its length says {count}"
            raise self.hooks.wrong("train_loader", found, "as many as that in every epoch")

    def calibration(self) -> Iterator[Batch]:
        """About two thousand training examples."""
        yield from self._drawn(_CALIBRATION_EPOCH, _CALIBRATION_EXAMPLES)

    def examples(self, count: int) -> tuple[torch.Tensor, ...]:
        """The model's inputs in the first validation batch."""
        for batch in islice(self.validation(), 1):
            return tuple(tensor[:count] for tensor in self.inputs(batch, "val_loader"))
        raise self.hooks.wrong("val_loader", "gives no batch", "at least one")

    def first(self) -> Batch:
        """A training batch."""
        for batch in islice(self._drawn(_SAMPLES_EPOCH, 1), 1):
            return batch
        raise self._nothing()

    def samples(self, count: int) -> tuple[tuple[torch.Tensor, ...], None]:
        """The model's inputs in training batches; of one shape, so that they go into one array."""
        found = [self.inputs(batch) for batch in self._drawn(_SAMPLES_EPOCH, count)]
        if not found:
            raise self._nothing()
        alike = [x for x in found if [t.shape[1:] for t in x] == [t.shape[1:] for t in found[0]]]
        return tuple(torch.cat(parts)[:count] for parts in zip(*alike, strict=True)), None

    def _drawn(self, epoch: int, count: int) -> Iterator[Batch]:
        """Batches of at least `count` examples of all training data; random states are put back."""
        with _seeded(self._epoch_seed(epoch)):
            # A loader of its own: that of the epoch may be in use, and its workers kept alive.
            loader = self._make(0, 1)
            left, largest = count, 0
            for batch in self._epoch(loader, epoch):
                rows = len(self.inputs(batch)[0])
                largest = max(largest, rows)
                # Of one example, where others are larger, a batch norm may make nothing.
                if rows > 1 or largest == 1:
                    yield batch
                left -= rows
                if left <= 0:
                    return

    def _epoch(self, loader: Iterable[Batch], epoch: int) -> Iterator[Batch]:
        for place in (loader, *(getattr(loader, x, None) for x in ("sampler", "batch_sampler"))):
            if isinstance(generator := getattr(place, "generator", None), torch.Generator):
                generator.manual_seed(self._epoch_seed(epoch))
            if callable(set_epoch := getattr(place, "set_epoch", None)):
                set_epoch(epoch)
        return self.hooks.each("train_loader", loader)

    def validation(self) -> Iterator[Batch]:
        """All of the validation part."""
        with _seeded(self.seed):
            loader = self.hooks.call("val_loader", self.batch_size)
        given = False
        for batch in self.hooks.each("val_loader", loader):
            given = True
            yield batch
        if not given:
            raise self.hooks.wrong("val_loader", "gives no batch", "at least one")

    def _nothing(self) -> TaskError:
        found = f"gives no batch, asked for batches of {self.batch_size}"
        return self.hooks.wrong("train_loader", found, "at least one")

    @cached_property
    def _loader(self) -> Any:
        return self._make(self.world.rank, self.world.size)

    def _make(self, rank: int, size: int) -> Any:
        # Seeded, so that data split at random is split alike each time.
        with _seeded(self.seed):
            return self.hooks.call("train_loader", self.batch_size, self.seed, rank, size)

    def _epoch_seed(self, epoch: int) -> int:
        place = np.random.SeedSequence(self.seed, spawn_key=(epoch, self.world.rank))
        return int(place.generate_state(1)[0])

    def inputs(self, batch: Batch, loader: str = "train_loader") -> tuple[torch.Tensor, ...]:
        """What the model takes of a batch.

        Raises:
            TaskError: that is not a tensor or several.
        """
        name = "inputs" if "inputs" in self.hooks else loader
        if name == "inputs":
            found = self.hooks.call("inputs", batch)
            expected = "a tensor, or a tuple of tensors"
        else:
            found = batch[0] if isinstance(batch, tuple | list) and batch else batch
            expected = "a tensor, or a tuple or list that starts with one; or a hook inputs(batch)"
        tensors = tuple(found) if isinstance(found, tuple | list) else (found,)
        if not tensors or not all(isinstance(x, torch.Tensor) and x.ndim for x in tensors):
            verb = "gives" if name == "inputs" else "yields"
            raise self.hooks.wrong(name, f"{verb} {kind_of(found if tensors else batch)}", expected)
        rows = {len(tensor) for tensor in tensors}
        if len(rows) > 1 or 0 in rows:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise self.hooks.wrong(name, f"gives {shapes}", "a row for each example in every one")
        return tensors


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the global random states, and put them back after the block."""
    ours, theirs = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _seed_others(seed)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(theirs)


def _seed_others(seed: int) -> None:
    """What user's augmentations draw from, beside torch's."""
    random.seed(seed)
    np.random.seed(seed)
