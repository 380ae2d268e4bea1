"""The steps that conversions of checkpoints and of ONNX files share."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.approximation import Approximation, compare_models, compare_outputs
from structconv_cli.artifacts import outputs_of, scores_of, stamp
from structconv_cli.conversion import LayerOutcome
from structconv_cli.cost import Cost
from structconv_cli.data.dataset import Dataset
from structconv_cli.json_file import write_json
from structconv_cli.onnx.file import save_onnx
from structconv_cli.onnx.lower import Lowering, LoweringSettings, lower
from structconv_cli.plan import Plan
from structconv_cli.planning.targets import Targets
from structconv_cli.progress import Observer
from structconv_cli.run_folder import RunFolder
from structconv_cli.tasks.choice import image_task
from structconv_cli.tasks.classification import Classification
from structconv_cli.verify import Artifacts

_OUTPUTS_ONLY = (
    "on the real inputs that the run folder keeps (verifying does not run the task file, so the "
    "metric is not computed again)"
)
WITHOUT_DATA = (
    "the model was converted without data. Its accuracy is unmeasured: give --data to `structconv "
    "convert`, or judge structured.onnx yourself."
)
_MET = 1.005
NOISE = 'The "real inputs" that the run folder keeps are noise, for lack of data.'
UNLABELLED = (
    "The images have no labels, so accuracy is unmeasured; how far the outputs are from the "
    "original's is."
)


def lower_into(
    folder: RunFolder,
    dense: onnx.ModelProto,
    plan: Plan,
    settings: LoweringSettings,
    feeds: Mapping[str, npt.NDArray[np.generic]],
    observer: Observer,
) -> Lowering:
    """Write the lowered graph, and how it was lowered."""
    structured, lowering = lower(dense, plan.structures, settings.how(feeds), observer)
    stamp(structured, plan, lowering.layers)
    save_onnx(structured, folder.structured_onnx)
    write_json(lowering, folder.lowering)
    observer.note(f"{len(lowering.layers)} layers in cheaper forms")
    return lowering


def comparison(
    artifacts: Artifacts, original: onnx.ModelProto, data: Dataset | None
) -> Callable[[], Approximation]:
    """What measures the structured model against the original."""
    structured = artifacts.structured_onnx
    if data is None:
        return lambda: compare_outputs(
            outputs_of(original, artifacts), outputs_of(structured, artifacts), _OUTPUTS_ONLY
        )
    batches = data.batches(data.val, image_task(data).most_at_once // 4)
    models = scores_of(original), scores_of(structured)
    return lambda: compare_models(*models, batches, data.ignore_label)


def total_costs(layers: tuple[LayerOutcome, ...]) -> tuple[Cost, Cost]:
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


def run_files(folder: RunFolder, dense_weights: Path) -> dict[str, str]:
    """The name of every artefact of a run, by its role."""
    files = {
        "plan": folder.plan,
        "layers": folder.inventory,
        "structured weights": folder.structured_weights,
        "dense weights": dense_weights,
        "original model": folder.original_onnx,
        "dense structured model": folder.dense_onnx,
        "structured model": folder.structured_onnx,
        "lowering": folder.lowering,
        "reference outputs": folder.reference,
    }
    return {role: path.name for role, path in files.items()}


def chance_warning(task: Classification, original: float) -> list[str]:
    """A warning where the original's accuracy (percent) is near chance."""
    classes = len(task.data.classes)
    if original >= 200 / classes:
        return []
    return [
        f"The original model is right on only {original:.1f} % of the validation images, near "
        f"chance for {classes} classes: check --mean, --std and --size against what it was "
        "trained with, and the order of the classes."
    ]
