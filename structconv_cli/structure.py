"""Structured kernels: the subspace of weights that sum-pooling plus a reduced convolution spans.

A structured kernel (paper, section 3) of size C x N_1 x .. x N_d with parameters (c, n_1, .., n_d)
is a combination of all placements of a block of ones of size (C-c+1) x (N_1-n_1+1) x ... Along one
axis of length L with l placements, the basis is the banded matrix A of shape (L, l) with ones at
rows m .. m+k-1 of column m, where k = L-l+1 is the window. Over several axes it is the Kronecker
product of these matrices, so everything here works axis by axis (`structured_axis`) and never
builds it.

Along the channels two more choices are part of the structure (our derivation). *Which channels are
read, in which order*: single-channel masks are a binary basis too, so a selection of channels is a
composite kernel whose pooling costs nothing, and the windows may run over the selected channels in
any order. *Balanced*: the sub-case in which all class sums are zero, S = 0, one degree of freedom
fewer per filter and offset, whose lowered form needs no sum over channels.
"""

from dataclasses import dataclass
from math import prod
from typing import Annotated

import torch
from pydantic import (
    BeforeValidator,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from structconv_cli.channel_words import channel_numbers, channel_words
from structconv_cli.errors import StructureError
from structconv_cli.structured_axis import (
    AxisMap,
    balance,
    basis_axis,
    coefficients_axis,
    expand_axis,
    kernel_matrix,
    project_axis,
)

_SMALL_KERNEL = 64
"""Positions up to which a kernel's axes are mapped by one matrix product: their loops are short."""


@dataclass(frozen=True)
class Structure:
    """The structured subspace of one layer's weight, per axis.

    Attributes:
        dense: (C / groups, N_1, .., N_d) of the dense weight; (Q,) for a linear layer of Q inputs.
        reduced: (c, n_1, .., n_d), between 1 and `dense` on every axis.
        reads: the input channels that are read, of each group, in the order in which the windows
            take them; empty for all of them in their own order. The weights of others are zero.
        balanced: whether the weights' residue-class sums along the channels are zero.

    A weight has shape (C_out, *dense); its coefficients (the reduced weight) (C_out, *reduced).

    Raises:
        StructureError: an axis is impossible.
    """

    dense: tuple[int, ...]
    reduced: tuple[int, ...]
    reads: Annotated[
        tuple[int, ...],
        BeforeValidator(channel_numbers),
        PlainSerializer(channel_words, when_used="json"),
    ] = ()
    balanced: bool = False

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields: dict[str, object] = write(self)
        return {name: value for name, value in fields.items() if value not in ("", (), [], False)}

    def __post_init__(self) -> None:
        if len(self.dense) != len(self.reduced) or not self.dense:
            raise StructureError(
                f"structure {self.reduced} has {len(self.reduced)} axes, but the weight "
                f"{self.dense} has {len(self.dense)}: give one size for every axis."
            )
        for size, small in zip(self.dense, self.reduced, strict=True):
            if not 1 <= small <= size:
                raise StructureError(
                    f"structure {self.reduced} does not fit the weight {self.dense}: every size "
                    f"must lie between 1 and the dense size; found {small} of {size}."
                )
        self._check_channels()

    def _check_channels(self) -> None:
        count, kept = self.dense[0], self.reduced[0]
        if len(set(self.reads)) < len(self.reads) or not all(0 <= i < count for i in self.reads):
            raise StructureError(
                f"structure {self.reduced} of {self.dense} reads the channels {self.reads[:8]}...: "
                f"every channel must lie between 0 and {count - 1} and be named once."
            )
        if kept > self.channels:
            raise StructureError(
                f"structure {self.reduced} of {self.dense} reads {self.channels} channels, fewer "
                f"than the {kept} that it is reduced to."
            )
        if self.balanced and (kept < 2 or kept == self.channels):
            raise StructureError(
                f"structure {self.reduced} of {self.dense} cannot be balanced: expected at least 2 "
                f"and fewer than {self.channels} channels kept; found {kept}."
            )

    @property
    def channels(self) -> int:
        """Number of input channels that are read, in each group."""
        return len(self.reads) or self.dense[0]

    @property
    def windows(self) -> tuple[int, ...]:
        """Width of the sum-pool on every axis: dense (or what is read) - reduced + 1."""
        dense = (self.channels, *self.dense[1:])
        return tuple(s - r + 1 for s, r in zip(dense, self.reduced, strict=True))

    @property
    def is_dense(self) -> bool:
        """Whether nothing is reduced."""
        return self.dense == self.reduced

    @property
    def ratio(self) -> float:
        """Multiplications (and weights) before, over those after."""
        return prod(self.dense) / prod(self.reduced)

    def project(self, weight: torch.Tensor) -> torch.Tensor:
        """Orthogonal projection of `weight` (C_out, *dense) onto the subspace; differentiable."""
        self._check(weight, self.dense)
        return self.scattered(self._projected(weight))

    def coefficients(self, weight: torch.Tensor) -> torch.Tensor:
        """Least-squares coefficients A^+ W of shape (C_out, *reduced)."""
        self._check(weight, self.dense)
        return self._each_axis(self._projected(weight), coefficients_axis, self.reduced)

    def expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The dense weight A a of shape (C_out, *dense) that these coefficients stand for."""
        self._check(coefficients, self.reduced)
        for axis, window in enumerate(self.windows, start=1):
            coefficients = expand_axis(coefficients, axis, window)
        return self.scattered(coefficients)

    def gathered(self, weight: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """Only the channels that are read, in their order, of an axis of channels."""
        if not self.reads:
            return weight
        return weight.index_select(axis, torch.tensor(self.reads, device=weight.device))

    def scattered(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of `gathered` for axis 1: every channel in its place, zeros elsewhere."""
        if not self.reads:
            return weight
        places = torch.tensor(self.reads, device=weight.device)
        shape = (len(weight), self.dense[0], *weight.shape[2:])
        return weight.new_zeros(shape).index_copy(1, places, weight)

    def _projected(self, weight: torch.Tensor) -> torch.Tensor:
        """The projection, of the channels that are read only."""
        read = self.gathered(weight)
        if self.balanced:
            read = balance(read, self.windows[0])
        sizes = (self.channels, *self.dense[1:])
        return self._each_axis(read, project_axis, sizes, channels=not self.balanced)

    def _each_axis(
        self,
        weight: torch.Tensor,
        apply: AxisMap,
        sizes: tuple[int, ...],
        *,
        channels: bool = True,
    ) -> torch.Tensor:
        """Apply a linear map to every axis; to the axes of a small kernel as one matrix."""
        kernel = self.dense[1:]
        if channels:
            weight = apply(weight, 1, self.reduced[0])
        if self.windows[1:] == (1,) * len(kernel):
            return weight
        if prod(kernel) > _SMALL_KERNEL:
            for axis, small in enumerate(self.reduced[1:], start=2):
                weight = apply(weight, axis, small)
            return weight
        matrix = kernel_matrix(apply, kernel, self.reduced[1:]).to(weight)
        return (weight.flatten(2) @ matrix).reshape(*weight.shape[:2], *sizes[1:])

    def residual(self, weight: torch.Tensor) -> float:
        """Relative distance to the subspace, ||W - P W||_F / ||W||_F, in float64; 0 for W = 0."""
        exact = weight.detach().double()
        norm = float(exact.norm())
        return float((exact - self.project(exact)).norm()) / norm if norm else 0.0

    def basis(self) -> tuple[torch.Tensor, ...]:
        """A basis (dense, m) of every axis, float64; the subspace is that of their product.

        The banded 0/1 matrix of m = reduced columns; for the channels its rows stand where the
        channels that are read are, and a balanced structure has the m = c - 1 differences
        e_j - e_p(j) instead (p as in `onnx.forms`).
        """
        count, kept = self.dense[0], self.reduced[0]
        if self.balanced:
            heads = torch.arange(kept - 1)
            matrix = torch.zeros(self.channels, kept - 1, dtype=torch.float64)
            matrix[heads, heads] = 1
            matrix[kept - 1 + (heads - kept + 1) % self.windows[0], heads] -= 1
        else:
            matrix = basis_axis(self.channels, kept)
        if self.reads:
            matrix = torch.zeros(count, matrix.shape[1], dtype=torch.float64).index_copy(
                0, torch.tensor(self.reads), matrix
            )
        kernel = zip(self.dense[1:], self.reduced[1:], strict=True)
        return (matrix, *(basis_axis(size, small) for size, small in kernel))

    def orthonormal_basis(self) -> tuple[torch.Tensor, ...]:
        """Per axis an orthonormal Q of the basis' range, (dense, m), float64."""
        return tuple(torch.linalg.qr(matrix).Q.contiguous() for matrix in self.basis())

    def _check(self, tensor: torch.Tensor, sizes: tuple[int, ...]) -> None:
        if tuple(tensor.shape[1:]) != sizes:
            raise StructureError(
                f"a weight of shape {tuple(tensor.shape)} does not fit the structure "
                f"{self.reduced} of {self.dense}: expected (C_out, "
                f"{', '.join(map(str, sizes))})."
            )
