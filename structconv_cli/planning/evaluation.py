"""Running a model on samples, a few images at a time, and how long an image takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from structconv_cli.errors import PlanError
from structconv_cli.onnx.probe import run_fed, session
from structconv_cli.planning.divergence import Original, ends_in_softmax
from structconv_cli.reconstruction.samples import Array, Feeds, Samples, images_per_run

_NUMBERS_RUN = 2**21
"""Numbers in the inputs of one run: inner tensors hold some ten times as many."""
_MOST_RUN = 64

Run = Callable[[Feeds], Sequence[Array]]


@dataclass(frozen=True, eq=False)
class OriginalModel:
    """The original model, loaded and timed.

    Attributes:
        model: the graph.
        runtime: its session.
        shape: of its first output, in a run of a few images.
        load_seconds: that loading took.
        image_seconds: that one image of a warm run took.
    """

    model: onnx.ModelProto
    runtime: onnxruntime.InferenceSession
    shape: tuple[int, ...]
    load_seconds: float
    image_seconds: float

    @classmethod
    def of(cls, model: onnx.ModelProto, feeds: Feeds, threads: int) -> "OriginalModel":
        """Load a model and run it on the first of these images.

        Raises:
            OnnxError: ONNX Runtime cannot load or run it.
        """
        start = time.perf_counter()
        runtime = session(model, threads)
        loading = time.perf_counter() - start
        first = Samples(feeds).part(slice(_batch(model, feeds))).inputs
        shape = run_fed(runtime, first)[0].shape
        start = time.perf_counter()
        run_fed(runtime, first)
        seconds = time.perf_counter() - start
        return cls(model, runtime, shape, loading, seconds / Samples(first).count)

    def on(self, samples: Samples) -> Original:
        """Its outputs on samples.

        Raises:
            PlanError: they are not finite.
        """
        outputs = outputs_on(self.model, samples, lambda feeds: run_fed(self.runtime, feeds))
        if not all(np.isfinite(array).all() for array in outputs if array.dtype.kind == "f"):
            raise PlanError(
                "the model puts out NaN or infinity on the samples; expected finite numbers. Check "
                "that the samples are prepared as in training, and that the model runs on them."
            )
        labels = None if samples.labels is None else samples.labels.astype(np.int64)
        return Original(outputs, labels, ends_in_softmax(self.model))


def outputs_on(model: onnx.ModelProto, samples: Samples, run: Run) -> list[Array]:
    """All outputs that `run` makes of samples, fed as many at a time as `model` takes.

    The samples must fill whole runs of a model with a fixed batch.
    """
    batch = _batch(model, samples.inputs)
    parts = [
        run(samples.part(slice(start, start + batch)).inputs)
        for start in range(0, samples.count, batch)
    ]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _batch(model: onnx.ModelProto, feeds: Feeds) -> int:
    numbers = sum(array[0].size for array in feeds.values())
    return images_per_run(model) or int(np.clip(_NUMBERS_RUN // max(numbers, 1), 1, _MOST_RUN))
