"""Classification of images: cross-entropy, top-1 and top-5 accuracy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from structconv_cli.data.dataset import check_labels
from structconv_cli.errors import TaskError
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.tasks.distillation import divergence
from structconv_cli.tasks.images import Batch, ImageTask
from structconv_cli.tasks.outputs import class_scores
from structconv_cli.tasks.task import Evaluation, Metric

_TOP = 5


@dataclass(frozen=True, eq=False)
class Classification(ImageTask):
    """Images (B, C, H, W) and class numbers (B,); models that give scores (B, K)."""

    metric = Metric("top-1 accuracy", "%")
    following = 0.9
    """Half a point better than 0.5 in long trainings, level in short ones (`benchmarks`)."""

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Check that the model gives a score for every class of the data.

        Raises:
            TaskError: it does not give scores (B, K), K >= 2.
            DataError: it has too few of them.
        """
        with eval_mode(model):
            scores = class_scores(model(*self.examples(2)))
        if scores.ndim != 2:
            raise TaskError(
                f"the model puts out {tuple(scores.shape)} for a batch of images, and the data "
                "has one label for each; expected scores (batch, classes). Give data with masks "
                "for segmentation, or describe the task with --task FILE.py."
            )
        if scores.shape[1] < 2:
            raise TaskError(
                "the model puts out one score per image; expected one for each of at least two "
                "classes. Describe a task of a single score with --task FILE.py."
            )
        check_labels(self.data, scores.shape[1])

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Scores (B, K)."""
        return class_scores(model(batch[0]))

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy, in nats."""
        return functional.cross_entropy(outputs, batch[1])

    def distillation(
        self, outputs: torch.Tensor, taught: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """See `tasks.distillation`; in nats."""
        return divergence(outputs, taught)

    @torch.no_grad()
    def evaluate(self, forward: Callable[[Batch], torch.Tensor]) -> Evaluation:
        """Top-1 accuracy (percent), cross-entropy (nats); top-5 with more than ten classes."""
        sums, classes = torch.zeros(4, dtype=torch.float64), len(self.data.classes)
        for batch in self.validation():
            scores, labels = forward(batch).float(), batch[1]
            labels = labels.to(scores.device)
            classes = classes or scores.shape[1]  # labels that are mere numbers have no names
            best = scores.topk(min(_TOP, scores.shape[1]), 1).indices == labels.unsqueeze(1)
            loss = functional.cross_entropy(scores, labels, reduction="sum")
            found: list[Any] = [best[:, 0].sum(), best.any(1).sum(), loss, len(labels)]
            sums += torch.tensor([float(value) for value in found], dtype=torch.float64)
        first, top, loss_sum, images = self.world.sum(sums).tolist()
        others: Mapping[str, float] = {}
        if classes > 2 * _TOP:
            others = {f"top-{_TOP} accuracy": 100 * top / images}
        return Evaluation(100 * first / images, loss_sum / images, int(images), others)
