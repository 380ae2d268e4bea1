"""The tensors that a model takes and gives: their names, shapes of one example, and types.

Examples lie along the first axis of every one of them.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from structconv_cli.errors import ArchitectureError

INPUT, OUTPUT = "input", "output"

_CLOSE = 1e-4
"""Relative difference that rounding in float32 explains."""


@dataclass(frozen=True)
class TensorKind:
    """What a tensor of a batch is like.

    Attributes:
        shape: of one example.
        dtype: "float32", "int64", ...
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorKind":
        """That of a batch."""
        return cls(tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))

    @property
    def is_floating(self) -> bool:
        """Whether it can be compared within rounding: class numbers and masks cannot."""
        return "float" in self.dtype


def input_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Names of a model's `count` inputs: "input" for one, else its forward pass's parameters."""
    if count == 1:
        return (INPUT,)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return tuple((names + [f"{INPUT}_{i}" for i in range(len(names), count)])[:count])


def takes_any_number(model: nn.Module) -> bool:
    """Whether a model's forward pass is declared as (*inputs)."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL


def are_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two outputs of one shape are the same but for rounding in float32; numbers that are
    not floating point are the same exactly."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    missed = (one - other).double().norm()
    return bool(missed <= _CLOSE * one.double().norm() + torch.finfo(torch.float32).tiny)


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a model's outputs, in order; None among them is left out.

    Raises:
        ArchitectureError: there is anything but tensors, in tuples, lists and dicts.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if leaf is not None]
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise ArchitectureError(
                f"the model puts out a value of type {type(leaf).__name__}; expected tensors, "
                "alone or in tuples, lists and dicts."
            )
    if not leaves:
        raise ArchitectureError("the model puts out no tensor; expected at least one.")
    return leaves


def named_outputs(outputs: Any, batch: int, taken: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """A model's outputs by name: "output" for one, else the keys and numbers that lead to it.

    Args:
        outputs: what the model returned for `batch` examples.
        batch: how many.
        taken: names that the outputs cannot have: those of inputs and weights.

    Raises:
        ArchitectureError: as `tensors_of`, or an output does not have an example in each row.
    """
    tensors = tensors_of(outputs)
    paths, _ = pytree.tree_flatten_with_path(outputs)
    keys = [_joined(path) for path, leaf in paths if leaf is not None]
    named: dict[str, torch.Tensor] = {}
    for key, tensor in zip(keys, tensors, strict=True):
        name = key if len(tensors) > 1 else OUTPUT
        while name in named or name in taken:
            name = f"{OUTPUT}_{name}"
        named[name] = tensor
        if not tensor.ndim or len(tensor) != batch:
            raise ArchitectureError(
                f"the model puts out {tuple(tensor.shape)} as {name} for a batch of {batch}; "
                "expected as many rows as examples along the first axis of every output. Return "
                "only tensors with one row for each example."
            )
    return named


def taken_names(model: nn.Module, inputs: Sequence[str]) -> tuple[str, ...]:
    """Names that a graph of a model has already: its inputs and weights."""
    return (*inputs, *dict(model.named_parameters()), *dict(model.named_buffers()))


def floating(kinds: Mapping[str, TensorKind]) -> tuple[str, ...]:
    """The names of floating-point tensors."""
    return tuple(name for name, kind in kinds.items() if kind.is_floating)


def sized(inputs: Sequence[torch.Tensor], batch: int) -> tuple[torch.Tensor, ...]:
    """Exactly `batch` examples: the first ones, repeated where there are fewer."""
    return tuple(tensor[torch.arange(batch) % len(tensor)] for tensor in inputs)


def _joined(path: Sequence[Any]) -> str:
    """Of a path of keys and numbers: "out", "boxes_0"; "output_1" where it starts with a number."""
    words = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path
    ]
    words = ["".join(c if c.isalnum() else "_" for c in word) for word in words]
    if not words or not words[0] or words[0][0].isdigit():
        words.insert(0, OUTPUT)
    return "_".join(words)
