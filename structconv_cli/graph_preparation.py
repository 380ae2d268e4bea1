"""All that the conversion of an ONNX file starts from, loaded and checked before the long work."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import torch

from structconv_cli.conversion import NOISE, UNLABELLED
from structconv_cli.data.dataset import Dataset, load_dataset
from structconv_cli.data.hold_out import load_or_hold_out
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import PlanError, TaskError
from structconv_cli.graph_inventory import graph_inventory
from structconv_cli.graph_module import ScoresModule
from structconv_cli.model.inventory import Inventory
from structconv_cli.model.signature import sized
from structconv_cli.model_graph import image_channels
from structconv_cli.onnx.example_inputs import Shapes, example_inputs
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.lower import LoweringSettings
from structconv_cli.onnx.lowerable import load_lowerable
from structconv_cli.plan import Plan, read_plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.pipeline import training_samples
from structconv_cli.planning.rule import rule_plan
from structconv_cli.planning.settings import ProposalSettings
from structconv_cli.planning.targets import Targets
from structconv_cli.progress import Observer
from structconv_cli.reconstruction.samples import Samples, check_samples, images_per_run
from structconv_cli.reference import REAL_EXAMPLES
from structconv_cli.tasks.choice import image_task
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.segmentation import Segmentation

_BATCH = 2


@dataclass(frozen=True, eq=False)
class OnnxRequest:
    """What the user asked for.

    Attributes:
        model: an ONNX file.
        shapes: sizes of inputs with open axes.
        data: images to fit and judge on, with or without labels; None for the weights only.
        out: the run folder to write.
        force: whether an existing one is replaced.
        n, channels: the rule for all layers (see `planning.rule`), where there is no plan file.
        plan_file: a plan to obey instead.
        targets: what a plan is to be made for instead; empty for none.
        proposal: how such a plan is made.
        images: training images that weights are fitted on and plans made from.
        lowering: how the ONNX forms are chosen.
        seed: of what is random.
        command: the command line's words, for the record.
    """

    model: Path
    shapes: Shapes
    data: DataSpec | None
    out: Path
    force: bool = False
    n: int = 2
    channels: float = 1.0
    plan_file: Path | None = None
    targets: Targets = field(default_factory=Targets)
    proposal: ProposalSettings = field(default_factory=lambda: ProposalSettings(tuned=False))
    images: int = 512
    lowering: LoweringSettings = field(default_factory=LoweringSettings)
    seed: int = 0
    command: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PreparedGraph:
    """What a conversion starts from, loaded and checked.

    Attributes:
        graph: the model.
        spec: the data as it was loaded; None for none.
        data: the images; None for none.
        task: what judges the model by labels; None where there are none that fit it.
        samples: images to fit on; None for none.
        real: the model's inputs, one tensor each: validation images, or noise where there is no
            data.
        inventory: the model's layers.
        given: the plan of a file or of the rule; None if one is to be made for targets.
        notes: what the user should know, one sentence each.
    """

    graph: onnx.ModelProto
    spec: DataSpec | None
    data: Dataset | None
    task: Classification | Segmentation | None
    samples: Samples | None
    real: tuple[torch.Tensor, ...]
    inventory: Inventory
    given: Plan | None
    notes: tuple[str, ...]

    def feeds(self, batch: int = _BATCH) -> dict[str, npt.NDArray[Any]]:
        """A batch of the model's inputs by name; of the model's own size where that is fixed."""
        return _feeds(self.graph, self.real, batch)


def prepare_graph(request: OnnxRequest, observer: Observer) -> PreparedGraph:
    """Load and check all that the conversion of an ONNX file starts from.

    Raises:
        StructconvError: whatever is wrong with it.
    """
    with observer.stage("model"):
        graph, found = load_lowerable(request.model)
        notes = [*found]
    spec = data = task = samples = None
    if request.data is None:
        rows = images_per_run(graph) or REAL_EXAMPLES
        noise = example_inputs(graph, rows, request.shapes, request.seed)
        real = tuple(torch.from_numpy(array) for array in noise.values())
        notes.append(NOISE)
    else:
        with observer.stage("data"):
            spec, data, found = _load(request.data, graph, observer)
            notes += [*data.notes, *found]
            images = image_task(data)(data, seed=request.seed)
            samples = training_samples(images, graph, request.images)
            check_samples(graph, samples)
            real = images.examples(REAL_EXAMPLES)
    with observer.stage("layers"):
        inventory = graph_inventory(graph, _feeds(graph, real, _BATCH))
    if data is not None:
        task, why = _judge(data, graph, request.seed)
        notes += [why] if why else []
    if request.targets.max_drop is not None and not isinstance(task, Classification):
        raise PlanError(
            "--max-drop is about points of accuracy, which take images with one label each, and a "
            "model that gives one score per class. Give such --data, or another target, such as "
            "--target-speedup."
        )
    given = _given_plan(request, inventory) if request.targets.is_empty else None
    return PreparedGraph(graph, spec, data, task, samples, real, inventory, given, tuple(notes))


def _feeds(
    graph: onnx.ModelProto, real: tuple[torch.Tensor, ...], batch: int
) -> dict[str, npt.NDArray[Any]]:
    inputs = sized(real, images_per_run(graph) or batch)
    return {n: x.numpy() for n, x in zip(Graph(graph).inputs, inputs, strict=True)}


def _load(
    spec: DataSpec, graph: onnx.ModelProto, observer: Observer
) -> tuple[DataSpec, Dataset, tuple[str, ...]]:
    """Load images."""

    def load(spec: DataSpec) -> Dataset:
        channels = image_channels(graph)
        return load_dataset(spec, channels=channels, progress=observer.steps, need_labels=False)

    found, data, notes = load_or_hold_out(spec, load)
    observer.note(f"{len(data.train)} training and {len(data.val)} validation images")
    return found, data, notes


def _judge(
    data: Dataset, graph: onnx.ModelProto, seed: int
) -> tuple[Classification | Segmentation | None, str]:
    """What judges the graph by labels; or why nothing does.

    Raises:
        DataError: the data has classes that the model does not have.
    """
    if data.train.targets is None:
        return None, UNLABELLED
    task = image_task(data)(data, seed=seed)
    try:
        task.check(ScoresModule(graph))
    except TaskError as error:
        reason = str(error).partition(";")[0]
        return None, f"The labels were not used, so accuracy is unmeasured: {reason}."
    return task, ""


def _given_plan(request: OnnxRequest, inventory: Inventory) -> Plan:
    if request.plan_file:
        return check_plan(read_plan(request.plan_file), inventory.axes, inventory.refused)
    return rule_plan(inventory, request.n, request.channels)
