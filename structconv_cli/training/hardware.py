"""Where and in what precision training runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from structconv_cli.errors import TrainingError, one_line
from structconv_cli.world import local_rank

Precision = Literal["fp32", "bf16"]


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
            TrainingError: it has not.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise TrainingError(
                "--train-device cuda was given, but torch finds no CUDA device here (torch "
                f"{torch.__version__}). Install a CUDA build of torch, or train with "
                "--train-device cpu."
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
        except RuntimeError as error:
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
