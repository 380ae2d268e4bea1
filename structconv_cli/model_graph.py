"""The ONNX graph of what the user names: an ONNX file, or a checkpoint and its architecture."""

import re
from pathlib import Path

import onnx
import torch
from torch import nn

from structconv_cli.errors import ArchitectureError, PlanError
from structconv_cli.model.architecture import Architecture, build_model
from structconv_cli.model.checkpoint import load_checkpoint, load_into
from structconv_cli.model.signature import input_names
from structconv_cli.onnx.example_inputs import Shapes
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import load_onnx
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.lowerable import check_lowerable

_TRACE_BATCH = 2
_ONNX = re.compile(rb"\x08[\x01-\x40][\x12\x1a\x22\x28\x32\x3a\x42]")
"""A protobuf message: the IR version, then any other field of an ONNX model."""


def is_onnx(path: Path) -> bool:
    """Whether a file is an ONNX model by its content, or by its name (it may be damaged)."""
    if path.suffix == ".onnx":
        return True
    try:
        with path.open("rb") as file:
            return bool(_ONNX.match(file.read(3)))
    except OSError:  # said by what reads it
        return False


def image_channels(model: onnx.ModelProto) -> int:
    """Channels of the images that a graph of one input takes.

    Raises:
        PlanError: it takes several inputs, or no images of a fixed number of channels.
    """
    graph = Graph(model)
    if len(graph.inputs) != 1:
        raise PlanError(
            f"the model has the inputs {', '.join(graph.inputs)}; --data gives images to a model "
            "of one input. Leave it out to go on without data."
        )
    shape = graph.shape(graph.inputs[0]) or ()
    if len(shape) == 4 and shape[1]:
        return shape[1]
    found = "x".join(map(str, shape))
    raise PlanError(
        f"the model's input {graph.inputs[0]} has the shape {found or 'of no size'}; --data gives "
        "images, (batch, channels, height, width) with a fixed number of channels. Leave it out to "
        "go on without data."
    )


def load_graph(
    path: Path, architecture: Architecture | None, shapes: Shapes
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Read a model as an ONNX graph.

    Args:
        path: an .onnx file, or a checkpoint.
        architecture: what builds the model that the checkpoint fits; not used for an ONNX file.
        shapes: sizes of the inputs. A checkpoint needs them all: of one input as "input", of
            several by the names of its forward pass's parameters.

    Returns:
        The graph, and one sentence on each part of it that structconv leaves alone.

    Raises:
        StructconvError: the file cannot be read; a checkpoint comes without architecture or input
            size; the model cannot be exported.
    """
    if path.suffix == ".onnx":
        model = load_onnx(path)
        return model, check_lowerable(model)
    if architecture is None:
        raise ArchitectureError(
            f"{path} is no .onnx file, and a checkpoint holds weights only: name what builds the "
            "model with --arch FILE.py:FACTORY."
        )
    if not shapes:
        raise ArchitectureError(
            "a checkpoint does not say how large its images are. Give the size of one batch, such "
            "as --input-shape 1x3x224x224."
        )
    checkpoint = load_checkpoint(path)
    built = build_model(architecture)
    load_into(built, checkpoint)
    built.float().eval()
    return export_onnx(built, *noise_inputs(built, shapes, _TRACE_BATCH)), ()


def noise_inputs(
    model: nn.Module, shapes: Shapes, batch: int, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Normal noise for a model's inputs.

    Args:
        model: the model.
        shapes: sizes of its inputs, the batch first: of one input as "input", of several by the
            names of its forward pass's parameters.
        batch: examples, in place of the first size.
        seed: of the noise.

    Raises:
        ArchitectureError: the names are not those of the inputs.
    """
    names = input_names(model, len(shapes))
    if set(names) != set(shapes):
        raise ArchitectureError(
            f"--input-shape gives sizes for {', '.join(shapes)}; a model of {len(shapes)} inputs "
            f"has {', '.join(names)}. Give the size of each, such as "
            f"{' '.join(f'--input-shape {name}=1x3x224x224' for name in names)}."
        )
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shapes[name][1:], generator=generator) for name in names)
