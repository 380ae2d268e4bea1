"""The pipeline: checkpoint, data and plan in; a run folder with a verified ONNX model out."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import onnx
import torch
from torch import nn

from structconv_cli import __version__
from structconv_cli.approximation import Approximation
from structconv_cli.artifacts import load_artifacts, save_tensors
from structconv_cli.attempts import attempt, make_planner
from structconv_cli.conversion import ConvertRequest, ConvertResult, layer_outcomes
from structconv_cli.conversion_steps import (
    WITHOUT_DATA,
    chance_warning,
    comparison,
    lower_into,
    run_files,
    target_notes,
    total_costs,
)
from structconv_cli.data.dataset import load_dataset
from structconv_cli.errors import StructconvError
from structconv_cli.json_file import write_json
from structconv_cli.model.checkpoint import save_like
from structconv_cli.model.plain import restore
from structconv_cli.model.signature import sized
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import load_onnx, save_onnx
from structconv_cli.plan import Plan
from structconv_cli.planning.judgement import judge
from structconv_cli.planning.pipeline import PlanFiles, check_plan_destination, write_proposal
from structconv_cli.planning.proposal import Proposal
from structconv_cli.preparation import TRACE_BATCH, Prepared, prepare
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reference import record_reference
from structconv_cli.report.curve import draw_curve
from structconv_cli.rewrite import rewrite
from structconv_cli.run_folder import FORMAT, RunFolder, RunInfo, check_destination, new_run_folder
from structconv_cli.tasks.choice import NO_TASK, task_name
from structconv_cli.tasks.classification import Classification
from structconv_cli.training.record import FineTuneResult
from structconv_cli.unfinished import open_unfinished
from structconv_cli.verify import VerifyResult, verify
from structconv_cli.world import ALONE, check_batch_size, joined


def convert(
    request: ConvertRequest, observer: Observer = SILENT
) -> tuple[ConvertResult, VerifyResult] | None:
    """Carry out a conversion and verify it; the run folder appears when all of it is done.

    A run whose verification fails is kept, so that it can be looked into. What an interrupted
    fine-tuning reached stays in `OUT.partial`.

    Where torchrun started several processes, all must call this; process 0 returns the outcome, and
    the others None once it is tuned.

    Raises:
        StructconvError: whatever is wrong with the input, before anything is written.
    """
    start = time.perf_counter()
    unfinished = open_unfinished(request)
    # It was begun with --force if there was a run to replace.
    replaces = request.force or bool(unfinished.tried)
    check_destination(request.out, replaces)
    request.hardware.check()
    with joined(request.hardware.device) as world:
        check_batch_size(request.recipe.batch_size, world)
        ready = prepare(request, world, observer)
        world.wait()
        found = attempt(request, ready, unfinished, world, observer)
    if not world.first:
        return None
    inventory, original = ready.inventory, ready.original
    plan, tuned, tuning = found.plan, found.model, found.tuning
    with new_run_folder(request.out, replaces) as folder:
        with observer.stage("rewrite and export"):
            save_onnx(original, folder.original_onnx)
            dense_graph, files = _write_models(folder, ready, tuned, plan)
            write_json(plan, folder.plan)
            if found.prediction is not None:
                write_json(found.prediction, folder.prediction)
                draw_curve(found.prediction, folder.curve)
            write_json(inventory, folder.inventory)
            folder.write_info(_run_info(request, ready, plan, files))
        with observer.stage("lowering"):
            feeds = ready.feeds(request.lowering.target.batch_size)
            lowering = lower_into(folder, dense_graph, plan, request.lowering, feeds, observer)
        artifacts = load_artifacts(folder)
        compare = comparison(artifacts, original, ready.data) if ready.source else WITHOUT_DATA
        verification = verify(artifacts, compare, observer)
        write_json(verification, folder.verify_result)
        layers = layer_outcomes(inventory, plan, lowering)
        before, after = total_costs(layers)
        result = ConvertResult(
            layers=layers,
            before=before,
            after=after,
            finetune=tuning,
            original_bytes=folder.original_onnx.stat().st_size,
            structured_bytes=folder.structured_onnx.stat().st_size,
            seconds=time.perf_counter() - start,
            notes=(
                *ready.notes,
                *found.notes,
                *_warnings(ready, tuning),
                *target_notes(request.targets, before, after),
                *(found.reconstruction.notes if found.reconstruction else ()),
            ),
            reconstruction=found.reconstruction,
        )
        write_json(result, folder.convert_result)
    unfinished.discard()
    return result, verification


def dry_run(request: ConvertRequest, out: Path, observer: Observer = SILENT) -> Proposal:
    """Plan a conversion and predict what it does; write the plan, as `structconv plan` does.

    Args:
        request: the conversion; its run folder is not written.
        out: the plan file.
        observer: is told of the stages.

    Raises:
        StructconvError: whatever is wrong with the input; nothing is written then.
    """
    files = PlanFiles(out)
    check_plan_destination(files, force=request.force)
    ready = prepare(request, ALONE, observer)
    planner = make_planner(request, ready, observer)
    if ready.given is None:
        proposal = planner.propose(request.targets)
    else:
        proposal = Proposal(ready.given, judge(planner, ready.given))
    write_proposal(proposal, files)
    return proposal


def verify_run(path: Path, observer: Observer = SILENT) -> VerifyResult:
    """Verify an existing run again, from its files alone, and record the outcome in it.

    Raises:
        StructconvError: the run folder is missing, incomplete or damaged.
    """
    folder = RunFolder(path)
    info = folder.info()
    artifacts = load_artifacts(folder)
    original = load_onnx(folder.original_onnx)
    compare: Callable[[], Approximation] | str
    try:
        with observer.stage("data"):
            data = None
            if info.data is not None:
                channels = next(iter(artifacts.inventory.inputs.values())).shape[0]
                data = load_dataset(
                    info.data,
                    channels=channels,
                    progress=observer.steps,
                    need_labels=info.task != NO_TASK,
                )
        if data is None and info.task == NO_TASK:
            compare = WITHOUT_DATA
        else:
            compare = comparison(artifacts, original, data)
    except StructconvError as error:
        compare = f"the data could not be loaded: {error}"
    result = verify(artifacts, compare, observer)
    write_json(result, folder.verify_result)
    return result


def _write_models(
    folder: RunFolder, ready: Prepared, tuned: nn.Module, plan: Plan
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Write weights, the dense graph and reference outputs; return the graph and the files."""
    files = _write_dense(folder, ready, tuned.state_dict(), plan)
    rewritten = rewrite(tuned, plan.structures)
    save_tensors(rewritten.state_dict(), folder.structured_weights, plan)
    dense_graph = export_onnx(tuned, *sized(ready.real, TRACE_BATCH))
    save_onnx(dense_graph, folder.dense_onnx)
    save_tensors(record_reference(tuned, ready.inventory, ready.real), folder.reference, plan)
    return dense_graph, files


def _write_dense(
    folder: RunFolder, ready: Prepared, state: Mapping[str, torch.Tensor], plan: Plan
) -> dict[str, str]:
    """Write the dense weights for the user's model, and by the plain layers' names; the files."""
    checkpoint = ready.opened.checkpoint
    own = folder.dense_weights(".safetensors" if checkpoint.kind == "safetensors" else ".pt")
    save_like(checkpoint, restore(ready.plain, state, checkpoint.tensors), own)
    if ready.plain.is_as_it_was:
        return run_files(folder, own)
    save_tensors(state, folder.plain_weights, plan)
    return run_files(folder, folder.plain_weights) | {"checkpoint": own.name}


def _run_info(
    request: ConvertRequest, ready: Prepared, plan: Plan, files: dict[str, str]
) -> RunInfo:
    return RunInfo(
        format=FORMAT,
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=request.command,
        checkpoint=str(request.checkpoint.absolute()),
        architecture=ready.opened.architecture,
        task=task_name(ready.task),
        data=ready.spec,
        plan_sha256=plan.digest,
        files=files,
        kind=ready.opened.checkpoint.kind,
    )


def _warnings(ready: Prepared, tuning: FineTuneResult) -> list[str]:
    if not isinstance(ready.task, Classification):
        return []
    return chance_warning(ready.task, tuning.stages[0].evaluation.score)
