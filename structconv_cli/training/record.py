"""What a fine-tuning did, stage by stage and epoch by epoch."""

from dataclasses import dataclass

from structconv_cli.tasks.task import Evaluation, Metric
from structconv_cli.training.recipe import Recipe


@dataclass(frozen=True)
class StageResult:
    """The model after one stage.

    Attributes:
        stage: original, regularised, projected, batch norm re-estimated, or fine-tuned.
        evaluation: on the validation part.
        max_residual: largest relative distance of a layer's weight to its subspace.
        seconds: time that the stage took, evaluation left out.
    """

    stage: str
    evaluation: Evaluation
    max_residual: float
    seconds: float


@dataclass(frozen=True)
class EpochResult:
    """One epoch.

    Attributes:
        epoch: from 1.
        phase: at its end: regularised or fine-tuned.
        loss: mean of what was minimised, without the structural loss.
        max_residual: at its end.
        evaluation: at its end; None where it was not judged.
    """

    epoch: int
    phase: str
    loss: float
    max_residual: float
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class FineTuneResult:
    """What fine-tuning did.

    Attributes:
        recipe: how.
        metric: what the scores are.
        stages: in order; the first is the original model, the last the result. None where
            nothing is labelled.
        epochs: in order; fewer than the recipe's if it stopped early.
    """

    recipe: Recipe
    metric: Metric
    stages: tuple[StageResult, ...]
    epochs: tuple[EpochResult, ...]

    @property
    def drop(self) -> float:
        """How much worse the result is than the original, in the metric's unit; 0 if unjudged."""
        if not self.stages:
            return 0.0
        first, last = self.stages[0].evaluation, self.stages[-1].evaluation
        return self.metric.drop(first.score, last.score)
