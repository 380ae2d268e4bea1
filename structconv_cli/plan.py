"""The plan: which structure every layer gets, or why it is kept dense. Data only."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from structconv_cli.errors import PlanError
from structconv_cli.structure import Structure


@dataclass(frozen=True)
class LayerPlan:
    """A layer to be structured.

    Attributes:
        name: the module's name in the model.
        structure: its dense and reduced sizes.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    structure: Structure


@dataclass(frozen=True)
class KeptLayer:
    """A layer that stays dense, and why."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """One entry per convolution and linear layer, in the order in which the model runs them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    layers: tuple[LayerPlan | KeptLayer, ...]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PlanError(f"the plan names layer {twice[0]} more than once; give one entry each.")

    @cached_property
    def structures(self) -> Mapping[str, Structure]:
        """Structure by layer name, for the layers that are structured."""
        return {
            layer.name: layer.structure for layer in self.layers if isinstance(layer, LayerPlan)
        }

    @property
    def kept(self) -> tuple[KeptLayer, ...]:
        """The layers that stay dense."""
        return tuple(layer for layer in self.layers if isinstance(layer, KeptLayer))

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's JSON: names the plan in the files made from it."""
        return hashlib.sha256(PLAN_JSON.dump_json(self)).hexdigest()


PLAN_JSON = TypeAdapter(Plan)


def read_plan(path: Path) -> Plan:
    """Read a plan file, perhaps edited by hand.

    Raises:
        PlanError: the file is missing, is not JSON, or an entry is malformed (its place is named).
    """
    try:
        return PLAN_JSON.validate_json(path.read_bytes())
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(path, first["loc"])
        raise PlanError(
            f"the plan {path} is not valid at {place}: {first['msg']}. Expected "
            '{"layers": [{"name": ..., "structure": {"dense": [...], "reduced": [...]}} or '
            '{"name": ..., "reason": ...}, ...]}, as in the plan.json of a run folder.'
        ) from None


def _place(path: Path, location: tuple[int | str, ...]) -> str:
    """Where an error is, with the layer's name if the file gives one there."""
    place = ".".join(str(part) for part in location) or "the top level"
    try:
        name = json.loads(path.read_bytes())["layers"][location[1]]["name"]
    except (ValueError, LookupError, TypeError):
        return place
    return f"{place} (layer {name})"
