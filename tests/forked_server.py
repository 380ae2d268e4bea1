"""What the server of `forked` does before it forks: the imports of a conversion, and an export.

It starts no thread: those would be missing in what it forks.
"""

import torch
from torch import nn

import structconv_cli.benchmarking.run
import structconv_cli.commands.requests
import structconv_cli.convert
import structconv_cli.html.page  # noqa: F401
from structconv_cli.onnx.export import export_onnx

export_onnx(nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)), torch.zeros(2, 1, 4, 4))
