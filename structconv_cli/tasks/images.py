"""What tasks on labelled images share: which batches they are given."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from structconv_cli.data.dataset import Dataset
from structconv_cli.data.order import Shuffle, batch_indices
from structconv_cli.world import ALONE, World

_CALIBRATION_EPOCH = 1 << 20
"""Stands for the order in which calibration images are drawn: no epoch has it."""

_MOST_PIXELS = 256 * 224 * 224

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Images (B, C, H, W) with what is to be said of them.

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

    calibration_images: ClassVar[int] = 2048
    most_at_once: ClassVar[int] = 256

    @property
    def at_once(self) -> int:
        """Images in a batch of calibration or evaluation: fewer of large ones, for the memory."""
        height, width = self.data.val.image_shape[1:]
        return max(2, min(self.most_at_once, _MOST_PIXELS // (height * width)))

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
        """Some training images, augmented as in training.

        Statistics of other images do not fit the tuned weights: a ResNet-20 on CIFAR-10 lost five
        points to statistics of images without crops.
        """
        left = self.calibration_images
        for batch in self.data.batches(
            self.data.train,
            self.at_once,
            shuffle=Shuffle(self.seed, _CALIBRATION_EPOCH),
            augment=self.augment,
        ):
            if len(batch[0]) > 1:
                yield batch
            left -= len(batch[0])
            if left <= 0:
                return

    def validation(self) -> Iterator[Batch]:
        """This process's share of the validation part."""
        return self.data.batches(
            self.data.val, self.at_once, rank=self.world.rank, world=self.world.size
        )

    def examples(self, count: int) -> tuple[torch.Tensor, ...]:
        """The first validation images."""
        return (self.data.prepare(self.data.val.first(count)),)

    def samples(self, count: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Random training images; their classes, where they have one each.

        The validation part stays out of it, so that what it says of the result is not flattered.
        """
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(self.data.train), generator=generator)[:count]
        images, targets = self.data.train.fetch(chosen)
        labels = targets if targets is not None and targets.ndim == 1 else None
        return (self.data.prepare(images),), labels
