"""From the user's files to a plan file: load, plan, predict, write."""

import os
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import onnx

from structconv_cli.data.dataset import Dataset, load_dataset
from structconv_cli.data.hold_out import load_or_hold_out
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import PlanError
from structconv_cli.json_file import write_json
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.signature import INPUT
from structconv_cli.model_graph import open_source
from structconv_cli.onnx.example_inputs import Shapes, example_inputs
from structconv_cli.onnx.graph import Graph
from structconv_cli.plan import read_plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.judgement import judge
from structconv_cli.planning.proposal import Planner, Proposal
from structconv_cli.planning.settings import ProposalSettings
from structconv_cli.planning.targets import Targets
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reconstruction.samples import Samples, check_samples
from structconv_cli.report.curve import draw_curve
from structconv_cli.tasks.choice import image_task
from structconv_cli.tasks.task import Task

_MOST_NUMBERS, _MOST_INPUTS, _LEAST_SAMPLES = 2**25, 2**28, 16
"""Of all samples' outputs and inputs, which are held in memory, and of samples all the same."""


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for.

    Attributes:
        model: an .onnx file or a checkpoint.
        architecture: what builds the model that a checkpoint fits; None to recognise it.
        shapes: sizes of inputs with open axes.
        data: what to predict losses from; None to estimate them.
        images: how many images of the data's training part are used.
        targets: what is to be reached; empty for the best bargain.
        given: a plan file to predict instead of making a plan; None to make one.
        settings: where the model is to be fast, and how losses are predicted.
        out: the plan file.
        force: whether an existing one is replaced.
        trust_pickle: whether a pickled module's code may be run.
    """

    model: Path
    architecture: Architecture | None
    shapes: Shapes
    data: DataSpec | None
    images: int
    targets: Targets
    settings: ProposalSettings
    out: Path
    force: bool = False
    given: Path | None = None
    trust_pickle: bool = False


@dataclass(frozen=True)
class PlanFiles:
    """What is written: the plan, its prediction, and a picture of the trade-offs."""

    plan: Path
    prediction: Path = field(init=False)
    picture: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prediction", self.plan.with_suffix(".prediction.json"))
        object.__setattr__(self, "picture", self.plan.with_suffix(".png"))


def plan_model(
    request: PlanRequest, observer: Observer = SILENT
) -> tuple[Proposal, tuple[str, ...]]:
    """Make a plan and write it; the model is not changed.

    Returns:
        The plan with its prediction, and one sentence on each part of the model left alone.

    Raises:
        StructconvError: the input does not allow it, or no plan meets the targets; nothing is
            written then.
    """
    files = PlanFiles(request.out)
    check_plan_destination(files, force=request.force)
    with observer.stage("model"):
        source = open_source(
            request.model,
            request.architecture,
            observer,
            trust_pickle=request.trust_pickle,
        )
    data = None
    if request.data is not None:
        with observer.stage("data"):
            _, data, _ = load_or_hold_out(request.data, partial(_load, source.channels, observer))
    with observer.stage("export"):
        shapes = dict(request.shapes)
        if data is not None and source.takes_images_alone:
            shapes.setdefault(INPUT, (2, *data.train.image_shape))
        graph, notes = source.graph(shapes)
        samples = None
        if data is not None:
            seed = request.settings.sensitivity.seed
            samples = training_samples(image_task(data)(data, seed=seed), graph, request.images)
            check_samples(graph, samples)
        batch = request.settings.target.batch_size
        if samples is not None and not request.shapes:
            name, images = next(iter(samples.inputs.items()))
            shapes = {name: (batch, *images.shape[1:])}
        feeds = example_inputs(graph, batch, shapes)
    planner = Planner(graph, feeds, samples, request.settings, observer=observer)
    if request.given is None:
        proposal = planner.propose(request.targets)
    else:
        axes = {name: layer.dense for name, layer in planner.network.layers.items()}
        given = check_plan(read_plan(request.given), axes, planner.network.kept)
        proposal = Proposal(given, judge(planner, given))
    write_proposal(proposal, files)
    return proposal, notes


def _load(channels: int, observer: Observer, spec: DataSpec) -> Dataset:
    return load_dataset(spec, channels=channels, progress=observer.steps, need_labels=False)


def write_proposal(proposal: Proposal, files: PlanFiles) -> None:
    """Write a plan, its prediction, and the picture; the plan last."""
    files.plan.parent.mkdir(parents=True, exist_ok=True)
    write_json(proposal.prediction, files.prediction)
    draw_curve(proposal.prediction, files.picture)
    write_json(proposal.plan, files.plan)


def training_samples(task: Task, graph: onnx.ModelProto, count: int) -> Samples:
    """Some training examples as a graph's inputs; fewer where these or outputs would fill memory.

    Labels only where each example has one, and the graph's first output a score for each of several
    classes: other losses are predicted from the outputs alone.
    """
    view = Graph(graph)
    numbers = sum(prod(size or 1 for size in (view.shape(x) or ())[1:]) for x in view.outputs)
    example = sum(prod(tensor.shape[1:]) for tensor in task.examples(1))
    most = min(_MOST_NUMBERS // numbers, _MOST_INPUTS // example)
    inputs, labels = task.samples(min(count, max(_LEAST_SAMPLES, most)))
    arrays = {name: tensor.numpy() for name, tensor in zip(view.inputs, inputs, strict=True)}
    shape = view.shape(view.outputs[0])
    if labels is None or (shape is not None and (len(shape) != 2 or shape[1] == 1)):
        return Samples(arrays)
    return Samples(arrays, labels.numpy())


def check_plan_destination(files: PlanFiles, *, force: bool) -> None:
    """Refuse to replace a plan that somebody may have edited, unless that is wanted.

    Raises:
        PlanError: the plan file exists, is a folder, or is to have the picture's name.
    """
    if files.plan.is_dir():
        raise PlanError(f"{files.plan} is a folder; give the plan file's name with --out.")
    if files.plan == files.picture:
        raise PlanError(
            f"{files.plan} is where the plan's picture goes; give --out a name such as plan.json."
        )
    every = (files.plan, files.prediction, files.picture)
    present = [file for file in every if file.exists()]
    if present and not force:
        raise PlanError(
            f"{present[0]} exists, and may have been edited. Give another --out, or --force to "
            "replace it."
        )
    folder = next(parent for parent in files.plan.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PlanError(
            f"nothing can be written to {folder}. Give the plan file another place with --out."
        )
