"""How much worse a changed model's outputs are than the original's, on the same samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx
from scipy.special import log_softmax

from structconv_cli.errors import PlanError
from structconv_cli.onnx.graph import Graph

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]

_LEAST_PROBABILITY = 1e-30
_LEAST_OF_DIVERGENCE = 0.1


@dataclass(frozen=True, eq=False)
class Original:
    """What the original model puts out on some samples.

    Attributes:
        outputs: all its outputs, one array each, images along the first axis.
        labels: class of each image, for the first output; None where there are none.
        normalised: whether the first output holds probabilities (a Softmax makes it), not logits.
    """

    outputs: Sequence[Array]
    labels: npt.NDArray[np.int64] | None
    normalised: bool

    @property
    def classifies(self) -> bool:
        """Whether the output is a row of class scores for each image."""
        first = self.outputs[0]
        return len(self.outputs) == 1 and first.ndim == 2 and first.shape[1] > 1

    def rise(self, outputs: Sequence[Array]) -> tuple[float, float | None]:
        """The rise in loss, and top-1 points lost (None without labels).

        The loss is cross-entropy where there are labels, a tenth of the divergence at least: on few
        images a change may seem to help. Without labels it is the divergence KL(original ||
        changed) of a classifier's outputs; else the squared difference of the outputs relative to
        their variance around the mean image's. In nats, in nats, and without unit.
        """
        if self.labels is not None:
            found = self._log_probabilities(outputs[0])
            rows = np.arange(len(found))
            rise = (self._log[rows, self.labels] - found[rows, self.labels]).mean()
            rise = max(rise, _LEAST_OF_DIVERGENCE * self._divergence(found))
            lost = self._right.mean() - (found.argmax(1) == self.labels).mean()
            return float(rise), 100 * float(lost)
        if self.classifies:
            return self._divergence(self._log_probabilities(outputs[0])), None
        floats = self._floats(outputs)
        if not floats:
            raise PlanError(
                "the model puts out whole numbers only, and losses are predicted from outputs that "
                "change by degrees. Return its scores too, or plan without data."
            )
        return float(np.mean([_relative(a, b) for a, b in floats])), None

    def _divergence(self, log_probabilities: Floats) -> float:
        apart = self._log - log_probabilities
        return float((np.exp(self._log) * apart).sum(1).mean())

    @cached_property
    def _log(self) -> Floats:
        return self._log_probabilities(self.outputs[0])

    @cached_property
    def _right(self) -> npt.NDArray[np.bool_]:
        right: npt.NDArray[np.bool_] = self._log.argmax(1) == self.labels
        return right

    def _log_probabilities(self, scores: Array) -> Floats:
        exact = scores.astype(np.float64)
        if self.normalised:
            return np.log(np.maximum(exact, _LEAST_PROBABILITY))
        found: Floats = log_softmax(exact, axis=1)
        return found

    def _floats(self, outputs: Sequence[Array]) -> list[tuple[Floats, Floats]]:
        return [
            (one.astype(np.float64), other.astype(np.float64))
            for one, other in zip(self.outputs, outputs, strict=True)
            if one.dtype.kind == "f"
        ]


def ends_in_softmax(model: onnx.ModelProto) -> bool:
    """Whether a Softmax makes a model's first output."""
    graph = Graph(model)
    made = graph.producers.get(graph.outputs[0])
    return made is not None and made.op_type == "Softmax"


def _relative(original: Floats, changed: Floats) -> float:
    scale = float(np.square(original - original.mean(0)).mean()) or float(
        np.square(original).mean()
    )
    difference = float(np.square(changed - original).mean())
    return difference / scale if scale else float(difference > 0)
