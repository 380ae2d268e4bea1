"""Where the time goes: the layers of two models, joined by their names.

A lowered model's nodes are named after the layer that they were emitted for (`LAYER/AveragePool`),
and its weights too (`LAYER/weight`); so the nodes tell by themselves which layer they belong to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx

from structconv_cli.errors import BenchmarkError
from structconv_cli.onnx.example_inputs import Feeds, example_inputs, with_sizes
from structconv_cli.onnx.file import load_onnx
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.nodes import is_transposed, layer_of
from structconv_cli.timing.layer_times import LayerComparison, LayerTimes
from structconv_cli.timing.node_owners import times_by_owner
from structconv_cli.timing.node_times import NodeTime, node_times
from structconv_cli.timing.peak_rate import peak_macs_per_s

OTHER = ""
"""Owner of the nodes that belong to no layer."""
_REPEATS = 4
_PROFILED_MS = 300.0
_LEAST_RUNS, _MOST_RUNS = 5, 100
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Profiled:
    """One model's time and arithmetic by layer.

    Attributes:
        ms: Time (ms) by layer, `OTHER` among them.
        macs: Multiply-accumulates of one run by layer.
    """

    ms: Mapping[str, float]
    macs: Mapping[str, int]


def compare_layers(
    models: tuple[tuple[str, Path], tuple[str, Path]],
    threads: int,
    batch_size: int,
    forms: Mapping[str, str],
) -> LayerComparison:
    """Profile two models in turns, on the CPU, and join their layers by name.

    Args:
        models: Name and file of the original, and of what was made of it.
        threads: Intra-op threads.
        batch_size: Images in one run.
        forms: The ONNX form of each lowered layer, where it is known.

    Raises:
        BenchmarkError: The models have no layer's name in common.
        OnnxError: One cannot be read.
    """
    (baseline, before_file), (candidate, after_file) = models
    before, after = load_onnx(before_file), load_onnx(after_file)
    names = list(dict.fromkeys(name for n in before.graph.node if (name := layer_of(n))))
    owners = [layer_owners(before, names), layer_owners(after, names)]
    if not set(owners[1].values()) & set(names):
        raise BenchmarkError(
            f"The models '{baseline}' and '{candidate}' have no layer's name in common, so their "
            "layers cannot be compared. Compare a model with what structconv made of it."
        )
    first, second = _profile_in_turns([before, after], owners, threads, batch_size)
    peak = peak_macs_per_s(threads)
    layers = tuple(
        _layer(name, forms.get(name, ""), first, second, peak)
        for name in names
        if name in first.ms or name in second.ms
    )
    return LayerComparison(
        baseline=baseline,
        candidate=candidate,
        peak_macs_per_s=peak,
        layers=layers,
        other_before_ms=first.ms.get(OTHER, 0.0),
        other_after_ms=second.ms.get(OTHER, 0.0),
    )


def layer_owners(model: onnx.ModelProto, names: list[str]) -> dict[str, str]:
    """The layer that each node belongs to, by the node's first output; `OTHER` for none.

    Args:
        model: The model.
        names: The layers. A node made for several of them is counted to the first that reads it.
    """
    known, owners = set(names), dict[str, str]()
    for node in model.graph.node:
        layer = layer_of(node)
        # A layer's name may hold slashes; that of a new node ends in its operator, and a number.
        emitted = node.name.rpartition("/")[0]
        owners[node.output[0]] = next((x for x in (layer, emitted) if x in known), None) or OTHER
    shared = {
        node.output[0]: node
        for node in model.graph.node
        if owners[node.output[0]] == OTHER and layer_of(node) is not None
    }
    for node in model.graph.node:
        for name in node.input:
            if name in shared and owners[node.output[0]] != OTHER and owners[name] == OTHER:
                owners[name] = owners[node.output[0]]
    return owners


def _profile_in_turns(
    models: list[onnx.ModelProto], owners: list[dict[str, str]], threads: int, batch_size: int
) -> list[Profiled]:
    feeds = [example_inputs(model, batch_size, {}) for model in models]
    contents = [model.SerializeToString() for model in models]
    found: list[list[tuple[NodeTime, ...]]] = [[], []]
    for _ in range(_REPEATS):
        for index, content in enumerate(contents):
            runs = _runs(found[index])
            times = node_times(content, feeds[index], provider=_CPU, threads=threads, runs=runs)
            found[index].append(times)
    profiled = []
    for model, of, repeats, given in zip(models, owners, found, feeds, strict=True):
        sums = [times_by_owner(model.graph.node, of, times) for times in repeats]
        layers = {name for each in sums for name in each}
        # The lower quartile: what disturbs a repeat only ever adds to it.
        ms = {
            name: float(np.quantile([each.get(name, 0.0) for each in sums], 0.25))
            for name in layers
        }
        profiled.append(Profiled(ms, _macs(model, of, given)))
    return profiled


def _runs(found: list[tuple[NodeTime, ...]]) -> int:
    if not found:
        return _LEAST_RUNS
    once = sum(entry.ms for entry in found[0])
    return int(np.clip(_PROFILED_MS / max(once, 1e-3), _LEAST_RUNS, _MOST_RUNS))


def _macs(model: onnx.ModelProto, owners: Mapping[str, str], feeds: Feeds) -> dict[str, int]:
    graph = Graph(with_sizes(model, feeds))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    sums: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in shapes:
            continue
        weight = shapes[node.input[1]]
        summands = weight[0] if is_transposed(node) else prod(weight[1:])
        sizes = [size or 0 for size in graph.shape(node.output[0]) or ()]
        owner = owners[node.output[0]]
        sums[owner] = sums.get(owner, 0) + prod(sizes) * summands * bool(sizes)
    return sums


def _layer(name: str, form: str, before: Profiled, after: Profiled, peak: float) -> LayerTimes:
    macs = before.macs.get(name, 0), after.macs.get(name, 0)
    return LayerTimes(
        name=name,
        form=form,
        before_ms=before.ms.get(name, 0.0),
        after_ms=after.ms.get(name, 0.0),
        before_macs=macs[0],
        after_macs=macs[1],
        before_bound_ms=1e3 * macs[0] / peak,
        after_bound_ms=1e3 * macs[1] / peak,
    )
