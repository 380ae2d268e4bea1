"""ONNX Runtime's static quantisation of a float model to 8 bits (QDQ)."""

import logging
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from structconv_cli.errors import BenchmarkError, one_line

_PER_RUN = 16


def write_int8(
    source: Path, out: Path, feeds: Mapping[str, npt.NDArray[np.generic]], batch: int | None
) -> str:
    """Quantise a model; return how, in words.

    Activations become unsigned, weights signed and per channel, which is what x86 processors
    multiply fastest; without VNNI instructions weights get 7 bits, since products of 8 overflow.

    Args:
        source: the float model.
        out: the file to write.
        feeds: examples to take ranges from, (examples, ...) by input.
        batch: the only batch size that the model takes; None for any.

    Raises:
        BenchmarkError: ONNX Runtime cannot quantise it.
    """
    narrow = not _has_vnni()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(out),
                _Examples(feeds, batch or _PER_RUN),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=narrow,
            )
        except Exception as error:
            raise BenchmarkError(
                f"ONNX Runtime cannot quantise {source} to 8 bits: {one_line(error)}. Leave "
                "--against int8 out, or give a quantised file of your own: --against FILE.onnx."
            ) from error
    bits = "7-bit weights (no VNNI here)" if narrow else "8-bit weights"
    return f"ONNX Runtime's static INT8 (QDQ), {bits}, per channel"


class _Examples(CalibrationDataReader):  # type: ignore[misc]
    """Batches of examples, the last filled up with the first examples."""

    def __init__(self, feeds: Mapping[str, npt.NDArray[np.generic]], batch: int) -> None:
        count = len(next(iter(feeds.values())))
        starts = range(0, count, batch)
        rows = (np.arange(start, start + batch) % count for start in starts)
        self._batches: Iterator[dict[str, npt.NDArray[np.generic]]] = (
            {name: array[chosen] for name, array in feeds.items()} for chosen in rows
        )

    def get_next(self) -> dict[str, npt.NDArray[np.generic]] | None:
        """The next batch by input; None at the end."""
        return next(self._batches, None)


def _has_vnni() -> bool:
    """Whether products of 8 bits do not overflow; on other processors than x86 they never do."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "vnni" in cpuinfo.read_text()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice, which the user did not ask for, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
