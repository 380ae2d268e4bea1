"""The pipeline for an ONNX file: no training; weights inside their subspaces by least squares."""

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import torch

from structconv_cli import __version__
from structconv_cli.artifacts import load_artifacts, save_tensors
from structconv_cli.attempts import MOST_ATTEMPTS, backed_off
from structconv_cli.conversion import ConvertResult, layer_outcomes
from structconv_cli.conversion_steps import (
    WITHOUT_DATA,
    chance_warning,
    comparison,
    lower_into,
    run_files,
    target_notes,
    total_costs,
)
from structconv_cli.errors import PlanError
from structconv_cli.graph_inventory import graph_inventory
from structconv_cli.graph_module import OutputsModule, ScoresModule
from structconv_cli.graph_preparation import (
    OnnxRequest,
    PreparedGraph,
    prepare_graph,
)
from structconv_cli.json_file import write_json
from structconv_cli.model.checkpoint_kind import Kind
from structconv_cli.model.inventory import Inventory
from structconv_cli.onnx.file import save_onnx
from structconv_cli.onnx.lower import Lowering
from structconv_cli.onnx.probe import dense_kernel, layer_nodes
from structconv_cli.plan import Plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.prediction import Prediction
from structconv_cli.planning.proposal import Planner
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reconstruction.apply import apply_to_graph
from structconv_cli.reconstruction.result import ReconstructionRecord, ReconstructionSettings
from structconv_cli.reconstruction.samples import Samples, images_per_run
from structconv_cli.reconstruction.sequential import reconstruct
from structconv_cli.reference import record_reference
from structconv_cli.report.curve import draw_curve
from structconv_cli.run_folder import FORMAT, RunFolder, RunInfo, check_destination, new_run_folder
from structconv_cli.tasks.choice import task_name
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.task import UNMEASURED
from structconv_cli.training.recipe import named_recipe
from structconv_cli.training.record import FineTuneResult, StageResult
from structconv_cli.verify import VerifyResult, verify


@dataclass(frozen=True, eq=False)
class _Found:
    """A plan, carried out.

    Attributes:
        plan: what was carried out.
        prediction: what it was predicted to do; None for a plan from a file or a rule.
        dense: the graph with weights inside their subspaces.
        record: how these were found.
        stages: how it was judged; none where there is nothing to judge by.
        notes: what the user should know, one sentence each.
    """

    plan: Plan
    prediction: Prediction | None
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
    plan = found.plan
    with new_run_folder(request.out, request.force) as folder:
        save_onnx(ready.graph, folder.original_onnx)
        # A layer may have got a bias.
        inventory = graph_inventory(found.dense, ready.feeds())
        _write_models(folder, ready, found, inventory)
        write_json(plan, folder.plan)
        if found.prediction is not None:
            write_json(found.prediction, folder.prediction)
            draw_curve(found.prediction, folder.curve)
        write_json(inventory, folder.inventory)
        folder.write_info(_run_info(request, folder, ready, plan))
        with observer.stage("lowering"):
            feeds = ready.feeds(request.lowering.target.batch_size)
            lowering = lower_into(folder, found.dense, plan, request.lowering, feeds, observer)
        artifacts = load_artifacts(folder)
        judge = comparison(artifacts, ready.graph, ready.data) if ready.data else WITHOUT_DATA
        verification = verify(artifacts, judge, observer)
        write_json(verification, folder.verify_result)
        seconds = time.perf_counter() - start
        result = _result(request, ready, found, folder, inventory, lowering, seconds)
        write_json(result, folder.convert_result)
    return result, verification


def _carried_out(request: OnnxRequest, ready: PreparedGraph, observer: Observer) -> _Found:
    """Choose a plan as the request says and carry it out; backed off while it loses too much."""
    original = _judged(ready, ready.graph, "original", 0.0, 0.0, observer)
    if ready.given is not None:
        return _reconstructed(request, ready, ready.given, None, original, observer)
    settings, drop = request.proposal, request.targets.max_drop
    feeds = ready.feeds(settings.target.batch_size)
    planner = Planner(
        ready.graph, feeds, ready.samples, settings, ready.inventory.refused, observer
    )
    most_loss = planner.most_loss(drop) if drop is not None else None
    notes: list[str] = []
    for _ in range(MOST_ATTEMPTS):
        proposal = planner.propose(request.targets, most_loss)
        if not proposal.plan.structures:
            if notes:
                break
            raise PlanError(
                "the best plan for these targets keeps every layer as it is, so there is nothing "
                "to convert. Allow a larger --max-drop, or ask for more."
            )
        plan = check_plan(proposal.plan, ready.inventory.axes, ready.inventory.refused)
        found = _reconstructed(request, ready, plan, proposal.prediction, original, observer)
        lost = _lost(ready, found)
        if drop is None or most_loss is None or lost <= drop:
            return replace(found, notes=tuple(notes))
        notes.append(
            f"A plan {proposal.prediction.speedup:.2f} times as fast lost {lost:.2f} points, more "
            f"than --max-drop {drop:g}, and was given up."
        )
        most_loss = backed_off(most_loss, proposal.prediction.loss, drop, lost)
    raise PlanError(
        f"no plan tried loses at most {drop:g} points without training: {' '.join(notes)} Allow a "
        "larger --max-drop, ask for less, or fine-tune: convert the checkpoint with --arch."
    )


def _lost(ready: PreparedGraph, found: _Found) -> float:
    """Loss of the metric on the validation part; 0 where there is nothing to judge by."""
    if ready.task is None:
        return 0.0
    first, last = found.stages[0].evaluation, found.stages[-1].evaluation
    return ready.task.metric.drop(first.score, last.score)


def _reconstructed(
    request: OnnxRequest,
    ready: PreparedGraph,
    plan: Plan,
    prediction: Prediction | None,
    original: tuple[StageResult, ...],
    observer: Observer,
) -> _Found:
    """Carry out a plan and judge the outcome."""
    observer.note(f"{len(plan.structures)} of {len(plan.layers)} layers structured")
    start = time.perf_counter()
    threads = request.proposal.sensitivity.threads
    settings = ReconstructionSettings(seed=request.seed, threads=threads)
    images = Samples(ready.samples.inputs) if ready.samples is not None else None
    name = "least squares" if images is not None else "projected"
    found = reconstruct(ready.graph, plan.structures, images, settings, observer)
    dense = apply_to_graph(ready.graph, found)
    seconds = time.perf_counter() - start
    judged = _judged(ready, dense, name, _residual(dense, plan), seconds, observer)
    first = tuple(replace(x, max_residual=_residual(ready.graph, plan)) for x in original)
    return _Found(plan, prediction, dense, found.record, (*first, *judged))


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
) -> None:
    """Write weights, the dense graph and reference outputs."""
    save_onnx(found.dense, folder.dense_onnx)
    dense: dict[str, torch.Tensor] = {}
    reduced: dict[str, torch.Tensor] = {}
    structures = found.plan.structures
    for name, nodes in layer_nodes(found.dense, list(structures)).items():
        weight, bias = (torch.from_numpy(np.array(x)) for x in dense_kernel(found.dense, nodes[0]))
        dense[f"{name}.weight"] = weight
        reduced[f"{name}.weight"] = structures[name].coefficients(weight.double()).float()
        if inventory.layer(name).spec.bias:
            dense[f"{name}.bias"] = reduced[f"{name}.bias"] = bias.flatten()
    save_tensors(dense, _dense_weights(folder), found.plan)
    save_tensors(reduced, folder.structured_weights, found.plan)
    fixed = images_per_run(found.dense)
    reference = record_reference(OutputsModule(found.dense), inventory, ready.real, fixed=fixed)
    save_tensors(reference, folder.reference, found.plan)


def _dense_weights(folder: RunFolder) -> Path:
    return folder.dense_weights(".safetensors")


def _run_info(request: OnnxRequest, folder: RunFolder, ready: PreparedGraph, plan: Plan) -> RunInfo:
    return RunInfo(
        format=FORMAT,
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=request.command,
        checkpoint=str(request.model.absolute()),
        architecture=None,
        task=task_name(ready.task),
        data=ready.spec,
        plan_sha256=plan.digest,
        files=run_files(folder, _dense_weights(folder)),
        kind=Kind.ONNX,
    )


def _result(
    request: OnnxRequest,
    ready: PreparedGraph,
    found: _Found,
    folder: RunFolder,
    inventory: Inventory,
    lowering: Lowering,
    seconds: float,
) -> ConvertResult:
    layers = layer_outcomes(inventory, found.plan, lowering)
    before, after = total_costs(layers)
    warnings: list[str] = []
    if isinstance(ready.task, Classification):
        warnings = chance_warning(ready.task, found.stages[0].evaluation.score)
    return ConvertResult(
        layers=layers,
        before=before,
        after=after,
        finetune=FineTuneResult(
            named_recipe("default", 0, seed=request.seed),
            ready.task.metric if ready.task is not None else UNMEASURED,
            found.stages,
            (),
        ),
        original_bytes=folder.original_onnx.stat().st_size,
        structured_bytes=folder.structured_onnx.stat().st_size,
        seconds=seconds,
        notes=(
            *ready.notes,
            *found.record.notes,
            *found.notes,
            *warnings,
            *target_notes(request.targets, before, after),
        ),
        reconstruction=found.record,
    )
