"""Random changes to training images, which leave their class as it is."""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

AUGMENTATIONS = frozenset({"crop", "flip"})


def augment_batch(images: Tensor, kinds: Collection[str], generator: torch.Generator) -> Tensor:
    """Return images (B, C, H, W), each changed at random; the shape and the dtype stay.

    "crop" shifts by up to an eighth of the height and of the width and fills with zeros; "flip"
    mirrors left and right every other time.

    Raises:
        ValueError: a kind is none of these.
    """
    if unknown := set(kinds) - AUGMENTATIONS:
        raise ValueError(f"unknown augmentations {sorted(unknown)}")
    count, _, height, width = images.shape
    if "crop" in kinds:
        dy, dx = height // 8, width // 8
        padded = F.pad(images, (dx, dx, dy, dy))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        rows = torch.randint(2 * dy + 1, (count,), generator=generator)
        columns = torch.randint(2 * dx + 1, (count,), generator=generator)
        images = windows[torch.arange(count), :, rows, columns]
    if "flip" in kinds:
        flipped = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    return images
