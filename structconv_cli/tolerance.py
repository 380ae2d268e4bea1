"""How far rounding alone can take two computations of the same layer apart.

A floating-point sum of K products, each operand rounded once, is off by at most
gamma(K) * sum |w||x| with gamma(K) = K u / (1 - K u) and u the unit roundoff, in whatever order it
is summed (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). For a structured
layer the products are a_m * pool(x)_m, and sum_m |a_m| pool(|x|)_m = (|x| * E)(o) with
E = expand(|a|). So every bound here is the dense convolution of |x| with a kernel of bounds.
"""

import math
from collections.abc import Iterable
from math import prod

import torch

from structconv_cli.structure import Structure

SAFETY = 4.0
"""Factor on statistical (square-root) error growth: about four standard deviations."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """u = eps / 2: the largest relative error of rounding once to `dtype`."""
    return torch.finfo(dtype).eps / 2


def gamma(summands: int, dtype: torch.dtype) -> float:
    """K u / (1 - K u), the relative bound of a sum of K rounded products."""
    error = summands * unit_roundoff(dtype)
    return error / (1 - error)


def magnitude(coefficients: torch.Tensor, structure: Structure) -> torch.Tensor:
    """E = expand(|a|): what each dense weight is summed from, float64, (C_out, *dense)."""
    return structure.expand(coefficients.double().abs())


def stored_weight_bound(
    weight: torch.Tensor, coefficients: torch.Tensor, structure: Structure
) -> torch.Tensor:
    """Bound on |W - expand(a)| when W and a were each rounded to the dtype they are stored in.

    Rounding W leaves the subspace by at most u ||W_o|| (norm of filter o); rounding a adds u E.
    """
    u = unit_roundoff(weight.dtype)
    tiny: float = torch.finfo(weight.dtype).tiny
    return 2 * u * (magnitude(coefficients, structure) + _filter_norms(weight)) + tiny


def layer_bound(
    weight: torch.Tensor, coefficients: torch.Tensor, structure: Structure, dtype: torch.dtype
) -> torch.Tensor:
    """Kernel B such that |x| * B bounds |dense layer - structured layer|, computed in `dtype`."""
    computed = weight.double().abs() + magnitude(coefficients, structure)
    stored = stored_weight_bound(weight, coefficients, structure)
    return stored + gamma(_summands(structure), dtype) * computed


def bias_bound(bias: torch.Tensor, structure: Structure, dtype: torch.dtype) -> torch.Tensor:
    """What a bias adds to the outputs that `layer_bound` bounds, (C_out,).

    A sum may begin with it, and then every addition rounds what is as large as the bias.
    """
    return gamma(_summands(structure), dtype) * bias.double().abs()


def _summands(structure: Structure) -> int:
    """Of an output, at most, the bias included; each may be rounded before it is added."""
    return prod(structure.dense) + sum(structure.windows) + 2


def kernel_bound(weight: torch.Tensor, structure: Structure) -> torch.Tensor:
    """Bound on |W - impulse response| of a float32 graph with this dense weight.

    Along the kernel's axes each weight is a sum of coefficients, at most prod(min(window, reduced))
    of them. Along the channels it is one weight of the difference form, or, for the last channel of
    each of the k residue classes, the common sum less the others of its class. Four roundings are
    allowed besides (the pool's area and division, batch-norm folding).
    """
    channels, *kernel = structure.reduced
    spatial = Structure(structure.dense, (structure.dense[0], *kernel))
    sizes = zip(spatial.windows[1:], kernel, strict=True)
    terms = prod(min(window, reduced) for window, reduced in sizes)
    parts = spatial.coefficients(structure.project(weight.double())).abs()
    if structure.windows[0] > 1:
        parts = structure.scattered(_difference_parts(structure.gathered(parts), channels))
        terms += -(-(channels - 1) // structure.windows[0]) + 1
    summed = spatial.expand(parts)
    u = unit_roundoff(torch.float32)
    rounded = 2 * u * (summed + _filter_norms(weight)) + torch.finfo(torch.float32).tiny
    return rounded + gamma(terms + 4, torch.float32) * summed


def _difference_parts(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """What each channel's response is summed from in the difference form: sums of magnitudes.

    An upper bound: the common sum is at most the smallest sum of magnitudes of a class.
    """
    size = weight.shape[1]
    window = size - channels + 1
    classes = torch.arange(size) % window
    sums = torch.zeros(len(weight), window, *weight.shape[2:], dtype=weight.dtype)
    sums.index_add_(1, classes, weight)
    common = sums.amin(1, keepdim=True)
    tail = sums[:, classes[channels - 1 :]] + common
    return torch.cat([weight[:, : channels - 1], tail], 1)


def _filter_norms(weight: torch.Tensor) -> torch.Tensor:
    """||W_o|| of every filter, float64, to be broadcast against W."""
    norms: torch.Tensor = weight.double().flatten(1).norm(dim=1)
    return norms.reshape(-1, *([1] * (weight.ndim - 1)))


def model_tolerance(layers: Iterable[tuple[int, float]]) -> float:
    """Relative tolerance for a whole model's output in float32, on both sides.

    Args:
        layers: (K, g) of every layer run: summands per output, and the norm of E over that of W (1
            for a dense layer), by which cancellation amplifies rounding.

    Rounding errors grow like sqrt(K) u on average (Higham and Mary 2019); those of all layers are
    added as if they all reached the output, with a safety factor, for both computations.
    """
    u = unit_roundoff(torch.float32)
    return 2 * SAFETY * u * sum(math.sqrt(summands) * growth for summands, growth in layers)
