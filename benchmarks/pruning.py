"""Channel pruning with Torch-Pruning (`pip install --no-deps torch-pruning==1.6.1`).

Shortcuts that subsample and pad with zero channels are written as 1x1 convolutions with fixed
weights of 0 and 1. The function is the same, ONNX Runtime is a little faster with it, and
Torch-Pruning can prune the residual stream, which it cannot do through the padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

LEAST_LEFT = 8
"""Every layer keeps one in this many of its channels, at least."""


@dataclass(frozen=True)
class Pruning:
    """How Torch-Pruning is to prune.

    Attributes:
        inside: Only channels inside residual blocks; the residual stream keeps its own.
        ranked_globally: Whether channels of all layers compete, or those of each layer.
        round_to: Channels that remain are a multiple of this.
        ratio: Share of the channels to be pruned, before rounding.
    """

    inside: bool
    ranked_globally: bool
    round_to: int
    ratio: float = 0.0

    @property
    def way(self) -> str:
        """All but the ratio, in words."""
        where = "blocks" if self.inside else "all"
        return f"{where}-{'global' if self.ranked_globally else 'local'}-{self.round_to}"


WAYS = tuple(Pruning(*way) for way in product((False, True), (True, False), (1, 8, 16)))


@torch.no_grad()
def with_convolved_shortcuts(model: nn.Module) -> nn.Module:
    """The model with the sample models' padded shortcuts as 1x1 convolutions, in place."""
    for block in list(model.modules()):
        pad = getattr(getattr(block, "shortcut", None), "pad", None)
        if isinstance(pad, int):
            channels = 2 * pad
            convolution = nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False)
            convolution.weight.zero_()
            middle = slice(pad, pad + channels)
            convolution.weight[middle, :, 0, 0] = torch.eye(channels)
            convolution.requires_grad_(False)
            block.shortcut = convolution  # type: ignore[assignment]
    return model


def pruned(model: nn.Module, example: torch.Tensor, pruning: Pruning) -> nn.Module:
    """Prune the channels of least norm from a model, in place; the same ones each time.

    Its outputs keep their channels. What is frozen stays so, without the channels that went.

    Args:
        model: Of plain layers, with one input; padded shortcuts rewritten.
        example: That input, (B, C, H, W).
        pruning: Which channels, and how many.

    Returns:
        The same model, in eval mode.
    """
    import torch_pruning

    class Pruner(torch_pruning.pruner.BasePruner):  # type: ignore[misc]
        """Leaves some channels to every layer: layers that lost all would be kept whole instead."""

        def _round_to(self, pruned: int, channels: int, round_to: int) -> int:
            most = channels - max(round_to, channels // LEAST_LEFT)
            return int(min(super()._round_to(pruned, channels, round_to), most))

    model.eval()
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    # Torch-Pruning finds the layers' dependencies in autograd's graph.
    model.requires_grad_(True)
    pruner = Pruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=pruning.ranked_globally,
        pruning_ratio=pruning.ratio,
        round_to=pruning.round_to,
        ignored_layers=list(_kept(model, example, pruning.inside)),
    )
    pruner.step()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model.eval()


def _kept(model: nn.Module, example: torch.Tensor, inside: bool) -> Iterator[nn.Module]:
    """Layers that keep their output channels: the last ones; with `inside`, the residual stream's.

    Those are the layers whose output channels are tied to other layers'.
    """
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    kinds = (nn.Conv2d, nn.Linear)
    for group in graph.get_all_groups(root_module_types=kinds):
        made, read = [], []
        for dependency, _ in group:
            module = dependency.target.module
            if not isinstance(module, kinds) or getattr(module, "groups", 1) > 1:
                continue
            is_output = graph.is_out_channel_pruning_fn(dependency.handler)
            (made if is_output else read).append(module)
        if not read or (inside and len(set(made)) > 1):
            yield from made
