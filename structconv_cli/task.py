"""The task a model is tuned and judged by: classification."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from structconv_cli.model.eval_mode import eval_mode

_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Evaluation:
    """A model's quality on one split.

    Attributes:
        accuracy: top-1, in percent.
        loss: mean cross-entropy, in nats.
        images: how many images were judged.
    """

    accuracy: float
    loss: float
    images: int


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits (B, K) against labels (B,)."""
    return functional.cross_entropy(logits, labels)


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """T^2 KL(teacher || student) of logits (B, K), both softened by the temperature T = 2, in nats.

    Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    student = functional.log_softmax(logits / _TEMPERATURE, 1)
    teacher = functional.log_softmax(teacher_logits / _TEMPERATURE, 1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return _TEMPERATURE**2 * divergence


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Evaluation:
    """Top-1 accuracy and loss over batches of prepared images and labels, in eval mode."""
    right, loss, images = 0, 0.0, 0
    with eval_mode(model):
        for inputs, labels in batches:
            logits = model(inputs)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            images += len(labels)
    return Evaluation(100 * right / images, loss / images, images)
