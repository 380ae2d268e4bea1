"""The size of a model's images, from what the model tells of it, or by trying."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.inventory import run_once
from structconv_cli.model.signature import input_names

_TYPICAL = (224, 32, 28, 64, 299, 256, 384, 512)
"""In this order: a model that runs on one size mostly runs on others, and was trained on one."""
_BATCH = 2


@dataclass(frozen=True)
class InputGuess:
    """What a model's inputs are taken to be.

    Attributes:
        shapes: of a batch of one, by input name, as `--input-shape` has them.
        why: where they come from, one sentence for the user.
    """

    shapes: dict[str, tuple[int, ...]]
    why: str


def guess_input(model: nn.Module) -> InputGuess:
    """The input of a model of images, found by its first convolution and its own metadata.

    Channels and number of spatial axes are those of the first convolution. The size is that of the
    model's `default_cfg` or `pretrained_cfg` (timm's), or of its `image_size`; else the first of
    some typical ones that the model runs on.

    Raises:
        ArchitectureError: it has several inputs or no convolution, or runs on none of the sizes.
    """
    required = _required_inputs(model)
    if required > 1:
        names = input_names(model, required)
        raise ArchitectureError(
            f"the model takes {required} inputs ({', '.join(names)}), whose sizes cannot be "
            f"guessed. Give each, such as --input-shape {names[0]}=1x3x224x224."
        )
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    told = _told(model)
    if told is not None and _runs(model, told):
        return _guess(told, "the model's own metadata says so")
    if first is None:
        raise ArchitectureError(
            "the model has no convolution module that would tell what its images are like. Give "
            "their size, such as --input-shape 1x3x224x224."
        )
    channels = _channels(first)
    dims = len(first.kernel_size)
    for size in _TYPICAL:
        shape = (channels, *(size,) * dims)
        if _runs(model, shape):
            return _guess(
                shape,
                f"{channels} channels are those of the first convolution, and {size} is the first "
                "of some typical sizes that the model runs on; times and sizes depend on it",
            )
    tried = ", ".join(map(str, _TYPICAL))
    shape_text = "x".join(map(str, (1, channels, *("SIZE",) * dims)))
    raise ArchitectureError(
        f"the model does not say how large its images are, and runs on none of {shape_text} with "
        f"SIZE {tried}. Give the size, such as --input-shape 1x{channels}{'x224' * dims}."
    )


def program_shapes(program: torch.export.ExportedProgram) -> InputGuess:
    """The inputs of an exported program: those that it was exported with; an open size's example.

    Raises:
        ArchitectureError: an input is no tensor.
    """
    kept = program.graph_signature.user_inputs
    shapes: dict[str, tuple[int, ...]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in kept:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                raise ArchitectureError(
                    f"the exported program's input {node.name} is a {type(value).__name__}; "
                    "expected tensors only. Export it with tensors as its inputs."
                )
            shapes[node.name] = (1, *(_size(size) for size in value.shape[1:]))
    if len(shapes) == 1:
        shapes = {"input": next(iter(shapes.values()))}
    return InputGuess(shapes, "the program was exported with inputs of this size")


def _guess(shape: tuple[int, ...], why: str) -> InputGuess:
    text = "x".join(map(str, (1, *shape)))
    return InputGuess({"input": (1, *shape)}, f"Inputs are taken to be {text}: {why}.")


def _required_inputs(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def _told(model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) by the model's own word."""
    for name in ("pretrained_cfg", "default_cfg"):
        settings = getattr(model, name, None)
        if isinstance(settings, Mapping):
            shape: Any = settings.get("input_size")
            if isinstance(shape, tuple | list) and len(shape) == 3:
                return tuple(int(size) for size in shape)
    size = getattr(model, "image_size", None)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if isinstance(size, int) and first is not None:
        return (_channels(first), size, size)
    return None


def _channels(module: nn.modules.conv._ConvNd) -> int:
    # A lazy module's are filled in by its first run only.
    return int(module.in_channels) or 3


def _runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        run_once(model, (torch.randn(_BATCH, *shape),))
    except ArchitectureError:
        return False
    return True


def _size(size: Any) -> int:
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(hint if hint is not None else size)
