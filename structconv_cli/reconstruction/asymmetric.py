"""The weight inside a subspace that makes of a changed input what the original made of its own.

When the layers before it have changed, a layer reads p^ where the original reads p. With a free
bias, the expected squared error of its outputs against targets y (W p, or what `sequential` adds to
it) is least over W' = (Q a)^T, Q an orthonormal basis of the subspace and z = Q^T p^, for

    (Cov(z) + r I) a = Cov(z, y) + r Q^T W^T,

r as in `least_squares`; without a bias, for the second moments in place of the covariances. This is
the asymmetric reconstruction of He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep
Neural Networks", ICCV 2017, section 3.3, with a subspace in place of a choice of channels. Only the
R coordinates z are ever correlated, not the D inputs, so wide layers cost what is left of them.
"""

from dataclasses import dataclass

import torch

from structconv_cli.reconstruction.activations import Moments, Sums
from structconv_cli.reconstruction.subspace import Bases, restoring, ridge, solve
from structconv_cli.structure import Structure


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


class AsymmetricLayer:
    """Collects what a layer reads and should make, and fits it.

    Args:
        weight: (C_out, *dense), any float type.
        groups: number of channel groups.
        structure: the subspace; a dense one for all weights.
    """

    def __init__(self, weight: torch.Tensor, groups: int, structure: Structure) -> None:
        self.weight, self.structure = weight.double(), structure
        self.rows = self.weight.reshape(groups, len(weight) // groups, -1)
        self.bases = Bases(structure)
        self.coordinates = self.bases.reduce(self.rows)
        self.sums = Sums()

    @property
    def numbers(self) -> int:
        """Numbers that the moments hold."""
        groups, outputs, width = self.coordinates.shape
        return int(groups * (outputs + width) ** 2)

    def add(self, patches: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in patches p^ (G, n, D), and what is to be made of them (G, n, C_out/G)."""
        z = self.bases.reduce(patches.double())
        self.sums.add(torch.cat([z, targets], dim=2))

    def fit(self, name: str, *, bias: bool = True, rescale: bool = False) -> AsymmetricFit:
        """The best weight for all that was taken in.

        Args:
            name: the layer's, for messages.
            bias: whether the layer may have a shift.
            rescale: whether each channel gets its target's variance, as batch norm would give it.

        Raises:
            OnnxError: what the layer reads is not finite.
        """
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
        return AsymmetricFit(
            self.bases.expand(solved).reshape(self.weight.shape),
            shift.reshape(-1),
            error(self.coordinates),
            error(solved),
        )
