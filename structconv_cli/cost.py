"""Operation counts of a layer, dense and structured, by the paper's counting (section 3.2).

Per output element a dense convolution takes C N^2 multiplications and C N^2 - 1 additions; a
structured one c n^2 multiplications, c n^2 - 1 additions, and its share of the sum-pool, which all
C_out filters of a group use together. The pool is counted with shared partial sums: along a spatial
axis a window of k takes floor(log2 k) + popcount(k) - 1 additions per element (doubling); along the
channels, the difference form takes C - 1 additions per pixel (our derivation, `onnx.lower`).
Batch-norm scales and biases are not counted: they are the same before and after.
"""

from dataclasses import dataclass
from math import prod

from structconv_cli.layer_spec import LayerSpec
from structconv_cli.structure import Structure


@dataclass(frozen=True)
class Cost:
    """Operations for one image, and weights held.

    Attributes:
        multiplications: number of multiplications (equal to the MACs of the convolution).
        additions: number of additions, those of the sum-pool included.
        parameters: weights and biases.
    """

    multiplications: int
    additions: int
    parameters: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.multiplications + other.multiplications,
            self.additions + other.additions,
            self.parameters + other.parameters,
        )


def dense_cost(spec: LayerSpec, output_size: tuple[int, ...], calls: int = 1) -> Cost:
    """Cost of the layer as it is.

    Args:
        spec: the layer.
        output_size: its output's spatial sizes; the rows of a linear layer.
        calls: how often one image passes through it.
    """
    return _convolution(spec, prod(spec.axes), prod(output_size) * calls)


def structured_cost(
    spec: LayerSpec, structure: Structure, output_size: tuple[int, ...], calls: int = 1
) -> Cost:
    """Cost of sum-pool and reduced convolution together; arguments as for `dense_cost`."""
    reduced = _convolution(spec, prod(structure.reduced), prod(output_size) * calls)
    pool = sum_pool_additions(spec, structure, output_size) * calls
    return Cost(reduced.multiplications, reduced.additions + pool, reduced.parameters)


def sum_pool_additions(spec: LayerSpec, structure: Structure, output_size: tuple[int, ...]) -> int:
    """Additions of the sum-pool for one image; amortise over C_out for the share of one filter.

    The channel pool runs first, at every pixel that the reduced convolution can reach; the spatial
    pools follow on the c channels that remain.
    """
    channel_window, *windows = structure.windows
    # Sizes of the plane that is pooled: what the dense kernel reaches, then axis by axis less.
    plane = [
        (o - 1) * s + d * (n - 1) + 1
        for o, s, d, n in zip(
            output_size, spec.stride, spec.dilation, structure.dense[1:], strict=False
        )
    ] or list(output_size)
    additions = (structure.channels - 1) * prod(plane) if channel_window > 1 else 0
    for axis, window in enumerate(windows):
        reduced, stride = structure.reduced[1 + axis], spec.stride[axis]
        if reduced == 1 and stride > 1:  # the stride moves into the pool, which then shares nothing
            plane[axis], per_element = output_size[axis], window - 1
        else:
            plane[axis] -= spec.dilation[axis] * (window - 1)
            per_element = _doubling_additions(window)
        additions += structure.reduced[0] * prod(plane) * per_element
    return spec.groups * additions


def _doubling_additions(window: int) -> int:
    return window.bit_length() - 1 + window.bit_count() - 1


def _convolution(spec: LayerSpec, products: int, positions: int) -> Cost:
    outputs = spec.weight_shape[0]
    return Cost(
        multiplications=outputs * products * positions,
        additions=outputs * (products - 1) * positions,
        parameters=outputs * products + (outputs if spec.bias else 0),
    )
