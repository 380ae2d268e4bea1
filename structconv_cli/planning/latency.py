"""What every structure of every layer takes on the target, measured in place before any training.

A form's time does not depend on the weights' values. So each candidate is tried on the whole graph
at once: all layers get that structure, the graph is written anew and run under the profiler
(`onnx.measure`), and one run times one candidate for all layers. The runs differ in how tensors are
carried, since that ties layers together: *whole*; *in parts*, as channel windows want it; and with
*half* of the channels of all selectable spaces, or of every second one, since a layer's time then
depends on what it reads and on what it makes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from structconv_cli.onnx.alternatives import Alternatives, Choice
from structconv_cli.onnx.channels import Channels
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.measure import Measure
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import TimingCache
from structconv_cli.planning.candidates import (
    DENSE,
    KERNEL_LEVELS,
    PRODUCT_LEVELS,
    WINDOWS,
    Candidate,
    ChannelKind,
    KernelLevel,
    kernel_levels,
)
from structconv_cli.planning.network import Feeds, Network, NetworkLayer
from structconv_cli.progress import SILENT, Observer

State = Literal["whole", "parts", "half"]
"""How a tensor is carried."""


@dataclass(frozen=True)
class Situation:
    """A candidate, and how its layer's input and output are carried.

    Attributes:
        candidate: the layer's structure.
        source: its input; "parts" for windows, and for the other readers of such a tensor.
        sink: its output: "half" where the selection of others leaves half of it.
    """

    candidate: Candidate
    source: State = "whole"
    sink: State = "whole"


@dataclass(frozen=True, eq=False)
class Latency:
    """Measured times (ms), for the target's batch.

    Attributes:
        layers: by layer and situation; the dense one is `Situation(Candidate())`.
        others: of all nodes but the layers, all tensors whole.
        units: what carrying each unit in parts adds to that.
        halves: what half of a space's channels take from that, by space; negative if they save.
    """

    layers: Mapping[str, Mapping[Situation, float]]
    others: float
    units: tuple[float, ...]
    halves: Mapping[str, float]

    @property
    def dense(self) -> float:
        """The sum for the model as it is."""
        return self.others + sum(times[Situation(Candidate())] for times in self.layers.values())


def measure_latency(
    network: Network,
    target: Target,
    feeds: Feeds,
    cache: TimingCache,
    observer: Observer = SILENT,
) -> Latency:
    """Time every candidate of every layer.

    Args:
        network: the dense graph.
        target: where it is to be fast.
        feeds: an input of the real shapes, by name.
        cache: times known from earlier; new ones are added.
        observer: is told of the runs.
    """
    return _Runs(network, target, feeds, cache, observer).measure()


class _Runs:
    """The runs, and what was found so far."""

    def __init__(
        self,
        network: Network,
        target: Target,
        feeds: Feeds,
        cache: TimingCache,
        observer: Observer,
    ) -> None:
        self.network, self.target, self.feeds, self.cache = network, target, feeds, cache
        self.observer, self.done, self.slowest = observer, 0, 1.0
        self.layers: dict[str, dict[Situation, float]] = {name: {} for name in network.layers}
        self.groups = [group for group in _alternating(network) if group]
        windows = 3 * len(PRODUCT_LEVELS) if network.units else 0
        halves = len(self.groups) * len(PRODUCT_LEVELS)
        self.runs = len(KERNEL_LEVELS) + windows + halves

    def measure(self) -> Latency:
        plain = self._whole(DENSE)
        for level in KERNEL_LEVELS[1:]:
            self._whole(level)
        units = self._windows(plain) if self.network.units else ()
        halves = self._halves(plain) if self.groups else {}
        if self.slowest > _BUSY:
            self.observer.note(
                f"busy machine: up to {self.slowest:.1f} times slower at times; corrected"
            )
        return Latency(self.layers, sum(plain.values()), units, halves)

    def _whole(self, level: KernelLevel) -> dict[str, float]:
        """All tensors whole; return the other nodes' times by output."""
        nodes = self.network.candidate_nodes(Candidate(level))
        alternatives = self.network.alternatives(nodes)
        return self._run(alternatives, alternatives.choice((), _FORM), level, lambda _: _WHOLE)

    def _windows(self, plain: Mapping[str, float]) -> tuple[float, ...]:
        """All units in parts; return what that adds to the other nodes, by unit."""
        network = self.network
        added: tuple[float, ...] = ()
        for level, kind in product(PRODUCT_LEVELS, WINDOWS):
            nodes = network.candidate_nodes(Candidate(level, kind))
            alternatives = network.alternatives(nodes)
            choice = alternatives.choice(alternatives.units, _FORM)
            others = self._run(
                alternatives,
                choice,
                level,
                lambda x, kind=kind: _parts(x, kind),  # type: ignore[misc]
            )
            if kind == "window" and level == DENSE:
                added = tuple(
                    self._change(plain, others, frozenset(unit.parts)) for unit in network.units
                )
            if kind == "window":
                self._windowless(alternatives, level)
        return added

    def _windowless(self, alternatives: Alternatives, level: KernelLevel) -> None:
        """Readers of parts that use no window, of units that hold all channels."""
        network = self.network
        cut = [number for number in range(len(network.units)) if network.is_cut(number)]
        if not cut:
            return
        parts = {s: p for number in cut for s, p in network.units[number].parts.items()}
        space = {output: Form("dense", _FORM.space) for output in alternatives.layers}
        self._run(
            alternatives,
            Choice(parts, space),
            level,
            lambda layer: _parts(layer, "all") if layer.unit in cut else None,
        )

    def _halves(self, plain: Mapping[str, float]) -> dict[str, float]:
        """Half of the channels of every selectable space, and of every second one."""
        network, saved = self.network, dict[str, float]()
        for level, spaces in product(PRODUCT_LEVELS, self.groups):
            parts = {name: (Channels(((0, network.selectable[name]),)),) for name in spaces}
            nodes = network.candidate_nodes(Candidate(level))
            alternatives = network.alternatives(nodes)
            forms = alternatives.choice((), _FORM).forms

            def situation(layer: NetworkLayer, spaces: frozenset[str] = spaces) -> _Place:
                source: State = "half" if layer.source in spaces else "whole"
                sink: State = "half" if layer.sink in spaces else "whole"
                return "selected" if source == "half" else "all", source, sink

            others = self._run(alternatives, Choice(parts, forms), level, situation)
            for name in spaces:
                saved.setdefault(name, self._change(plain, others, frozenset((name,))))
        return saved

    def _run(
        self,
        alternatives: Alternatives,
        choice: Choice,
        level: KernelLevel,
        place: Callable[[NetworkLayer], "_Place | None"],
    ) -> dict[str, float]:
        """Note what the layers take in one run; return what the other nodes do, by output."""
        measure = Measure(alternatives, self.target, self.feeds, self.cache)
        variant = measure.in_place(choice)
        times = dict(variant.ms)
        self.slowest = max(self.slowest, variant.slowdown, 1 / variant.slowdown)
        self.done += 1
        self.observer.steps(self.done, self.runs)
        for layer in self.network.layers.values():
            ms = times.pop(layer.output, 0.0)
            found = place(layer)
            # Levels that make the same kernel are one candidate.
            if found and level in kernel_levels(layer.dense[1:]).values():
                kind, source, sink = found
                situation = Situation(Candidate(level, kind), source, sink)
                self.layers[layer.name].setdefault(situation, ms)
        return times

    def _change(
        self, before: Mapping[str, float], after: Mapping[str, float], spaces: frozenset[str]
    ) -> float:
        """What nodes that make tensors of some spaces take more than before."""
        found = 0.0
        for output in before.keys() | after.keys():
            space = self.network.spaces.of(output)
            if space is not None and space.name in spaces:
                found += after.get(output, 0.0) - before.get(output, 0.0)
        return found


_BUSY = 1.25
"""Change of the machine's speed, either way, of which the user should know."""
_FORM = Form("dense", "average")
_Place = tuple[ChannelKind, State, State]
_WHOLE: _Place = ("all", "whole", "whole")


def _parts(layer: NetworkLayer, kind: ChannelKind) -> _Place | None:
    """A layer's place when all units are carried in parts; None where it reads none."""
    return (kind, "parts", "whole") if layer.unit is not None else None


def _alternating(network: Network) -> list[frozenset[str]]:
    """All selectable spaces; and two halves of them, so that layers lie between two of these."""
    names = frozenset(network.selectable)
    neighbours: dict[str, set[str]] = {name: set() for name in names}
    for layer in network.layers.values():
        if layer.source in names and layer.sink in names:
            neighbours[layer.source].add(layer.sink)
            neighbours[layer.sink].add(layer.source)
    first: set[str] = set()
    for name in network.selectable:
        if not neighbours[name] & first:
            first.add(name)
    return [names, frozenset(first), names - first]
