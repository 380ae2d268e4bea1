"""What the tensors of a graph hold for given inputs, at their sizes and at others."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx.numpy_helper import to_array

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.probe import exposed, run_fed

Array = npt.NDArray[np.generic]
Values = Mapping[str, Array]


def samples(model: onnx.ModelProto, feeds: Values, tensors: Sequence[str]) -> list[Values]:
    """Run a graph on given inputs, and on inputs of another size where its axes are open.

    The graph says itself which sizes it takes: the first that it runs at is the second sample.

    Args:
        model: the graph.
        feeds: its inputs; those that have a default may be left out.
        tensors: the inner tensors wanted.

    Returns:
        One or two samples: values by tensor, the inputs among them. None if ONNX Runtime does not
        run the graph on `feeds`.
    """
    inputs = {value.name for value in model.graph.input} - set(feeds)
    defaults = {t.name: to_array(t) for t in model.graph.initializer if t.name in inputs}
    feeds = {**defaults, **feeds}
    # A graph without outputs cannot be run.
    wanted = list(tensors) or [value.name for value in model.graph.output][:1]
    try:
        runtime = exposed(model, wanted)
        found = [_run(runtime, feeds, wanted)]
    except OnnxError:
        return []
    for other in _other_sizes(model, feeds):
        try:
            return [*found, _run(runtime, other, wanted)]
        except OnnxError:
            continue
    return found


def _run(runtime: onnxruntime.InferenceSession, feeds: Values, tensors: Sequence[str]) -> Values:
    return {**feeds, **dict(zip(tensors, run_fed(runtime, feeds), strict=True))}


def _other_sizes(model: onnx.ModelProto, feeds: Values) -> Iterator[Values]:
    """Inputs of other sizes, the cheapest first; none if every axis is fixed."""
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.input if v.name in feeds}
    if all(dim.HasField("dim_value") for shape in shapes.values() for dim in shape):
        return
    for resize in _SIZES:
        named: dict[str, int] = {}
        other = {}
        for name, shape in shapes.items():
            sizes = list(feeds[name].shape)
            for axis, dim in enumerate(shape[: len(sizes)]):
                if not dim.HasField("dim_value"):
                    size = (1 if sizes[axis] > 1 else 2) if not axis else resize(sizes[axis], axis)
                    sizes[axis] = named.setdefault(dim.dim_param or f"{name}/{axis}", size)
            other[name] = np.resize(feeds[name], sizes)
        yield other


_SIZES: tuple[Callable[[int, int], int], ...] = (
    # Odd, and not square; then what suits networks that halve their images; then the batch alone.
    lambda size, axis: (size - size // (axis + 1)) | 1,
    lambda size, axis: size // 2,
    lambda size, axis: size + 32,
    lambda size, axis: size,
)
"""Other sizes of an open axis behind the first, by its size and position."""
