"""The bounds hold for every rounding error, and are tight enough to see a wrong weight."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_onnx_lower import block_basis, structured_weight
from torch.nn import functional

from structconv_cli.exactness import random_input
from structconv_cli.layer_spec import LayerSpec
from structconv_cli.layers import structured_layer
from structconv_cli.structure import Structure
from structconv_cli.tolerance import (
    gamma,
    kernel_bound,
    layer_bound,
    magnitude,
    model_tolerance,
    stored_weight_bound,
    unit_roundoff,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def structures(draw: st.DrawFn, most_channels: int = 12) -> Structure:
    channels = draw(st.integers(1, most_channels))
    kernel = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    dense = (channels, *(min(k, 3) if len(kernel) == 3 else k for k in kernel))
    return Structure(dense, tuple(draw(st.integers(1, size)) for size in dense))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[LayerSpec, Structure]:
    structure = draw(structures())
    dims = len(structure.dense) - 1
    groups = draw(st.sampled_from([1, 1, 2])) if dims else 1
    kind = ("linear", "conv1d", "conv2d", "conv3d")[dims]
    spec = LayerSpec(
        name="layer",
        kind=kind,  # type: ignore[arg-type]
        weight_shape=(2 * groups, *structure.dense),
        stride=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        padding=tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(dims)),
        dilation=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        groups=groups,
    )
    return spec, structure


def solve(weight: torch.Tensor, structure: Structure) -> torch.Tensor:
    """Coefficients by least squares over the enumerated basis, in float64."""
    basis = block_basis(structure.dense, structure.reduced)
    solved = torch.linalg.lstsq(basis, weight.double().flatten(1).T).solution
    return solved.T.reshape(len(weight), *structure.reduced)


def expand(coefficients: torch.Tensor, structure: Structure) -> torch.Tensor:
    basis = block_basis(structure.dense, structure.reduced)
    return (coefficients.double().flatten(1) @ basis.T).reshape(-1, *structure.dense)


def dense(spec: LayerSpec, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The plain layer."""
    if not spec.dims:
        return functional.linear(x, weight)
    padded = functional.pad(x, [p for pads in reversed(spec.padding) for p in pads])
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[spec.dims - 1]
    return convolve(padded, weight, None, spec.stride, 0, spec.dilation, spec.groups)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_roundoff_is_the_largest_relative_rounding_error(dtype: torch.dtype) -> None:
    u = unit_roundoff(dtype)
    above = torch.tensor(1 + 1.001 * u, dtype=torch.float64)
    below = torch.tensor(1 + 0.999 * u, dtype=torch.float64)
    if dtype == torch.float64:
        assert (1 + u, 1 + 1.01 * u > 1) == (1, True)
    else:
        assert float(above.to(dtype)) > 1
        assert float(below.to(dtype)) == 1


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
    dtype=st.sampled_from(DTYPES[:3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_gamma_bounds_any_sum_of_rounded_products(
    values: list[float], dtype: torch.dtype, seed: int
) -> None:
    a = torch.tensor(values, dtype=torch.float64).to(dtype).clamp(-100, 100)
    b = torch.randn(len(a), generator=torch.Generator().manual_seed(seed)).to(dtype)
    total = torch.zeros((), dtype=dtype)
    for first, second in zip(a, b, strict=True):
        total = total + first * second
    exact = (a.double() * b.double()).sum()
    size = (a.double() * b.double()).abs().sum()
    tiny = len(a) * torch.finfo(dtype).smallest_normal
    assert abs(float(total) - float(exact)) <= gamma(len(a), dtype) * float(size) + tiny


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_gamma_grows_with_the_number_of_summands(dtype: torch.dtype) -> None:
    values = [gamma(k, dtype) for k in (1, 2, 3, 10, 100, 5000, 10**6)]
    assert values == sorted(set(values))
    assert values[0] == pytest.approx(unit_roundoff(dtype), rel=1e-6)


@given(structure=structures(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_magnitude_is_the_expansion_of_absolute_coefficients(
    structure: Structure, seed: int
) -> None:
    a = torch.randn(3, *structure.reduced, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(magnitude(a, structure), expand(a.abs(), structure))


@given(structure=structures(), seed=st.integers(0, 999), scale=st.integers(-12, 12))
@settings(max_examples=150, deadline=None)
def test_stored_weights_differ_by_no_more_than_their_bound(
    structure: Structure, seed: int, scale: int
) -> None:
    weight = structured_weight(structure.dense, structure.reduced, 3, seed) * 10.0**scale
    reduced = solve(weight, structure).float()
    bound = stored_weight_bound(weight, reduced, structure)
    assert bound.shape == weight.shape
    assert ((weight.double() - expand(reduced, structure)).abs() <= bound).all()


@given(layer=convolutions(), seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES[2:]))
@settings(max_examples=150, deadline=None)
def test_computed_layers_differ_by_no_more_than_their_bound(
    layer: tuple[LayerSpec, Structure], seed: int, dtype: torch.dtype
) -> None:
    spec, structure = layer
    weight = structured_weight(structure.dense, structure.reduced, spec.weight_shape[0], seed)
    reduced = solve(weight, structure).float()
    x = random_input(spec, torch.Generator().manual_seed(seed)).to(dtype)
    module = structured_layer(spec, structure).to(dtype)
    with torch.no_grad():
        module.weight.copy_(reduced)
        computed = module(x)
    exact = dense(spec, weight.double(), x.double())
    bound = layer_bound(weight, reduced, structure, dtype)
    allowed = dense(spec, bound, x.double().abs())
    error = (computed.double() - exact).abs()
    assert (error <= allowed + torch.finfo(dtype).tiny).all()
    plain = dense(spec, weight.to(dtype), x).double()
    assert ((plain - exact).abs() <= allowed + torch.finfo(dtype).tiny).all()


SIZES = [
    ((16, 3, 3), (16, 2, 2)),
    ((16, 3, 3), (9, 2, 2)),
    ((64, 1, 1), (33, 1, 1)),
    ((32,), (7,)),
    ((8, 5), (8, 3)),
    ((4, 3, 3, 3), (3, 2, 2, 2)),
]


@pytest.mark.parametrize(("full", "small"), SIZES)
def test_bounds_are_not_absurdly_loose(full: tuple[int, ...], small: tuple[int, ...]) -> None:
    structure = Structure(full, small)
    weight = structured_weight(full, small, 32)
    reduced = solve(weight, structure).float()
    stored = stored_weight_bound(weight, reduced, structure)
    error = (weight.double() - expand(reduced, structure)).abs()
    assert error.max() <= stored.max() <= 1e4 * error.max()
    assert kernel_bound(weight, structure).max() <= 1e4 * error.max()
    dims = len(full) - 1
    spec = LayerSpec(
        "layer",
        ("linear", "conv1d", "conv2d", "conv3d")[dims],  # type: ignore[arg-type]
        (32, *full),
        (1,) * dims,
        ((0, 0),) * dims,
        (1,) * dims,
    )
    x = random_input(spec, torch.Generator().manual_seed(0)).float()
    module = structured_layer(spec, structure)
    with torch.no_grad():
        module.weight.copy_(reduced)
        error = (module(x).double() - dense(spec, weight.double(), x.double())).abs()
    allowed = dense(spec, layer_bound(weight, reduced, structure, torch.float32), x.double().abs())
    assert error.max() <= allowed.max() <= 1e4 * error.max()


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_layer_bound_grows_with_the_summation_length(dtype: torch.dtype) -> None:
    """Ones everywhere, so that nothing but the number of summands changes."""
    bounds = []
    for channels in (2, 4, 8, 16, 64, 256):
        structure = Structure((channels, 3), (channels, 2))
        reduced = torch.ones(1, channels, 2)
        weight = expand(reduced, structure).float()
        # Per unit of weight, without the filter's norm, which grows with the channels as well.
        stored = stored_weight_bound(weight, reduced, structure)
        bounds.append(float((layer_bound(weight, reduced, structure, dtype) - stored).max()))
    assert bounds == sorted(set(bounds))


@pytest.mark.parametrize(("full", "small"), SIZES)
def test_a_coarser_dtype_is_allowed_more(full: tuple[int, ...], small: tuple[int, ...]) -> None:
    structure = Structure(full, small)
    weight = structured_weight(full, small, 4)
    reduced = solve(weight, structure).float()
    fine = layer_bound(weight, reduced, structure, torch.float64)
    assert (fine < layer_bound(weight, reduced, structure, torch.float32)).all()
    exact = stored_weight_bound(weight.double(), reduced.double(), structure)
    assert (exact < 1e-6 * stored_weight_bound(weight, reduced, structure)).all()


@pytest.mark.parametrize(("full", "small"), SIZES)
def test_one_per_cent_of_any_single_reduced_weight_violates_the_bound(
    full: tuple[int, ...], small: tuple[int, ...]
) -> None:
    structure = Structure(full, small)
    weight = structured_weight(full, small, 3)
    reduced = solve(weight, structure).float()
    limit = 1e-3 * reduced.abs().max()
    tried = 0
    for index in np.ndindex(*reduced.shape):
        if reduced[index].abs() >= limit:
            changed = reduced.clone()
            changed[index] *= 1.01
            deviation = (weight.double() - expand(changed, structure)).abs()
            assert (deviation > stored_weight_bound(weight, changed, structure)).any(), index
            tried += 1
    assert tried >= 0.9 * reduced.numel()


@given(structure=structures(most_channels=8), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_kernel_bound_covers_a_float32_expansion_in_any_order(
    structure: Structure, seed: int
) -> None:
    weight = structured_weight(structure.dense, structure.reduced, 2, seed)
    area = float(prod(structure.windows))
    reduced = (solve(weight, structure) * area).float().flatten(1).numpy()
    basis = block_basis(structure.dense, structure.reduced).bool().numpy()
    order = np.random.default_rng(seed).permutation(basis.shape[1])
    kernel = np.zeros((2, basis.shape[0]), np.float32)
    for column in order:
        kernel[:, basis[:, column]] += reduced[:, column : column + 1]
    kernel = kernel * np.float32(1 / area)
    deviation = torch.from_numpy(kernel).double().reshape(weight.shape) - weight.double()
    assert (deviation.abs() <= kernel_bound(weight, structure)).all()


def test_zero_weights_are_allowed_no_more_than_underflow() -> None:
    structure = Structure((4, 3), (2, 2))
    zeros, none = torch.zeros(2, 4, 3), torch.zeros(2, 2, 2)
    for bound in (
        stored_weight_bound(zeros, none, structure),
        layer_bound(zeros, none, structure, torch.float32),
        kernel_bound(zeros, structure),
    ):
        assert (bound > 0).all()
        assert bound.max() <= 1e-37


def test_model_tolerance_adds_layers_and_grows_with_their_length_and_growth() -> None:
    assert model_tolerance([]) == 0
    one, two = model_tolerance([(100, 1.0)]), model_tolerance([(400, 1.0)])
    assert two == pytest.approx(2 * one)
    assert model_tolerance([(100, 1.0), (400, 1.0)]) == pytest.approx(one + two)
    assert model_tolerance([(100, 3.0)]) == pytest.approx(3 * one)
    assert one == pytest.approx(2 * 4 * 2.0**-24 * 10)


def test_model_tolerance_covers_a_deep_float32_network() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(64, 64, generator=generator) / 8 for _ in range(20)]
    x = torch.randn(50, 64, generator=generator)
    single, double = x, x.double()
    for weight in layers:
        single, double = (single @ weight.T).relu(), (double @ weight.T.double()).relu()
    error = float((single.double() - double).abs().max() / double.abs().max())
    assert 0 < error <= model_tolerance([(64, 1.0)] * 20) <= 1e4 * error
