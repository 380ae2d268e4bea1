"""Times of whole models: measured, and told from the sums of their nodes' times."""

from collections.abc import Mapping
from dataclasses import dataclass

from structconv_cli.onnx.measure import Measure
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import TimingCache
from structconv_cli.planning.choice import Choice
from structconv_cli.planning.network import Feeds, Network
from structconv_cli.planning.options import ModelOptions
from structconv_cli.planning.realise import realise

DENSE = "dense"
"""Name of the model as it is, among those that are timed."""
_PLAUSIBLE = 0.3


@dataclass(frozen=True)
class Clock:
    """How the sum of a model's nodes' times becomes the time of the whole model (ms).

    The profiler adds to every node what it takes to write the time down; the session adds what lies
    between nodes. Two models measured both ways give the line.
    """

    offset: float = 0.0
    factor: float = 1.0

    def whole(self, nodes_ms: float) -> float:
        """The whole model's time for a sum of its nodes'."""
        return self.offset + self.factor * nodes_ms

    def nodes(self, whole_ms: float) -> float:
        """The sum for a time of the whole model."""
        return (whole_ms - self.offset) / self.factor


class Stopwatch:
    """Times whole models on one target.

    Args:
        network: the dense graph.
        target: where they are to be fast.
        feeds: an input of the real shapes, by name.
        cache: times known from earlier; new ones are added.
    """

    def __init__(self, network: Network, target: Target, feeds: Feeds, cache: TimingCache) -> None:
        self._network = network
        self._measure = Measure(network.alternatives({}), target, feeds, cache)

    def whole(self, choices: Mapping[str, Choice]) -> dict[str, float]:
        """Times (ms) of the dense model and of some choices, by name, in turns."""
        models = {name: realise(self._network, choice) for name, choice in choices.items()}
        return self._measure.whole({DENSE: self._network.graph.model, **models})

    def clock(self, options: ModelOptions, fastest: Choice) -> tuple[float, Clock]:
        """The dense model's time (ms), and how sums of nodes become times of models.

        Args:
            options: what there is to choose from.
            fastest: the choice that takes least time: the line's other end.
        """
        dense, quick = options.dense_ms, fastest.ms
        if all(option.structure.is_dense for option in fastest.options):
            return dense, Clock()
        times = self.whole({"fastest": fastest})
        slow, fast = times[DENSE], times["fastest"]
        if not slow:  # not timed: the fastest choice comes to the same graph
            return dense, Clock()
        # The share of the dense model's time that shrinks as the sum of its nodes does.
        share = (1 - fast / slow) / (1 - quick / dense) if quick < dense else 1.0
        if abs(share - 1) > _PLAUSIBLE:  # so far off is noise, or too short a line to tell
            share = 1.0
        return slow, Clock((1 - share) * slow, share * slow / dense)
