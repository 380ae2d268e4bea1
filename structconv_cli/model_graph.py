"""The ONNX graph of what the user names: an ONNX file, or a checkpoint and its architecture."""

from pathlib import Path

import onnx
import torch

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.architecture import Architecture, build_model
from structconv_cli.model.checkpoint import load_checkpoint, load_into
from structconv_cli.model.signature import input_names
from structconv_cli.onnx.example_inputs import Shapes
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import load_onnx
from structconv_cli.onnx.lowerable import check_lowerable

_TRACE_BATCH = 2


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
    names = input_names(built, len(shapes))
    if set(names) != set(shapes):
        raise ArchitectureError(
            f"--input-shape gives sizes for {', '.join(shapes)}; a model of {len(shapes)} inputs "
            f"has {', '.join(names)}. Give the size of each, such as "
            f"{' '.join(f'--input-shape {name}=1x3x224x224' for name in names)}."
        )
    example = [torch.randn(_TRACE_BATCH, *shapes[name][1:]) for name in names]
    return export_onnx(built.float().eval(), *example), ()
