"""Verifying a run that exists, from its files alone."""

from collections.abc import Callable
from pathlib import Path

from structconv_cli.approximation import Approximation
from structconv_cli.artifacts import load_artifacts
from structconv_cli.comparison import comparison
from structconv_cli.data.dataset import load_dataset
from structconv_cli.errors import StructconvError
from structconv_cli.json_file import write_json
from structconv_cli.onnx.file import load_onnx
from structconv_cli.progress import SILENT, Observer
from structconv_cli.run_folder import RunFolder
from structconv_cli.tasks.choice import NO_TASK
from structconv_cli.verify import VerifyResult, verify


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
        compare = comparison(artifacts, original, data, info.task)
    except StructconvError as error:
        compare = f"the data could not be loaded: {error}"
    result = verify(artifacts, compare, observer)
    write_json(result, folder.verify_result)
    return result
