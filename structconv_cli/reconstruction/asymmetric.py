"""The weight inside a subspace that makes of a changed input what the original made of its own.

When the layers before it have changed, a layer reads p^ where the original reads p. With a free
bias, the expected squared error of its outputs against targets y (W p, or what `sequential` adds to
it) is least over W' = (Q a)^T, Q an orthonormal basis of the subspace and z = Q^T p^, for

    (Cov(z) + r I) a = Cov(z, y) + r Q^T W^T,

r as in `least_squares`; without a bias, for the second moments in place of the covariances. This is
the asymmetric reconstruction of He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep
Neural Networks", ICCV 2017, section 3.3, with a subspace in place of a choice of channels. Only the
R coordinates z are ever correlated, not the D inputs. Layers for which R^2 numbers are still too
many are fitted by the dual (ours): with n patches projected onto the subspace, centred, as the rows
of Z, and their targets Y,

    W'^T = P W^T + Z^T (Z Z^T + n r I)^-1 (Y - Z W^T),

which is the same solution from n x n numbers and needs no basis, P alone.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch

from structconv_cli.errors import OnnxError
from structconv_cli.reconstruction.activations import Moments, Sums
from structconv_cli.reconstruction.subspace import (
    Bases,
    restoring,
    ridge,
    ridge_of,
    solve,
)
from structconv_cli.structure import Structure

MOST_NUMBERS = 2**26
"""Numbers that a layer's moments, or its patches, may hold (0.5 GiB; the solution takes as much
again)."""
_LEAST_PATCHES, _PATCHES_PER_COORDINATE = 16384, 8
_MOST_DUAL = 4096
"""Patches of the dual, whose products with each other are held."""


@dataclass(frozen=True, eq=False)
class AsymmetricFit:
    """A layer's new weight, and how far its outputs are from their targets.

    Attributes:
        weight: (C_out, *dense) float64, inside the subspace.
        shift: (C_out,) float64, to be added to the bias.
        projected, error: E||y^ - y||^2 / Var(y), summed over channels, for the nearest weight and
            for this one, each with its best bias.
    """

    weight: torch.Tensor
    shift: torch.Tensor
    projected: float
    error: float


class AsymmetricLayer(ABC):
    """Collects what a layer reads and should make, and fits it; `asymmetric_layer` makes one.

    Args:
        weight: (C_out, *dense), any float type.
        groups: number of channel groups.
        structure: the subspace; a dense one for all weights.

    Attributes:
        rows: the filters, (G, C_out/G, D) float64.
        most_patches: about how many are to be taken in.
    """

    most_patches: int

    def __init__(self, weight: torch.Tensor, groups: int, structure: Structure) -> None:
        self.weight, self.structure = weight.double(), structure
        self.rows = self.weight.reshape(groups, len(weight) // groups, -1)

    @abstractmethod
    def add(self, patches: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in patches p^ (G, n, D), and what is to be made of them (G, n, C_out/G)."""

    @abstractmethod
    def fit(self, name: str, *, bias: bool = True, rescale: bool = False) -> AsymmetricFit:
        """The best weight for all that was taken in.

        Args:
            name: the layer's, for messages.
            bias: whether the layer may have a shift.
            rescale: whether each channel gets its target's variance, as batch norm would give it.

        Raises:
            OnnxError: what the layer reads is not finite.
        """


def asymmetric_layer(weight: torch.Tensor, groups: int, structure: Structure) -> AsymmetricLayer:
    """What collects and fits a layer: its moments where they are small enough, else the dual."""
    numbers = groups * (prod(structure.reduced) + len(weight) // groups) ** 2
    return (_Primal if numbers <= MOST_NUMBERS else _Dual)(weight, groups, structure)


class _Primal(AsymmetricLayer):
    """Moments of coordinates and targets together."""

    def __init__(self, weight: torch.Tensor, groups: int, structure: Structure) -> None:
        super().__init__(weight, groups, structure)
        self.sums, self.bases = Sums(), Bases(structure)
        self.coordinates = self.bases.reduce(self.rows)
        width = self.coordinates.shape[2]
        self.most_patches = max(_LEAST_PATCHES, _PATCHES_PER_COORDINATE * width)

    def add(self, patches: torch.Tensor, targets: torch.Tensor) -> None:
        z = self.bases.reduce(patches.double())
        self.sums.add(torch.cat([z, targets], dim=2))

    def fit(self, name: str, *, bias: bool = True, rescale: bool = False) -> AsymmetricFit:
        moments = self.sums.moments(name)
        width = self.coordinates.shape[2]
        covariance = moments.covariance if bias else moments.second
        gram = covariance[:, :width, :width]
        response = covariance[:, width:, :width]
        variance = covariance[:, width:, width:].diagonal(dim1=1, dim2=2)
        held = ridge(Moments(moments.mean[:, :width], gram, moments.count))
        solved = solve(gram, held, response + held * self.coordinates)
        if rescale:
            made = ((solved @ gram) * solved).sum(2)
            solved = solved * restoring(made, variance).unsqueeze(2)

        def error(rows: torch.Tensor) -> float:
            missed = variance - 2 * (rows * response).sum(2) + ((rows @ gram) * rows).sum(2)
            total = float(variance.sum())
            return float(missed.clamp(min=0).sum()) / total if total > 0 else 0.0

        mean, wanted = moments.mean[:, :width], moments.mean[:, width:]
        shift = wanted - (solved @ mean.unsqueeze(2)).squeeze(2)
        if not bias:
            shift = torch.zeros_like(shift)
        found = self.bases.expand(solved).reshape(self.weight.shape)
        return AsymmetricFit(found, shift.reshape(-1), error(self.coordinates), error(solved))


class _Dual(AsymmetricLayer):
    """Few patches and their targets, for a layer whose moments would be too large."""

    def __init__(self, weight: torch.Tensor, groups: int, structure: Structure) -> None:
        super().__init__(weight, groups, structure)
        self.taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        numbers = groups * (prod(structure.dense) + len(weight) // groups)
        self.most_patches = min(_MOST_DUAL, max(1, MOST_NUMBERS // numbers))

    def _projected(self, rows: torch.Tensor) -> torch.Tensor:
        return self.structure.project(rows.reshape(-1, *self.structure.dense)).reshape(rows.shape)

    def add(self, patches: torch.Tensor, targets: torch.Tensor) -> None:
        self.taken.append((self._projected(patches.double()), targets.double()))

    def fit(self, name: str, *, bias: bool = True, rescale: bool = False) -> AsymmetricFit:
        z, y = (torch.cat(parts, dim=1) for parts in zip(*self.taken, strict=True))
        self.taken = []
        if not bool(z.isfinite().all() and y.isfinite().all()):
            raise OnnxError(
                f"layer {name} reads numbers that are not finite on the samples. Check the "
                "samples' scale, and the model."
            )
        count = z.shape[1]
        mean, wanted = z.mean(1, keepdim=True), y.mean(1, keepdim=True)
        second = z.square().sum((1, 2)) / count
        if bias:
            z, y = z.sub_(mean), y.sub_(wanted)
        products = (z @ z.transpose(1, 2)).div_(count)
        trace = products.diagonal(dim1=1, dim2=2).sum(1)
        size = prod(self.structure.reduced)
        held = ridge_of(trace, products.square().sum((1, 2)), second, size, count)
        nearest = self._projected(self.rows)
        missed = y - z @ nearest.transpose(1, 2)
        solved = nearest + solve(products, held, missed.transpose(1, 2) / count) @ z
        variance = y.square().mean(1)
        if rescale:
            made = (z @ solved.transpose(1, 2)).square().mean(1)
            solved = solved * restoring(made, variance).unsqueeze(2)

        def error(rows: torch.Tensor) -> float:
            total = float(variance.sum())
            far = (y - z @ rows.transpose(1, 2)).square().mean(1)
            return float(far.sum()) / total if total > 0 else 0.0

        shift = (wanted - mean @ solved.transpose(1, 2)) if bias else torch.zeros_like(wanted)
        return AsymmetricFit(
            # Rounding alone leads out of the subspace.
            self._projected(solved).reshape(self.weight.shape),
            shift.reshape(-1),
            error(nearest),
            error(solved),
        )
