"""One axis of a structured kernel: the banded basis, projection onto its range, coefficients.

Along one axis, a vector lies in the range of A exactly when its sums over the k residue classes of
the index modulo k are equal (our derivation: every window of k neighbours meets each class once, so
the k-1 differences of class indicators are orthogonal to the range, and span its complement). With
m_r members and sum S_r in class r, the nearest such vector shifts every member of class r by
(S - S_r) / m_r, where S = sum_r (S_r / m_r) / sum_r (1 / m_r). So projection takes O(L) operations
and no factorisation.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn.functional import pad

from structconv_cli.sum_pool import box_sum

AxisMap = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Maps one axis of a weight, given the axis and its reduced size."""


def basis_axis(length: int, reduced: int) -> torch.Tensor:
    """The (length, reduced) matrix whose column m has ones at rows m .. m + length - reduced."""
    rows = torch.arange(length).unsqueeze(1)
    columns = torch.arange(reduced).unsqueeze(0)
    return ((rows >= columns) & (rows <= columns + length - reduced)).double()


def project_axis(weight: torch.Tensor, axis: int, reduced: int) -> torch.Tensor:
    """Project along one axis by making its residue-class sums equal (see the module's text)."""
    length = weight.shape[axis]
    window = length - reduced + 1
    if window == 1:
        return weight
    classes = _residue_classes(weight, axis, window)
    rows = classes.shape[axis]
    members = torch.full((window,), float(rows), dtype=weight.dtype, device=weight.device)
    members[length - (rows - 1) * window :] -= 1
    members = members.reshape(-1, *[1] * (weight.ndim - 1 - axis))
    sums = classes.sum(axis)
    common = (sums / members).sum(axis, keepdim=True) / (1 / members).sum()
    shifted = classes + ((common - sums) / members).unsqueeze(axis)
    return shifted.flatten(axis, axis + 1).narrow(axis, 0, length)


def balance(weight: torch.Tensor, window: int) -> torch.Tensor:
    """The nearest weight (C_out, C, ...) whose residue-class sums along axis 1 are all zero."""
    classes = torch.arange(weight.shape[1], device=weight.device) % window
    sums = weight.new_zeros(len(weight), window, *weight.shape[2:]).index_add(1, classes, weight)
    members = torch.bincount(classes, minlength=window).to(weight.dtype)
    means = sums / members.reshape(1, -1, *([1] * (weight.ndim - 2)))
    return weight - means[:, classes]


def coefficients_axis(weight: torch.Tensor, axis: int, reduced: int) -> torch.Tensor:
    """Solve A a = w for a weight inside the range: a_j = w_j - w_{j-1} + a_{j-window}."""
    window = weight.shape[axis] - reduced + 1
    if window == 1:
        return weight
    head = weight.narrow(axis, 0, reduced)
    steps = torch.diff(head, dim=axis, prepend=torch.zeros_like(head.narrow(axis, 0, 1)))
    solved = _residue_classes(steps, axis, window).cumsum(axis)
    return solved.flatten(axis, axis + 1).narrow(axis, 0, reduced)


def expand_axis(coefficients: torch.Tensor, axis: int, window: int) -> torch.Tensor:
    """The combination A a of the basis' columns."""
    if window == 1:
        return coefficients
    padded = _padded(coefficients, axis, window - 1, window - 1)
    return box_sum(padded, axis, window)


def _residue_classes(x: torch.Tensor, axis: int, window: int) -> torch.Tensor:
    """Reshape an axis to (rows, window), zero-filled, so that column r is class r."""
    rows = -(-x.shape[axis] // window)
    filled = _padded(x, axis, 0, rows * window - x.shape[axis])
    return filled.reshape(*x.shape[:axis], rows, window, *x.shape[axis + 1 :])


def _padded(x: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    """Zeros added to both ends of an axis."""
    return pad(x, (0, 0) * (x.ndim - 1 - axis) + (before, after)) if before or after else x


@lru_cache(maxsize=256)
def kernel_matrix(
    apply: AxisMap, kernel: tuple[int, ...], reduced: tuple[int, ...]
) -> torch.Tensor:
    """What a map does to all axes of a kernel, as a matrix to multiply with from the right."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for size, small in zip(kernel, reduced, strict=True):
        matrix = torch.kron(matrix, apply(torch.eye(size, dtype=torch.float64), 1, small))
    return matrix
