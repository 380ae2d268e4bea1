"""What can be done with a graph: how its spaces can be carried, in which forms its layers written.

A `Choice` picks one way for all of it. This module knows what is possible and what follows from a
fixed preference; which of the possible is fastest is measured (`choose`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from structconv_cli.onnx.channels import Channels
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.roles import Layer
from structconv_cli.onnx.spaces import Carriage, Space, Spaces, carriage
from structconv_cli.onnx.structured_node import StructuredNode


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to write a graph.

    Attributes:
        parts: how the spaces that are not carried whole are carried, by the space's name.
        forms: every structured layer's form, by the name of its output.
    """

    parts: Mapping[str, tuple[Channels, ...]]
    forms: Mapping[str, Form]


@dataclass(frozen=True, eq=False)
class Unit:
    """Spaces that are carried in parts together or not at all.

    Attributes:
        carriages: how each is carried.
        parts: their parts, and those of spaces that are concatenated into them.
    """

    carriages: tuple[Carriage, ...]
    parts: Mapping[str, tuple[Channels, ...]]

    @property
    def is_free(self) -> bool:
        """Whether carrying it in parts takes no operation: nothing to weigh."""
        return all(
            c.kind == "basis" and len(p) == 1 and not p[0].is_selection
            for c in self.carriages
            for p in c.parts.values()
        )


class Alternatives:
    """What is possible for one graph.

    Attributes:
        spaces: its channel spaces.
        layers: its structured layers by the name of their output.
    """

    def __init__(self, spaces: Spaces, layers: Mapping[str, StructuredNode]) -> None:
        self.spaces, self.layers = spaces, layers

    @cached_property
    def _carriages(self) -> Mapping[str, Carriage | str]:
        needs = {o: e.need for o, e in self.layers.items() if e.need and self._mixes(e)}
        return {space.name: carriage(self.spaces, space, needs) for space in self.spaces}

    @property
    def units(self) -> tuple[Unit, ...]:
        """The spaces that can be carried in parts, those that ask for one another together."""
        return self._resolved[0]

    @cached_property
    def _resolved(self) -> tuple[tuple[Unit, ...], frozenset[str]]:
        """The units, and the spaces that could be carried alone but conflict with one of them."""
        units: list[Unit] = []
        conflicts: set[str] = set()
        for name, found in self._carriages.items():
            if isinstance(found, str):
                continue
            touching = [unit for unit in units if set(unit.parts) & set(found.parts)]
            asked = [found.parts, *(unit.parts for unit in touching)]
            merged = {space: parts for each in asked for space, parts in each.items()}
            if any(merged[space] != parts for each in asked for space, parts in each.items()):
                conflicts.add(name)
                continue
            units = [unit for unit in units if unit not in touching]
            carriages = (found, *(c for unit in touching for c in unit.carriages))
            units.append(Unit(carriages, merged))
        return tuple(units), frozenset(conflicts)

    def obstacle(self, layer: StructuredNode) -> str:
        """Why a layer's input cannot be carried in parts; empty if it can, or need not."""
        if layer.need is None:
            return ""
        if layer.groups > 1:
            return "its channel structure lies inside groups"
        space = self.input_space(layer)
        if space is None:
            return (
                "its input's channels are not on axis 1, or their number or its bias is not fixed"
            )
        found = self._carriages[space.name]
        if isinstance(found, str):
            return found
        if space.name in self._resolved[1]:
            return f"{space.name} would have to be cut in two different ways"
        return ""

    def input_space(self, layer: StructuredNode) -> Space | None:
        """The space of a layer's input, where the layer reads its channels from axis 1."""
        return self.spaces.of(layer.node.input[0]) if self._mixes(layer) else None

    def _mixes(self, layer: StructuredNode) -> bool:
        role = self.spaces.role(layer.node)
        return isinstance(role, Layer) and role.mixes

    def is_met(self, layer: StructuredNode, choice: Choice) -> bool:
        """Whether a choice carries a layer's input in a way that its channel structure can use."""
        space = self.input_space(layer)
        if layer.need is None or space is None:
            return True
        return layer.need.is_met(choice.parts.get(space.name, ()))

    def choice(self, units: tuple[Unit, ...], local: Form) -> Choice:
        """Carry these units in parts; write every layer in the form its input allows.

        Args:
            units: the units to carry in parts; the layers that read them are written "split".
            local: the form of the other layers, as far as they have that structure.
        """
        parts = {name: part for unit in units for name, part in unit.parts.items()}
        forms = {}
        for output, layer in self.layers.items():
            space = self.input_space(layer)
            split = layer.need is not None and space is not None and space.name in parts
            channels = "split" if split else local.channels if layer.need else "dense"
            forms[output] = Form(channels, local.space if layer.is_spatial else "dense")
        return Choice(parts, forms)
