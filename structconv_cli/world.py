"""The processes that train together, started by torch's own launcher (torchrun)."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from torch import distributed, nn

from structconv_cli.errors import TaskError, TrainingError, beneath, one_line

T = TypeVar("T")
_BACKENDS = ("gloo", "nccl", "process group", "connection")
"""One of these is named by what torch raises where a process is lost."""
_PATIENCE = timedelta(hours=3)
"""How long processes wait for one another: the first plans and fits while others wait. A process
that ends is noticed at once; only one that hangs, or whose machine is gone, is waited for."""


@dataclass(frozen=True)
class World:
    """One process's place among those that train together.

    Attributes:
        rank: from 0; process 0 writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            with reached():
                distributed.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' tensors, in each of them."""
        if self.size > 1:
            with reached():
                distributed.all_reduce(values)
        return values

    def same(self, value: T) -> T:
        """Process 0's value, in each of them: text, numbers, tensors in plain containers."""
        if self.size == 1:
            return value
        held: list[T] = [value]
        with reached():
            distributed.broadcast_object_list(held)
        return held[0]

    @torch.no_grad()
    def same_tensors(self, model: nn.Module) -> None:
        """Give each process process 0's parameters and buffers, in place."""
        if self.size == 1:
            return
        with reached():
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)


ALONE = World()


def check_batch_size(batch_size: int, world: World) -> None:
    """Check that a training step's examples can be shared out evenly.

    Raises:
        TrainingError: they cannot.
    """
    if batch_size % world.size or batch_size < 2 * world.size:
        raise TrainingError(
            f"--batch-size {batch_size} is shared by {world.size} processes: give a multiple of "
            f"{world.size}, with at least 2 for each."
        )


def launched() -> bool:
    """Whether torchrun, or another launcher like it, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def launched_rank() -> int:
    """This process's rank, as the launcher says; 0 without one."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the other processes for as long as the block lasts; alone without a launcher.

    Raises:
        TrainingError: the others cannot be reached, or are lost.
    """
    if not launched():
        yield ALONE
        return
    backend = "gloo"
    if device == "cuda":
        # Sums of scores and plans are exchanged on the CPU, gradients on the GPU.
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank())
    with reached():
        distributed.init_process_group(backend, timeout=_PATIENCE)
    yield World(distributed.get_rank(), distributed.get_world_size())
    # Not behind a failure: what the others never answered cannot be wound up (see `leave`).
    distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End a process that failed among others, with this exit status.

    Winding up Python would destroy connections that the others never answered, and torch then now
    and again aborts the process: seen as signal 6 in place of the status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def local_rank() -> int:
    """This process's number on its machine: which of its GPUs it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """How many of the processes share this machine's cores and memory; all, if nothing says."""
    if not launched():
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


@contextmanager
def reached() -> Iterator[None]:
    """Say so where the block fails because another process is lost.

    Raises:
        TrainingError: it is.
    """
    try:
        yield
    except (RuntimeError, TaskError) as failure:
        error = beneath(failure)
        text = str(error).lower()
        if not isinstance(error, RuntimeError) or not (
            isinstance(error, distributed.DistError) or any(word in text for word in _BACKENDS)
        ):
            raise
        rank = os.environ.get("RANK", "?")
        raise TrainingError(
            f"process {rank} lost the others: {one_line(error)[:200]}. One of them stopped; its "
            "own message says why. Start all of them again, with --resume to go on from the last "
            "epoch that was saved."
        ) from None
