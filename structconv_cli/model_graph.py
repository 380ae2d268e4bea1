"""The ONNX graph of what the user names: an ONNX file, or a checkpoint and its architecture."""

from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import nn

from structconv_cli.errors import ArchitectureError, PlanError
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.checkpoint_kind import Kind, identify
from structconv_cli.model.input_guess import guess_input
from structconv_cli.model.inventory import first_channels
from structconv_cli.model.opening import Opened, open_model
from structconv_cli.model.signature import input_names
from structconv_cli.onnx.example_inputs import Shapes
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.lowerable import load_lowerable
from structconv_cli.progress import SILENT, Observer

_TRACE_BATCH = 2


def is_onnx(path: Path) -> bool:
    """Whether a file is an ONNX model by its content, or by its name (it may be damaged).

    Raises:
        CheckpointError: it is missing, or no model at all.
    """
    return path.suffix == ".onnx" or identify(path) is Kind.ONNX


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


@dataclass(frozen=True, eq=False)
class ModelSource:
    """What the user named, read: an ONNX graph, or a checkpoint's model.

    Attributes:
        read: the one or the other.
        notes: what was found rather than told, one sentence each.
    """

    read: onnx.ModelProto | Opened
    notes: tuple[str, ...]

    @property
    def takes_images_alone(self) -> bool:
        """Whether sizes of images are those of its one input, which has no name of its own yet."""
        return isinstance(self.read, Opened)

    @property
    def channels(self) -> int:
        """Channels of the images that it takes.

        Raises:
            PlanError: it takes no images, or several inputs.
        """
        if isinstance(self.read, onnx.ModelProto):
            return image_channels(self.read)
        return model_channels(self.read.model)

    def graph(self, shapes: Shapes) -> tuple[onnx.ModelProto, tuple[str, ...]]:
        """The model as an ONNX graph, its layers plain ones.

        Args:
            shapes: sizes of the inputs. A checkpoint's are guessed if none is given; else it needs
                them all: of one input as "input", of several by the names of its forward pass's
                parameters.

        Returns:
            The graph, and one sentence on each part of it that structconv leaves alone.

        Raises:
            StructconvError: a checkpoint comes without input size; the model cannot be exported.
        """
        if isinstance(self.read, onnx.ModelProto):
            return self.read, self.notes
        shapes, notes = known_shapes(self.read, shapes)
        example = noise_inputs(self.read.model, shapes, _TRACE_BATCH)
        found = self.read.plain(*example)
        return export_onnx(found.model, *example), (*self.notes, *notes, *found.notes)


def known_shapes(opened: Opened, given: Shapes) -> tuple[Shapes, tuple[str, ...]]:
    """Sizes of a checkpoint's inputs: those given, those of its program, or a guess; and a note.

    Raises:
        ArchitectureError: they cannot be guessed.
    """
    if given:
        return given, ()
    if opened.shapes:
        return opened.shapes, ()
    guess = guess_input(opened.model)
    return guess.shapes, (guess.why,)


def open_source(
    path: Path,
    architecture: Architecture | None,
    observer: Observer = SILENT,
    *,
    trust_pickle: bool = False,
) -> ModelSource:
    """Read an ONNX file, or a checkpoint and what builds its model.

    Args:
        path: the file.
        architecture: what builds the model that a checkpoint fits; None to recognise it. Not used
            for an ONNX file.
        observer: is told of long work.
        trust_pickle: whether the user said that a pickled module's code may be run.

    Raises:
        StructconvError: the file cannot be read, or the model not be built.
    """
    if is_onnx(path):
        return ModelSource(*load_lowerable(path))
    opened = open_model(path, architecture, observer, trust_pickle=trust_pickle)
    return ModelSource(opened, opened.notes)


def model_channels(model: nn.Module) -> int:
    """Channels of the images that a PyTorch model takes.

    Raises:
        PlanError: it has no convolution.
    """
    found = first_channels(model)
    if found is None:
        # Convolutions may be function calls; the first kernel is the first convolution's.
        found = next((p.shape[1] for p in model.parameters() if p.ndim > 2), None)
    if found is None:
        raise PlanError(
            "the model has no convolution, so there is nothing to structure. structconv is for "
            "convolutional networks."
        )
    return found


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
