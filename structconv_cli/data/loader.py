"""Batches of a split, fetched and augmented: here, or by worker processes ahead of the training.

Only what is decoded on demand goes to workers: a batch held in memory costs less than its way from
one process to another. Workers and this process do the same work in the same order, so that the
batches do not depend on who made them.
"""

import os
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import data as torch_data

from structconv_cli.data.augmentation import augment_batch
from structconv_cli.data.order import Shuffle
from structconv_cli.data.split import Split
from structconv_cli.errors import DataError

Batch = tuple[Tensor, Tensor | None]

_MOST_WORKERS = 8
_PREFETCHED = 4


@dataclass(frozen=True, eq=False)
class EpochBatches(torch_data.Dataset["Batch | DataError"]):
    """The batches of one rank's epoch, by step.

    Attributes:
        split: where the examples are.
        indices: of each batch's examples.
        shuffle: what the augmentation follows; None for none.
        augment: its kinds.
        rank: whose batches these are.
        ignore_label: of the mask pixels that augmentation makes.
    """

    split: Split
    indices: Sequence[Tensor]
    shuffle: Shuffle | None
    augment: Collection[str]
    rank: int
    ignore_label: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, step: int) -> "Batch | DataError":
        """One batch as `fetch` gives it, augmented; an error is returned, for the way home."""
        try:
            images, targets = self.split.fetch(self.indices[step])
        except DataError as error:
            return error
        if self.shuffle is None or not self.augment:
            return images, targets
        masks = targets if targets is not None and targets.ndim == 3 else None
        seed = self.shuffle.batch_seed(step, self.rank)
        images, masks = augment_batch(images, self.augment, seed, masks, self.ignore_label)
        return images, targets if masks is None else masks


def iterate(epoch: EpochBatches, workers: int) -> Iterator[Batch]:
    """Go through an epoch's batches; `workers` processes make them where they must be decoded.

    Raises:
        DataError: an image cannot be decoded, or a worker process ended.
    """
    if not workers or epoch.split.in_memory or not len(epoch):
        found: Iterator[Batch | DataError] = (epoch[step] for step in range(len(epoch)))
    else:
        found = _from_workers(epoch, workers)
    for batch in found:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def worker_count(wanted: int | None, processes: int) -> int:
    """How many workers each of the processes on this machine gets: as `wanted`, or by the cores."""
    if wanted is not None:
        return wanted
    # Training a ResNet-20 on streamed CIFAR-10, on two busy cores, waited for 1.9 % of its time
    # with one worker, 2.0 % with two, 3.7 % with none: so most cores are left to the training.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_WORKERS, max(1, (cores or 1) // (2 * processes)))


def _from_workers(epoch: EpochBatches, workers: int) -> Iterator["Batch | DataError"]:
    loader = torch_data.DataLoader(
        epoch,
        batch_size=None,
        sampler=range(len(epoch)),
        num_workers=min(workers, len(epoch)),
        prefetch_factor=_PREFETCHED,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_interrupts,
        # Else it draws its base seed from the global random state.
        generator=torch.Generator(),
    )
    on_death = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise wherever the training is when a worker dies. Without it, the
        # death is seen when the next batch is asked for.
        signal.signal(signal.SIGCHLD, on_death)
    for step in range(len(epoch)):
        try:
            batch = next(batches)
        except RuntimeError as error:
            raise DataError(
                f"A worker process that decodes images ended, at batch {step + 1} of {len(epoch)} "
                f"({str(error).splitlines()[0]}). Most often the memory, or the shared memory in "
                "/dev/shm, is used up: use a smaller --batch-size or --size, fewer --workers, or "
                "--workers 0 to decode without worker processes."
            ) from error
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C goes to the whole group; the training ends the workers itself, without tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
