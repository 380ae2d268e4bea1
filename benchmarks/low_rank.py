"""Low-rank variants: Tucker-2 or spatial SVD of k x k convolutions, SVD of 1x1 and linear layers.

- Tucker-2: a k x k convolution becomes a 1x1 convolution to fewer channels, a k x k one between
  fewer, and a 1x1 one back (Kim et al., ICLR 2016). The factors are TensorLy's
  (`pip install tensorly`), by higher-order orthogonal iteration.
- Spatial SVD: it becomes a k x 1 convolution to fewer channels and a 1 x k one back (Jaderberg et
  al., BMVC 2014).
- A 1x1 convolution or a linear layer becomes two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import nn

tensorly.set_backend("pytorch")


@dataclass(frozen=True)
class LowRank:
    """What is decomposed, and how ranks are chosen.

    Attributes:
        method: Of k x k convolutions: "tucker" or "spatial".
        by: "energy": each mode of each weight loses this share of its squared norm, at most;
            "share": each mode loses this share of its rank.
        round_to: Ranks are multiples of this, the next higher one.
        narrowest: Layers with fewer input or output channels stay as they are: the time that each
            convolution takes beside its arithmetic outweighs what factors of theirs save.
        ratio: The share.
    """

    method: str
    by: str
    round_to: int = 8
    narrowest: int = 0
    ratio: float = 0.0

    @property
    def way(self) -> str:
        """All but the ratio, in words."""
        return f"{self.method}-{self.by}-{self.round_to}-from-{self.narrowest}"

    def rank(self, matrix: torch.Tensor) -> int:
        """Rank for a matrix (rows, columns): at most its rows."""
        rows = len(matrix)
        wanted = (1 - self.ratio) * rows
        if self.by == "energy":
            energies = torch.linalg.svdvals(matrix.double()).square()
            lost = 1 - energies.cumsum(0) / energies.sum().clamp_min(1e-30)
            wanted = 1 + int((lost > self.ratio).sum())
        return min(rows, self.round_to * math.ceil(wanted / self.round_to))


WAYS = tuple(
    LowRank(method, by, narrowest=narrowest)
    for method, by, narrowest in product(("tucker", "spatial"), ("energy", "share"), (0, 32))
)


@torch.no_grad()
def low_ranked(model: nn.Module, way: LowRank) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """Decompose a model's layers, in place.

    Layers whose factors would multiply no less stay as they are; so do grouped convolutions, frozen
    layers and those of other kinds.

    Returns:
        The same model, and the ranks by layer: (input, output) of Tucker-2, else one.
    """
    made: dict[nn.Module, tuple[nn.Module, tuple[int, ...]] | None] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) not in (nn.Conv2d, nn.Linear) or not module.weight.requires_grad:
            continue
        if module not in made:
            made[module] = _decomposed(module, way)
        found = made[module]
        if found is not None:
            model.set_submodule(name, found[0])
            ranks[name] = found[1]
    return model, ranks


def ranks_text(ranks: Mapping[str, tuple[int, ...]]) -> str:
    """Ranks in words, for a log."""
    return ", ".join(f"{name} {'/'.join(map(str, rank))}" for name, rank in ranks.items())


def _decomposed(module: nn.Module, way: LowRank) -> tuple[nn.Module, tuple[int, ...]] | None:
    if isinstance(module, nn.Linear):
        return _two_linear(module, way)
    assert isinstance(module, nn.Conv2d)
    if module.groups > 1 or min(module.weight.shape[:2]) < way.narrowest:
        return None
    if module.kernel_size == (1, 1):
        return _two_pointwise(module, way)
    return _spatial(module, way) if way.method == "spatial" else _tucker(module, way)


def _two_linear(linear: nn.Linear, way: LowRank) -> tuple[nn.Module, tuple[int, ...]] | None:
    factors = _svd(linear.weight, way)
    if factors is None:
        return None
    first, second = factors
    rank = len(first)
    into = nn.Linear(linear.in_features, rank, bias=False)
    out = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)
    into.weight.copy_(first)
    out.weight.copy_(second)
    if linear.bias is not None:
        out.bias.copy_(linear.bias)
    return nn.Sequential(into, out), (rank,)


def _two_pointwise(conv: nn.Conv2d, way: LowRank) -> tuple[nn.Module, tuple[int, ...]] | None:
    factors = _svd(conv.weight.flatten(1), way)
    if factors is None or any(conv.padding):
        return None
    first, second = factors
    # The stride comes first: the second then has fewer pixels.
    into = _pointwise(first, stride=conv.stride)
    return nn.Sequential(into, _pointwise(second, conv.bias)), (len(first),)


def _svd(matrix: torch.Tensor, way: LowRank) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Factors (rank, columns) and (rows, rank); None if they hold no fewer numbers."""
    rows, columns = matrix.shape
    rank = way.rank(matrix if rows <= columns else matrix.T)
    if rank * (rows + columns) >= rows * columns:
        return None
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def _tucker(conv: nn.Conv2d, way: LowRank) -> tuple[nn.Module, tuple[int, ...]] | None:
    weight = conv.weight
    outputs, inputs = weight.shape[:2]
    kernel = math.prod(conv.kernel_size)
    out_rank = way.rank(weight.flatten(1))
    in_rank = way.rank(weight.transpose(0, 1).flatten(1))
    full_in, full_out = in_rank == inputs, out_rank == outputs
    cost = kernel * in_rank * out_rank
    cost += (0 if full_in else inputs * in_rank) + (0 if full_out else outputs * out_rank)
    # With a stride the first factor runs on more pixels than the others.
    pixels = math.prod(conv.stride)
    cost += 0 if full_in else (pixels - 1) * inputs * in_rank
    if cost >= kernel * inputs * outputs:
        return None
    (core, (out_factor, in_factor)), _ = partial_tucker(
        weight.detach(), rank=[out_rank, in_rank], modes=[0, 1], init="svd"
    )
    if full_in:
        core = torch.einsum("oikl,ci->ockl", core, in_factor)
    if full_out:
        core = torch.einsum("oikl,co->cikl", core, out_factor)
    middle = nn.Conv2d(
        in_rank,
        out_rank,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=full_out and conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    middle.weight.copy_(core)
    if middle.bias is not None:
        assert conv.bias is not None
        middle.bias.copy_(conv.bias)
    layers = [] if full_in else [_pointwise(in_factor.T)]
    layers.append(middle)
    if not full_out:
        layers.append(_pointwise(out_factor, conv.bias))
    return nn.Sequential(*layers), (in_rank, out_rank)


def _spatial(conv: nn.Conv2d, way: LowRank) -> tuple[nn.Module, tuple[int, ...]] | None:
    outputs, inputs, height, width = conv.weight.shape
    # Rows: input channel and row of the kernel; columns: output channel and column of the kernel.
    matrix = conv.weight.permute(1, 2, 0, 3).reshape(inputs * height, outputs * width)
    rank = way.rank(matrix if len(matrix) <= matrix.shape[1] else matrix.T)
    # With a stride down the columns, the first factor still runs on every column of pixels.
    columns = conv.stride[1]
    cost = rank * (columns * inputs * height + outputs * width)
    if cost >= inputs * outputs * height * width or isinstance(conv.padding, str):
        return None
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    first = _along(conv, 0, inputs, rank, bias=False)
    first.weight.copy_((left[:, :rank] * roots).T.reshape(rank, inputs, height, 1))
    second = _along(conv, 1, rank, outputs, bias=conv.bias is not None)
    back = (roots[:, None] * right[:rank]).reshape(rank, outputs, width)
    second.weight.copy_(back.transpose(0, 1)[:, :, None])
    if second.bias is not None and conv.bias is not None:
        second.bias.copy_(conv.bias)
    return nn.Sequential(first, second), (rank,)


def _along(conv: nn.Conv2d, axis: int, inputs: int, outputs: int, *, bias: bool) -> nn.Conv2d:
    """A convolution that is like another along one axis, and leaves the other axis alone."""

    def part(values: tuple[int, ...], alone: int) -> Any:
        return tuple(value if index == axis else alone for index, value in enumerate(values))

    assert not isinstance(conv.padding, str)
    return nn.Conv2d(
        inputs,
        outputs,
        part(conv.kernel_size, 1),
        part(conv.stride, 1),
        part(conv.padding, 0),
        part(conv.dilation, 1),
        bias=bias,
        padding_mode=conv.padding_mode,
    )


def _pointwise(
    matrix: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
) -> nn.Conv2d:
    """A 1x1 convolution of this matrix (outputs, inputs)."""
    outputs, inputs = matrix.shape
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=bias is not None)  # type: ignore[arg-type]
    conv.weight.copy_(matrix[:, :, None, None])
    if conv.bias is not None and bias is not None:
        conv.bias.copy_(bias)
    return conv
