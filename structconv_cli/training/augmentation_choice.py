"""Which random changes of training images go with the data, where the user does not say (ours).

Random crops go with nearly all images. Mirroring helps more (`benchmarks`), but makes other classes
of digits and letters. The original tells: it has learned the classes, and where it is as right on
mirror images as on the images themselves, mirroring changes no class.
"""

import torch
from torch import nn

from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.tasks.images import ImageTask
from structconv_cli.tasks.outputs import class_scores

AUTO = ("auto",)
"""Stands for the choice."""

_IMAGES = 512
_TOLERATED = 2.0
"""Points of accuracy: about twice the standard error of the difference on so many images."""
_LEAST = 50.0
"""Per cent: of a model that is wrong more often than right, the difference says little."""


def choose_augmentation(task: ImageTask, model: nn.Module) -> tuple[tuple[str, ...], str]:
    """Crops, and mirroring where that changes no class; a sentence for the user if so.

    Args:
        task: of labelled images.
        model: the original.
    """
    plain, mirrored = accuracies(task, model)
    if plain < _LEAST or plain - mirrored > _TOLERATED:
        return ("crop",), ""
    return ("crop", "flip"), (
        "Training images are cropped and mirrored at random (--augment crop,flip): the original is "
        f"right on {mirrored:.1f} % of mirror images, on {plain:.1f} % of the images themselves."
    )


@torch.no_grad()
def accuracies(task: ImageTask, model: nn.Module) -> tuple[float, float]:
    """How often, in per cent, a model is right on some training images, and on their mirror images.

    Of masks, pixels are counted; of scores with another resolution, the nearest.
    """
    generator = torch.Generator().manual_seed(task.seed)
    chosen = torch.randperm(len(task.data.train), generator=generator)[:_IMAGES]
    right, counted = [0, 0], 0
    with eval_mode(model):
        for indices in torch.split(chosen, task.at_once):
            stored, targets = task.data.train.fetch(indices)
            assert targets is not None
            images, is_mask = task.data.prepare(stored), targets.ndim == 3
            known = targets != task.data.ignore_label if is_mask else torch.ones_like(targets) > 0
            counted += int(known.sum())
            for index, flipped in enumerate((images, images.flip(3))):
                found = class_scores(model(flipped)).argmax(1)
                if is_mask:
                    size = tuple(targets.shape[1:])
                    found = nn.functional.interpolate(found[:, None].float(), size)[:, 0].long()
                    found = found.flip(2) if index else found
                right[index] += int(((found == targets) & known).sum())
    return 100 * right[0] / max(1, counted), 100 * right[1] / max(1, counted)
