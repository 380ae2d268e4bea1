"""The user's images in a benchmark: what models run on, are calibrated on, and are judged by."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.benchmarking.result import Quality
from structconv_cli.data.dataset import Dataset, load_dataset
from structconv_cli.data.hold_out import load_or_hold_out
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import BenchmarkError, TaskError
from structconv_cli.graph_module import ScoresModule
from structconv_cli.onnx.file import load_onnx
from structconv_cli.onnx.graph import Graph
from structconv_cli.tasks.choice import image_task
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.segmentation import Segmentation


@dataclass(frozen=True, eq=False)
class Images:
    """Images that fit a model.

    Attributes:
        spec: What was loaded.
        data: The images.
        task: What judges models by the labels; None where there are none that fit.
        missing: Why there is no task; empty if there is one.
    """

    spec: DataSpec
    data: Dataset
    task: Classification | Segmentation | None
    missing: str = ""

    def inputs(self, count: int) -> npt.NDArray[np.float32]:
        """The first validation images, prepared: (count at most, C, H, W)."""
        prepared: npt.NDArray[np.float32] = self.data.prepare(self.data.val.first(count)).numpy()
        return prepared

    def calibration(self, count: int) -> npt.NDArray[np.float32]:
        """Random training images, prepared: (count at most, C, H, W)."""
        task = self.task or Classification(self.data, seed=self.spec.seed)
        (images,), _ = task.samples(count)
        drawn: npt.NDArray[np.float32] = images.numpy()
        return drawn

    @property
    def quality(self) -> Quality | None:
        """What scores mean; None where models cannot be judged."""
        if self.task is None:
            return None
        metric = self.task.metric
        return Quality(
            metric.name,
            metric.unit,
            metric.higher_is_better,
            len(self.data.val),
            self.spec.source,
        )

    @torch.no_grad()
    def score(self, file: Path) -> float:
        """The metric of an ONNX file on the validation part, in ONNX Runtime on the CPU."""
        assert self.task is not None
        task, scores = self.task, ScoresModule(load_onnx(file))
        return task.evaluate(lambda batch: task.forward(scores, batch)).score


def load_images(
    spec: DataSpec, model: onnx.ModelProto, progress: Callable[[int, int], None]
) -> Images:
    """Load images for a model of one image input; labels are used where there are any that fit.

    Raises:
        DataError: The data cannot be read, or does not fit the model.
        BenchmarkError: The model does not take images.
    """
    channels, sizes = _image_input(model)

    def load(spec: DataSpec) -> Dataset:
        return load_dataset(spec, channels=channels, progress=progress, need_labels=False)

    spec, data, _ = load_or_hold_out(spec, load)
    found = data.val.image_shape[1:]
    if any(size not in (None, have) for size, have in zip(sizes, found, strict=True)):
        wanted = "x".join("?" if size is None else str(size) for size in sizes)
        raise BenchmarkError(
            f"The images of {spec.source} are {'x'.join(map(str, found))} pixels, and the model "
            f"takes {wanted}. Give --size, or the data that the model was made for."
        )
    if data.train.targets is None:
        return Images(spec, data, None, f"the images of {spec.source} have no labels.")
    task = image_task(data)(data, seed=spec.seed)
    try:
        task.check(ScoresModule(model))
    except TaskError as error:
        return Images(spec, data, None, str(error))
    return Images(spec, data, task)


def _image_input(model: onnx.ModelProto) -> tuple[int, tuple[int | None, ...]]:
    """Channels, and height and width where they are fixed, of a model's only input."""
    names = Graph(model).inputs
    values = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    dims = [dim.dim_value or None for dim in values[names[0]]] if names else []
    if len(names) != 1 or len(dims) != 4 or dims[1] is None:
        raise BenchmarkError(
            f"The model's inputs are {', '.join(names) or 'none'}; --data gives images to models "
            "of one input (batch, channels, height, width). Give --input FILE.npz, or leave the "
            "data out."
        )
    return dims[1], (dims[2], dims[3])
