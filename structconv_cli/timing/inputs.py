"""The input that a benchmark gives to models, as they declare it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from structconv_cli.errors import BenchmarkError

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
}


def agree_on_inputs(
    declared: Mapping[str, Sequence[Mapping[str, Any]]], batch_size: int
) -> tuple[list[list[dict[str, Any]]], dict[str, tuple[int, ...]]]:
    """Give each input's name, dtype and shape, for every model, and the shapes they all share.

    Args:
        declared: By the model's title, the baseline's first, each input's name, ONNX Runtime's
            type, and shape, in which open dimensions are None.
        batch_size: Images in one run, which becomes the size of the first axis.

    Raises:
        BenchmarkError: An input cannot be filled, or has a batch axis of another size or another
            axis without a size; or the models' inputs differ, or take more memory together than
            is available now.
    """
    inputs = [_resolve(title, items, batch_size) for title, items in declared.items()]
    shapes = _common_shapes(list(declared), inputs)
    _check_memory(inputs, batch_size)
    return inputs, shapes


def _resolve(
    title: str, inputs: Sequence[Mapping[str, Any]], batch_size: int
) -> list[dict[str, Any]]:
    """Give each input's name, dtype and shape, the batch axis set to the batch size."""
    resolved = []
    for item in inputs:
        name, shape = item["name"], list(item["shape"])
        if item["type"] not in _DTYPES:
            raise BenchmarkError(
                f"{title}: input '{name}' has type {item['type']}; the benchmark can fill "
                f"{', '.join(_DTYPES)}. Export the model with such an input."
            )
        if shape and shape[0] is None:
            shape[0] = batch_size
        elif shape and shape[0] != batch_size:
            raise BenchmarkError(
                f"{title}: input '{name}' has a fixed batch axis of {shape[0]}, and the benchmark "
                f"was asked for a batch size of {batch_size}. Use a batch size of {shape[0]}, or "
                "export the model with a symbolic batch axis."
            )
        if None in shape:
            axes = ", ".join(str(axis) for axis, size in enumerate(shape) if size is None)
            raise BenchmarkError(
                f"{title}: input '{name}' has no fixed size on axis {axes}; only the first axis, "
                "the batch, may be symbolic. Export the model with fixed sizes on the others."
            )
        resolved.append({"name": name, "dtype": _DTYPES[item["type"]], "shape": shape})
    return resolved


def _common_shapes(
    titles: Sequence[str], inputs: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, tuple[int, ...]]:
    """Give the shapes that all models' inputs have, by the inputs' names."""
    shapes = [{item["name"]: tuple(item["shape"]) for item in items} for items in inputs]
    for title, other in zip(titles[1:], shapes[1:], strict=True):
        if other != shapes[0]:
            raise BenchmarkError(
                f"{title} has the inputs {other}, and the baseline, {titles[0]}, has "
                f"{shapes[0]}. Only models with the same input names and shapes can be compared; "
                "export them for the same input."
            )
    return shapes[0]


def _check_memory(inputs: Sequence[Sequence[Mapping[str, Any]]], batch_size: int) -> None:
    """Refuse an input that cannot fit, which some systems would grant and then kill us for."""
    needed = sum(
        math.prod(item["shape"]) * np.dtype(item["dtype"]).itemsize
        for items in inputs
        for item in items
    )
    available = psutil.virtual_memory().available
    if needed > available:
        raise BenchmarkError(
            f"A batch size of {batch_size} makes the input of all models together {needed} bytes, "
            f"and {available} bytes of memory are available. Use a smaller batch size."
        )
