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
    filters: torch.Tensor = (
        weight.double().flatten(1).norm(dim=1).reshape(-1, *([1] * (weight.ndim - 1)))
    )
    tiny: float = torch.finfo(weight.dtype).tiny
    return 2 * u * (magnitude(coefficients, structure) + filters) + tiny


def layer_bound(
    weight: torch.Tensor, coefficients: torch.Tensor, structure: Structure, dtype: torch.dtype
) -> torch.Tensor:
    """Kernel B such that |x| * B bounds |dense layer - structured layer|, computed in `dtype`."""
    summands = prod(structure.dense) + sum(structure.windows) + 2
    computed = weight.double().abs() + magnitude(coefficients, structure)
    stored = stored_weight_bound(weight, coefficients, structure)
    return stored + gamma(summands, dtype) * computed


def kernel_bound(weight: torch.Tensor, structure: Structure) -> torch.Tensor:
    """Bound on |W - impulse response| of a float32 graph with this dense weight.

    Each weight is then a sum of at most prod(min(window, reduced)) coefficients; four roundings are
    allowed besides (scaling by the pool's area, the pool's division, batch-norm folding).
    """
    coefficients = structure.coefficients(weight.double()).to(weight.dtype)
    terms = prod(min(w, r) for w, r in zip(structure.windows, structure.reduced, strict=True))
    computed = gamma(terms + 4, torch.float32) * magnitude(coefficients, structure)
    return stored_weight_bound(weight, coefficients, structure) + computed


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
