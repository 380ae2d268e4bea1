"""Which candidates of a layer are measured when time is short, and what the others are given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

Floats = npt.NDArray[np.float64]

_LEAST_IMAGES = 16


def interpolate(errors: Floats, known: Floats, values: Floats) -> Floats:
    """Values at `errors`, monotone, through the origin and the known points (`known`, `values`).

    Known values that fall with the error are averaged until they do not (isotonic regression);
    beyond the last point, values grow in proportion to the error. Without a point above error 0
    nothing is known: infinity, but 0 at error 0.
    """
    usable = np.isfinite(values) & (known > 0)
    if not usable.any():
        return np.where(errors > 0, np.inf, 0.0)
    at, index = np.unique(known[usable], return_inverse=True)
    weights = np.bincount(index)
    means = np.bincount(index, np.maximum(values[usable], 0)) / weights
    rising = isotonic_regression(means, weights=weights).x
    inside = np.interp(errors, [0.0, *at], [0.0, *rising])
    found: Floats = np.where(errors > at[-1], rising[-1] * (errors / at[-1]), inside)
    return found


@dataclass(frozen=True)
class Allotment:
    """How many candidates of each layer are measured at most, on how many images."""

    candidates: int
    images: int


def allot(
    counts: Sequence[int], seconds: float, image_seconds: float, load_seconds: float, images: int
) -> Allotment:
    """Spend a time on measuring: first one candidate of each layer, then images, then candidates.

    Args:
        counts: candidates of each layer.
        seconds: to spend.
        image_seconds: that one image takes to run.
        load_seconds: that loading the model for a layer takes.
        images: most that may be run for a candidate.
    """
    left = seconds - load_seconds * len(counts)
    # The original model is run on the images once, too.
    runs = left / (image_seconds * images) - 1
    most = max(counts, default=0)
    fitting = [k for k in range(1, most + 1) if sum(min(k, n) for n in counts) <= runs]
    if fitting:
        return Allotment(fitting[-1], images)
    affordable = int(left / (image_seconds * (len(counts) + 1)))
    return Allotment(1, min(images, max(_LEAST_IMAGES, affordable)))


def spread(count: int, most: int) -> list[int]:
    """Positions to measure among `count` in the order of their residual.

    One: the middle. More: evenly up to the last; the origin is known as it is.
    """
    if most >= count:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return sorted({-(-count * (i + 1) // most) - 1 for i in range(most)})
