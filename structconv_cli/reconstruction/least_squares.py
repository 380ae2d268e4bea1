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
from functools import cached_property, reduce

import numpy as np
import torch

from structconv_cli.errors import StructureError
from structconv_cli.reconstruction.activations import Moments
from structconv_cli.structure import Structure

_PATCHES_PER_SAMPLE = 3
"""Patches of one image overlap and are alike. Counting three as one lowered the error on other
images for nearly all of 32 fits (ResNet-20, 2 to 256 images), by up to a third for few images."""
_MOST_SHRINKAGE = 0.999
_LEAST_RIDGE = 1e-9
"""Relative to the mean variance: what float32 activations are certain of, and no less."""
_LEAST_VARIANCE = 1e-8
"""Share of a channel's variance below which no factor can bring it back."""


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
        self.moments, self.rescale = moments, rescale
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
        covariance, count = self.moments.covariance, self.moments.count / _PATCHES_PER_SAMPLE
        size = covariance.shape[1]
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
        squares = covariance.square().sum((1, 2))
        excess = (squares - trace.square() / size).clamp(min=1e-300)
        shrinkage = ((1 - 2 / size) * squares + trace.square()) / ((count + 1 - 2 / size) * excess)
        shrinkage = shrinkage.clamp(max=_MOST_SHRINKAGE)
        ratio = (shrinkage / (1 - shrinkage)).clamp(min=_LEAST_RIDGE)
        return (ratio * trace / size).reshape(-1, 1, 1)

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
        bases = _Bases(structure)
        gram = self._gram(bases)
        response = bases.reduce(self._response)
        coordinates = bases.reduce(self.rows)
        # A filter per row: a = (Q^T W^T) and so on, transposed.
        solved = _solve(gram, self._ridge, response + self._ridge * coordinates)
        rows = bases.expand(solved)
        variance = ((solved @ gram) * solved).sum(2)
        shared = (solved * response).sum(2)
        factor = torch.ones_like(variance)
        if self.rescale:
            alive = (variance > _LEAST_VARIANCE * self._variance) & (self._variance > 0)
            factor[alive] = (self._variance[alive] / variance[alive]).sqrt()
        rows = rows * factor.unsqueeze(2)
        missed = self._variance - 2 * factor * shared + factor.square() * variance
        shift = ((self.rows - rows) @ self.moments.mean.unsqueeze(2)).reshape(-1)
        return Fit(
            rows.reshape(self.weight.shape),
            self.bias + shift,
            float(missed.clamp(min=0).sum() / self._variance.sum()),
            residual,
        )

    def _gram(self, bases: "_Bases") -> torch.Tensor:
        """Q^T S Q, (G, R, R) for R coordinates: one side after the other, by symmetry."""
        assert self.moments is not None
        if self._last is None or self._last[0] != bases.kernel_sizes:
            half = bases.reduce_kernel(self.moments.covariance).transpose(1, 2)
            self._last = bases.kernel_sizes, bases.reduce_kernel(half)
        half = bases.reduce_channels(self._last[1]).transpose(1, 2)
        return bases.reduce_channels(half)


class _Bases:
    """Orthonormal bases: of the channels, and of all positions of the kernel together.

    The kernel goes first, for it makes the rest smaller. Either is None where nothing is reduced.
    """

    def __init__(self, structure: Structure) -> None:
        channels, *kernel = structure.basis()
        self.channels = _orthonormal(channels)
        self.inputs = len(channels)
        self.kernel_sizes = structure.reduced[1:]
        self.kernel: torch.Tensor | None = None
        if structure.reduced[1:] != structure.dense[1:]:
            bases = [_orthonormal(basis) for basis in kernel]
            filled = [
                np.eye(len(basis)) if q is None else q.numpy()
                for basis, q in zip(kernel, bases, strict=True)
            ]
            self.kernel = torch.from_numpy(reduce(np.kron, filled))

    def reduce_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        """(G, n, C * K) to (G, n, C * k)."""
        if self.kernel is None:
            return rows
        return (rows.reshape(*rows.shape[:2], self.inputs, -1) @ self.kernel).flatten(2)

    def reduce_channels(self, rows: torch.Tensor) -> torch.Tensor:
        """(G, n, C * k) to (G, n, c * k)."""
        if self.channels is None:
            return rows
        shaped = rows.reshape(*rows.shape[:2], self.inputs, -1)
        return _along_channels(shaped, self.channels).flatten(2)

    def reduce(self, rows: torch.Tensor) -> torch.Tensor:
        """Coordinates Q^T of rows (G, n, D)."""
        return self.reduce_channels(self.reduce_kernel(rows))

    def expand(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Rows (G, n, D) of coordinates."""
        count = self.inputs if self.channels is None else self.channels.shape[1]
        shaped = coordinates.reshape(*coordinates.shape[:2], count, -1)
        if self.channels is not None:
            shaped = _along_channels(shaped, self.channels.T)
        if self.kernel is not None:
            shaped = shaped @ self.kernel.T
        return shaped.flatten(2)


def _along_channels(shaped: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(G, n, C, K) times (C, c) to (G, n, c, K), as one large product."""
    last = shaped.transpose(2, 3)
    product = last.reshape(-1, last.shape[-1]) @ matrix
    return product.reshape(*last.shape[:-1], -1).transpose(2, 3)


def _orthonormal(basis: torch.Tensor) -> torch.Tensor | None:
    """Of its range; None where that is everything."""
    return None if basis.shape[0] == basis.shape[1] else torch.linalg.qr(basis).Q


def _solve(gram: torch.Tensor, ridge: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Rows x of x (gram + ridge I) = right, for symmetric gram."""
    system = gram.clone()
    system.diagonal(dim1=1, dim2=2).add_(ridge.squeeze(2))
    factor, failed = torch.linalg.cholesky_ex(system)
    if not bool(failed.any()):
        return torch.cholesky_solve(right.transpose(1, 2), factor).transpose(1, 2)
    # Rounding made it indefinite: directions without variance are left alone.
    inverse: torch.Tensor = torch.linalg.pinv(system, rtol=1e-12, hermitian=True)
    return right @ inverse
