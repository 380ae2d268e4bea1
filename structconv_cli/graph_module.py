"""An ONNX graph in the place of a PyTorch model, run by ONNX Runtime."""

import onnx
import torch
from torch import nn

from structconv_cli.artifacts import scores_of
from structconv_cli.whole_graph import WholeGraph


class ScoresModule(nn.Module):
    """A graph of one input as a module that gives class scores, to be judged by a task."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self._scores = scores_of(model)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, K), or whatever the graph gives."""
        return torch.from_numpy(self._scores(images.numpy()))


class OutputsModule(nn.Module):
    """A graph as a module that gives all its outputs, in order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self._graph = WholeGraph(model)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Batches of its inputs, in order -> batches of its outputs."""
        pairs = zip(self._graph.inputs, inputs, strict=True)
        outputs = self._graph({name: tensor.numpy() for name, tensor in pairs})
        return [torch.from_numpy(array) for array in outputs.values()]
