"""Operation counts against counts by hand, PyTorch's own counter, and additions really made."""

from dataclasses import replace
from itertools import permutations
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from structconv_cli.cost import Cost, dense_cost, structured_cost, sum_pool_additions
from structconv_cli.layer_spec import LayerSpec, spec_of
from structconv_cli.layers import structured_layer
from structconv_cli.structure import Structure
from structconv_cli.sum_pool import box_sum


class CountAdditions(TorchDispatchMode):
    """Counts the additions that tensors of numbers go through, one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor:
            self.count += out.numel()
        elif func is torch.ops.aten.sum.dim_IntList:
            self.count += args[0].numel() - out.numel()
        return out


def macs(module: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() // 2


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor, Structure]:
    """A convolution, an image, and a structure for it."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=draw(st.integers(0, 1)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )
    sizes = [
        d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True)
    ]
    dense = tuple(module.weight.shape[1:])
    structure = Structure(dense, tuple(draw(st.integers(1, size)) for size in dense))
    return module, torch.zeros(1, inputs, *sizes), structure


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_multiplications_and_parameters_are_those_of_the_modules(
    case: tuple[nn.Module, torch.Tensor, Structure],
) -> None:
    module, image, structure = case
    spec = spec_of("layer", module)
    size = tuple(module(image).shape[2:])
    dense, small = dense_cost(spec, size), structured_cost(spec, structure, size)
    reduced = structured_layer(spec, structure)
    assert dense.multiplications == macs(module, image)
    assert small.multiplications == macs(reduced, image)
    assert dense.parameters == sum(p.numel() for p in module.parameters())
    assert small.parameters == sum(p.numel() for p in reduced.parameters())
    # One addition fewer than multiplications, per output.
    assert dense.additions == dense.multiplications - spec.weight_shape[0] * prod(size)
    assert small.multiplications <= dense.multiplications
    assert small.multiplications * structure.ratio == pytest.approx(dense.multiplications)
    assert small.additions >= sum_pool_additions(spec, structure, size) >= 0


@pytest.mark.parametrize("rows", [1, 7])
def test_linear_by_hand(rows: int) -> None:
    spec = spec_of("head", nn.Linear(8, 3))
    assert dense_cost(spec, (rows,)) == Cost(24 * rows, 21 * rows, 27)
    # 5 of 8 features are left: 3 x 5 products, 3 x 4 additions, and 7 for the differences.
    structure = Structure((8,), (5,))
    assert structured_cost(spec, structure, (rows,)) == Cost(15 * rows, (12 + 7) * rows, 18)
    assert macs(nn.Linear(8, 3), torch.zeros(rows, 8)) == 24 * rows
    assert sum_pool_additions(spec, Structure((8,), (8,)), (rows,)) == 0


def conv1d(
    kernel: int, channels: int = 4, stride: int = 1, dilation: int = 1, groups: int = 1
) -> LayerSpec:
    module = nn.Conv1d(
        channels, 2 * groups, kernel, stride=stride, dilation=dilation, groups=groups, bias=False
    )
    return spec_of("layer", module)


@pytest.mark.parametrize(
    ("spec", "reduced", "outputs", "additions"),
    [
        # Nothing reduced: nothing pooled.
        (conv1d(5), (4, 5), 6, 0),
        # A window of 3 (2 additions) at the 6 - 1 + 3 places that a kernel of 3 reaches.
        (conv1d(5), (4, 3), 6, 4 * 8 * 2),
        # A window of 2 at (6 - 1) * 2 + (4 - 1) * 2 + 1 = 17 places.
        (conv1d(5, stride=2, dilation=2), (4, 4), 6, 4 * 17 * 1),
        # One element is left of the kernel: the stride moves into the pool, which runs 6 times.
        (conv1d(3, stride=2), (4, 1), 6, 4 * 6 * 2),
        # The difference form: C - 1 additions at the 6 + 5 - 1 places that the kernel reaches.
        (conv1d(5), (3, 5), 6, 3 * 10),
        (conv1d(5), (2, 5), 6, 3 * 10),
        (conv1d(5), (1, 5), 6, 3 * 10),
        # Channels first, then space on the 3 that are left.
        (conv1d(5), (3, 3), 6, 3 * 10 + 3 * 8 * 2),
        # Two groups of 2 channels each.
        (conv1d(5, groups=2), (1, 4), 6, 2 * (1 * 10 + 1 * 9 * 1)),
        # Depthwise: one channel per group, 4 groups.
        (conv1d(5, groups=4), (1, 3), 6, 4 * 8 * 2),
        # A pointwise layer reduces channels only.
        (conv1d(1), (2, 1), 6, 3 * 6),
    ],
)
def test_sum_pool_by_hand(
    spec: LayerSpec, reduced: tuple[int, ...], outputs: int, additions: int
) -> None:
    structure = Structure(spec.axes, reduced)
    assert sum_pool_additions(spec, structure, (outputs,)) == additions
    whole = structured_cost(spec, structure, (outputs,))
    filters = spec.weight_shape[0]
    assert whole.additions == filters * outputs * (prod(reduced) - 1) + additions


@pytest.mark.parametrize("window", range(2, 33))
def test_a_window_takes_as_many_additions_as_the_pool_makes(window: int) -> None:
    # A long axis, so that the partial sums at its end do not count.
    outputs = 100 * window
    spec = conv1d(window + 1, channels=1)
    counted = sum_pool_additions(spec, Structure((1, window + 1), (1, 2)), (outputs - 1,))
    with CountAdditions() as made:
        box_sum(torch.zeros(1, outputs + window - 1), 1, window)
    assert counted % outputs == 0
    assert counted // outputs == made.count // outputs
    # By doubling: one addition per bit below the highest, and one per further bit that is set.
    assert counted // outputs == len(f"{window:b}") - 1 + f"{window:b}".count("1") - 1


def separable_additions(structure: Structure, outputs: tuple[int, ...]) -> list[int]:
    """Additions of pooling axis by axis, in every order, with windows of at most 3 at stride 1.

    Each pool shortens its axis only, so the first one still runs along the full length of the rest.
    """
    channels, *kernel = structure.reduced
    _, *windows = structure.windows
    counts = []
    for order in permutations(range(len(kernel))):
        extent = [o + n - 1 for o, n in zip(outputs, structure.dense[1:], strict=True)]
        additions = 0
        for axis in order:
            extent[axis] -= windows[axis] - 1
            additions += (windows[axis] - 1) * prod(extent)
        counts.append(channels * additions)
    return counts


@pytest.mark.parametrize(
    ("kernel", "reduced"),
    [
        ((3, 3), (2, 2)),
        ((3, 3), (1, 1)),
        ((3, 3), (2, 1)),
        ((3, 3, 3), (2, 2, 2)),
        ((1, 3), (1, 2)),
    ],
)
@pytest.mark.parametrize("side", [1, 8])
def test_pools_over_several_axes_count_what_the_earlier_ones_cover(
    kernel: tuple[int, ...], reduced: tuple[int, ...], side: int
) -> None:
    structure = Structure((2, *kernel), (2, *reduced))
    module = (nn.Conv2d, nn.Conv3d)[len(kernel) - 2](2, 4, kernel)
    size = (side,) * len(kernel)
    found = sum_pool_additions(spec_of("layer", module), structure, size)
    counts = separable_additions(structure, size)
    assert min(counts) <= found <= max(counts)


def test_summing_nine_numbers_takes_eight_additions() -> None:
    spec = spec_of("layer", nn.Conv2d(1, 1, 3, bias=False))
    assert structured_cost(spec, Structure((1, 3, 3), (1, 1, 1)), (1, 1)) == Cost(1, 8, 1)


def test_calls_multiply_operations_and_not_parameters() -> None:
    module = nn.Conv2d(4, 6, 3, padding=1)
    spec, structure = spec_of("layer", module), Structure((4, 3, 3), (3, 2, 2))
    for cost in (
        lambda calls: dense_cost(spec, (5, 7), calls),
        lambda calls: structured_cost(spec, structure, (5, 7), calls),
    ):
        once, thrice = cost(1), cost(3)
        assert thrice.multiplications == 3 * once.multiplications
        assert thrice.additions == 3 * once.additions
        assert thrice.parameters == once.parameters


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


def test_a_structure_that_reduces_nothing_costs_what_the_dense_layer_does() -> None:
    spec = spec_of("layer", nn.Conv2d(4, 6, (3, 1), stride=2, groups=2))
    assert structured_cost(spec, Structure(spec.axes, spec.axes), (5, 7)) == dense_cost(
        spec, (5, 7)
    )
    unbiased = replace(spec, bias=False)
    assert dense_cost(spec, (5, 7)).parameters == dense_cost(unbiased, (5, 7)).parameters + 6
