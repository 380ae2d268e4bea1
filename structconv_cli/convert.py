"""The pipeline: checkpoint, data and plan in; a run folder with a verified ONNX model out."""

import time
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import nn

from structconv_cli.artifacts import save_tensors
from structconv_cli.attempts import attempt, make_planner
from structconv_cli.conversion import ConvertRequest, ConvertResult
from structconv_cli.finishing import CarriedOut, Outset, finish
from structconv_cli.model.checkpoint import save_like
from structconv_cli.model.plain import restore
from structconv_cli.model.signature import sized
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import save_onnx
from structconv_cli.plan import Plan
from structconv_cli.planning.judgement import judge
from structconv_cli.planning.pipeline import PlanFiles, check_plan_destination, write_proposal
from structconv_cli.planning.proposal import Proposal
from structconv_cli.preparation import TRACE_BATCH, Prepared, prepare
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reference import record_reference
from structconv_cli.rewrite import rewrite
from structconv_cli.run_folder import RunFolder, check_destination, new_run_folder
from structconv_cli.training.hardware import Hardware
from structconv_cli.unfinished import open_unfinished
from structconv_cli.verify import VerifyResult
from structconv_cli.world import ALONE, World, check_batch_size, joined


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
        hardware_notes = _hardware_notes(request.hardware, world, observer)
        ready = prepare(request, world, observer)
        world.wait()
        found = attempt(request, ready, unfinished, world, observer)
    if not world.first:
        return None
    with new_run_folder(request.out, replaces) as folder:
        with observer.stage("rewrite and export"):
            dense, files = _write_models(folder, ready, found.model, found.plan)
        outset = Outset(
            started=start,
            command=request.command,
            checkpoint=request.checkpoint,
            architecture=ready.opened.architecture,
            kind=ready.opened.checkpoint.kind,
            original=ready.original,
            spec=ready.spec,
            data=ready.data,
            task=ready.task,
            targets=request.targets,
            lowering=request.lowering,
            feeds=ready.feeds(request.lowering.target.batch_size),
        )
        done = CarriedOut(
            found.plan,
            found.prediction,
            ready.inventory,
            dense,
            files,
            found.tuning,
            found.reconstruction,
            (*hardware_notes, *ready.notes, *found.notes),
        )
        outcome = finish(folder, outset, done, observer)
    unfinished.discard()
    return outcome


def _hardware_notes(hardware: Hardware, world: World, observer: Observer) -> tuple[str, ...]:
    """What speaks against the hardware chosen, told at once: the training may take hours."""
    note = hardware.note() if world.first else None
    if note is None:
        return ()
    with observer.stage("hardware"):
        observer.note(note)
    return (note,)


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
        return {"dense weights": own.name}
    save_tensors(state, folder.plain_weights, plan)
    return {"dense weights": folder.plain_weights.name, "checkpoint": own.name}
