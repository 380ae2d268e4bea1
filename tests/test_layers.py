"""Structured layers against plain ones: the rewrite is exact, whatever the layer's attributes are.

The reference is the plain module holding a projected weight, the projection built from the
definition (a pseudo-inverse of explicit blocks of ones), in float64.
"""

import copy
from collections.abc import Iterator
from functools import cache
from itertools import cycle, product
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from structconv_cli.errors import StructureError
from structconv_cli.layer_spec import LayerSpec, pad_input, spec_of
from structconv_cli.layers import (
    StructuredConv1d,
    StructuredConv2d,
    StructuredConv3d,
    StructuredLayer,
    StructuredLinear,
    structure_module,
    structured_layer,
)
from structconv_cli.structure import Structure

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
STRUCTURED = {1: StructuredConv1d, 2: StructuredConv2d, 3: StructuredConv3d}
KERNELS = {
    1: [(3,), (5,), (7,), (2,), (4,), (1,)],
    2: [(3, 3), (1, 3), (3, 1), (1, 7), (5, 3), (2, 2), (4, 3), (4, 2), (1, 1)],
    3: [(3, 3, 3), (1, 3, 2), (2, 2, 2), (3, 1, 1), (3, 2, 4)],
}
MODES = ["zeros", "reflect", "replicate", "circular"]
DEPTHWISE = "C"
CHANNELS = 4


@cache
def projector(structure: Structure) -> torch.Tensor:
    """B B^+ as a matrix over the flattened weight, B having a column per placed block of ones."""
    columns = []
    for corner in product(*(range(count) for count in structure.reduced)):
        block = np.zeros(structure.dense)
        ends = zip(corner, structure.windows, strict=True)
        block[tuple(slice(start, start + window) for start, window in ends)] = 1
        columns.append(block.ravel())
    basis = np.stack(columns, axis=1)
    return torch.from_numpy(basis @ np.linalg.pinv(basis))


def structures(dense: tuple[int, ...]) -> list[Structure]:
    """Space reduced, channels reduced, both, one element left, one channel left, all summed."""
    channels, *kernel = dense
    fewer, less = max(1, channels - 1), tuple(max(1, n - 1) for n in kernel)
    ones = (1,) * len(kernel)
    wanted = [
        (channels, *less),
        (fewer, *kernel),
        (fewer, *less),
        (channels, *ones),
        (1, *kernel),
        (1, *ones),
        (channels, 1, *kernel[1:]),
    ]
    return [Structure(dense, reduced) for reduced in dict.fromkeys(wanted) if reduced != dense]


def check(module: nn.Module, structure: Structure, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Compare the structured layer in `dtype` with the dense layer of the projected weight."""
    module = copy.deepcopy(module).to(dtype)
    found = structure_module("layer", module, structure)(x.to(dtype))
    assert found.dtype == dtype
    exact, x = module.double(), x.to(dtype).double()
    with torch.no_grad():
        weight = exact.weight.flatten(1) @ projector(structure).T
        exact.weight.copy_(weight.reshape(exact.weight.shape))
        expected = exact(x)
        assert found.shape == expected.shape
        error = (found.double() - expected).abs()
        if dtype == torch.float64:
            scale = float(expected.abs().max())
            assert float(error.max()) <= 1e-12 * scale
            return
        # (n + 1) u sum |x||a| bounds a sum of n products of rounded operands, and each pool adds
        # its window (Higham, section 3.1). |a| is expanded to what it weighs on every input.
        n = prod(structure.reduced) + sum(structure.windows) + 3
        sizes = structure.coefficients(exact.weight).abs()
        exact.weight.copy_(structure.expand(sizes))
        if exact.bias is not None:
            exact.bias.copy_(exact.bias.abs())
        bound = n * torch.finfo(dtype).eps / 2 * exact(x.abs())
        assert bool((error <= bound).all())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(module: nn.Module, seed: int) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random(*parameter.shape, seed=seed))
    return module


def build(
    dims: int,
    kernel: tuple[int, ...],
    stride: int,
    padding: int | str,
    dilation: int,
    mode: str,
    groups: int | str,
    bias: bool,
    *,
    seed: int = 0,
) -> nn.Module:
    groups = CHANNELS if groups == DEPTHWISE else groups
    # Two filters per group, so that depthwise has a channel multiplier.
    module = CONVOLUTION[dims](
        CHANNELS,
        2 * groups,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=mode,
        dtype=torch.float64,
    )
    return fill(module, seed)


def image(module: nn.Module, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Just large enough for some outputs; a different size on every axis."""
    sizes = [
        d * (k - 1) + 3 + axis
        for axis, (d, k) in enumerate(zip(module.dilation, module.kernel_size, strict=True))
    ]
    return random(batch, module.in_channels, *sizes, seed=seed)


def table(stride: int, padding: int | str) -> Iterator[tuple[int, str, int | str, bool]]:
    yield from product([1, 2], MODES, [1, 2, DEPTHWISE], [False, True])


PLACES = [
    (dims, stride, padding)
    for dims in (1, 2, 3)
    for stride in (1, 2, 3)
    for padding in (0, 1, 2, "same", "valid")
    if padding != "same" or stride == 1  # torch refuses the others
]


# torch's remark on its own speed, in the reference.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
# Every combination of the attributes with every kind of structure; kernels take turns.
@pytest.mark.parametrize(("dims", "stride", "padding"), PLACES)
def test_rewrite_is_exact_over_the_whole_table(dims: int, stride: int, padding: int | str) -> None:
    kernels = cycle(KERNELS[dims])
    checked = 0
    for dilation, mode, groups, bias in table(stride, padding):
        module = build(
            dims, next(kernels), stride, padding, dilation, mode, groups, bias, seed=checked
        )
        x = image(module)
        for structure in structures(tuple(module.weight.shape[1:])):
            for dtype in (torch.float64, torch.float32):
                try:
                    check(module, structure, x, dtype)
                except AssertionError as error:
                    raise AssertionError(f"{module} {structure}, {dtype}: {error}") from None
            checked += 1
    assert checked > 48


# Every kernel with every structure that fits it, the attributes taking turns.
@pytest.mark.parametrize(
    ("dims", "kernel"), [(dims, kernel) for dims in (1, 2, 3) for kernel in KERNELS[dims]]
)
def test_rewrite_is_exact_for_every_structure_of_every_kernel(
    dims: int, kernel: tuple[int, ...]
) -> None:
    dense = (CHANNELS, *kernel)
    turns = cycle(
        (stride, padding, dilation, mode)
        for dilation, padding, mode, stride in product([1, 2], [0, 1, 2], MODES, [1, 2, 3])
    )
    reductions = list(product(*(range(1, size + 1) for size in dense)))
    for reduced in reductions[:: 1 + len(reductions) // 60]:
        stride, padding, dilation, mode = next(turns)
        module = build(dims, kernel, stride, padding, dilation, mode, 1, True)
        check(module, Structure(dense, reduced), image(module), torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_every_axis_has_its_own_stride_padding_and_dilation(mode: str) -> None:
    for stride, padding, dilation in product([(1, 2), (3, 1)], [(0, 2), (3, 1)], [(1, 2), (3, 1)]):
        module = fill(
            nn.Conv2d(
                3, 4, (3, 4), stride, padding, dilation, padding_mode=mode, dtype=torch.float64
            ),
            seed=2,
        )
        x = random(2, 3, 9, 12)
        for reduced in [(3, 2, 2), (2, 1, 3), (1, 3, 1), (2, 1, 1)]:
            check(module, Structure((3, 3, 4), reduced), x, torch.float64)


def test_a_wide_layer_in_float32() -> None:
    module = fill(nn.Conv2d(80, 8, 3, padding=1), seed=0)
    x = random(1, 80, 7, 7)
    check(module, Structure((80, 3, 3), (41, 2, 2)), x, torch.float32)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_an_unbatched_image(dims: int, mode: str) -> None:
    module = build(dims, KERNELS[dims][0], 2, 1, 1, mode, 2, True)
    x = image(module, batch=1)
    structure = structures(tuple(module.weight.shape[1:]))[2]
    layer = structure_module("layer", module, structure)
    alone = layer(x[0])
    assert alone.ndim == dims + 1
    assert torch.equal(alone, layer(x)[0])
    assert alone.shape == module(x[0]).shape


# --- linear


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("reduced", [1, 2, 7, 11, 12])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(lead: tuple[int, ...], reduced: int, bias: bool) -> None:
    structure = Structure((12,), (reduced,))
    for dtype in (torch.float64, torch.float32):
        module = fill(nn.Linear(12, 5, bias=bias, dtype=torch.float64), seed=3)
        check(module, structure, random(*lead, 12), dtype)
    assert type(structure_module("head", module, structure)) is StructuredLinear


# --- the reference itself


def test_the_convolution_it_all_rests_on_agrees_with_loops() -> None:
    module = build(2, (3, 2), 2, 1, 2, "zeros", 2, True)
    structure = Structure((2, 3, 2), (1, 2, 2))
    x = image(module)
    layer = structure_module("layer", module, structure)
    weight = (module.weight.detach().flatten(1) @ projector(structure).T).reshape(4, 2, 3, 2)
    padded = torch.zeros(2, 4, x.shape[2] + 2, x.shape[3] + 2, dtype=torch.float64)
    padded[:, :, 1:-1, 1:-1] = x
    found = layer(x)
    expected = torch.zeros_like(found)
    for b, o, i, j in product(*map(range, found.shape)):
        total = float(module.bias.detach()[o])
        for c, u, v in product(range(2), range(3), range(2)):
            pixel = padded[b, 2 * (o // 2) + c, 2 * i + 2 * u, 2 * j + 2 * v]
            total += float(weight[o, c, u, v] * pixel)
        expected[b, o, i, j] = total
    assert found.numel() > 20
    assert float((found - expected).detach().abs().max()) < 1e-13


# --- what the module keeps


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kind_and_state(dims: int) -> None:
    dense = (2, *KERNELS[dims][0])
    structure = structures(dense)[2]
    for bias in (False, True):
        module = build(dims, KERNELS[dims][0], 1, 1, 1, "zeros", 2, bias)
        layer = structure_module("layer", module, structure)
        assert type(layer) is STRUCTURED[dims]
        assert list(layer.state_dict()) == (["weight", "bias"] if bias else ["weight"])
        assert layer.weight.shape == (4, *structure.reduced)
        if bias:
            assert torch.equal(layer.bias, module.bias)
            assert layer.bias is not module.bias


def test_state_loads_into_an_empty_layer() -> None:
    module = build(2, (3, 3), 1, 1, 1, "reflect", 1, True).float()
    structure = Structure((4, 3, 3), (3, 2, 2))
    layer = structure_module("layer", module, structure)
    empty = structured_layer(spec_of("layer", module), structure)
    empty.load_state_dict(layer.state_dict(), strict=True)
    x = image(module).float()
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mode_and_dtype_stay(training: bool, dtype: torch.dtype) -> None:
    module = nn.Conv2d(4, 4, 3).to(dtype).train(training)
    layer = structure_module("layer", module, Structure((4, 3, 3), (4, 2, 2)))
    assert layer.training is training
    assert layer.weight.dtype == dtype
    assert layer.bias.dtype == dtype


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_frozen_parameters_stay_frozen(name: str) -> None:
    module = nn.Conv2d(4, 4, 3)
    module.get_parameter(name).requires_grad_(False)
    layer = structure_module("layer", module, Structure((4, 3, 3), (4, 2, 2)))
    for parameter in ("weight", "bias"):
        expected = module.get_parameter(parameter).requires_grad
        assert layer.get_parameter(parameter).requires_grad is expected, parameter


def test_the_dense_module_is_left_alone() -> None:
    module = nn.Conv2d(4, 4, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    layer = structure_module("layer", module, Structure((4, 3, 3), (2, 2, 2)))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_dense_weight_is_the_projection() -> None:
    module = build(2, (3, 3), 1, 1, 1, "zeros", 1, False)
    structure = Structure((4, 3, 3), (3, 2, 2))
    layer = structure_module("layer", module, structure)
    expected = (module.weight.flatten(1) @ projector(structure).T).reshape(module.weight.shape)
    assert float((layer.dense_weight() - expected).detach().abs().max()) < 1e-13


def test_gradients_are_the_dense_ones_seen_through_the_basis() -> None:
    module = build(2, (3, 3), 2, 1, 1, "reflect", 2, True)
    structure = Structure((2, 3, 3), (1, 2, 2))
    layer = structure_module("layer", module, structure)
    x = image(module).requires_grad_()
    out = layer(x)
    direction = random(*out.shape, seed=5)
    small, bias, input_gradient = torch.autograd.grad(
        (direction * out).sum(), [layer.weight, layer.bias, x]
    )
    with torch.no_grad():
        module.weight.copy_(layer.dense_weight())
    dense, dense_bias, dense_input = torch.autograd.grad(
        (direction * module(x)).sum(), [module.weight, module.bias, x]
    )
    # W = A a, so dL/da = A^T dL/dW, and A^T is the pool of the window's size.
    expected = dense.unfold(1, 2, 1).unfold(2, 2, 1).unfold(3, 2, 1).sum((-1, -2, -3))
    assert float((small - expected).abs().max()) < 1e-12
    assert float((bias - dense_bias).abs().max()) < 1e-12
    assert float((input_gradient - dense_input).abs().max()) < 1e-12


def test_gradcheck_of_the_layer() -> None:
    module = build(1, (4,), 2, 1, 1, "circular", 1, True)
    layer = structure_module("layer", module, Structure((4, 4), (3, 1)))
    x = image(module)

    def forward(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(forward, layer.weight.detach().clone().requires_grad_())


def test_what_print_shows() -> None:
    layer = structure_module("x", nn.Conv2d(4, 4, 3), Structure((4, 3, 3), (3, 2, 2)))
    assert repr(layer) == "StructuredConv2d((4, 3, 3) -> (3, 2, 2), groups=1)"
    assert isinstance(layer, StructuredLayer)


# --- specifications


def test_spec_of_a_convolution() -> None:
    module = nn.Conv2d(
        8, 6, (3, 4), (2, 1), (1, 0), (1, 2), groups=2, bias=False, padding_mode="reflect"
    )
    assert spec_of("stage.conv", module) == LayerSpec(
        name="stage.conv",
        kind="conv2d",
        weight_shape=(6, 4, 3, 4),
        stride=(2, 1),
        padding=((1, 1), (0, 0)),
        dilation=(1, 2),
        groups=2,
        padding_mode="reflect",
        bias=False,
    )
    assert spec_of("x", nn.Linear(3, 2)) == LayerSpec("x", "linear", (2, 3), bias=True)


@pytest.mark.parametrize(
    ("module", "dims", "depthwise", "axes"),
    [
        (nn.Conv1d(4, 4, 3, groups=4), 1, True, (1, 3)),
        (nn.Conv2d(4, 8, 3, groups=4), 2, True, (1, 3, 3)),
        (nn.Conv2d(4, 8, 3, groups=2), 2, False, (2, 3, 3)),
        (nn.Conv2d(1, 8, 3), 2, False, (1, 3, 3)),
        (nn.Conv3d(4, 8, (1, 2, 3)), 3, False, (4, 1, 2, 3)),
        (nn.Linear(5, 2), 0, False, (5,)),
    ],
)
def test_properties_of_a_spec(
    module: nn.Module, dims: int, depthwise: bool, axes: tuple[int, ...]
) -> None:
    spec = spec_of("x", module)
    assert (spec.dims, spec.is_depthwise, spec.axes) == (dims, depthwise, axes)


@pytest.mark.parametrize("mode", MODES)
def test_padding_of_same_with_an_even_kernel_is_longer_behind(mode: str) -> None:
    module = nn.Conv1d(1, 1, 4, padding="same", dilation=1, padding_mode=mode, bias=False)
    spec = spec_of("x", module)
    assert spec.padding == ((1, 2),)
    x = torch.arange(1.0, 8.0).reshape(1, 1, 7)
    with torch.no_grad():
        module.weight.fill_(1.0)
    assert torch.equal(pad_input(x, spec).unfold(2, 4, 1).sum(-1), module(x).detach())


class OwnConv(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "module",
    [OwnConv(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.Bilinear(2, 2, 2)],
)
def test_anything_else_is_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"stage is a {type(module).__name__}"):
        structure_module("stage", module, Structure((4, 3, 3), (2, 2, 2)))


def test_a_structure_of_another_shape_is_refused() -> None:
    with pytest.raises(StructureError):
        structure_module("stage", nn.Conv2d(4, 4, 3), Structure((5, 3, 3), (2, 2, 2)))
    with pytest.raises(StructureError):
        structure_module("stage", nn.Linear(4, 4), Structure((4, 3, 3), (2, 2, 2)))
