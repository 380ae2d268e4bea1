"""Lowering: from a dense ONNX graph with structured weights to its fastest equivalent graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.alternatives import Alternatives, Choice
from structconv_cli.onnx.arrangement import (
    arrange_channels,
    arranged_structures,
    carried_through,
    channels_removed,
    outputs_left,
    unarranged,
)
from structconv_cli.onnx.channels import Carried
from structconv_cli.onnx.choose import choose
from structconv_cli.onnx.forms import CHANNEL_FORMS, SPACE_FORMS, Form
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.rebuild import rebuild
from structconv_cli.onnx.spaces import Spaces
from structconv_cli.onnx.structured_node import (
    structured_nodes,
)
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import TimingCache
from structconv_cli.progress import SILENT, Observer
from structconv_cli.structure import Structure

MEASURE = "measure"
DEFAULT_FORM = Form("split", "average")
_OTHER_BASIS = "its input is carried as the differences that other layers read"


@dataclass(frozen=True)
class LoweredLayer:
    """A structured layer that was written in a cheaper form.

    Attributes:
        name: the layer's name.
        form: what it became, e.g. "difference + AveragePool + Conv".
        output: the dense node's output.
        note: why its input's channels are not carried in parts; empty where they are, or need not.
    """

    name: str
    form: str
    output: str
    note: str = ""


@dataclass(frozen=True)
class DenseLayer:
    """A layer that was left dense.

    Attributes:
        name: the layer's name.
        reason: why.
        structured: whether its weight is structured all the same.
    """

    name: str
    reason: str
    structured: bool = False


@dataclass(frozen=True)
class Lowering:
    """What was done to a graph.

    Attributes:
        layers: the structured layers in cheaper forms.
        dense: the layers left dense, each with its reason.
        carried: the tensors that stand for each dense tensor that is carried in parts.
        removed: channels that nothing reads, by the dense tensor that no longer has them.
        outputs: how many outputs are left to make, by the name of a layer that lost some.
        forms: "measure", or the form that was asked for.
        structures: the structure that each layer of the dense graph has, told or found.
        environment: where the forms were timed; empty if they were not.
        ms: median times (ms) of whole models by alternative; empty if nothing was timed.
        timed, known: how many times were measured, and how many were known from the cache.
    """

    layers: tuple[LoweredLayer, ...]
    dense: tuple[DenseLayer, ...]
    carried: Mapping[str, Carried]
    removed: Mapping[str, int]
    forms: str
    outputs: Mapping[str, int] = field(default_factory=dict)
    structures: Mapping[str, Structure] = field(default_factory=dict)
    environment: str = ""
    ms: Mapping[str, float] = field(default_factory=dict)
    timed: int = 0
    known: int = 0


@dataclass(frozen=True, eq=False)
class Measured:
    """Choose forms by measuring them.

    Attributes:
        target: where the model is to be fast.
        feeds: an input of the real shapes, by name.
        cache: file of known timings; None for none.
    """

    target: Target
    feeds: Mapping[str, npt.NDArray[np.generic]]
    cache: Path | None


@dataclass(frozen=True)
class LoweringSettings:
    """How forms are to be chosen.

    Attributes:
        forms: "measure", or a form for all layers (see `parse_form`).
        target: where the model is to be fast.
        cache: file of known timings; None for none.
    """

    forms: str = MEASURE
    target: Target = field(default_factory=Target)
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.forms != MEASURE:
            parse_form(self.forms)

    def how(self, feeds: Mapping[str, npt.NDArray[np.generic]]) -> "Measured | Form":
        """What `lower` takes, for an input of the real shapes."""
        if self.forms == MEASURE:
            return Measured(self.target, feeds, self.cache)
        return parse_form(self.forms)


def parse_form(text: str) -> Form:
    """A form from the command line: "split", "banded+ones", "average", "dense".

    Raises:
        OnnxError: it names no form.
    """
    form = Form("dense", "dense")
    for word in text.split("+"):
        if word in CHANNEL_FORMS[1:]:
            form = Form(word, form.space if "+" in text else "average")
        elif word in SPACE_FORMS[1:]:
            form = Form(form.channels, word)
        elif word != "dense":
            raise OnnxError(
                f"there is no form '{word}'. Give 'measure', or one of {', '.join(CHANNEL_FORMS)} "
                f"(channels), {', '.join(SPACE_FORMS[1:])} (space), or one of each, such as "
                "split+average."
            )
    return form


def lower(
    model: onnx.ModelProto,
    structures: Mapping[str, Structure] | None = None,
    how: Measured | Form = DEFAULT_FORM,
    observer: Observer = SILENT,
) -> tuple[onnx.ModelProto, Lowering]:
    """Write a graph's structured layers in cheaper, equivalent forms.

    Args:
        model: a float32 graph; it is not changed.
        structures: structure by layer name, each to be found in the graph and its weight
            structured; None to find the structure by projecting every weight.
        how: measure the forms and take the fastest, the dense one included; or the form that every
            layer is to have as far as its structure and its place in the graph allow.
        observer: is told of the measurements.

    Returns:
        The lowered graph, its inputs and outputs as before, and what was done.

    Raises:
        OnnxError: a layer of `structures` is not in the graph, or its weight is not structured.
    """
    dense = Graph(model)
    layers, refused = before, _ = structured_nodes(dense, structures)
    slim, selections = arrange_channels(model, {o: x.structure for o, x in before.items()})
    graph = Graph(slim)
    if selections or any(layer.structure.reads for layer in before.values()):
        layers, refused = structured_nodes(graph, arranged_structures(before, graph, selections))
    grouped = [o for o, layer in layers.items() if layer.need and layer.groups > 1]
    alternatives = Alternatives(Spaces(graph, grouped), layers)
    decision = _choose(alternatives, how, observer)
    choice = decision.choice
    rebuilt = rebuild(alternatives.spaces, choice.parts, layers, choice.forms)
    written = tuple(
        LoweredLayer(layer.name, rebuilt.forms[output], output, _note(alternatives, choice, output))
        for output, layer in layers.items()
        if output in rebuilt.forms
    )
    left = [
        DenseLayer(
            layer.name,
            _why_dense(alternatives, choice, output, measured=bool(decision.ms)),
            structured=True,
        )
        for output, layer in layers.items()
        if output not in rebuilt.forms
    ]
    lost = unarranged(before, {layer.name for layer in layers.values()}, selections)
    left += [DenseLayer(name, reason, structured=True) for name, reason in lost.items()]
    return rebuilt.model, Lowering(
        layers=written,
        dense=(*left, *(DenseLayer(name, reason) for name, reason in refused.items())),
        carried=carried_through(selections, rebuilt.carried),
        removed=channels_removed(dense, selections) if selections else {},
        forms=f"{how.channels}+{how.space}" if isinstance(how, Form) else MEASURE,
        outputs=outputs_left(dense, graph) if selections else {},
        structures={layer.name: layer.structure for layer in before.values()},
        environment=decision.environment,
        ms=decision.ms,
        timed=decision.timed,
        known=decision.known,
    )


@dataclass(frozen=True, eq=False)
class _Decision:
    """A choice, and how it was made: fields as in `Lowering`."""

    choice: Choice
    environment: str = ""
    ms: Mapping[str, float] = field(default_factory=dict)
    timed: int = 0
    known: int = 0


def _choose(alternatives: Alternatives, how: Measured | Form, observer: Observer) -> _Decision:
    if isinstance(how, Form):
        return _Decision(_fixed(alternatives, how))
    environment = how.target.environment
    if not alternatives.layers:
        return _Decision(Choice({}, {}), environment)
    cache = TimingCache(how.cache, environment)
    choice, ms = choose(alternatives, how.target, how.feeds, cache, observer)
    cache.save()
    return _Decision(choice, environment, ms, cache.measured, cache.hits)


def _fixed(alternatives: Alternatives, form: Form) -> Choice:
    """One form for all, as far as it goes; where the input cannot be carried in parts, none."""
    if form.channels == "split":
        return alternatives.choice(alternatives.units, Form("dense", form.space))
    return alternatives.choice((), form)


def _note(alternatives: Alternatives, choice: Choice, output: str) -> str:
    layer, form = alternatives.layers[output], choice.forms[output]
    if layer.need is None:
        return ""
    if form.channels == "split":
        return "" if alternatives.is_met(layer, choice) else _OTHER_BASIS
    return alternatives.obstacle(layer) or "measured: carrying its input in parts does not pay"


def _why_dense(alternatives: Alternatives, choice: Choice, output: str, *, measured: bool) -> str:
    layer = alternatives.layers[output]
    if not alternatives.is_met(layer, choice):
        return _OTHER_BASIS
    if measured:
        return "measured: no form of it is faster than the dense layer"
    return alternatives.obstacle(layer) or "the form asked for does not use its structure"
