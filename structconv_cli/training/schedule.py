"""Learning rate and regularisation over the steps of a training."""

import math
from dataclasses import dataclass

from structconv_cli.errors import TrainingError
from structconv_cli.training.recipe import Recipe

_WARM_UP = 0.05


def steps_per_epoch(batches: int, recipe: Recipe) -> int:
    """How often weights change in an epoch of so many batches (in each process).

    Raises:
        TrainingError: never, for an epoch has fewer batches than a step adds up.
    """
    if batches < recipe.accumulate:
        raise TrainingError(
            f"--accumulate {recipe.accumulate} adds up more batches than an epoch has ({batches}): "
            "the weights would never change. Give a lower --accumulate, or a smaller --batch-size."
        )
    return batches // recipe.accumulate


@dataclass(frozen=True)
class Schedule:
    """What holds at each step (weights change once a step).

    Attributes:
        recipe: the recipe.
        steps_per_epoch: weight changes in an epoch.
    """

    recipe: Recipe
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """In all."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def regularised(self) -> int:
        """Steps of the regularised phase."""
        return min(self.steps, round(self.recipe.regularised * self.steps_per_epoch))

    def learning_rate(self, step: int) -> float:
        """From the recipe's peak to zero, after a linear rise over a twentieth."""
        rise = min(1.0, (step + 1) / max(1, round(_WARM_UP * self.steps)))
        gone = step / self.steps
        left = 1 - gone if self.recipe.annealing == "linear" else (1 + math.cos(math.pi * gone)) / 2
        return self.recipe.learning_rate * rise * left

    def strength(self, step: int) -> float:
        """The structural loss's lambda in the regularised phase."""
        if self.recipe.strength == "fixed":
            return self.recipe.sr_lambda
        return self.recipe.sr_lambda * (step + 1) / max(1, self.regularised)
