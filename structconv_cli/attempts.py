"""The plan that a conversion carries out, fine-tuned; backed off while it loses too much.

What a plan loses after fine-tuning is only known after fine-tuning. So `--max-drop` is a loop: plan
for the loss that the drop is predicted to stand for, fine-tune, measure, and if more was lost, plan
for proportionally less.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx
import torch
from torch import nn

from structconv_cli.conversion import ConvertRequest
from structconv_cli.data.dataset import Dataset
from structconv_cli.errors import PlanError
from structconv_cli.model.checkpoint import Checkpoint
from structconv_cli.model.inventory import Inventory
from structconv_cli.model.signature import sized
from structconv_cli.plan import Plan, read_plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.pipeline import training_samples
from structconv_cli.planning.prediction import Prediction
from structconv_cli.planning.proposal import Planner
from structconv_cli.planning.rule import rule_plan
from structconv_cli.progress import Observer
from structconv_cli.structure import Structure
from structconv_cli.tasks.task import Task
from structconv_cli.training.finetune import finetune
from structconv_cli.training.record import FineTuneResult

MOST_ATTEMPTS = 4
_BACK_OFF = 0.8
"""Aim below the loss that would do in proportion: small losses are recovered less completely."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a conversion starts from, loaded and checked.

    Attributes:
        checkpoint: the user's weights.
        model: with these weights, in eval mode.
        data: to tune and judge on; None where the task file loads it.
        task: what the model is tuned for and judged by.
        real: the model's inputs, one tensor each, for some validation examples.
        inventory: the model's layers.
        given: the plan of a file or of the rule; None if one is to be made for targets.
        original: the model as an ONNX graph.
    """

    checkpoint: Checkpoint
    model: nn.Module
    data: Dataset | None
    task: Task
    real: tuple[torch.Tensor, ...]
    inventory: Inventory
    given: Plan | None
    original: onnx.ModelProto

    def feeds(self, batch: int) -> dict[str, npt.NDArray[Any]]:
        """A batch of the model's inputs by name, to time it with."""
        inputs = zip(self.inventory.inputs, sized(self.real, batch), strict=True)
        return {name: tensor.numpy() for name, tensor in inputs}


@dataclass(frozen=True, eq=False)
class Attempt:
    """A plan, fine-tuned.

    Attributes:
        plan: what was carried out.
        prediction: what it was predicted to do; None for a plan from a file or a rule.
        model: the tuned model, its planned weights inside their subspaces.
        tuning: how it was tuned.
        notes: what the user should know, one sentence each.
    """

    plan: Plan
    prediction: Prediction | None
    model: nn.Module
    tuning: FineTuneResult
    notes: tuple[str, ...] = ()


def make_planner(request: ConvertRequest, ready: Prepared, observer: Observer) -> Planner:
    """Measure and predict what there is to choose from."""
    settings = request.proposal
    samples = training_samples(ready.task, ready.original, request.images)
    feeds = ready.feeds(settings.target.batch_size)
    return Planner(ready.original, feeds, samples, settings, ready.inventory.refused, observer)


def given_plan(request: ConvertRequest, inventory: Inventory) -> Plan:
    """The plan of the file, or that of the rule.

    Raises:
        PlanError: the file's plan does not fit the model; no layer is eligible.
    """
    if request.plan_file:
        return check_plan(read_plan(request.plan_file), inventory.axes, inventory.refused)
    return rule_plan(inventory, request.n, request.channels)


def attempt(request: ConvertRequest, ready: Prepared, observer: Observer) -> Attempt:
    """Choose a plan as the request says, and fine-tune the model into it.

    Raises:
        PlanError: no plan meets the targets, or holds the drop after fine-tuning.
        TrainingError: fine-tuning fails.
    """
    inventory = ready.inventory

    def tuned(plan: Plan, prediction: Prediction | None) -> Attempt:
        observer.note(f"{len(plan.structures)} of {len(plan.layers)} layers structured")
        found = finetune(
            ready.model,
            plan.structures,
            ready.task,
            request.recipe,
            hardware=request.hardware,
            observer=observer,
        )
        return Attempt(plan, prediction, *found, notes=tuple(tried))

    tried: list[str] = []
    if ready.given is not None:
        return tuned(ready.given, None)
    planner = make_planner(request, ready, observer)
    drop = request.targets.max_drop
    most_loss = None if drop is None else planner.most_loss(drop)
    given_up: list[Mapping[str, Structure]] = []
    for _ in range(MOST_ATTEMPTS):
        try:
            proposal = planner.propose(request.targets, most_loss)
        except PlanError:
            if not tried:
                raise
            break
        if not proposal.plan.structures and not tried:
            raise PlanError(_nothing_structured(proposal.plan))
        # Nothing is left to back off to.
        if proposal.plan.structures in ({}, *given_up):
            break
        plan = check_plan(proposal.plan, inventory.axes, inventory.refused)
        found = tuned(plan, proposal.prediction)
        if drop is None or found.tuning.drop <= drop:
            return found
        tried.append(
            f"a plan {proposal.prediction.speedup:.2f} times as fast lost "
            f"{found.tuning.drop:.2f} points, more than --max-drop {drop:g}, and was given up."
        )
        given_up.append(proposal.plan.structures)
        assert most_loss is not None
        most_loss = _BACK_OFF * min(most_loss, proposal.prediction.loss) * drop / found.tuning.drop
    raise PlanError(
        f"no plan tried loses at most {drop:g} points after fine-tuning: {' '.join(tried)} "
        "Tune longer (--epochs), allow a larger --max-drop, or ask for less."
    )


def _nothing_structured(plan: Plan) -> str:
    reasons = "; ".join(f"{kept.name}: {kept.reason}" for kept in plan.kept[:3])
    return (
        "the best plan for these targets keeps every layer as it is, so there is nothing to "
        f"convert. Why, of its first layers: {reasons}. Allow a larger --max-drop, or ask for more."
    )
