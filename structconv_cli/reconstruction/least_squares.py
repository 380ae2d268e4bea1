"""The weight inside a structured subspace whose outputs on data are nearest to the original's.

Plain projection takes the nearest *weight*. What counts is the *output*, and inputs are far from
white: neighbouring pixels and channels are correlated. With patches p of covariance S and a free
bias, the expected squared error of a layer's outputs is tr((W' - W) S (W' - W)^T), which is least
over W' = (Q a)^T, Q an orthonormal basis of the subspace, for

    (Q^T S Q + r I) a = Q^T (S + r I) W^T.

The ridge r makes directions that the samples do not show fall back to plain projection. It is the
shrinkage of the covariance that is best for so many samples of a normal distribution: OAS, Chen,
Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance Estimation", 2010, equation 23.

Least squares shrinks outputs (as every regression does); the batch norm behind a layer, once its
statistics are taken anew, gives each channel its mean and variance back. That has a closed form
too: a factor and a shift for each filter. A factor leaves a filter inside the subspace.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from structconv_cli.errors import StructureError
from structconv_cli.reconstruction.activations import Moments
from structconv_cli.reconstruction.subspace import Bases, restoring, ridge, solve
from structconv_cli.structure import Structure


@dataclass(frozen=True, eq=False)
class Fit:
    """A weight inside a subspace, in place of a dense one.

    Attributes:
        weight: (C_out, *dense) float64.
        bias: (C_out,) float64.
        error: E||W'p + b' - Wp - b||^2 / Var(Wp), summed over channels; the squared residual where
            there is no data, or no variance in it.
        residual: of plain projection, ||W - P W|| / ||W||.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    error: float
    residual: float


def fit(
    weight: torch.Tensor,
    bias: torch.Tensor,
    structure: Structure,
    moments: Moments | None,
    *,
    rescale: bool = True,
) -> Fit:
    """Fit one structure; see `DenseLayer` for several structures of one layer."""
    return DenseLayer(weight, bias, moments, rescale=rescale).fit(structure)


class DenseLayer:
    """A dense layer on data, to be fitted by structures: fastest by equal reduced kernels.

    Args:
        weight: (C_out, *dense), any float type.
        bias: (C_out,).
        moments: of its patches; None to project plainly.
        rescale: whether to give each channel its variance back, as batch norm would. The bias
            always takes the means' difference.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        moments: Moments | None,
        *,
        rescale: bool = True,
    ) -> None:
        self.weight, self.bias = weight.double(), bias.double()
        self.moments = None if moments is None else moments.double()
        self.rescale = rescale
        self.groups = len(moments.mean) if moments else 1
        # The covariance in the last kernel basis: structures often share one.
        self._last: tuple[tuple[int, ...], torch.Tensor] | None = None

    @cached_property
    def rows(self) -> torch.Tensor:
        """The filters, (G, C_out/G, D)."""
        return self.weight.reshape(self.groups, len(self.weight) // self.groups, -1)

    @cached_property
    def _response(self) -> torch.Tensor:
        """W S, (G, C_out/G, D)."""
        assert self.moments is not None
        return self.rows @ self.moments.covariance

    @cached_property
    def _variance(self) -> torch.Tensor:
        """Of the outputs, (G, C_out/G)."""
        return (self._response * self.rows).sum(2)

    @cached_property
    def _ridge(self) -> torch.Tensor:
        """Of each group, (G, 1, 1)."""
        assert self.moments is not None
        return ridge(self.moments)

    def fit(self, structure: Structure) -> Fit:
        """The best weight and bias inside a structure's subspace.

        Raises:
            StructureError: the structure is not of the weight's shape.
        """
        if tuple(self.weight.shape[1:]) != structure.dense:
            raise StructureError(
                f"a weight of shape {tuple(self.weight.shape)} does not fit a structure of "
                f"{structure.dense}: expected (C_out, {', '.join(map(str, structure.dense))})."
            )
        if structure.is_dense:
            return Fit(self.weight, self.bias, 0.0, 0.0)
        projected = structure.project(self.weight)
        norm = float(self.weight.norm())
        residual = float((self.weight - projected).norm()) / norm if norm else 0.0
        if self.moments is None or not float(self._variance.sum()) > 0:
            return Fit(projected, self.bias, residual**2, residual)
        bases = Bases(structure)
        gram = self._gram(bases)
        response = bases.reduce(self._response)
        coordinates = bases.reduce(self.rows)
        # A filter per row: a = (Q^T W^T) and so on, transposed.
        solved = solve(gram, self._ridge, response + self._ridge * coordinates)
        rows = bases.expand(solved)
        variance = ((solved @ gram) * solved).sum(2)
        shared = (solved * response).sum(2)
        factor = torch.ones_like(variance)
        if self.rescale:
            factor = restoring(variance, self._variance)
        rows = rows * factor.unsqueeze(2)
        missed = self._variance - 2 * factor * shared + factor.square() * variance
        shift = ((self.rows - rows) @ self.moments.mean.unsqueeze(2)).reshape(-1)
        return Fit(
            rows.reshape(self.weight.shape),
            self.bias + shift,
            float(missed.clamp(min=0).sum() / self._variance.sum()),
            residual,
        )

    def _gram(self, bases: Bases) -> torch.Tensor:
        """Q^T S Q, (G, R, R) for R coordinates: one side after the other, by symmetry."""
        assert self.moments is not None
        if self._last is None or self._last[0] != bases.kernel_sizes:
            half = bases.reduce_kernel(self.moments.covariance).transpose(1, 2)
            self._last = bases.kernel_sizes, bases.reduce_kernel(half)
        half = bases.reduce_channels(self._last[1]).transpose(1, 2)
        return bases.reduce_channels(half)
