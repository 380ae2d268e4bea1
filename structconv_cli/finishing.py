"""The end that all conversions share: from a plan carried out to a run folder, verified."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli import __version__
from structconv_cli.artifacts import load_artifacts, stamp
from structconv_cli.comparison import comparison
from structconv_cli.conversion import ConvertResult, LayerOutcome, layer_outcomes
from structconv_cli.cost import Cost
from structconv_cli.data.dataset import Dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.json_file import write_json
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.inventory import Inventory
from structconv_cli.onnx.file import save_onnx
from structconv_cli.onnx.lower import Lowering, LoweringSettings, lower
from structconv_cli.plan import Plan
from structconv_cli.planning.prediction import Prediction
from structconv_cli.planning.targets import Targets
from structconv_cli.progress import Observer
from structconv_cli.reconstruction.result import ReconstructionRecord
from structconv_cli.report.curve import draw_curve
from structconv_cli.run_folder import FORMAT, RunFolder, RunInfo
from structconv_cli.tasks.choice import task_name
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.task import Task
from structconv_cli.training.record import FineTuneResult
from structconv_cli.verify import VerifyResult, verify

_MET = 1.005
_LEARNED = 0.1
"""Share of the way from chance to 100 % that a model which has learned something has gone."""


@dataclass(frozen=True, eq=False)
class Outset:
    """What a conversion began with, as far as its end has to do with it.

    Attributes:
        started: when, by `time.perf_counter` (seconds).
        command: the command line's words.
        checkpoint: the user's file.
        architecture: what built the model; None for a file that holds the model itself.
        kind: the file's kind.
        original: the dense model.
        spec: the data as it was loaded; None where a task file loads it, or there is none.
        data: likewise.
        task: what the model was judged by; None where nothing is labelled.
        targets: what was asked for.
        lowering: how ONNX forms are chosen.
        feeds: inputs to time them with, by name.
    """

    started: float
    command: tuple[str, ...]
    checkpoint: Path
    architecture: Architecture | None
    kind: str
    original: onnx.ModelProto
    spec: DataSpec | None
    data: Dataset | None
    task: Task | None
    targets: Targets
    lowering: LoweringSettings
    feeds: Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class CarriedOut:
    """A plan, carried out.

    Attributes:
        plan: the plan.
        prediction: what it was predicted to do; None for a plan from a file or a rule.
        inventory: the model's layers.
        dense: the graph with weights inside their subspaces.
        files: names of the run's files that differ between conversions, by role.
        tuning: how it was judged, stage by stage.
        reconstruction: how weights were found without training; None where they were tuned.
        notes: what the user should know, one sentence each.
    """

    plan: Plan
    prediction: Prediction | None
    inventory: Inventory
    dense: onnx.ModelProto
    files: Mapping[str, str]
    tuning: FineTuneResult
    reconstruction: ReconstructionRecord | None
    notes: tuple[str, ...]


def finish(
    folder: RunFolder, outset: Outset, done: CarriedOut, observer: Observer
) -> tuple[ConvertResult, VerifyResult]:
    """Record a plan that was carried out, lower its graph, verify the outcome and write it down.

    The folder already has the dense graph, the weights and the reference outputs.

    Raises:
        OnnxError: the graph cannot be lowered.
    """
    plan, task = done.plan, task_name(outset.task)
    save_onnx(outset.original, folder.original_onnx)
    write_json(plan, folder.plan)
    if done.prediction is not None:
        write_json(done.prediction, folder.prediction)
        draw_curve(done.prediction, folder.curve)
    write_json(done.inventory, folder.inventory)
    folder.write_info(_run_info(folder, outset, done, task))
    with observer.stage("lowering"):
        lowering = _lower_into(folder, outset, done, observer)
    artifacts = load_artifacts(folder)
    compare = comparison(artifacts, outset.original, outset.data, task)
    verification = verify(artifacts, compare, observer)
    write_json(verification, folder.verify_result)
    layers = layer_outcomes(done.inventory, plan, lowering)
    before, after = _total_costs(layers)
    result = ConvertResult(
        layers=layers,
        before=before,
        after=after,
        finetune=done.tuning,
        original_bytes=folder.original_onnx.stat().st_size,
        structured_bytes=folder.structured_onnx.stat().st_size,
        seconds=time.perf_counter() - outset.started,
        notes=(
            *done.notes,
            *chance_warning(outset.task, done.tuning),
            *target_notes(outset.targets, before, after),
            *(done.reconstruction.notes if done.reconstruction else ()),
        ),
        reconstruction=done.reconstruction,
    )
    write_json(result, folder.convert_result)
    return result, verification


def _lower_into(
    folder: RunFolder, outset: Outset, done: CarriedOut, observer: Observer
) -> Lowering:
    """Write the lowered graph, and how it was lowered."""
    how = outset.lowering.how(outset.feeds)
    structured, lowering = lower(done.dense, done.plan.structures, how, observer)
    stamp(structured, done.plan, lowering.layers)
    save_onnx(structured, folder.structured_onnx)
    write_json(lowering, folder.lowering)
    observer.note(f"{len(lowering.layers)} layers in cheaper forms")
    return lowering


def _run_info(folder: RunFolder, outset: Outset, done: CarriedOut, task: str) -> RunInfo:
    shared = {
        "plan": folder.plan,
        "layers": folder.inventory,
        "structured weights": folder.structured_weights,
        "original model": folder.original_onnx,
        "dense structured model": folder.dense_onnx,
        "structured model": folder.structured_onnx,
        "lowering": folder.lowering,
        "reference outputs": folder.reference,
    }
    return RunInfo(
        format=FORMAT,
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=outset.command,
        checkpoint=str(outset.checkpoint.absolute()),
        architecture=outset.architecture,
        task=task,
        data=outset.spec,
        plan_sha256=done.plan.digest,
        files={role: path.name for role, path in shared.items()} | dict(done.files),
        kind=outset.kind,
    )


def _total_costs(layers: tuple[LayerOutcome, ...]) -> tuple[Cost, Cost]:
    """Costs of all layers that the model runs together, before and after."""
    pairs = [(layer.before, layer.after) for layer in layers if layer.before and layer.after]
    nothing = Cost(0, 0, 0)
    return sum((x for x, _ in pairs), nothing), sum((y for _, y in pairs), nothing)


def target_notes(targets: Targets, before: Cost, after: Cost) -> list[str]:
    """What to say where lowering left layers dense that the plan for these targets counts on."""
    asked = (
        (targets.macs, "MACs", after.multiplications / before.multiplications),
        (targets.parameters, "parameters", after.parameters / before.parameters),
    )
    return [
        f"{left:.3f} of the {what} are left where {wanted:g} was asked for: structured layers of "
        "which no form is faster here were left dense (see the table)."
        for wanted, what, left in asked
        if wanted is not None and left > wanted * _MET
    ]


def chance_warning(task: Task | None, tuning: FineTuneResult) -> list[str]:
    """A warning where the original's accuracy is near chance."""
    if not isinstance(task, Classification):
        return []
    labels = task.data.val.labels
    assert labels is not None
    original = tuning.stages[0].evaluation.score
    # Labels that are mere numbers have no names.
    classes = len(task.data.classes) or len(set(labels.tolist()))
    chance = 100 / classes
    if original >= min(2 * chance, chance + _LEARNED * (100 - chance)):
        return []
    return [
        f"The original model is right on only {original:.1f} % of the validation images, near "
        f"chance for {classes} classes: check --mean, --std and --size against what it was "
        "trained with, and the order of the classes."
    ]
