"""Counting which classes pixels are taken for."""

import torch
from torch.nn import functional


def at_size(scores: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Scores (B, K, h, w) at another resolution (H, W), bilinearly, corners not aligned."""
    if tuple(scores.shape[2:]) == size:
        return scores
    return functional.interpolate(scores, size, mode="bilinear", align_corners=False)


def confusion(
    predicted: torch.Tensor, masks: torch.Tensor, classes: int, ignore_label: int
) -> torch.Tensor:
    """How many pixels of class i are taken for class j: int64 (K, K).

    Args:
        predicted: class numbers (B, H, W).
        masks: the true ones, likewise.
        classes: K.
        ignore_label: of pixels that are not counted.
    """
    counted = masks != ignore_label
    pairs = masks[counted] * classes + predicted[counted]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(counts: torch.Tensor) -> float:
    """mIoU in percent: the mean of |A and B| / |A or B| over classes in masks or predictions.

    A class that neither has does not count; NaN if there is none.
    """
    counts = counts.double()
    both = counts.diagonal()
    either = counts.sum(0) + counts.sum(1) - both
    there = either > 0
    return float(100 * (both[there] / either[there]).mean())


def pixel_accuracy(counts: torch.Tensor) -> float:
    """Share of pixels taken for their class, in percent; NaN if there are none."""
    return float(100 * counts.diagonal().sum() / counts.sum())
