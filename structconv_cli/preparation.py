"""All that a conversion starts from, loaded and checked before the long work."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy.typing as npt
import onnx
import torch
from torch import nn

from structconv_cli.conversion import NOISE, UNLABELLED, ConvertRequest
from structconv_cli.data.dataset import Dataset, load_dataset
from structconv_cli.data.hold_out import load_or_hold_out
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import PlanError, StructconvError
from structconv_cli.model.inventory import Inventory, take_inventory
from structconv_cli.model.opening import Opened, open_model
from structconv_cli.model.plain import Plain
from structconv_cli.model.signature import sized
from structconv_cli.model_graph import known_shapes, model_channels, noise_inputs
from structconv_cli.onnx.export import export_onnx
from structconv_cli.plan import Plan, read_plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.pipeline import training_samples
from structconv_cli.planning.rule import rule_plan
from structconv_cli.progress import Observer
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.reference import REAL_EXAMPLES
from structconv_cli.tasks.choice import task_for
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.images import ImageTask
from structconv_cli.tasks.task import Task
from structconv_cli.training.augmentation_choice import AUTO, choose_augmentation
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.schedule import steps_per_epoch
from structconv_cli.world import World

TRACE_BATCH = 2


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a conversion starts from, loaded and checked.

    Attributes:
        opened: the user's weights and model.
        plain: the same model, of plain layers.
        spec: the data as it was loaded; None where the task file loads it, or there is none.
        data: to tune and judge on; likewise.
        source: gives examples to fit on and to plan with; None where there is no data.
        task: what the model is tuned for and judged by; None where nothing is labelled.
        real: the model's inputs, one tensor each, for some validation examples; noise where there
            is no data.
        inventory: the model's layers.
        given: the plan of a file or of the rule; None if one is to be made for targets.
        original: the model as an ONNX graph.
        recipe: how to fine-tune, its augmentation settled.
        notes: what the user should know, one sentence each.
    """

    opened: Opened
    plain: Plain
    spec: DataSpec | None
    data: Dataset | None
    source: Task | None
    task: Task | None
    real: tuple[torch.Tensor, ...]
    inventory: Inventory
    given: Plan | None
    original: onnx.ModelProto
    recipe: Recipe
    notes: tuple[str, ...]

    @property
    def model(self) -> nn.Module:
        """The model of plain layers, with the user's weights, in eval mode."""
        return self.plain.model

    def feeds(self, batch: int) -> dict[str, npt.NDArray[Any]]:
        """A batch of the model's inputs by name, to time it with."""
        inputs = zip(self.inventory.inputs, sized(self.real, batch), strict=True)
        return {name: tensor.numpy() for name, tensor in inputs}

    def samples(self, count: int) -> Samples | None:
        """Some training examples as the graph's inputs; None where there is no data."""
        return training_samples(self.source, self.original, count) if self.source else None


def prepare(request: ConvertRequest, world: World, observer: Observer) -> Prepared:
    """Load and check all that a conversion starts from, before the long work.

    Raises:
        StructconvError: whatever is wrong with it.
    """
    with observer.stage("checkpoint"):
        opened = open_model(
            request.checkpoint,
            request.architecture,
            observer,
            trust_pickle=request.trust_pickle,
        )
        channels = model_channels(opened.model)
    with observer.stage("data"):
        spec, data, source, task, notes = _load_data(request, channels, world, observer)
        if source is None:
            shapes, guessed = known_shapes(opened, request.shapes)
            notes += guessed
            real = noise_inputs(opened.model, shapes, REAL_EXAMPLES, request.recipe.seed)
        else:
            real = source.examples(REAL_EXAMPLES)
        _check_drop(request, task)
    with observer.stage("export of the original"):
        example = sized(real, TRACE_BATCH)
        found = opened.plain(*example)
        inventory = take_inventory(found.model, *example)
        if task is not None:
            task.check(found.model)
            steps_per_epoch(task.steps, request.recipe)
        given = given_plan(request, inventory) if request.targets.is_empty else None
        original = export_onnx(found.model, *example)
    if isinstance(source, ImageTask):
        source, chosen = _settled(source, request.recipe, found.model, world, observer)
        task = source if task is not None else None
        notes = [*notes, *chosen]
    augment = source.augment if isinstance(source, ImageTask) else ()
    notes = [*opened.notes, *found.notes, *notes]
    return Prepared(
        opened,
        found,
        spec,
        data,
        source,
        task,
        real,
        inventory,
        given,
        original,
        replace(request.recipe, augment=augment),
        tuple(notes),
    )


def _settled(
    task: ImageTask, recipe: Recipe, model: nn.Module, world: World, observer: Observer
) -> tuple[ImageTask, tuple[str, ...]]:
    """The task with the augmentation it is trained with, and notes."""
    if not recipe.epochs:
        return replace(task, augment=()), ()
    if task.augment != AUTO:
        return task, ()
    with observer.stage("augmentation"):
        augment, note = world.same(choose_augmentation(task, model) if world.first else ((), ""))
        observer.note(", ".join(augment))
    return replace(task, augment=augment), (note,) if note else ()


def given_plan(request: ConvertRequest, inventory: Inventory) -> Plan:
    """The plan of the file, or that of the rule.

    Raises:
        PlanError: the file's plan does not fit the model; no layer is eligible.
    """
    if request.plan_file:
        return check_plan(read_plan(request.plan_file), inventory.axes, inventory.refused)
    return rule_plan(inventory, request.n, request.channels)


def _load_data(
    request: ConvertRequest, channels: int, world: World, observer: Observer
) -> tuple[DataSpec | None, Dataset | None, Task | None, Task | None, list[str]]:
    """The data, what gives examples of it, what judges by it, and notes."""
    if request.task is not None:
        task = task_for(request.task, request.recipe, world)
        return None, None, task, task, []
    if request.data is None:
        return None, None, None, None, [NOISE]
    trains = request.recipe.epochs > 0
    load = partial(load_dataset, channels=channels, progress=observer.steps, need_labels=trains)
    spec, notes = request.data, tuple[str, ...]()
    if trains:
        data = load(spec)
    else:
        spec, data, notes = load_or_hold_out(spec, load)
    if len(data.train) < 2:
        raise StructconvError("the training part has a single image; expected at least 2.")
    observer.note(f"{len(data.train)} training and {len(data.val)} validation images")
    source = task_for(data, request.recipe, world)
    labelled = data.train.targets is not None
    every = [*data.notes, *notes, *(() if labelled else (UNLABELLED,))]
    return spec, data, source, source if labelled else None, every


def _check_drop(request: ConvertRequest, task: Task | None) -> None:
    if request.targets.max_drop is not None and not isinstance(task, Classification):
        judged = f"judged by {task.metric.name}" if task is not None else "not judged by labels"
        raise PlanError(
            "--max-drop is about points of accuracy, which are predicted from images with one "
            f"label each; here the model is {judged}. Give another target, such as "
            "--target-speedup."
        )
