"""All that a conversion starts from, loaded and checked before the long work."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx
import torch
from torch import nn

from structconv_cli.conversion import ConvertRequest
from structconv_cli.data.dataset import Dataset, load_dataset
from structconv_cli.errors import PlanError, StructconvError
from structconv_cli.model.architecture import build_model
from structconv_cli.model.checkpoint import Checkpoint, load_checkpoint, load_into
from structconv_cli.model.inventory import Inventory, first_channels, take_inventory
from structconv_cli.model.signature import sized
from structconv_cli.onnx.export import export_onnx
from structconv_cli.plan import Plan, read_plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.rule import rule_plan
from structconv_cli.progress import Observer
from structconv_cli.reference import REAL_EXAMPLES
from structconv_cli.tasks.choice import task_for
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.task import Task
from structconv_cli.world import World

TRACE_BATCH = 2


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


def prepare(request: ConvertRequest, world: World, observer: Observer) -> Prepared:
    """Load and check all that a conversion starts from, before the long work."""
    with observer.stage("checkpoint"):
        checkpoint, model = _load_model(request)
    with observer.stage("data"):
        data, task = _load_task(request, model, world, observer)
        real = task.examples(REAL_EXAMPLES)
        _check_drop(request, task)
    with observer.stage("export of the original"):
        example = sized(real, TRACE_BATCH)
        inventory = take_inventory(model, *example)
        task.check(model)
        given = given_plan(request, inventory) if request.targets.is_empty else None
        original = export_onnx(model, *example)
    return Prepared(checkpoint, model, data, task, real, inventory, given, original)


def given_plan(request: ConvertRequest, inventory: Inventory) -> Plan:
    """The plan of the file, or that of the rule.

    Raises:
        PlanError: the file's plan does not fit the model; no layer is eligible.
    """
    if request.plan_file:
        return check_plan(read_plan(request.plan_file), inventory.axes, inventory.refused)
    return rule_plan(inventory, request.n, request.channels)


def _load_model(request: ConvertRequest) -> tuple[Checkpoint, nn.Module]:
    checkpoint = load_checkpoint(request.checkpoint)
    model = build_model(request.architecture)
    load_into(model, checkpoint)
    return checkpoint, model.float().eval()


def _load_task(
    request: ConvertRequest, model: nn.Module, world: World, observer: Observer
) -> tuple[Dataset | None, Task]:
    channels = first_channels(model)
    if channels is None:
        raise PlanError(
            f"the model that {request.architecture.reference} builds has no convolution, so there "
            "is nothing to structure. structconv is for convolutional networks."
        )
    if request.task is not None:
        return None, task_for(request.task, request.recipe, world)
    assert request.data is not None
    data = load_dataset(request.data, channels=channels, progress=observer.steps)
    if len(data.train) < 2:
        raise StructconvError("the training part has a single image; expected at least 2.")
    observer.note(f"{len(data.train)} training and {len(data.val)} validation images")
    return data, task_for(data, request.recipe, world)


def _check_drop(request: ConvertRequest, task: Task) -> None:
    if request.targets.max_drop is not None and not isinstance(task, Classification):
        raise PlanError(
            f"--max-drop is about points of accuracy, which are predicted from images with one "
            f"label each; the task here is judged by {task.metric.name}. Give another target, such "
            "as --target-speedup."
        )
