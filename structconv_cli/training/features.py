"""Following what the original model computes inside, besides its outputs.

Hints: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, FitNets: Hints for Thin Deep Nets, 2015.
Structure changes no shape, so features are compared as they are, without the regressors that
FitNets needs; each is taken relative to its own size, so that no block outweighs the others.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Features:
    """What the blocks around structured layers put out, in a model and in its teacher.

    A layer's block is the module that holds it, where that is called and is not the whole model;
    else the layer itself.

    Args:
        student: trained; hooks stay on it and on the teacher until `close`.
        teacher: a model with the same layers.
        layers: names of the structured layers.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Collection[str]) -> None:
        self._pairs = [(name.rpartition(".")[0], name) for name in layers]
        self._watching = False
        self._seen: tuple[dict[str, list[torch.Tensor]], ...] = ({}, {})
        watched = {name for pair in self._pairs for name in pair if name}
        self._handles = [
            module.register_forward_hook(self._hook(name, seen))
            for model, seen in zip((student, teacher), self._seen, strict=True)
            for name, module in model.named_modules()
            if name in watched
        ]

    def _hook(self, name: str, seen: dict[str, list[torch.Tensor]]) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._watching and isinstance(output, torch.Tensor) and output.is_floating_point():
                seen.setdefault(name, []).append(output)

        return keep

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The block in which both models run; what they put out is forgotten behind it."""
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            for seen in self._seen:
                seen.clear()

    def distance(self) -> torch.Tensor:
        """Mean over blocks of ||student - teacher||^2 / ||teacher||^2; call it inside `watched`.

        Blocks that put out no tensor, or tensors of other shapes, are left out; 0 if all are.
        """
        ours, taught = self._seen
        blocks = dict.fromkeys(
            next((name for name in pair if name in ours and name in taught), "")
            for pair in self._pairs
        )
        found = [
            _relative(mine, theirs)
            for block in blocks
            for mine, theirs in zip(ours.get(block, ()), taught.get(block, ()), strict=False)
            if mine.shape == theirs.shape
        ]
        return torch.stack(found).mean() if found else torch.zeros(())

    def close(self) -> None:
        """Take the hooks off both models."""
        for handle in self._handles:
            handle.remove()


def _relative(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    theirs = theirs.detach().float()
    least = torch.finfo(theirs.dtype).tiny
    return (mine.float() - theirs).square().mean() / theirs.square().mean().clamp(min=least)
