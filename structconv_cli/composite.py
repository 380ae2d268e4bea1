"""Composite kernels: weights spanned by any linearly independent binary basis (paper, section 2).

W = sum_m a_m b_m with binary b_m, so X * W = sum_m a_m (X * b_m): one multiplication per basis
element, the rest is adding. `Structure` is the special case with shifted blocks; this module serves
the others, of which disjoint channel masks matter most: a mask of several channels sums them
before they are multiplied, and single-channel masks select channels, with no adding at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from structconv_cli.errors import StructureError


@dataclass(frozen=True, eq=False)
class CompositeBasis:
    """A binary basis over the first axes of a kernel; the axes behind them are left free.

    Attributes:
        elements: 0/1 tensor of shape (M, s_1, .., s_r). A weight has shape (C_out, s_1, .., s_r,
            *free), its coefficients (C_out, M, *free): with elements of shape (M, C), every kernel
            position has coefficients of its own.

    Raises:
        StructureError: the elements are not binary, or not linearly independent.
    """

    elements: torch.Tensor

    def __post_init__(self) -> None:
        elements = self.elements
        if elements.ndim < 2 or elements.shape[0] == 0:
            raise StructureError(
                f"a composite basis needs a tensor of shape (M, sizes...) with M >= 1; found "
                f"{tuple(elements.shape)}."
            )
        if not bool(((elements == 0) | (elements == 1)).all()):
            raise StructureError("a composite basis must hold zeros and ones only.")
        rank = (
            int(torch.count_nonzero(self._flat.sum(1)))
            if self.is_disjoint
            else int(torch.linalg.matrix_rank(self._flat))
        )
        if rank < elements.shape[0]:
            raise StructureError(
                f"the {elements.shape[0]} elements of a composite basis must be linearly "
                f"independent; their rank is {rank}. Remove those that the others span."
            )

    @property
    def is_disjoint(self) -> bool:
        """Whether no position belongs to two elements: projection is then a mean per element."""
        return bool((self._flat.sum(0) <= 1).all())

    def coefficients(self, weight: torch.Tensor) -> torch.Tensor:
        """Least-squares coefficients (C_out, M, *free) of `weight`, in float64."""
        flat = self._flatten(weight).double()
        if self.is_disjoint:
            solved = self._flat @ flat / self._flat.sum(1, keepdim=True)
        else:
            q, r = torch.linalg.qr(self._flat.T)
            solved = torch.linalg.solve_triangular(r, q.T @ flat, upper=True)
        outputs, *free = weight.shape[0], *weight.shape[self.elements.ndim :]
        return solved.reshape(outputs, self.elements.shape[0], *free)

    def reconstruct(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The weight (C_out, s_1, .., s_r, *free) that these coefficients stand for, in float64."""
        outputs, _, *free = coefficients.shape
        flat = self._flat.T @ coefficients.double().reshape(*coefficients.shape[:2], -1)
        return flat.reshape(outputs, *self.elements.shape[1:], *free)

    def project(self, weight: torch.Tensor) -> torch.Tensor:
        """Orthogonal projection of `weight` onto the basis' span, in the weight's dtype."""
        return self.reconstruct(self.coefficients(weight)).reshape(weight.shape).to(weight.dtype)

    @property
    def _flat(self) -> torch.Tensor:
        return self.elements.flatten(1).double()

    def _flatten(self, weight: torch.Tensor) -> torch.Tensor:
        sizes = tuple(self.elements.shape[1:])
        if tuple(weight.shape[1 : 1 + len(sizes)]) != sizes:
            raise StructureError(
                f"a weight of shape {tuple(weight.shape)} does not fit a basis over {sizes}: "
                f"expected (C_out, {', '.join(map(str, sizes))}, ...)."
            )
        return weight.reshape(weight.shape[0], prod(sizes), -1)


def channel_masks(groups: Sequence[Sequence[int]], channels: int) -> CompositeBasis:
    """The basis of disjoint channel masks: one element for every group of channel indices.

    Channels in no group get zero weight; groups of one channel each are channel selection.

    Raises:
        StructureError: an index is out of range, a group is empty, or two groups share a channel.
    """
    elements = torch.zeros(len(groups), channels)
    for mask, group in zip(elements, groups, strict=True):
        for channel in group:
            if not 0 <= channel < channels:
                raise StructureError(f"channel {channel} is not one of 0..{channels - 1}.")
            mask[channel] = 1
    if bool((elements.sum(0) > 1).any()):
        shared = int(torch.nonzero(elements.sum(0) > 1)[0])
        raise StructureError(f"channel {shared} is in more than one mask; masks must be disjoint.")
    return CompositeBasis(elements)
