"""Structural regularisation: drawing weights into their structured subspaces while they train.

The paper's loss (section 4) is lambda * sum_l ||R_l||_F / ||W_l||_F with the residual
R = (I - A A^+) W. Its gradient is closed: with r = ||R||, d(r / ||W||)/dW = R / (r ||W||) -
r W / ||W||^3, one projection per layer and no graph.

It is a group lasso on the residual, so its proximal step is closed too: shrink the residual, leave
the projection alone. With a fixed lambda a short fine-tune does not reach zero. Here the residual
can also be held under a limit that falls from what it is at the start to zero (the proximal step of
the limit's indicator), so that the phase ends inside the subspace, whatever lambda is.
"""

import math

import torch

from structconv_cli.structure import Structure


@torch.no_grad()
def add_structural_gradient(
    weight: torch.nn.Parameter, structure: Structure, strength: float
) -> None:
    """Add to a weight's gradient that of strength * ||W - P W||_F / ||W||_F.

    Nothing where the residual is zero (the loss has a kink there), or the weight is frozen.
    """
    if weight.grad is None:
        return
    residual = weight - structure.project(weight)
    tiny = torch.finfo(weight.dtype).tiny
    norm, size = weight.norm().clamp_min(tiny), residual.norm()
    pull = residual / size.clamp_min(tiny) - weight * (size / norm.square())
    weight.grad.add_(torch.where(size > 0, pull * (strength / norm), 0.0))


@torch.no_grad()
def shrink_residual(weight: torch.Tensor, structure: Structure, step: float) -> None:
    """The proximal step of step * ||W - P W||_F / ||W||_F, ||W|| held fixed, in place."""
    projection = structure.project(weight)
    residual = weight - projection
    tiny = torch.finfo(weight.dtype).tiny
    less = step / (weight.norm() * residual.norm()).clamp_min(tiny)
    weight.copy_(projection + (1 - less).clamp_min(0) * residual)


@torch.no_grad()
def limit_residual(weight: torch.Tensor, structure: Structure, limit: float) -> None:
    """Shrink the residual of `weight`, in place, to at most `limit` of the weight's norm.

    The projection is left alone. With limit 0 the weight is projected; from 1 on nothing changes.
    """
    if limit >= 1:
        return
    projection = structure.project(weight)
    if limit <= 0:
        weight.copy_(projection)
        return
    residual = weight - projection
    # ||P W||^2 + r^2 = ||W'||^2 with r = limit ||W'|| gives the residual of the shrunk weight.
    allowed = limit / math.sqrt(1 - limit**2) * projection.norm()
    scale = (allowed / residual.norm().clamp_min(torch.finfo(weight.dtype).tiny)).clamp_max(1)
    weight.copy_(projection + scale * residual)


def falling(step: int, steps: int) -> float:
    """A factor after `step` of `steps`: a cosine from 1 to exactly 0."""
    return 0.0 if step >= steps else (1 + math.cos(math.pi * step / steps)) / 2
