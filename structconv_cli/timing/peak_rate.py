"""How fast this machine can multiply at best: the bound that a layer's time is held against."""

import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

_SIDES = (128, 256, 384, 768)
"""Sides of square matrices. Which is fastest depends on the caches and the threads."""
_SECONDS = 0.25


def peak_macs_per_s(threads: int) -> float:
    """Multiply-accumulates per second of float32 matrix products in ONNX Runtime, on the CPU.

    The fastest of many runs: what disturbs one only ever adds to it.

    Args:
        threads: intra-op threads.
    """
    return max(_rate(side, threads) for side in _SIDES)


def _rate(side: int, threads: int) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _product(side), options, providers=["CPUExecutionProvider"]
    )
    left = np.random.default_rng(1).standard_normal((side, side), np.float32)
    seconds: list[float] = []
    while sum(seconds) < _SECONDS:
        start = time.perf_counter()
        session.run(None, {"x": left})
        seconds.append(time.perf_counter() - start)
    return float(side**3 / min(seconds))


def _product(side: int) -> bytes:
    """A model that multiplies by a constant matrix, which ONNX Runtime packs beforehand."""
    right = np.random.default_rng(0).standard_normal((side, side), np.float32)
    shape = [side, side]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    weights = [numpy_helper.from_array(right, "w")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content
