"""What a reconstruction found: new weights, and a record of how near their outputs are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from structconv_cli.structure import Structure

Method = Literal["least squares", "least squares, dense", "projection"]


@dataclass(frozen=True)
class ReconstructedLayer:
    """One layer.

    Attributes:
        name: the layer's name.
        method: how its weight was found; "dense" for a layer that is not structured, but was fitted
            to make up for those before it.
        residual: relative distance of the original weight to the subspace.
        projected: E||y^ - y||^2 / Var(y) of its outputs by plain projection, on the samples, all
            layers before it as they are now; y are its targets. None where nothing was measured.
        error: the same for its new weight.
    """

    name: str
    method: Method
    residual: float
    projected: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class ReconstructionRecord:
    """How a model was reconstructed.

    Attributes:
        layers: its layers, in the order of the graph.
        images: samples used; 0 for weights only.
        notes: what the user should know, one sentence each.
    """

    layers: tuple[ReconstructedLayer, ...]
    images: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class NewWeight:
    """What takes a layer's parameters' place.

    Attributes:
        weight: (C_out, *dense) float64, inside the subspace.
        shift: (C_out,) float64, to be added to its bias.
        structure: the subspace; dense for a layer that is not structured.
    """

    weight: torch.Tensor
    shift: torch.Tensor
    structure: Structure


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """New weights by layer, for the graph with its batch norms folded, and how they were found."""

    weights: Mapping[str, NewWeight]
    record: ReconstructionRecord

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one sentence each."""
        return self.record.notes


@dataclass(frozen=True)
class ReconstructionSettings:
    """How to reconstruct.

    Attributes:
        refit: whether dense layers behind the first structured one are fitted too.
        sums: whether a layer that ends a residual branch aims at the original's sum, and so makes
            up for what its shortcut brings along.
        rescale: whether each channel gets its target's variance, as batch norm would give it.
        without_bias: layers that cannot have a bias.
        threads: of ONNX Runtime.
        seed: of the positions that patches are taken from.
        memory: bytes that the tensors held between runs may take.
    """

    refit: bool = True
    sums: bool = True
    rescale: bool = False
    without_bias: frozenset[str] = field(default_factory=frozenset)
    threads: int = 1
    seed: int = 0
    memory: int = 3 * 2**29
