"""Semantic segmentation: cross-entropy per pixel, mIoU; an ignored label.

The metric is the mean over classes of intersection over union, of all pixels of the validation part
that do not have the ignored label, counted together. A class that is in no mask and is never
predicted does not count; one that is only predicted counts as 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from structconv_cli.data.dataset import check_labels
from structconv_cli.errors import DataError, TaskError
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.tasks.confusion import at_size, confusion, mean_iou, pixel_accuracy
from structconv_cli.tasks.distillation import divergence
from structconv_cli.tasks.images import Batch, ImageTask
from structconv_cli.tasks.outputs import class_scores
from structconv_cli.tasks.task import Evaluation, Metric


@dataclass(frozen=True, eq=False)
class Segmentation(ImageTask):
    """Images (B, C, H, W) and masks of class numbers (B, H, W); models that give (B, K, h, w).

    Scores of another resolution than the mask's are resized to it, bilinearly. Of a model that
    gives several outputs, as torchvision's with their auxiliary head, the main one is trained.
    """

    metric = Metric("mIoU", "%")
    following = 0.5
    calibration_images: ClassVar[int] = 512
    most_at_once: ClassVar[int] = 16

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Check that the model gives a score for every class of every pixel.

        Raises:
            TaskError: it does not give scores (B, K, h, w), K >= 2.
            DataError: a mask has a class that the model does not have, or all hold the same.
        """
        with eval_mode(model):
            scores = class_scores(model(*self.examples(2)))
        if scores.ndim != 4:
            raise TaskError(
                f"the model puts out {tuple(scores.shape)} for a batch of images, and the data "
                "has masks; expected scores (batch, classes, height, width). Give data with class "
                "folders for classification, or describe the task with --task FILE.py."
            )
        if scores.shape[1] < 2:
            raise TaskError(
                "the model puts out one score per pixel; expected one for each of at least two "
                "classes. Describe a task of a single score with --task FILE.py."
            )
        check_labels(self.data, scores.shape[1])

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Scores (B, K, h, w)."""
        return class_scores(model(batch[0]))

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of the pixels that are not ignored, in nats; 0 if all are."""
        counted = self._counted(batch[1], outputs.shape[1])
        return self._sum(outputs, batch[1]) / counted.sum().clamp(min=1)

    def distillation(
        self, outputs: torch.Tensor, taught: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """See `tasks.distillation`; in nats. Ignored pixels too: the original answers for all."""
        return divergence(outputs, taught)

    @torch.no_grad()
    def evaluate(self, forward: Callable[[Batch], torch.Tensor]) -> Evaluation:
        """mIoU and pixel accuracy (percent), cross-entropy (nats)."""
        counts, sums = torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
        for images, masks in self.validation():
            scores = forward((images, masks)).float().cpu()
            classes = scores.shape[1]
            self._counted(masks, classes)
            predicted = at_size(scores, tuple(masks.shape[1:])).argmax(1)
            found = confusion(predicted, masks, classes, self.data.ignore_label).flatten()
            counts = counts + found if len(counts) else found
            sums += torch.tensor([float(self._sum(scores, masks)), len(masks)], dtype=sums.dtype)
        # A process without a share of few images does not know how many classes there are.
        size = int(self.world.sum(torch.tensor(len(counts) if self.world.first else 0)))
        counts = self.world.sum(counts if len(counts) else counts.new_zeros(size))
        loss_sum, images_judged = self.world.sum(sums).tolist()
        if not counts.sum():
            raise DataError(
                f"every pixel of the validation masks has the ignored label "
                f"{self.data.ignore_label}: there is nothing to judge the model by."
            )
        table = counts.view(int(size**0.5), -1)
        return Evaluation(
            mean_iou(table),
            loss_sum / float(counts.sum()),
            int(images_judged),
            {"pixel accuracy": pixel_accuracy(table)},
        )

    def _sum(self, scores: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        resized = at_size(scores.float(), tuple(masks.shape[1:]))
        ignored = self.data.ignore_label
        return functional.cross_entropy(resized, masks, ignore_index=ignored, reduction="sum")

    def _counted(self, masks: torch.Tensor, classes: int) -> torch.Tensor:
        """Which pixels are not ignored.

        Raises:
            DataError: one of them has a class that the model does not have.
        """
        counted: torch.Tensor = masks != self.data.ignore_label
        largest = int(torch.where(counted, masks, 0).max())
        if largest >= classes:
            raise DataError(
                f"a mask has the class {largest}, but the model has {classes} classes, 0 to "
                f"{classes - 1}; the ignored label is {self.data.ignore_label}. Give the masks "
                "that the model was trained with, or the ignored label that they use."
            )
        return counted
