"""Fine-tuning a model into its structured subspaces and inside them.

Stages: *regularised* (task loss + lambda * structural loss; see `training.recipe`), *projected*,
*batch norm re-estimated*, *fine-tuned* (weights held in the subspaces by projecting after every
step, then batch norm re-estimated again). The score after each is part of the result: projection
without training costs most of it, and training pays it back.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from structconv_cli.progress import SILENT, Observer
from structconv_cli.structure import Structure
from structconv_cli.tasks.task import Task
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import FineTuneResult
from structconv_cli.training.training import Training
from structconv_cli.world import ALONE, World


class Keeper(Protocol):
    """Keeps the state of an unfinished training."""

    def load(self) -> dict[str, Any] | None:
        """The last state that was kept; None if there is none."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state in place of the last one."""


def finetune(
    model: nn.Module,
    structures: Mapping[str, Structure],
    task: Task,
    recipe: Recipe,
    *,
    hardware: Hardware | None = None,
    world: World = ALONE,
    keeper: Keeper | None = None,
    enough: Callable[[float], bool] = lambda drop: False,
    observer: Observer = SILENT,
    teacher: nn.Module | None = None,
    fit: Callable[[], Mapping[str, torch.Tensor]] = dict,
    judge_epochs: bool = True,
) -> tuple[nn.Module, FineTuneResult]:
    """Return a tuned copy of the model, its planned weights inside their subspaces, and the record.

    Args:
        model: the original; untouched.
        structures: of its layers, by name.
        task: what it is trained for and judged by.
        recipe: how.
        hardware: where; the CPU in float32 by default.
        world: the processes that train together. All must call this with the same arguments.
        keeper: keeps the state after every epoch, and gives back one to go on from.
        enough: whether a drop (in the metric's unit) is small enough to stop early.
        observer: is told of the stages.
        teacher: whose outputs are followed; by default the model's.
        fit: finds the parameters that the recipe may aim at (`Recipe.aim`), by name; those of
            structured layers inside their subspaces. Called in process 0, if at all.
        judge_epochs: whether the model is judged after each epoch, and not only after each stage;
            without it nothing can be enough.

    Raises:
        TrainingError: the loss stops being a finite number, nothing can be trained, or another
            process is lost.
    """
    tuned, hardware = copy.deepcopy(model), hardware or Hardware()
    device = hardware.torch_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        training = Training(
            tuned, structures, task, recipe, hardware, world, observer, teacher, judge_epochs
        )
        try:
            _train(training, keeper, enough, fit)
        finally:
            training.close()
    result = FineTuneResult(
        training.recipe, task.metric, tuple(training.stages), tuple(training.epochs)
    )
    return hardware.bring_back(tuned).eval(), result


def _train(
    training: Training,
    keeper: Keeper | None,
    enough: Callable[[float], bool],
    fit: Callable[[], Mapping[str, torch.Tensor]],
) -> None:
    world, recipe = training.world, training.recipe
    if not recipe.epochs:
        training.stage("original", lambda: None)
        training.cross()
        return
    kept = world.same(keeper.load() if keeper is not None and world.first else None)
    if kept is not None:
        training.load(kept)
    else:
        training.stage("original", lambda: None)
        if recipe.aim == "least squares":
            training.lead(world.same(fit() if world.first else {}))
    with training.observer.stage("training"):
        while training.epoch < recipe.epochs and not _stops(training, enough):
            training.run_epoch()
            if keeper is not None and world.first:
                keeper.save(training.state())
    if training.schedule.regularised < training.schedule.steps:
        training.stage("fine-tuned", training.finish)


def _stops(training: Training, enough: Callable[[float], bool]) -> bool:
    """Whether the last epoch, inside the subspaces, left a drop that is small enough."""
    if not training.crossed or not training.epochs or training.epochs[-1].evaluation is None:
        return False
    before, after = training.stages[0].evaluation, training.epochs[-1].evaluation
    # Metrics that each process takes by itself may differ by rounding: one decides.
    return training.world.same(enough(training.task.metric.drop(before.score, after.score)))
