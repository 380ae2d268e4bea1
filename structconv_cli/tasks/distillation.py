"""Following the original model's scores.

T^2 KL(teacher || student), both softened by the temperature T = 2: Hinton, Vinyals, Dean,
Distilling the Knowledge in a Neural Network, 2015.
"""

import torch
from torch.nn import functional

_TEMPERATURE = 2.0


def divergence(scores: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """Mean over everything but classes, in nats, of scores (B, K, ...) from `taught`, likewise."""
    student = functional.log_softmax(scores.float() / _TEMPERATURE, 1)
    teacher = functional.log_softmax(taught.float() / _TEMPERATURE, 1)
    each = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return _TEMPERATURE**2 * each.mean()
