"""What training and judging need to know of a task, whatever it is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

Batch = Any
"""Examples as a task's loaders give them: tensors, in tuples, lists or dicts."""
Outputs = Any
"""What a model returns: a tensor, or tensors in tuples, lists or dicts."""


@dataclass(frozen=True)
class Metric:
    """The number that a task is judged by.

    Attributes:
        name: as the field calls it: "top-1 accuracy", "mIoU", "PSNR".
        unit: "%", "dB"; empty for none.
        higher_is_better: whether a rise is good.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True

    def drop(self, before: float, after: float) -> float:
        """How much worse `after` is than `before`, in the metric's unit; negative if better."""
        return before - after if self.higher_is_better else after - before

    def text(self, score: float) -> str:
        """A score in words: 'top-1 accuracy 88.34 %'."""
        return f"{self.name} {score:.2f}{' ' + self.unit if self.unit else ''}"


UNMEASURED = Metric("unmeasured")
"""Where nothing is labelled."""


@dataclass(frozen=True)
class Evaluation:
    """A model's quality on the validation part.

    Attributes:
        score: in the unit of the task's metric.
        loss: mean task loss.
        examples: how many were judged.
        others: other figures, by name.
    """

    score: float
    loss: float
    examples: int
    others: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """A task with its data. Batches are this process's share where several train together."""

    @property
    def metric(self) -> Metric:
        """What it is judged by."""

    @property
    def following(self) -> float:
        """Share of the loss that follows the original model's outputs, unless a recipe says."""

    def check(self, model: nn.Module) -> None:
        """Find out before the long work whether model, data and task fit one another.

        Raises:
            TaskError, DataError: they do not.
        """

    def examples(self, count: int) -> tuple[torch.Tensor, ...]:
        """The model's inputs, one tensor each, for some validation examples, `count` at most."""

    def samples(self, count: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The same for training examples, to predict losses with; their classes (B,), if any."""

    @property
    def steps(self) -> int:
        """Batches in an epoch, at least 1; the same in every process."""

    def training(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch (from 0), `steps` of them, the same each time for an epoch."""

    def calibration(self) -> Iterator[Batch]:
        """Some training batches, as in training, to take batch-norm statistics from."""

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model on a batch."""

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """The loss to minimise, a scalar."""

    def distillation(self, outputs: Outputs, taught: Outputs, batch: Batch) -> torch.Tensor:
        """How far outputs are from the original model's, a scalar in the loss's unit."""

    def evaluate(self, forward: Callable[[Batch], Outputs]) -> Evaluation:
        """Judge a model on the validation part: all of it, whatever the number of processes.

        Args:
            forward: the model, in eval mode.
        """
