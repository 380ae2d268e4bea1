"""Classification of images: cross-entropy, top-1 and top-5 accuracy."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from structconv_cli.data.dataset import Dataset
from structconv_cli.data.order import Shuffle, batch_indices
from structconv_cli.tasks.distillation import divergence
from structconv_cli.tasks.outputs import class_scores
from structconv_cli.tasks.task import Evaluation, Metric
from structconv_cli.world import ALONE, World

_EVALUATION_BATCH = 256
_CALIBRATION_IMAGES = 2048
_CALIBRATION_EPOCH = 1 << 20
"""Stands for the order in which calibration images are drawn: no epoch has it."""
_TOP = 5

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Classification:
    """Images (B, C, H, W) and class numbers (B,); models that give scores (B, K).

    Attributes:
        data: the images.
        batch_size: images per step in this process.
        augment: random changes to training images.
        seed: of shuffling and augmentation.
        world: the processes that train together.
    """

    data: Dataset
    batch_size: int = 64
    augment: tuple[str, ...] = ()
    seed: int = 0
    world: World = ALONE

    metric = Metric("top-1 accuracy", "%")

    @property
    def steps(self) -> int:
        """Whole batches; the last, smaller one is left out: a batch norm over few is noise."""
        count, world = len(self.data.train), self.world.size
        return len(batch_indices(count, self.batch_size, world=world, drop_last=True))

    def training(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        return self.data.batches(
            self.data.train,
            self.batch_size,
            shuffle=Shuffle(self.seed, epoch),
            augment=self.augment,
            rank=self.world.rank,
            world=self.world.size,
            drop_last=True,
        )

    def calibration(self) -> Iterator[Batch]:
        """About two thousand training images, augmented as in training.

        Statistics of other images do not fit the tuned weights: a ResNet-20 on CIFAR-10 lost five
        points to statistics of images without crops.
        """
        left = _CALIBRATION_IMAGES
        for batch in self.data.batches(
            self.data.train,
            _EVALUATION_BATCH,
            shuffle=Shuffle(self.seed, _CALIBRATION_EPOCH),
            augment=self.augment,
        ):
            if len(batch[0]) > 1:
                yield batch
            left -= len(batch[0])
            if left <= 0:
                return

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
        sums = torch.zeros(4, dtype=torch.float64)
        classes = 0
        for batch in self.data.batches(
            self.data.val, _EVALUATION_BATCH, rank=self.world.rank, world=self.world.size
        ):
            scores, labels = forward(batch).float(), batch[1]
            classes = scores.shape[1]
            labels = labels.to(scores.device)
            best = scores.topk(min(_TOP, classes), 1).indices == labels.unsqueeze(1)
            loss = functional.cross_entropy(scores, labels, reduction="sum")
            found = [best[:, 0].sum(), best.any(1).sum(), loss, len(labels)]
            sums += torch.tensor([float(value) for value in found], dtype=torch.float64)
        first, top, loss_sum, images = self.world.sum(sums).tolist()
        others: Mapping[str, float] = {}
        if len(self.data.classes) > 2 * _TOP:
            others = {f"top-{_TOP} accuracy": 100 * top / images}
        return Evaluation(100 * first / images, loss_sum / images, int(images), others)
