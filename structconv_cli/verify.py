"""Verification of a run: the rewrite must be exact; what structure cost is measured beside it.

(a) Every structured layer against its dense form in PyTorch (`exactness`).
(b) The ONNX file against PyTorch: every lowered layer's kernel, measured by impulses; and the whole
    model's output, at several batch sizes, against what PyTorch computed when the run was made.
(c) Structured against original on data (`approximation`); it does not decide exactness.

No code of the user's is run: the layers are rebuilt from their description, and PyTorch's outputs
for the whole model were recorded by `convert`. An ONNX file has no PyTorch model: there, ONNX
Runtime computed them from the dense structured graph.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.approximation import Approximation
from structconv_cli.errors import OnnxError, StructconvError
from structconv_cli.exactness import (
    Check,
    LayerWeights,
    check_kept,
    check_layer,
    compare,
    random_input,
)
from structconv_cli.graph_check import LoweredGraph, check_graph
from structconv_cli.model.inventory import Inventory
from structconv_cli.model.signature import floating
from structconv_cli.onnx.channels import Carried
from structconv_cli.onnx.probe import layer_nodes, run_exposed, run_fed, session
from structconv_cli.plan import Plan
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reconstruction.samples import images_per_run
from structconv_cli.reference import REAL, random_batches
from structconv_cli.structure import Structure
from structconv_cli.tolerance import magnitude, model_tolerance

KEPT = "kept weights"
PYTORCH, DENSE_GRAPH = "PyTorch", "structured_dense.onnx"
"""What the whole model's outputs are compared with."""
_LAYER_EXAMPLES = 2


@dataclass(frozen=True, eq=False)
class Artifacts:
    """What `verify` reads: two sets of weights, two graphs, and recorded outputs.

    Attributes:
        plan: what was structured.
        inventory: the model's layers.
        dense: tensors of the dense structured model, by parameter name.
        reduced: tensors of the rewritten model, by parameter name.
        dense_onnx: the dense structured model as the stock exporter wrote it.
        structured_onnx: the lowered model.
        carried: the tensors of it that stand for tensors of the dense one.
        reference: inputs and outputs of the whole model, from `record_reference`.
        computed_by: what computed these outputs.
    """

    plan: Plan
    inventory: Inventory
    dense: Mapping[str, torch.Tensor]
    reduced: Mapping[str, torch.Tensor]
    dense_onnx: onnx.ModelProto
    structured_onnx: onnx.ModelProto
    carried: Mapping[str, Carried]
    reference: Mapping[str, torch.Tensor]
    computed_by: str = PYTORCH

    def inputs(self, name: str, count: int | None = None) -> dict[str, npt.NDArray[Any]]:
        """The first `count` rows of the model's inputs in this set of them.

        All rows where the model takes no other number of them.
        """
        rows = None if images_per_run(self.dense_onnx) else count
        return {
            tensor: self.reference[f"{name}.{tensor}"][:rows].numpy()
            for tensor in self.inventory.inputs
        }

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets of inputs."""
        return (*random_batches(images_per_run(self.dense_onnx)), REAL)


@dataclass(frozen=True)
class VerifyResult:
    """The outcome of a verification.

    Attributes:
        exact: whether every check of the layers and of the model passed.
        first_diverging: the first layer, in the order in which the model runs them, that failed, or
            from which on the graphs' tensors differ; None if exact or not found.
        layers: checks per layer.
        model: checks of the whole model, relative to the largest value of each output.
        approximation: structured against original on data; None if it was not measured.
        approximation_missing: why it was not; empty if it was.
        notes: what was not compared, and why; one sentence each.
        computed_by: what computed the outputs that the whole model is compared with.
        schema: names this format and its version.
    """

    exact: bool
    first_diverging: str | None
    layers: tuple[Check, ...]
    model: tuple[Check, ...]
    approximation: Approximation | None
    approximation_missing: str
    notes: tuple[str, ...] = ()
    computed_by: str = PYTORCH
    schema: Literal["structconv-verification/1"] = "structconv-verification/1"

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in (*self.layers, *self.model) if not check.passed)


def verify(
    artifacts: Artifacts,
    approximate: Callable[[], Approximation] | str,
    observer: Observer = SILENT,
) -> VerifyResult:
    """Run all checks.

    Args:
        artifacts: what to check.
        approximate: measures part (c); or the reason why that is not possible.
        observer: is told of the three parts.
    """
    with observer.stage("layers in PyTorch"):
        layers = _check_layers(artifacts, observer)
    with observer.stage("layers in ONNX Runtime"):
        pair = LoweredGraph(
            artifacts.dense_onnx,
            artifacts.structured_onnx,
            artifacts.carried,
            artifacts.plan.structures,
        )
        layers += check_graph(pair, artifacts.inputs(REAL, _LAYER_EXAMPLES), observer)
    with observer.stage("whole model in ONNX Runtime"):
        model = _check_model(artifacts)
    approximation, missing = _measure(approximate, observer)
    exact = all(check.passed for check in (*layers, *model))
    return VerifyResult(
        exact=exact,
        first_diverging=None if exact else _first_diverging(artifacts, layers, model),
        layers=tuple(layers),
        model=tuple(model),
        approximation=approximation,
        approximation_missing=missing,
        notes=_left_out(artifacts.inventory),
        computed_by=artifacts.computed_by,
    )


def _left_out(inventory: Inventory) -> tuple[str, ...]:
    left = [name for name, kind in inventory.outputs.items() if not kind.is_floating]
    if not left:
        return ()
    return (
        f"Of the whole model's outputs, {', '.join(left)} "
        f"{'is' if len(left) == 1 else 'are'} not compared: whole numbers can jump where rounding "
        "decides. What makes them is checked node by node.",
    )


def _measure(
    approximate: Callable[[], Approximation] | str, observer: Observer
) -> tuple[Approximation | None, str]:
    if isinstance(approximate, str):
        return None, approximate
    try:
        with observer.stage("comparison with the original"):
            return approximate(), ""
    except StructconvError as error:
        return None, str(error)


def _check_layers(artifacts: Artifacts, observer: Observer) -> list[Check]:
    generator = torch.Generator().manual_seed(0)
    structures = artifacts.plan.structures
    nodes = layer_nodes(artifacts.dense_onnx, list(structures))
    sources = [found[0].input[0] for found in nodes.values()]
    feeds = artifacts.inputs(REAL, _LAYER_EXAMPLES)
    tensors = run_exposed(artifacts.dense_onnx, feeds, sources)
    checks: list[Check] = []
    for done, (name, structure) in enumerate(structures.items()):
        layer = _layer_weights(artifacts, name, structure)
        checks += check_layer(layer, {"random": random_input(layer.spec, generator)})
        if name in nodes:
            # In the graph, a padding that is not zeros is a node of its own, before the layer.
            padded = layer.spec.padding_mode != "zeros"
            real = torch.from_numpy(tensors[nodes[name][0].input[0]])
            checks += check_layer(layer, {"real": real}, padded=padded)[1:]
        observer.steps(done + 1, len(structures))
    others = sorted(artifacts.dense.keys() | artifacts.reduced.keys())
    return [*checks, check_kept(KEPT, others, structures, artifacts.dense, artifacts.reduced)]


def _layer_weights(artifacts: Artifacts, name: str, structure: Structure) -> LayerWeights:
    return LayerWeights(
        spec=artifacts.inventory.layer(name).spec,
        structure=structure,
        dense=artifacts.dense[f"{name}.weight"],
        reduced=artifacts.reduced[f"{name}.weight"],
        bias=artifacts.dense.get(f"{name}.bias"),
        reduced_bias=artifacts.reduced.get(f"{name}.bias"),
    )


def _check_model(artifacts: Artifacts) -> list[Check]:
    tolerance = _model_tolerance(artifacts)
    runtime = session(artifacts.structured_onnx)
    checks = []
    names = list(artifacts.inventory.outputs)
    ends = [value.name for value in (*runtime.get_inputs(), *runtime.get_outputs())]
    same = ends == [*artifacts.inventory.inputs, *names]
    for name in artifacts.sets:
        if not same:
            detail = f"the model's inputs and outputs are {', '.join(ends)}"
            checks.append(Check(name, "output", None, tolerance, False, detail))
            continue
        try:
            outputs = dict(zip(names, run_fed(runtime, artifacts.inputs(name)), strict=True))
        except OnnxError as error:
            checks.append(Check(name, "output", None, tolerance, False, str(error)))
            continue
        for tensor in floating(artifacts.inventory.outputs):
            expected = artifacts.reference[f"{name}.{tensor}"].double()
            what = "output" if len(names) == 1 else f"output {tensor}"
            found = torch.from_numpy(outputs[tensor])
            checks.append(_check_output(name, what, expected, found, tolerance))
    return checks


def _check_output(
    name: str, what: str, expected: torch.Tensor, found: torch.Tensor, tolerance: float
) -> Check:
    if found.shape != expected.shape:
        detail = f"the {what}'s shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
        return Check(name, what, None, tolerance, False, detail)
    deviation = (found.double() - expected) / (expected.abs().max() or 1.0)
    return compare(name, what, deviation, torch.full_like(deviation, tolerance), f"the {what}")


def _model_tolerance(artifacts: Artifacts) -> float:
    growth = []
    for layer in artifacts.inventory.layers:
        structure = artifacts.plan.structures.get(layer.spec.name)
        factor, summands = 1.0, prod(layer.spec.axes)
        if structure is not None:
            weight = artifacts.dense[f"{layer.spec.name}.weight"].double()
            sums = magnitude(artifacts.reduced[f"{layer.spec.name}.weight"], structure)
            factor = max(1.0, float(sums.norm() / weight.norm())) if weight.any() else 1.0
            summands += sum(structure.windows)
        growth += [(summands, factor)] * layer.calls
    return model_tolerance(growth)


def _first_diverging(
    artifacts: Artifacts, layers: Iterable[Check], model: Iterable[Check]
) -> str | None:
    order = [layer.spec.name for layer in artifacts.inventory.layers]
    failed = {check.subject for check in layers if not check.passed}
    if failed:
        return min(failed, key=lambda name: order.index(name) if name in order else len(order))
    failed_input = next(check.subject for check in model if not check.passed)
    feeds = artifacts.inputs(failed_input)
    nodes = layer_nodes(artifacts.dense_onnx, order)
    outputs = {node.output[0]: name for name, found in nodes.items() for node in found}
    try:
        dense = run_exposed(artifacts.dense_onnx, feeds, list(outputs))
        parts = {name: artifacts.carried.get(name) or ((name, None),) for name in outputs}
        inner = [tensor for carried in parts.values() for tensor, _ in carried]
        lowered = run_exposed(artifacts.structured_onnx, feeds, inner)
    except OnnxError:
        return None
    tolerance = _model_tolerance(artifacts)
    for node in artifacts.dense_onnx.graph.node:
        for name in (name for name in node.output if name in outputs):
            room = tolerance * np.abs(dense[name]).max()
            for tensor, channels in parts[name]:
                expected = channels.apply(dense[name], 1) if channels else dense[name]
                found = lowered[tensor]
                if found.shape != expected.shape or not np.abs(found - expected).max() <= room:
                    return outputs[name]
    return None
