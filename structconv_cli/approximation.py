"""What structure cost: the structured model against the original, on data.

This is approximation, not rewriting: it is measured, never verified (see `exactness`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from structconv_cli.errors import StructconvError

Model = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Approximation:
    """Structured against original on one split.

    Attributes:
        images: how many were compared.
        original_accuracy, structured_accuracy: top-1, in percent.
        agreement: share of images on which both predict the same class, in percent.
        output_difference: mean over images of ||structured - original|| / ||original||, outputs.
    """

    images: int
    original_accuracy: float
    structured_accuracy: float
    agreement: float
    output_difference: float


def compare_models(
    original: Model,
    structured: Model,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Approximation:
    """Run both models over batches of prepared images (B, C, H, W) and labels (B,).

    Raises:
        StructconvError: the models put out different shapes, or do not run on these images.
    """
    images = right_original = right_structured = agree = 0
    difference = 0.0
    for inputs, labels in batches:
        before, after = original(inputs.numpy()), structured(inputs.numpy())
        if before.shape != after.shape:
            raise StructconvError(
                f"the original puts out {before.shape} for a batch, the structured model "
                f"{after.shape}: they are not the same task."
            )
        first, second = before.argmax(1), after.argmax(1)
        truth = labels.numpy()
        right_original += int((first == truth).sum())
        right_structured += int((second == truth).sum())
        agree += int((first == second).sum())
        norms = np.maximum(np.linalg.norm(before, axis=1), np.finfo(np.float32).tiny)
        difference += float((np.linalg.norm(after - before, axis=1) / norms).sum())
        images += len(truth)
    return Approximation(
        images=images,
        original_accuracy=100 * right_original / images,
        structured_accuracy=100 * right_structured / images,
        agreement=100 * agree / images,
        output_difference=difference / images,
    )
