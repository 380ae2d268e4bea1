"""What each dense node takes in a graph written anew, and what whole models take.

Nodes are timed *in place*, by ONNX Runtime's profiler in a run of the whole model: with their real
neighbours, layouts and caches. Times are kept by what was emitted for a node and its real shapes,
so what was timed in one model is known in another.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.onnx.alternatives import Alternatives, Choice
from structconv_cli.onnx.example_inputs import with_sizes
from structconv_cli.onnx.graph import Graph, Shape
from structconv_cli.onnx.rebuild import Rebuilt, rebuild
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import TimingCache
from structconv_cli.timing.benchmark import BenchmarkSettings, benchmark
from structconv_cli.timing.execution_provider import PROVIDERS
from structconv_cli.timing.node_owners import times_by_owner
from structconv_cli.timing.node_times import NodeTime, node_times

_RUN_MS = 1500.0
"""Time that the profiled runs of one alternative fill, about."""
_LEAST_RUNS, _MOST_RUNS = 8, 60
_ROUNDS = 12
_TELLING, _LEAST_MS, _NOISE = 0.05, 0.1, 1.1
"""Share of the model, and time, that tells how fast the machine is now (the profiler counts whole
microseconds); and the ratio that is more than noise: neighbours change a node's time by some
percent."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One alternative of the whole model, and what its parts take.

    Attributes:
        choice: the alternative.
        rebuilt: the model.
        ms: time of the nodes emitted for each dense node, by its first output.
        slowdown: how much slower the machine was in this run than when it timed the same nodes
            before; the times are corrected for it.
    """

    choice: Choice
    rebuilt: Rebuilt
    ms: Mapping[str, float]
    slowdown: float = 1.0


class Measure:
    """Times of one graph's alternatives on one target.

    Args:
        alternatives: what is possible for the graph.
        target: where it is to be fast.
        feeds: an input of the real shapes, by name.
        cache: times known from earlier; new ones are added.
    """

    def __init__(
        self,
        alternatives: Alternatives,
        target: Target,
        feeds: Mapping[str, npt.NDArray[np.generic]],
        cache: TimingCache,
    ) -> None:
        self.alternatives, self.target, self.feeds, self.cache = alternatives, target, feeds, cache

    @cached_property
    def _dense(self) -> Graph:
        """The dense graph with its inputs at the real sizes."""
        return Graph(with_sizes(self.alternatives.spaces.graph.model, self.feeds))

    def rebuild(self, choice: Choice) -> Rebuilt:
        """The graph written as a choice has it."""
        return rebuild(
            self.alternatives.spaces, choice.parts, self.alternatives.layers, choice.forms
        )

    def in_place(self, choice: Choice) -> Variant:
        """What each dense node takes in an alternative, from the cache or from the profiler."""
        rebuilt = self.rebuild(choice)
        keys = self._keys(rebuilt)
        known = {owner: self.cache.get(key) for owner, key in keys.items()}
        slower = 1.0
        if any(ms is None for ms in known.values()):
            times = self._profile(rebuilt.model)
            found = {
                **dict.fromkeys(keys, 0.0),
                **times_by_owner(rebuilt.model.graph.node, rebuilt.owners, times),
            }
            slower = slowdown(known, found)
            for key, ms in _means(keys, found).items():
                # What is known stays: the same plan is made again from the same times.
                if self.cache.get(key) is None:
                    self.cache.put(key, ms / slower)
            known = {owner: self.cache.get(key) for owner, key in keys.items()}
        return Variant(choice, rebuilt, {owner: ms or 0.0 for owner, ms in known.items()}, slower)

    def whole(self, models: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
        """Times (ms) of whole models in turns: the lower quartile of the rounds of each."""
        digests = {name: _digest(model) for name, model in models.items()}
        distinct = {digest: name for name, digest in reversed(digests.items())}
        shapes = ",".join(_sizes(array.shape) for array in self.feeds.values())
        together = f"whole {shapes} among {','.join(sorted(distinct))}: "
        known = {digest: self.cache.get(together + digest) for digest in distinct}
        if len(distinct) > 1 and any(ms is None for ms in known.values()):
            found = self._in_turns({digest: models[name] for digest, name in distinct.items()})
            for digest, ms in found.items():
                self.cache.put(together + digest, ms)
            known = {**found}
        return {name: known[digest] or 0.0 for name, digest in digests.items()}

    def _in_turns(self, models: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
        settings = BenchmarkSettings(
            self.target.device, self.target.threads, self.target.batch_size, rounds=_ROUNDS
        )
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{name}.onnx" for name in models}
            for name, model in models.items():
                files[name].write_bytes(with_sizes(model, self.feeds).SerializeToString())
            result = benchmark(files, settings)
        # What disturbs a round only ever adds to it.
        return {t.name: float(np.quantile(t.round_ms, 0.25)) for t in result.models}

    def _profile(self, model: onnx.ModelProto) -> tuple[NodeTime, ...]:
        data = model.SerializeToString()
        provider, threads = PROVIDERS[self.target.device], self.target.threads
        once = node_times(data, self.feeds, provider=provider, threads=threads, runs=3)
        runs = int(np.clip(_RUN_MS / sum(t.ms for t in once), _LEAST_RUNS, _MOST_RUNS))
        return node_times(data, self.feeds, provider=provider, threads=threads, runs=runs)

    def _keys(self, rebuilt: Rebuilt) -> dict[str, str]:
        """Real shapes and form of what was emitted for each dense node."""
        dense = self._dense
        sizes = {t.name: tuple(t.dims) for t in rebuilt.model.graph.initializer}
        emitted: dict[str, list[str]] = {}
        for node in rebuilt.model.graph.node:
            owner = rebuilt.owners[node.output[0]]
            emitted.setdefault(owner, []).append(_signature(node, sizes))
        keys = {}
        for owner, nodes in emitted.items():
            node = dense.producers[owner]
            shapes = [_sizes(dense.shape(name)) for name in (*node.input[:1], owner)]
            keys[owner] = (
                f"batch {self.target.batch_size} {' -> '.join(shapes)}: {'; '.join(nodes)}"
            )
        return keys


def slowdown(before: Mapping[str, float | None], now: Mapping[str, float]) -> float:
    """How much longer nodes take now than they did before, on a machine that others use too.

    1 where that is little enough to be noise, or where the nodes known from before are too small a
    part of the model to tell.

    Args:
        before: times (ms) by node, as far as they are known.
        now: times (ms) of all nodes.
    """
    pairs = [(ms, now[name]) for name, ms in before.items() if ms and now.get(name)]
    then, since = (sum(side) for side in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    if since < _LEAST_MS or since <= _TELLING * sum(now.values()):
        return 1.0
    ratio = since / then
    return ratio if max(ratio, 1 / ratio) > _NOISE else 1.0


def _digest(model: onnx.ModelProto) -> str:
    """One word for a model's operators, attributes and shapes."""
    sizes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    digest = hashlib.blake2b(digest_size=16)
    for node in model.graph.node:
        digest.update(f"{_signature(node, sizes)} {node.input} {node.output}".encode())
    return digest.hexdigest()


def _means(keys: Mapping[str, str], ms: Mapping[str, float | None]) -> dict[str, float]:
    """The mean time by key: equal nodes are taken to take equally long."""
    values: dict[str, list[float]] = {}
    for owner, key in keys.items():
        values.setdefault(key, []).append(ms[owner] or 0.0)
    return {key: float(np.mean(each)) for key, each in values.items()}


def _signature(node: onnx.NodeProto, constants: Mapping[str, tuple[int, ...]]) -> str:
    """Operator, attributes and weights' shapes of a node."""
    attributes = ",".join(
        f"{a.name}={onnx.helper.get_attribute_value(a)!r}"
        for a in node.attribute
        if a.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.TENSOR)
    )
    weights = " ".join(_sizes(constants[name]) for name in node.input if name in constants)
    return f"{node.op_type}({attributes})[{weights}]"


def _sizes(shape: Shape | None) -> str:
    return "x".join("?" if size is None else str(size) for size in shape or ())
