"""What measures a run's structured model against the original."""

from collections.abc import Callable

import onnx

from structconv_cli.approximation import Approximation, compare_models, compare_outputs
from structconv_cli.artifacts import outputs_of, scores_of
from structconv_cli.data.dataset import Dataset
from structconv_cli.tasks.choice import NO_TASK, image_task
from structconv_cli.verify import Artifacts

_OUTPUTS_ONLY = (
    "on the real inputs that the run folder keeps (verifying does not run the task file, so the "
    "metric is not computed again)"
)
_WITHOUT_DATA = (
    "the model was converted without data. Its accuracy is unmeasured: give --data to `structconv "
    "convert`, or judge structured.onnx yourself."
)


def comparison(
    artifacts: Artifacts, original: onnx.ModelProto, data: Dataset | None, task: str
) -> Callable[[], Approximation] | str:
    """What measures the structured model against the original; or why nothing does.

    Args:
        artifacts: of the run.
        original: the dense model.
        data: validation images; None where a task file loads the data, or there is none.
        task: as the run folder records it (`tasks.choice.task_name`).
    """
    structured = artifacts.structured_onnx
    if data is None and task == NO_TASK:
        return _WITHOUT_DATA
    if data is None:
        return lambda: compare_outputs(
            outputs_of(original, artifacts), outputs_of(structured, artifacts), _OUTPUTS_ONLY
        )
    batches = data.batches(data.val, image_task(data).most_at_once // 4)
    models = scores_of(original), scores_of(structured)
    return lambda: compare_models(*models, batches, data.ignore_label)
