"""Composite kernels over any binary basis, against least squares on the basis matrix."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from structconv_cli.composite import CompositeBasis, channel_masks
from structconv_cli.errors import StructureError
from structconv_cli.structure import Structure

laws = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares(elements: torch.Tensor, weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and projection, filter by filter and free position by free position."""
    basis = elements.flatten(1).double().numpy().T
    axes = elements.ndim - 1
    outputs, free = weight.shape[0], weight.shape[1 + axes :]
    columns = weight.double().numpy().reshape(outputs, basis.shape[0], -1)
    coefficients = np.zeros((outputs, basis.shape[1], columns.shape[2]))
    for o in range(outputs):
        for f in range(columns.shape[2]):
            coefficients[o, :, f] = np.linalg.lstsq(basis, columns[o, :, f], rcond=None)[0]
    projection = np.einsum("sm,omf->osf", basis, coefficients)
    return coefficients.reshape(outputs, -1, *free), projection.reshape(weight.shape)


@st.composite
def independent_elements(draw: st.DrawFn) -> torch.Tensor:
    sizes = draw(st.sampled_from([(5,), (2, 3), (7,), (2, 2, 2), (3, 3)]))
    positions = int(np.prod(sizes))
    count = draw(st.integers(1, positions))
    bits = draw(
        st.lists(
            st.lists(st.integers(0, 1), min_size=positions, max_size=positions),
            min_size=count,
            max_size=count,
        )
    )
    elements = torch.tensor(bits, dtype=torch.float64).reshape(count, *sizes)
    assume(np.linalg.matrix_rank(elements.flatten(1).numpy()) == count)
    return elements


@laws
@given(independent_elements(), st.lists(st.integers(1, 3), max_size=2), seeds)
def test_any_independent_basis_solves_least_squares(
    elements: torch.Tensor, free: list[int], seed: int
) -> None:
    basis = CompositeBasis(elements)
    weight = random(3, *elements.shape[1:], *free, seed=seed)
    coefficients, projection = least_squares(elements, weight)
    scale = float(weight.norm())
    found = basis.coefficients(weight)
    assert found.shape == (3, elements.shape[0], *free)
    assert np.abs(found.numpy() - coefficients).max() < 1e-10 * scale
    projected = basis.project(weight)
    assert np.abs(projected.numpy() - projection).max() < 1e-11 * scale
    assert torch.equal(projected, basis.reconstruct(found))
    assert float((basis.project(projected) - projected).norm()) < 1e-11 * scale
    inner = ((weight - projected) * projected).sum()
    assert abs(float(inner)) < 1e-11 * scale**2


@laws
@given(st.permutations(range(8)), st.lists(st.integers(0, 8), min_size=1, max_size=4), seeds)
def test_disjoint_masks_average_over_each_group(
    order: list[int], cuts: list[int], seed: int
) -> None:
    bounds = sorted({0, *cuts, *([8] if cuts == [0] else [])})
    groups = [order[a:b] for a, b in pairwise(bounds)]
    assume(groups)
    basis = channel_masks(groups, 8)
    assert basis.is_disjoint
    weight = random(2, 8, 3, 2, seed=seed)
    expected = torch.zeros_like(weight)
    for group in groups:
        expected[:, group] = weight[:, group].mean(1, keepdim=True)
    assert float((basis.project(weight) - expected).norm()) < 1e-13 * float(weight.norm())
    coefficients = basis.coefficients(weight)
    for m, group in enumerate(groups):
        mean = weight[:, group].mean(1)
        assert torch.allclose(coefficients[:, m], mean, rtol=0, atol=1e-13)


def test_masks_of_one_channel_select() -> None:
    basis = channel_masks([[4], [1]], 6)
    weight = random(3, 6, 3, 3)
    expected = torch.zeros_like(weight)
    expected[:, [1, 4]] = weight[:, [1, 4]]
    assert torch.equal(basis.project(weight), expected)
    assert torch.equal(basis.coefficients(weight), weight[:, [4, 1]])


def test_a_linear_weight_has_no_free_axes() -> None:
    basis = channel_masks([[0, 2], [1]], 3)
    weight = torch.tensor([[1.0, 5.0, 3.0]])
    assert torch.equal(basis.coefficients(weight), torch.tensor([[2.0, 5.0]], dtype=torch.float64))
    projected = basis.project(weight)
    assert projected.dtype == torch.float32
    assert torch.equal(projected, torch.tensor([[2.0, 5.0, 2.0]]))


def test_the_convolution_is_mask_sums_times_coefficients() -> None:
    # What the basis is for: X * W = sum_m a_m (X * b_m), with masks that share no multiplication.
    basis = channel_masks([[0, 3], [1, 2, 5]], 6)
    weight = basis.project(random(4, 6, 3, 3))
    x = random(2, 6, 7, 8, seed=1)
    pooled = torch.stack([x[:, [0, 3]].sum(1), x[:, [1, 2, 5]].sum(1)], dim=1)
    dense = torch.nn.functional.conv2d(x, weight)
    reduced = torch.nn.functional.conv2d(pooled, basis.coefficients(weight))
    assert float((dense - reduced).abs().max()) < 1e-13 * float(dense.abs().max()) * 54


@pytest.mark.parametrize(
    ("dense", "reduced"),
    [((4, 3, 3), (2, 2, 2)), ((5, 3), (4, 1)), ((3, 2, 3), (3, 1, 2)), ((6,), (3,))],
)
def test_the_block_basis_projects_as_its_structure_does(
    dense: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    structure = Structure(dense, reduced)
    count = int(np.prod(reduced))
    blocks = structure.expand(torch.eye(count, dtype=torch.float64).reshape(count, *reduced))
    basis = CompositeBasis(blocks)
    weight = random(3, *dense)
    assert float((basis.project(weight) - structure.project(weight)).norm()) < 1e-12
    found = basis.coefficients(weight).reshape(3, *reduced)
    assert float((found - structure.coefficients(weight)).norm()) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_stay(dtype: torch.dtype) -> None:
    weight = random(3, 2, 3, 4).to(dtype)
    basis = CompositeBasis(torch.tensor([[[1, 1, 0], [0, 1, 0]], [[0, 1, 1], [0, 0, 1]]]))
    assert not basis.is_disjoint
    assert basis.project(weight).dtype == dtype
    assert basis.project(weight).shape == weight.shape
    assert basis.coefficients(weight).dtype == torch.float64


@pytest.mark.parametrize(
    "elements",
    [
        [[1, 1, 0], [1, 1, 0]],
        [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]],
        [[1, 0], [0, 1], [1, 1]],
        [[0, 0, 0]],
        [[1, 0, 0], [0, 0, 0]],
    ],
)
def test_dependent_elements_are_refused(elements: list[list[int]]) -> None:
    with pytest.raises(StructureError, match="linearly independent"):
        CompositeBasis(torch.tensor(elements))


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan"), float("inf")])
def test_elements_that_are_not_binary_are_refused(value: float) -> None:
    with pytest.raises(StructureError, match="zeros and ones"):
        CompositeBasis(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("shape", [(3,), (0, 3), ()])
def test_elements_of_no_use_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(StructureError, match="M >= 1"):
        CompositeBasis(torch.zeros(shape))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 1], [1, 2]], "channel 1 is in more than one mask"),
        ([[0], [4]], r"channel 4 is not one of 0\.\.3"),
        ([[-1]], "channel -1 is not one of"),
        ([[0], []], "linearly independent"),
        ([], "M >= 1"),
    ],
)
def test_impossible_masks_are_refused(groups: list[list[int]], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        channel_masks(groups, 4)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2,), (5, 4)])
def test_a_weight_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    basis = channel_masks([[0], [1, 2]], 4 if shape != (5, 4) else 5)
    with pytest.raises(StructureError, match="does not fit a basis over"):
        basis.project(torch.zeros(shape))
