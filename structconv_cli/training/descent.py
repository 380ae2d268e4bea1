"""What the regularised phase, and the phase after it, do to structured weights at every step.

Where weights W^ inside the subspaces are known whose outputs are near the original's (least squares
on activations), the phase leads there: as the residual's limit falls from 1 to 0 of what the
residual was, the same share of W^ - P W is added inside the subspace. Without a gradient it goes
from W to W^ and not to P W, which costs much more where channels are selected. (Ours.)
"""

from collections.abc import Mapping

import torch
from torch import nn

from structconv_cli.regularizer import (
    add_structural_gradient,
    falling,
    limit_residual,
    shrink_residual,
)
from structconv_cli.rewrite import structured_parameters
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
        self.moves: dict[str, torch.Tensor] = {}
        """What is added to parameters over the regularised phase, by name (`lead`)."""
        self._moved: dict[str, nn.Parameter] = {}

    @torch.no_grad()
    def lead(self, moves: Mapping[str, torch.Tensor], model: nn.Module) -> None:
        """Add these to parameters over the regularised phase; all at once if there is none.

        Args:
            moves: what is added to each by the end of the phase, by name; to structured weights
                inside their subspaces.
            model: whose parameters they are.
        """
        moved = {name: model.get_parameter(name) for name in moves}
        if self._schedule.regularised:
            self.moves, self._moved = dict(moves), moved
        else:
            for name, parameter in moved.items():
                parameter.add_(moves[name])

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
            for name, parameter in self._moved.items():
                parameter.add_(self.moves[name], alpha=falling(step, last) - share)
        elif how == "proximal":
            step_size = schedule.learning_rate(step) * schedule.strength(step)
            for weight, structure in self._weights:
                shrink_residual(weight, structure, step_size)


@torch.no_grad()
def moves_to(
    aims: Mapping[str, torch.Tensor], model: nn.Module, structures: Mapping[str, Structure]
) -> dict[str, torch.Tensor]:
    """What to add to parameters, but for their residuals, to come to others; by name.

    Args:
        aims: by the parameters' names; structured weights inside their subspaces. What is frozen
            stays.
        model: whose parameters are moved.
        structures: of its layers, by name.
    """
    parameters = structured_parameters(model, structures).values()
    structured = {id(weight): structure for weight, structure in parameters}
    moves = {}
    for name, parameter in model.named_parameters():
        if name in aims and parameter.requires_grad:
            start = parameter.double()
            if id(parameter) in structured:
                start = structured[id(parameter)].project(start)
            moves[name] = (aims[name].to(start) - start).to(parameter.dtype)
    return moves
