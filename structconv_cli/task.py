"""The task a model is tuned and judged by: classification."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from structconv_cli.model.eval_mode import eval_mode


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
