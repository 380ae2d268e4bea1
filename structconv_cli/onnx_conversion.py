"""The pipeline for an ONNX file: no training; weights inside their subspaces by least squares."""

import time
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch

from structconv_cli.artifacts import save_tensors
from structconv_cli.conversion import ConvertResult
from structconv_cli.finishing import CarriedOut, Outset, finish
from structconv_cli.graph_inventory import graph_inventory
from structconv_cli.graph_module import OutputsModule, ScoresModule
from structconv_cli.graph_preparation import OnnxRequest, PreparedGraph, prepare_graph
from structconv_cli.model.checkpoint_kind import Kind
from structconv_cli.model.inventory import Inventory
from structconv_cli.onnx.file import save_onnx
from structconv_cli.onnx.probe import dense_kernel, layer_nodes
from structconv_cli.plan import Plan
from structconv_cli.plan_choice import PlanChoice, Tried
from structconv_cli.planning.proposal import Planner
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reconstruction.apply import apply_to_graph
from structconv_cli.reconstruction.result import ReconstructionRecord, ReconstructionSettings
from structconv_cli.reconstruction.samples import Samples, images_per_run
from structconv_cli.reconstruction.sequential import reconstruct
from structconv_cli.reference import record_reference
from structconv_cli.run_folder import RunFolder, check_destination, new_run_folder
from structconv_cli.tasks.task import UNMEASURED
from structconv_cli.training.recipe import named_recipe
from structconv_cli.training.record import FineTuneResult, StageResult
from structconv_cli.verify import VerifyResult


@dataclass(frozen=True, eq=False)
class _Found:
    """A plan, carried out.

    Attributes:
        entry: the plan.
        dense: the graph with weights inside their subspaces.
        record: how these were found.
        stages: how it was judged; none where there is nothing to judge by.
        notes: what the user should know, one sentence each.
    """

    entry: Tried
    dense: onnx.ModelProto
    record: ReconstructionRecord
    stages: tuple[StageResult, ...]
    notes: tuple[str, ...] = ()


def convert_onnx(
    request: OnnxRequest, observer: Observer = SILENT
) -> tuple[ConvertResult, VerifyResult]:
    """Carry out a conversion and verify it; the run folder appears when all of it is done.

    A run whose verification fails is kept, so that it can be looked into. Labels are used to judge,
    and to plan for targets; weights are fitted without them.

    Raises:
        StructconvError: whatever is wrong with the input, or no plan meets the targets; nothing is
            written then.
    """
    start = time.perf_counter()
    check_destination(request.out, request.force)
    ready = prepare_graph(request, observer)
    found = _carried_out(request, ready, observer)
    with new_run_folder(request.out, request.force) as folder:
        # A layer may have got a bias.
        inventory = graph_inventory(found.dense, ready.feeds())
        files = _write_models(folder, ready, found, inventory)
        outset = Outset(
            started=start,
            command=request.command,
            checkpoint=request.model,
            architecture=None,
            kind=Kind.ONNX,
            original=ready.graph,
            spec=ready.spec,
            data=ready.data,
            task=ready.task,
            targets=request.targets,
            lowering=request.lowering,
            feeds=ready.feeds(request.lowering.target.batch_size),
        )
        metric = ready.task.metric if ready.task is not None else UNMEASURED
        recipe = named_recipe("default", 0, seed=request.seed)
        done = CarriedOut(
            found.entry.plan,
            found.entry.prediction,
            inventory,
            found.dense,
            files,
            FineTuneResult(recipe, metric, found.stages, ()),
            found.record,
            (*ready.notes, *found.notes),
        )
        return finish(folder, outset, done, observer)


def _carried_out(request: OnnxRequest, ready: PreparedGraph, observer: Observer) -> _Found:
    """Choose a plan as the request says and carry it out; backed off while it loses too much."""
    original = _judged(ready, ready.graph, "original", 0.0, 0.0, observer)
    settings = request.proposal

    def planner() -> Planner:
        feeds, refused = ready.feeds(settings.target.batch_size), ready.inventory.refused
        return Planner(ready.graph, feeds, ready.samples, settings, refused, observer)

    choice = PlanChoice(ready.given, request.targets, ready.inventory, planner)
    tried: tuple[Tried, ...] = ()
    while (entry := choice.next(tried)) is not None:
        found = _reconstructed(request, ready, entry, original, observer)
        drop = _drop(ready, found)
        if choice.holds(drop):
            return replace(found, notes=choice.given_up(tried))
        tried = (*tried, replace(entry, drop=drop))
    raise choice.exhausted(
        tried,
        "without training",
        "Allow a larger --max-drop, ask for less, or fine-tune: convert the checkpoint with "
        "--arch.",
    )


def _drop(ready: PreparedGraph, found: _Found) -> float:
    """Loss of the metric on the validation part; 0 where there is nothing to judge by."""
    if ready.task is None:
        return 0.0
    first, last = found.stages[0].evaluation, found.stages[-1].evaluation
    return ready.task.metric.drop(first.score, last.score)


def _reconstructed(
    request: OnnxRequest,
    ready: PreparedGraph,
    entry: Tried,
    original: tuple[StageResult, ...],
    observer: Observer,
) -> _Found:
    """Carry out a plan and judge the outcome."""
    plan = entry.plan
    observer.note(f"{len(plan.structures)} of {len(plan.layers)} layers structured")
    start = time.perf_counter()
    threads = request.proposal.sensitivity.threads
    settings = ReconstructionSettings(seed=request.seed, threads=threads)
    images = Samples(ready.samples.inputs) if ready.samples is not None else None
    name = "least squares" if images is not None else "projected"
    with observer.stage(name):
        found = reconstruct(ready.graph, plan.structures, images, settings, observer)
        dense = apply_to_graph(ready.graph, found)
    seconds = time.perf_counter() - start
    judged = _judged(ready, dense, name, _residual(dense, plan), seconds, observer)
    first = tuple(replace(x, max_residual=_residual(ready.graph, plan)) for x in original)
    return _Found(entry, dense, found.record, (*first, *judged))


def _judged(
    ready: PreparedGraph,
    graph: onnx.ModelProto,
    stage: str,
    residual: float,
    seconds: float,
    observer: Observer,
) -> tuple[StageResult, ...]:
    """A graph judged by the task; nothing where there is none."""
    task = ready.task
    if task is None:
        return ()
    scores = ScoresModule(graph)
    with observer.stage(f"evaluation: {stage}"):
        evaluation = task.evaluate(lambda batch: task.forward(scores, batch))
    return (StageResult(stage, evaluation, residual, seconds),)


def _residual(graph: onnx.ModelProto, plan: Plan) -> float:
    """The largest relative distance of a planned layer's weight to its subspace."""
    nodes = layer_nodes(graph, list(plan.structures))
    weights = {name: dense_kernel(graph, found[0])[0] for name, found in nodes.items()}
    return max(
        structure.residual(torch.from_numpy(weights[name].astype(np.float64)))
        for name, structure in plan.structures.items()
    )


def _write_models(
    folder: RunFolder, ready: PreparedGraph, found: _Found, inventory: Inventory
) -> dict[str, str]:
    """Write weights, the dense graph and reference outputs; the files that are this kind's own."""
    save_onnx(found.dense, folder.dense_onnx)
    dense: dict[str, torch.Tensor] = {}
    reduced: dict[str, torch.Tensor] = {}
    plan = found.entry.plan
    structures = plan.structures
    for name, nodes in layer_nodes(found.dense, list(structures)).items():
        weight, bias = (torch.from_numpy(np.array(x)) for x in dense_kernel(found.dense, nodes[0]))
        dense[f"{name}.weight"] = weight
        reduced[f"{name}.weight"] = structures[name].coefficients(weight.double()).float()
        if inventory.layer(name).spec.bias:
            dense[f"{name}.bias"] = reduced[f"{name}.bias"] = bias.flatten()
    own = folder.dense_weights(".safetensors")
    save_tensors(dense, own, plan)
    save_tensors(reduced, folder.structured_weights, plan)
    fixed = images_per_run(found.dense)
    reference = record_reference(OutputsModule(found.dense), inventory, ready.real, fixed=fixed)
    save_tensors(reference, folder.reference, plan)
    return {"dense weights": own.name}
