"""A graph as a function of whole batches, as many examples as are given."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.probe import run_fed, session
from structconv_cli.reconstruction.samples import images_per_run

Array = npt.NDArray[np.generic]


class WholeGraph:
    """Runs a graph; one that is fixed to some examples at once, as often as it takes.

    Attributes:
        inputs: names of its inputs.
        outputs: names of its outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Load it (OnnxError if ONNX Runtime refuses it)."""
        self.inputs = Graph(model).inputs
        self.outputs = tuple(value.name for value in model.graph.output)
        self._runtime = session(model)
        self._fixed = images_per_run(model)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, for inputs by name, each (B, ...).

        Raises:
            OnnxError: ONNX Runtime refuses an input, or fails.
        """
        count = len(next(iter(feeds.values())))
        share = self._fixed or count
        parts: list[list[Array]] = []
        for start in range(0, count, share):
            # The last part is filled up with the first examples.
            rows = np.arange(start, start + share) % count
            outputs = run_fed(self._runtime, {name: array[rows] for name, array in feeds.items()})
            parts.append([output[: count - start] for output in outputs])
        joined = (np.concatenate(found) for found in zip(*parts, strict=True))
        return dict(zip(self.outputs, joined, strict=True))
