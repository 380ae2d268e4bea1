"""The sizes of a model's inputs, and noise to fill them."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.graph import Graph

Feeds = dict[str, npt.NDArray[np.generic]]
Shapes = Mapping[str, tuple[int, ...]]


def example_inputs(model: onnx.ModelProto, batch: int, shapes: Shapes, seed: int = 0) -> Feeds:
    """Normal noise for a model's float inputs, zeros for others.

    Args:
        model: the model.
        batch: size of an open first axis.
        shapes: the sizes of inputs with other open axes; their first is replaced by the batch
            where the model leaves it open.
        seed: of the noise.

    Raises:
        OnnxError: an open axis has no size, a given shape does not fit, or an input is no tensor.
    """
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    wanted = Graph(model).inputs
    inputs = [value for value in model.graph.input if value.name in wanted]
    unknown = set(shapes) - set(wanted)
    if unknown:
        names = ", ".join(wanted)
        raise OnnxError(f"the model has no input {min(unknown)}; its inputs are {names}.")
    for value in inputs:
        if not value.type.HasField("tensor_type"):
            kind = value.type.WhichOneof("value")
            raise OnnxError(
                f"input {value.name} is a {(kind or 'value of no type').removesuffix('_type')}; "
                "expected a tensor. Export the model with tensors as inputs."
            )
        tensor = value.type.tensor_type
        # Older exporters wrote -1 for an open axis.
        declared = [d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim]
        sizes = _sizes(value.name, declared, batch, shapes.get(value.name))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        noise = rng.standard_normal(sizes) if dtype.kind == "f" else np.zeros(sizes)
        feeds[value.name] = noise.astype(dtype)
    return feeds


def _sizes(
    name: str, declared: list[int | None], batch: int, given: tuple[int, ...] | None
) -> tuple[int, ...]:
    if given is not None and (
        len(given) != len(declared)
        or any(
            size not in (None, fixed) for size, fixed in zip(declared[1:], given[1:], strict=True)
        )
    ):
        shape = "x".join("?" if size is None else str(size) for size in declared)
        raise OnnxError(
            f"input {name} has the shape {shape}; --input-shape gives "
            f"{'x'.join(map(str, given))}, which does not fit."
        )
    sizes = list(declared)
    if sizes and sizes[0] is None:
        sizes[0] = batch
    for axis, size in enumerate(sizes):
        if size is None and given is None:
            raise OnnxError(
                f"input {name} has no fixed size on axis {axis}, and its speed depends on it. Give "
                f"the usual size, such as --input-shape {name}=1x3x224x224."
            )
        if size is None and given is not None:
            sizes[axis] = given[axis]
    return tuple(size for size in sizes if size is not None)


def with_sizes(
    model: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[np.generic]]
) -> onnx.ModelProto:
    """A copy of a model whose inputs have the sizes of these arrays."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        if value.name in feeds:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, feeds[value.name].shape, strict=True):
                dim.dim_value = size
    return copy
