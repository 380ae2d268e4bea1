"""Where and in what precision training runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from structconv_cli.errors import TaskError, TrainingError, beneath, one_line
from structconv_cli.world import local_rank, local_size

Precision = Literal["fp32", "bf16"]

_TRIALS = 5
_MUCH_SLOWER = 2.0
"""Times as long in bfloat16 as in float32. Where the processor has it, a network's steps take a
third to one and a half times as long; where it is emulated, 10 times and more."""


@dataclass(frozen=True)
class Hardware:
    """How steps are computed. The weights are float32 in any case.

    Attributes:
        device: "cpu" or "cuda"; with several processes, each takes the GPU of its local rank.
        precision: of steps; "bf16" computes convolutions and products in bfloat16 (autocast).
        channels_last: whether images and weights are laid out so: quicker on GPUs, and for most
            networks on CPUs.
        compiled: whether `torch.compile` is used.
    """

    device: str = "cpu"
    precision: Precision = "fp32"
    channels_last: bool = False
    compiled: bool = False

    def check(self) -> None:
        """Check that this machine has the device.

        Raises:
            TrainingError: it has not, or fewer than processes.
        """
        if self.device != "cuda":
            return
        devices = torch.cuda.device_count()
        if local_size() > devices > 0:
            raise TrainingError(
                f"{local_size()} processes were started on this machine, which has {devices} CUDA "
                f"devices; each needs one of its own. Give torchrun --nproc-per-node {devices}, or "
                "train with --train-device cpu."
            )
        if not torch.cuda.is_available():
            raise TrainingError(
                "--train-device cuda was given, but torch finds no CUDA device here (torch "
                f"{torch.__version__}). Install a CUDA build of torch, or train with "
                "--train-device cpu."
            )

    def note(self) -> str | None:
        """What speaks against this choice on this machine, if anything does: bfloat16 that the
        processor does not have. A fraction of a second is spent on timing it."""
        if self.precision != "bf16" or self.device != "cpu":
            return None
        slower = bf16_slowdown()
        if slower < _MUCH_SLOWER:
            return None
        return (
            f"--precision bf16: this processor has no bfloat16 (a convolution took {slower:.0f} "
            "times as long as in float32). Training is faster without it."
        )

    @property
    def torch_device(self) -> torch.device:
        """This process's device."""
        return torch.device("cuda", local_rank()) if self.device == "cuda" else torch.device("cpu")

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model there, in place."""
        model.to(self.torch_device)
        if self.channels_last:
            # nn.Module.to alters parameters with four axes only, as is wanted.
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def bring_back(self, model: nn.Module) -> nn.Module:
        """Move a model to the CPU and its plain layout, in place."""
        model.cpu()
        if self.channels_last:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return model

    def move(self, batch: Any) -> Any:
        """A batch with its tensors there."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if self.channels_last and leaf.ndim == 4 and leaf.is_floating_point():
                return leaf.to(
                    self.torch_device, non_blocking=True, memory_format=torch.channels_last
                )
            return leaf.to(self.torch_device, non_blocking=True)

        return pytree.tree_map(moved, batch)

    def compile(self, model: nn.Module) -> nn.Module:
        """The model as it is run in steps: compiled, if so chosen; it has the same parameters."""
        return torch.compile(model) if self.compiled else model  # type: ignore[return-value]

    @contextmanager
    def running(self, precision: Precision | None = None) -> Iterator[None]:
        """Where a model is run: in the precision chosen, or in this one.

        Raises:
            TrainingError: it cannot be compiled, or its feature maps cannot be channels-last.
        """
        try:
            reduced = (precision or self.precision) == "bf16"
            with torch.autocast(self.device, torch.bfloat16, enabled=reduced):
                yield
        except (RuntimeError, TaskError) as failure:
            error = beneath(failure)
            if self.compiled:
                from torch._dynamo.exc import TorchDynamoException

                if isinstance(error, TorchDynamoException):
                    raise TrainingError(
                        f"--compile: torch.compile failed: {one_line(error)[:300]}. It needs a C++ "
                        "compiler, and a model that it can trace; leave out --compile."
                    ) from None
            if self.channels_last and "view size is not compatible" in str(error):
                raise TrainingError(
                    "--channels-last: the model calls view() on a feature map, which then is not "
                    "laid out for it. Leave out --channels-last, or write reshape() or flatten() "
                    "for view()."
                ) from None
            raise


def bf16_slowdown() -> float:
    """How many times as long as in float32 this processor takes in bfloat16, forwards and backwards
    through a small convolution."""
    weight = torch.ones(16, 16, 3, 3, requires_grad=True)
    images = torch.ones(4, 16, 32, 32)

    def seconds(reduced: bool) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            out = nn.functional.conv2d(images, weight, padding=1)
        torch.autograd.grad(out.float().sum(), weight)
        return time.perf_counter() - start

    # The first step of each sets the library up.
    pairs = [(seconds(False), seconds(True)) for _ in range(1 + _TRIALS)][1:]
    return median(reduced / plain for plain, reduced in pairs)
