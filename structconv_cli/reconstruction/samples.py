"""The data that predictions are made on, and whether it fits the model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.errors import PlanError
from structconv_cli.onnx.graph import Graph

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of a model, prepared as it takes them.

    Attributes:
        inputs: by name, images along the first axis: N of them in each.
        labels: (N,) class of each image; None where they are not known.
    """

    inputs: Feeds
    labels: Array | None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(next(iter(self.inputs.values())))

    def part(self, index: Array | slice) -> "Samples":
        """Some of the images."""
        inputs = {name: array[index] for name, array in self.inputs.items()}
        return Samples(inputs, None if self.labels is None else self.labels[index])


def check_samples(model: onnx.ModelProto, samples: Samples) -> None:
    """Check that samples fit a graph's inputs.

    Raises:
        PlanError: a name, shape, type or number is not as the graph needs it, or a value is not
            finite.
    """
    graph = Graph(model)
    missing, unknown = (
        set(graph.inputs) - set(samples.inputs),
        set(samples.inputs) - set(graph.inputs),
    )
    if missing or unknown:
        raise PlanError(
            f"the samples are for the inputs {', '.join(sorted(samples.inputs)) or 'of no name'}; "
            f"the model's are {', '.join(graph.inputs)}. Give an array for each of the model's."
        )
    for value in model.graph.input:
        if value.name in graph.inputs:
            _check_input(value, samples.inputs[value.name])
    counts = {name: len(array) for name, array in samples.inputs.items()}
    if len(set(counts.values())) > 1:
        raise PlanError(
            f"the samples' inputs have different numbers of images: {counts}. Give as many in each."
        )
    least = images_per_run(model) or 1
    if samples.count < least:
        raise PlanError(
            f"there are {samples.count} samples; the model runs on {least} at a time. Give at "
            f"least {least}."
        )
    labels = samples.labels
    if labels is None:
        return
    if labels.shape != (samples.count,) or labels.dtype.kind not in "iu":
        raise PlanError(
            f"the labels are {labels.dtype} of shape {labels.shape}; expected one integer for each "
            f"of the {samples.count} samples. Give class numbers, or no labels."
        )


def _check_input(value: onnx.ValueInfoProto, array: Array) -> None:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if array.dtype != dtype:
        raise PlanError(
            f"the samples for input {value.name} are {array.dtype}; the model takes {dtype}. "
            f"Convert them, normalised as in training, with .astype({dtype})."
        )
    sizes = [d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim]
    fits = array.ndim == len(sizes) and all(
        size in (None, found) for size, found in zip(sizes[1:], array.shape[1:], strict=True)
    )
    if array.ndim == 0 or not fits:
        wanted = " x ".join(["N", *("any" if size is None else str(size) for size in sizes[1:])])
        raise PlanError(
            f"the samples for input {value.name} have the shape "
            f"{' x '.join(map(str, array.shape))}; the model takes {wanted}. Give images of that "
            "shape, one after the other along the first axis."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise PlanError(
            f"the samples for input {value.name} hold NaN or infinity. Check how they were made."
        )


def images_per_run(model: onnx.ModelProto) -> int | None:
    """The number of images that a graph is fixed to; None where its first axis is open."""
    graph = Graph(model)
    sizes = [
        value.type.tensor_type.shape.dim[0].dim_value
        for value in model.graph.input
        if value.name in graph.inputs and len(value.type.tensor_type.shape.dim)
    ]
    return next((size for size in sizes if size > 0), None)


def check_labels(labels: Array, outputs: tuple[int, ...]) -> None:
    """Check labels against the shape of the model's first output.

    Raises:
        PlanError: the output is no row of class scores, or has no score for a label.
    """
    if len(outputs) != 2 or outputs[1] < 2:
        raise PlanError(
            f"the samples have labels, but the model's first output has the shape {outputs}, not "
            "(N, classes): it is no classifier. Give the samples without labels."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs[1]:
        raise PlanError(
            f"the labels go from {low} to {high}; the model has {outputs[1]} classes, 0 to "
            f"{outputs[1] - 1}. Give the labels that it was trained with."
        )
