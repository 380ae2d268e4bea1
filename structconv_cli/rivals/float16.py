"""A float model with its weights and arithmetic in float16, by ONNX Runtime's own converter."""

import warnings
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from structconv_cli.errors import BenchmarkError, one_line
from structconv_cli.onnx.file import load_onnx


def write_float16(source: Path, out: Path) -> str:
    """Convert a model, its inputs and outputs still float32; return how, in words.

    Raises:
        BenchmarkError: it cannot be converted.
    """
    try:
        with warnings.catch_warnings():
            # It tells of every weight that is too small for float16.
            warnings.simplefilter("ignore")
            half = OnnxModel(convert_float_to_float16(load_onnx(source), keep_io_types=True))
        # The converter appends the casts of inputs behind the nodes that read them.
        half.topological_sort()
        onnx.save(half.model, out)
    except Exception as error:
        raise BenchmarkError(
            f"ONNX Runtime's converter cannot write {source} in float16: {one_line(error)}. Leave "
            "--against fp16 out."
        ) from error
    return "float16, by ONNX Runtime's converter; inputs and outputs float32"
