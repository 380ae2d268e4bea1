"""What a training minimises: the task's loss, and how far the model is from its teacher.

    (1 - share) * task loss + share * distance of the outputs + hints * distance of the features

The structural loss is no part of it: its gradient is known in closed form (`training.descent`).
"""

import copy
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from structconv_cli.tasks.task import Batch, Task
from structconv_cli.training.features import Features
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.recipe import Recipe


class Objective:
    """The loss of a recipe, whose share of distillation is resolved.

    Args:
        model: trained; where there are hints, hooks stay on it until `close`.
        layers: names of its structured layers.
        task: what it is trained for.
        recipe: what is minimised.
        hardware: where the teacher runs.
        teacher: whose outputs are followed; the model as it is now, if none is given.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        task: Task,
        recipe: Recipe,
        hardware: Hardware,
        teacher: nn.Module | None,
    ) -> None:
        self._task, self._share, self._hints = task, recipe.distillation or 0.0, recipe.hints
        self._teacher: nn.Module | None = None
        self._features: Features | None = None
        if recipe.epochs and (self._share or self._hints):
            taught = hardware.place(teacher or copy.deepcopy(model)).eval()
            if self._hints:
                self._features = Features(model, taught, layers)
            self._teacher = hardware.compile(taught)

    def watched(self) -> AbstractContextManager[None]:
        """The block in which the model runs and `loss` is called."""
        return nullcontext() if self._features is None else self._features.watched()

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The loss, a scalar, of what the model made of a batch."""
        loss = self._task.loss(outputs, batch)
        if self._teacher is None:
            return loss
        with torch.no_grad():
            taught = self._task.forward(self._teacher, batch)
        if self._share:
            followed = self._task.distillation(outputs, taught, batch)
            loss = (1 - self._share) * loss + self._share * followed
        if self._features is not None:
            loss = loss + self._hints * self._features.distance()
        return loss

    def close(self) -> None:
        """Take the hooks off the models."""
        if self._features is not None:
            self._features.close()
