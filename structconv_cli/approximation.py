"""What structure cost: the structured model against the original, on data.

This is approximation, not rewriting: it is measured, never verified (see `exactness`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from structconv_cli.errors import DataError, StructconvError
from structconv_cli.tasks.confusion import at_size, confusion, mean_iou
from structconv_cli.tasks.task import Metric

Array = npt.NDArray[np.float32]
Model = Callable[[Array], Array]
"""Images (B, C, H, W) to scores (B, K) or (B, K, H, W)."""


@dataclass(frozen=True)
class Approximation:
    """Structured against original on one split.

    Attributes:
        examples: how many were compared.
        output_difference: mean over examples of ||structured - original|| / ||original||, outputs.
        metric: what the scores are; None where only outputs were compared.
        original, structured: their scores.
        agreement: share of images, or of pixels, for which both predict the same class, in percent.
        note: what was compared, where it is not scores on the validation part.
    """

    examples: int
    output_difference: float
    metric: Metric | None = None
    original: float | None = None
    structured: float | None = None
    agreement: float | None = None
    note: str = ""


def compare_models(
    original: Model,
    structured: Model,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    ignore_label: int = 255,
) -> Approximation:
    """Run both models over batches of prepared images (B, C, H, W), and labels or masks.

    Labels (B,) make it top-1 accuracy, masks (B, H, W) mIoU. Without them, or where the outputs are
    no scores for them, only outputs are compared, and the classes they predict if they are (B, K).

    Args:
        original, structured: give scores (B, K), or (B, K, h, w) for masks; others are outputs.
        batches: images, and class numbers or None.
        ignore_label: of mask pixels that are not judged.

    Raises:
        StructconvError: the models put out different shapes, or do not run on these images.
    """
    tally = _Tally(ignore_label)
    for inputs, targets in batches:
        before, after = original(inputs.numpy()), structured(inputs.numpy())
        if before.shape != after.shape:
            raise StructconvError(
                f"the original puts out {before.shape} for a batch, the structured model "
                f"{after.shape}: they are not the same task."
            )
        tally.add(before, after, targets)
    return tally.result()


def compare_outputs(
    original: Mapping[str, Array], structured: Mapping[str, Array], note: str
) -> Approximation:
    """Compare the floating-point outputs (B, ...) of two models for the same inputs, by name."""
    pairs = [
        (before, structured[name]) for name, before in original.items() if before.dtype.kind == "f"
    ]
    if not pairs:
        raise StructconvError("the model has no floating-point output to compare.")
    return Approximation(
        examples=len(pairs[0][0]),
        output_difference=float(np.mean([_differences(*pair).mean() for pair in pairs])),
        note=note,
    )


@dataclass
class _Tally:
    """Sums over batches; of labels, (right by the original, by the structured model)."""

    ignore_label: int
    examples: int = 0
    judged: int = 0
    agree: int = 0
    difference: float = 0.0
    masks: bool = False
    labels: bool = False
    right: list[int] = field(default_factory=lambda: [0, 0])
    counts: list[torch.Tensor] = field(default_factory=list)

    def add(self, before: Array, after: Array, targets: torch.Tensor | None) -> None:
        self.examples += len(before)
        self.difference += float(_differences(before, after).sum())
        if targets is not None and before.ndim == targets.ndim + 1 == 4:
            self.masks = True
            self._add_masks([before, after], targets)
        elif before.ndim == 2 and before.shape[1] > 1:
            first, second = before.argmax(1), after.argmax(1)
            self.agree += int((first == second).sum())
            self.judged += len(first)
            if targets is not None and targets.ndim == 1:
                self.labels = True
                truth = targets.numpy()
                self.right[0] += int((first == truth).sum())
                self.right[1] += int((second == truth).sum())

    def _add_masks(self, outputs: Sequence[Array], masks: torch.Tensor) -> None:
        classes = outputs[0].shape[1]
        size = tuple(masks.shape[1:])
        found = [at_size(torch.from_numpy(scores), size).argmax(1) for scores in outputs]
        judged = masks != self.ignore_label
        if judged.any() and int(masks[judged].max()) >= classes:
            raise DataError(
                f"a mask has the class {int(masks[judged].max())}, but the model {classes} classes."
            )
        counts = [confusion(one, masks, classes, self.ignore_label) for one in found]
        self.counts = (
            [a + b for a, b in zip(self.counts, counts, strict=True)] if self.counts else counts
        )
        self.agree += int(((found[0] == found[1]) & judged).sum())
        self.judged += int(judged.sum())

    def result(self) -> Approximation:
        metric: Metric | None = None
        scores: list[float | None] = [None, None]
        if self.masks:
            metric, scores = Metric("mIoU", "%"), [mean_iou(counts) for counts in self.counts]
        elif self.labels:
            metric = Metric("top-1 accuracy", "%")
            scores = [100 * right / self.judged for right in self.right]
        return Approximation(
            examples=self.examples,
            output_difference=self.difference / self.examples,
            metric=metric,
            original=scores[0],
            structured=scores[1],
            agreement=100 * self.agree / self.judged if self.judged else None,
        )


def _differences(before: Array, after: Array) -> Array:
    """||after - before|| / ||before|| of each example."""
    flat = before.reshape(len(before), -1)
    norms = np.maximum(np.linalg.norm(flat, axis=1), np.finfo(np.float32).tiny)
    apart: Array = np.linalg.norm(after.reshape(flat.shape) - flat, axis=1) / norms
    return apart
