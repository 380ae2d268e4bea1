"""The plan: which structure every layer gets, or why it is kept dense. Data only."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from structconv_cli.errors import PlanError
from structconv_cli.quoting import legible
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
    """One entry per convolution and linear layer, in the order in which the model runs them.

    `schema` names the format of its JSON and its version; a plan written by hand may leave it out.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    layers: tuple[LayerPlan | KeptLayer, ...]
    schema: Literal["structconv-plan/1"] = "structconv-plan/1"

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
        text = path.read_bytes()
        return PLAN_JSON.validate_json(text)
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}.") from None
    except ValidationError as error:
        place, problem = _first_problem(text, error)
        raise PlanError(
            f"the plan {path} is not valid at {legible(place)}: {legible(problem, most=300)}. "
            'Expected {"layers": [{"name": ..., "structure": {"dense": [...], "reduced": [...]}} '
            'or {"name": ..., "reason": ...}, ...]}, as `structconv plan` writes it.'
        ) from None


def _first_problem(text: bytes, error: ValidationError) -> tuple[str, str]:
    """Where the first error is (line, layer, field), and what is wrong there."""
    problems = error.errors()
    location = problems[0]["loc"]
    if len(location) > 1:
        # An entry is one of two kinds: what is wrong is said of the kind that it meant to be.
        entry = _entry(text, location[1])
        kind = "KeptLayer" if "reason" in entry and "structure" not in entry else "LayerPlan"
        meant = [p for p in problems if p["loc"][:2] == location[:2] and kind in p["loc"]]
        chosen = (meant or problems)[0]
        fields = [str(part) for part in chosen["loc"][2:] if part not in ("LayerPlan", "KeptLayer")]
        name = entry.get("name")
        words = [f"line {_line(text, location[1])}"]
        words += [f"layer {name}"] if isinstance(name, str) else [f"entry {location[1]}"]
        words += [".".join(fields)] if fields else []
        return ", ".join(words), str(chosen["msg"])
    place = ".".join(str(part) for part in location) or "the top level"
    return place, str(problems[0]["msg"])


def _entry(text: bytes, index: int | str) -> dict[str, object]:
    """An entry of "layers" as it stands in the file; empty where there is none."""
    try:
        entry = json.loads(text)["layers"][index]
    except (ValueError, LookupError, TypeError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _line(text: bytes, index: int | str) -> int:
    """The line on which an entry of "layers" begins, counted from 1."""
    words = text.decode(errors="replace")
    decoder = json.JSONDecoder()
    position = words.index("[", words.index('"layers"')) + 1
    for number in range(int(index) + 1):
        position += len(words[position:]) - len(words[position:].lstrip(" \t\r\n,"))
        if number < int(index):
            _, position = decoder.raw_decode(words, position)
    return words.count("\n", 0, position) + 1
