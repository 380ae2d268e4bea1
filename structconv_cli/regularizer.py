"""Structural regularisation: drawing weights into their structured subspaces while they train.

The paper's loss (section 4) is lambda * sum_l ||(I - A A^+) W_l||_F / ||W_l||_F. It is a group
lasso on the residual, so its proximal step is closed: shrink the residual, leave the projection
alone. With a fixed lambda a short fine-tune does not reach zero; here the residual is also held
under a limit that falls to zero over the regularised phase (the proximal step of the limit's
indicator), so the phase ends inside the subspace, whatever lambda is.
"""

import math
from collections.abc import Iterable

import torch

from structconv_cli.structure import Structure


def structural_loss(weights: Iterable[tuple[torch.Tensor, Structure]]) -> torch.Tensor:
    """sum_l ||W_l - P W_l||_F / ||W_l||_F, a differentiable scalar (0 where a weight is zero)."""
    terms = []
    for weight, structure in weights:
        residual = weight - structure.project(weight)
        norm = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
        terms.append(residual.norm() / norm)
    return torch.stack(terms).sum() if terms else torch.zeros(())


@torch.no_grad()
def limit_residual(weight: torch.Tensor, structure: Structure, limit: float) -> None:
    """Shrink the residual of `weight`, in place, to at most `limit` of the weight's norm.

    The projection is left alone. With limit 0 the weight is projected; from 1 on nothing changes.
    """
    if limit >= 1:
        return
    projection = structure.project(weight)
    residual = weight - projection
    # ||P W||^2 + r^2 = ||W'||^2 with r = limit ||W'|| gives the residual of the shrunk weight.
    allowed = limit / math.sqrt(1 - limit**2) * projection.norm()
    scale = (allowed / residual.norm().clamp_min(torch.finfo(weight.dtype).tiny)).clamp_max(1)
    weight.copy_(projection + scale * residual)


def residual_limit(step: int, steps: int) -> float:
    """Limit on the relative residual after `step` of `steps`: a cosine from 1 to exactly 0."""
    return 0.0 if step >= steps else (1 + math.cos(math.pi * step / steps)) / 2
