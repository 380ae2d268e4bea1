"""What the regularised phase, and the phase after it, do to structured weights at every step."""

from collections.abc import Mapping

import torch
from torch import nn

from structconv_cli.regularizer import (
    add_structural_gradient,
    falling,
    limit_residual,
    shrink_residual,
)
from structconv_cli.structure import Structure
from structconv_cli.training.schedule import Schedule


class Descent:
    """Leads weights into their subspaces and keeps them there.

    Args:
        weights: parameters and structures, by layer name.
        schedule: of the training.
    """

    def __init__(
        self, weights: Mapping[str, tuple[nn.Parameter, Structure]], schedule: Schedule
    ) -> None:
        self._weights = list(weights.values())
        self._schedule = schedule
        self.start = [structure.residual(weight) for weight, structure in self._weights]
        """The residuals that the limit falls from."""

    def before_step(self, step: int) -> None:
        """Add the structural loss's gradient to those of the task's loss."""
        schedule = self._schedule
        if step < schedule.regularised and schedule.recipe.residual != "proximal":
            strength = schedule.strength(step)
            for weight, structure in self._weights:
                add_structural_gradient(weight, structure, strength)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Limit, shrink or remove the residuals after step number `step` (from 0)."""
        schedule = self._schedule
        how, last = schedule.recipe.residual, schedule.regularised
        if step >= last:
            for weight, structure in self._weights:
                limit_residual(weight, structure, 0.0)
        elif how == "falling":
            share = falling(step + 1, last)
            for (weight, structure), start in zip(self._weights, self.start, strict=True):
                limit_residual(weight, structure, start * share)
        elif how == "proximal":
            step_size = schedule.learning_rate(step) * schedule.strength(step)
            for weight, structure in self._weights:
                shrink_residual(weight, structure, step_size)
