"""Reconstructing a model: its layers one after the other, each on what the ones before it make.

Layers are fitted in the order of the graph (`asymmetric`): the input is that of the model whose
earlier layers are structured already, the target what the original makes of its own input, so that
each layer makes up for errors before it. Two things more can be fitted to the original:

- *dense layers* behind the first structured one. They cannot hold their weight any better, but can
  answer to what has become of their inputs.
- *sums*. Where a layer's output is added to a shortcut s, the original's sum is W p + s, and the
  other operand is by now s^: the layer aims at W p + s - s^. (Ours.)

A second pass would change nothing: a layer's input depends only on layers before it, which it would
leave as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from structconv_cli.onnx.graph import Graph, captured
from structconv_cli.onnx.nodes import layer_of
from structconv_cli.onnx.probe import dense_kernel, layer_nodes
from structconv_cli.onnx.structured_node import layer_obstacle
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reconstruction.asymmetric import AsymmetricLayer, asymmetric_layer
from structconv_cli.reconstruction.layer_check import check_layers
from structconv_cli.reconstruction.patches import Reader, scales_operands
from structconv_cli.reconstruction.result import (
    Method,
    NewWeight,
    ReconstructedLayer,
    Reconstruction,
    ReconstructionRecord,
    ReconstructionSettings,
)
from structconv_cli.reconstruction.samples import Feeds, Samples, check_samples
from structconv_cli.reconstruction.slots import fill, with_bias_slots
from structconv_cli.reconstruction.stream import Stream, runs_of
from structconv_cli.structure import Structure

DEFAULTS = ReconstructionSettings()
_LEAST_IMAGES = 64
_SPREAD = 4
"""Outputs that there are for one whose patch is taken, at least: neighbours are much alike."""
_NOTHING = 1e-12
"""Relative squared error that float32 rounding explains."""


def reconstruct(
    model: onnx.ModelProto,
    structures: Mapping[str, Structure],
    samples: Samples | None,
    settings: ReconstructionSettings = DEFAULTS,
    observer: Observer = SILENT,
) -> Reconstruction:
    """Find weights inside their subspaces whose outputs are nearest to the original's.

    Args:
        model: a dense graph, its batch norms folded; it is not changed.
        structures: by layer.
        samples: some hundred images, prepared as the model takes them; labels are not used. None
            for the nearest weights, without regard to outputs.
        settings: how.
        observer: told how many layers are done.

    Raises:
        PlanError: a layer is not there or not of the structure's sizes, or the samples do not fit.
        OnnxError: ONNX Runtime cannot run the model, or its numbers are not finite.
    """
    check_layers(model, {name: (structure,) for name, structure in structures.items()})
    if samples is None:
        return _projected(model, structures)
    check_samples(model, samples)
    return _Sequence(model, structures, samples, settings, observer).all()


def _projected(model: onnx.ModelProto, structures: Mapping[str, Structure]) -> Reconstruction:
    nodes = layer_nodes(model, list(structures))
    weights, layers = {}, []
    for name, (node, *_) in nodes.items():
        weight = torch.from_numpy(dense_kernel(model, node)[0].astype(np.float64))
        weights[name] = _nearest(weight, structures[name])
        residual = structures[name].residual(weight)
        layers.append(ReconstructedLayer(name, "projection", residual))
    note = (
        "There were no samples: every weight is the nearest one in its subspace, and what that "
        "costs in accuracy is not measured. A few hundred unlabelled images would lower it."
    )
    return Reconstruction(weights, ReconstructionRecord(tuple(layers), 0, (note,)))


def _nearest(weight: torch.Tensor, structure: Structure) -> NewWeight:
    shift = torch.zeros(len(weight), dtype=torch.float64)
    return NewWeight(structure.project(weight), shift, structure)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer to be fitted: its nodes as readers, the place of the first, and its structure."""

    name: str
    index: int
    readers: tuple[Reader, ...]
    weight: torch.Tensor
    structure: Structure
    problem: str = ""


class _Sequence:
    """One call of `reconstruct` with samples: the original and the changed model, side by side."""

    def __init__(
        self,
        model: onnx.ModelProto,
        structures: Mapping[str, Structure],
        samples: Samples,
        settings: ReconstructionSettings,
        observer: Observer,
    ) -> None:
        self.settings, self.observer = settings, observer
        fitted = _layers_to_fit(Graph(model), structures, refit=settings.refit)
        slots = [name for name in fitted if name not in settings.without_bias]
        prepared = with_bias_slots(model, slots)
        runs = runs_of(prepared, samples)
        self.original = Stream(prepared, runs, settings.threads)
        self.changed = Stream(prepared, runs, settings.threads)
        self.graph = self.original.graph
        self.layers = [_layer(self.graph, name, structure) for name, structure in fitted.items()]
        self.images = sum(map(_rows, runs))
        self.rng = np.random.default_rng(settings.seed)

    def all(self) -> Reconstruction:
        """All layers, in order."""
        weights: dict[str, NewWeight] = {}
        found: list[ReconstructedLayer] = []
        notes: list[str] = []
        for done, layer in enumerate(self.layers, start=1):
            residual = layer.structure.residual(layer.weight)
            if layer.problem:
                weights[layer.name] = _nearest(layer.weight, layer.structure)
                found.append(ReconstructedLayer(layer.name, "projection", residual))
                notes.append(f"Layer {layer.name} was projected, not fitted: {layer.problem}.")
            else:
                record = self._fit(layer, weights, residual)
                if record is not None:
                    found.append(record)
            if layer.name in weights:
                fill(self.changed.model, {layer.name: weights[layer.name]})
            self.observer.steps(done, len(self.layers))
        return Reconstruction(
            weights, ReconstructionRecord(tuple(found), self.images, tuple(notes))
        )

    def _fit(
        self, layer: _Layer, weights: dict[str, NewWeight], residual: float
    ) -> ReconstructedLayer | None:
        """Fit one layer; None for a dense one whose inputs are the original's."""
        settings, structure = self.settings, layer.structure
        collected = self._collect(layer)
        bias = layer.name not in settings.without_bias
        fit = collected.fit(layer.name, bias=bias, rescale=settings.rescale)
        if structure.is_dense and fit.projected <= _NOTHING:
            return None
        weights[layer.name] = NewWeight(fit.weight, fit.shift, structure)
        method: Method = "least squares, dense" if structure.is_dense else "least squares"
        return ReconstructedLayer(layer.name, method, residual, fit.projected, fit.error)

    def _collect(self, layer: _Layer) -> AsymmetricLayer:
        """What a layer reads and should make, over all runs; both models move on to it."""
        live = self.original.live(layer.index)
        inputs = [reader.tensor for reader in layer.readers]
        other = self._other_operand(layer) if self.settings.sums else None
        wanted = [*live, *inputs, *([other] if other else [])]
        collected = asymmetric_layer(layer.weight, layer.readers[0].groups, layer.structure)
        most = collected.most_patches
        hold, runs, images = False, len(self.original.held), self.images
        pairs = zip(self.original.values(wanted), self.changed.values(wanted), strict=True)
        for run, (old, new) in enumerate(pairs):
            if not run:
                held = sum(part[name].nbytes for part in (old, new) for name in live)
                outputs = sum(reader.count(old[reader.tensor]) for reader in layer.readers)
                runs, hold = self._runs(held, -(-_SPREAD * most // outputs))
                images = sum(map(_rows, self.original.held[:runs]))
            for reader in layer.readers:
                x, y = old[reader.tensor], new[reader.tensor]
                count = _rows(self.original.held[run])
                share = -(-most * count // (images * len(layer.readers)))
                at = reader.positions(x, share, self.rng)
                targets = reader.patches(x, at).double() @ collected.rows.transpose(1, 2)
                if other and reader.makes(old[other], x, len(layer.weight)):
                    targets += reader.outputs(old[other], at) - reader.outputs(new[other], at)
                collected.add(reader.patches(y, at), targets)
            if hold:
                self.original.held[run] = {name: old[name] for name in live}
                self.changed.held[run] = {name: new[name] for name in live}
            if run + 1 == runs:
                break
        return collected

    def _runs(self, held: int, enough: int) -> tuple[int, bool]:
        """How many runs to fit a layer on, and whether their tensors can be held.

        Large maps of all images do not fit in memory, and going from the inputs again for each
        layer takes minutes; but a few images have patches enough of a large map.

        Args:
            held: bytes of one run's tensors.
            enough: runs that have patches enough.
        """
        runs = len(self.original.held)
        fitting = self.settings.memory // max(1, held)
        if fitting >= runs:
            return runs, True
        least = -(-_LEAST_IMAGES // _rows(self.original.held[0]))
        wanted = min(runs, max(fitting, enough, least))
        return wanted, wanted <= fitting

    def _other_operand(self, layer: _Layer) -> str | None:
        """What the layer's output is added to, if all that changes it has changed already."""
        if len(layer.readers) > 1:
            return None
        node = self.graph.nodes[layer.index]
        readers = self.graph.readers.get(node.output[0], ())
        if len(readers) != 1 or readers[0].op_type != "Add":
            return None
        others = [name for name in readers[0].input if name != node.output[0]]
        if len(others) != 1 or node.output[0] in self.graph.outputs:
            return None
        if not self.original.depends_on_data(others[0]):
            return None
        waiting = {e.name for e in self.layers if e.index >= layer.index}
        return None if self._layers_before(others[0]) & waiting else others[0]

    def _layers_before(self, tensor: str) -> set[str]:
        """All layers that a tensor depends on."""
        found: set[str] = set()
        seen: set[str] = set()
        pending = [tensor]
        while pending:
            name = pending.pop()
            node = self.graph.producers.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            layer = layer_of(node)
            if layer is not None:
                found.add(layer)
            pending += [*node.input, *captured(node)]
        return found


def _rows(feeds: Feeds) -> int:
    """Images of a run."""
    return len(next(iter(feeds.values())))


def _layers_to_fit(
    graph: Graph, structures: Mapping[str, Structure], *, refit: bool
) -> dict[str, Structure]:
    """Structured layers, and dense convolutions behind the first of them, in the graph's order."""
    found: dict[str, Structure] = {}
    for node in graph.nodes:
        name = layer_of(node)
        if name is None or name in found:
            continue
        if name in structures:
            found[name] = structures[name]
        elif refit and found and _is_refittable(graph, node):
            shape = dense_kernel(graph.model, node)[0].shape[1:]
            found[name] = Structure(shape, shape)
    return found


def _is_refittable(graph: Graph, node: onnx.NodeProto) -> bool:
    known = len(node.input) < 3 or not node.input[2] or graph.is_constant(node.input[2])
    return node.op_type == "Conv" and known and not layer_obstacle(graph, node)


def _layer(graph: Graph, name: str, structure: Structure) -> _Layer:
    nodes = [node for node in graph.nodes if layer_of(node) == name]
    readers = tuple(Reader.of(graph, node) for node in nodes)
    weight = torch.from_numpy(dense_kernel(graph.model, nodes[0])[0].astype(np.float64))
    index = next(i for i, node in enumerate(graph.nodes) if node.output[0] == nodes[0].output[0])
    problem = ""
    if any(scales_operands(node) for node in nodes):
        problem = "its node scales or transposes what it reads"
    return _Layer(name, index, readers, weight, structure, problem)
