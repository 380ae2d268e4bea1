"""Laws of the structured subspace; the reference is built from the definition, block by block."""

from itertools import product
from math import prod

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from structconv_cli.errors import StructureError
from structconv_cli.structure import Structure
from structconv_cli.structured_axis import project_axis

EXACT = {torch.float64: 1e-12, torch.float32: 2e-6}
"""Relative tolerance: a few hundred roundings of kernels with at most 6^3 elements."""

laws = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(list(EXACT))


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    dense = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    reduced = tuple(draw(st.integers(1, size)) for size in dense)
    if draw(st.booleans()):
        return Structure(dense, reduced)
    order = draw(st.permutations(range(dense[0])))
    return Structure(dense, reduced, tuple(order[: draw(st.integers(reduced[0], dense[0]))]))


@st.composite
def balanced_structures(draw: st.DrawFn) -> Structure:
    dense = (draw(st.integers(3, 9)), *draw(st.lists(st.integers(1, 4), max_size=2)))
    reads = tuple(draw(st.permutations(range(dense[0])))[: draw(st.integers(3, dense[0]))])
    kept = draw(st.integers(2, len(reads) - 1))
    kernel = tuple(draw(st.integers(1, size)) for size in dense[1:])
    return Structure(dense, (kept, *kernel), reads, balanced=True)


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def block_basis(structure: Structure) -> np.ndarray:
    """(prod dense, prod reduced): one column for every placement of the block of ones."""
    columns = []
    for corner in product(*(range(count) for count in structure.reduced)):
        read = structure.reads or tuple(range(structure.dense[0]))
        sizes = (len(read), *structure.dense[1:])
        block = np.zeros(sizes)
        block[
            tuple(
                slice(start, start + size - count + 1)
                for start, size, count in zip(corner, sizes, structure.reduced, strict=True)
            )
        ] = 1
        whole = np.zeros(structure.dense)
        whole[list(read)] = block
        columns.append(whole.ravel())
    return np.stack(columns, axis=1)


def reference_projection(structure: Structure, weight: torch.Tensor) -> torch.Tensor:
    basis = torch.from_numpy(block_basis(structure))
    flat = weight.double().flatten(1)
    return (flat @ torch.linalg.pinv(basis).T @ basis.T).reshape(weight.shape)


def relative(a: torch.Tensor, b: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """||a - b|| against the norm of `size`, or of b."""
    scale = float((b if size is None else size).double().norm())
    return float((a.double() - b.double()).norm()) / (scale or 1.0)


# --- projection


@laws
@given(structures(), seeds, dtypes)
def test_projection_is_that_of_the_definition(
    structure: Structure, seed: int, dtype: torch.dtype
) -> None:
    weight = random(3, *structure.dense, seed=seed, dtype=dtype)
    projected = structure.project(weight)
    assert projected.dtype == dtype
    assert relative(projected, reference_projection(structure, weight), weight) < EXACT[dtype]


@laws
@given(structures(), seeds)
def test_projection_is_the_kronecker_product_of_the_orthonormal_bases(
    structure: Structure, seed: int
) -> None:
    weight = random(2, *structure.dense, seed=seed)
    product_of_axes = np.ones((1, 1))
    for factor in structure.orthonormal_basis():
        product_of_axes = np.kron(product_of_axes, factor.numpy())
    q = torch.from_numpy(product_of_axes)
    assert relative(q.T @ q, torch.eye(prod(structure.reduced), dtype=torch.float64)) < 1e-13
    expected = (weight.flatten(1) @ q @ q.T).reshape(weight.shape)
    assert relative(structure.project(weight), expected, weight) < 1e-12


@laws
@given(structures(), seeds, dtypes)
def test_projection_is_idempotent(structure: Structure, seed: int, dtype: torch.dtype) -> None:
    weight = random(2, *structure.dense, seed=seed, dtype=dtype)
    once = structure.project(weight)
    assert relative(structure.project(once), once, weight) < EXACT[dtype]


@laws
@given(structures(), seeds, dtypes)
def test_residual_is_orthogonal_to_every_block_and_to_the_projection(
    structure: Structure, seed: int, dtype: torch.dtype
) -> None:
    weight = random(2, *structure.dense, seed=seed, dtype=dtype)
    projected = structure.project(weight)
    residual = (weight - projected).double().flatten(1)
    basis = torch.from_numpy(block_basis(structure))
    cosines = residual @ (basis / basis.norm(dim=0)) / weight.double().norm()
    assert float(cosines.abs().max()) < EXACT[dtype]
    inner = float((residual * projected.double().flatten(1)).sum())
    assert abs(inner) < EXACT[dtype] * float(weight.double().norm()) ** 2


@laws
@given(structures(), seeds, st.floats(-8, 8), st.floats(-8, 8))
def test_projection_is_linear(structure: Structure, seed: int, s: float, t: float) -> None:
    v = random(2, *structure.dense, seed=seed)
    w = random(2, *structure.dense, seed=seed + 1)
    combined = structure.project(s * v + t * w)
    apart = s * structure.project(v) + t * structure.project(w)
    assert float((combined - apart).norm()) < 1e-12 * (8 * float(v.norm() + w.norm()))


@laws
@given(structures(), seeds)
def test_scaling_output_channels_commutes_with_projection(structure: Structure, seed: int) -> None:
    weight = random(4, *structure.dense, seed=seed)
    # Powers of two scale without rounding, so this must hold bit for bit.
    scales = torch.tensor([0.25, -2.0, 64.0, 0.0], dtype=torch.float64)
    scales = scales.reshape(-1, *[1] * len(structure.dense))
    assert torch.equal(structure.project(scales * weight), scales * structure.project(weight))
    folded = scales * 1.1 * structure.project(weight)
    assert structure.residual(folded) < 1e-12


def test_every_block_of_ones_is_inside() -> None:
    structure = Structure((5, 3, 4), (2, 2, 1))
    blocks = torch.from_numpy(block_basis(structure).T.copy()).reshape(-1, 5, 3, 4)
    assert relative(structure.project(blocks), blocks) < 1e-14
    identity = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2, 1)
    assert relative(structure.coefficients(blocks), identity) < 1e-13


@pytest.mark.parametrize("dtype", list(EXACT))
def test_dense_structure_changes_nothing_at_all(dtype: torch.dtype) -> None:
    structure = Structure((5, 3, 2), (5, 3, 2))
    weight = random(4, 5, 3, 2, dtype=dtype)
    assert structure.is_dense
    assert not Structure((5, 3, 2), (5, 3, 1)).is_dense
    assert torch.equal(structure.project(weight), weight)
    assert torch.equal(structure.coefficients(weight), weight)
    assert torch.equal(structure.expand(weight), weight)
    assert structure.residual(weight) == 0


@pytest.mark.parametrize(
    ("dense", "reduced"),
    [((4, 3, 3), (2, 2, 2)), ((6,), (4,)), ((2, 5, 1), (2, 1, 1)), ((7, 3), (3, 2))],
)
def test_gradient_of_projection(dense: tuple[int, ...], reduced: tuple[int, ...]) -> None:
    structure = Structure(dense, reduced)
    weight = random(2, *dense).requires_grad_()
    assert torch.autograd.gradcheck(structure.project, weight)
    # The projection is symmetric, so its gradient of <g, P w> is P g.
    direction = random(2, *dense, seed=1)
    (gradient,) = torch.autograd.grad((direction * structure.project(weight)).sum(), weight)
    assert relative(gradient, structure.project(direction)) < 1e-13


def test_gradient_of_coefficients_and_expansion() -> None:
    structure = Structure((4, 3, 3), (3, 2, 2))
    assert torch.autograd.gradcheck(structure.coefficients, random(2, 4, 3, 3).requires_grad_())
    assert torch.autograd.gradcheck(structure.expand, random(2, 3, 2, 2).requires_grad_())


# --- which channels are read, in which order, and balanced


@laws
@given(balanced_structures(), seeds)
def test_a_balanced_projection_is_that_onto_windows_without_class_sums(
    structure: Structure, seed: int
) -> None:
    windows = block_basis(Structure(structure.dense, structure.reduced, structure.reads))
    # Sums of every class of the channels read, one after the other, at every kernel position.
    kernel = prod(structure.dense[1:])
    classes = np.zeros((structure.windows[0], structure.dense[0]))
    for place, channel in enumerate(structure.reads):
        classes[place % structure.windows[0], channel] = 1
    sums = np.kron(classes, np.eye(kernel))
    inside = windows @ scipy.linalg.null_space(sums @ windows)
    assert inside.shape[1] == (structure.reduced[0] - 1) * prod(structure.reduced[1:])
    weight = random(3, *structure.dense, seed=seed)
    flat = weight.flatten(1).numpy()
    expected = torch.from_numpy(flat @ inside @ np.linalg.pinv(inside)).reshape(weight.shape)
    projected = structure.project(weight)
    assert relative(projected, expected, weight) < 1e-12
    assert relative(structure.project(projected), projected, weight) < 1e-12
    assert relative(structure.expand(structure.coefficients(weight)), projected, weight) < 1e-12
    product_of_axes = np.ones((1, 1))
    for factor in structure.orthonormal_basis():
        product_of_axes = np.kron(product_of_axes, factor.numpy())
    q = torch.from_numpy(product_of_axes)
    assert relative((weight.flatten(1) @ q @ q.T).reshape(weight.shape), projected, weight) < 1e-12


def test_a_selection_zeroes_the_other_channels_and_keeps_these() -> None:
    structure = Structure((5, 3, 3), (2, 3, 3), (4, 1))
    weight = random(2, 5, 3, 3)
    projected = structure.project(weight)
    assert torch.equal(projected[:, [1, 4]], weight[:, [1, 4]])
    assert not projected[:, [0, 2, 3]].any()
    assert torch.equal(structure.coefficients(weight), weight[:, [4, 1]])
    assert structure.windows == (1, 1, 1)
    assert not structure.is_dense


@pytest.mark.parametrize(
    ("reduced", "reads", "balanced", "problem"),
    [
        ((2, 3), (0, 0), False, "once"),
        ((2, 3), (0, 4), False, "between 0 and 3"),
        ((2, 3), (-1, 0), False, "between 0 and 3"),
        ((3, 3), (0, 1), False, "fewer"),
        ((4, 3), (), True, "balanced"),
        ((1, 3), (), True, "balanced"),
        ((2, 3), (3, 1), True, "balanced"),
    ],
)
def test_impossible_channels_are_refused(
    reduced: tuple[int, ...], reads: tuple[int, ...], balanced: bool, problem: str
) -> None:
    with pytest.raises(StructureError, match=problem):
        Structure((4, 3), reduced, reads, balanced)


# --- the residue-class law


@laws
@given(st.integers(1, 24), st.data(), seeds)
def test_a_vector_is_inside_exactly_when_its_residue_class_sums_agree(
    length: int, data: st.DataObject, seed: int
) -> None:
    reduced = data.draw(st.integers(1, length))
    window = length - reduced + 1
    projected = project_axis(random(1, length, seed=seed), 1, reduced)
    sums = torch.stack([projected[0, r::window].sum() for r in range(window)])
    assert float((sums - sums[0]).abs().max()) < 1e-12
    # The other way round: fix the last member of every class so that all sums are 0.7.
    vector = random(length, seed=seed + 1)
    for r in range(window):
        vector[r::window][-1] += 0.7 - vector[r::window].sum()
    assert Structure((length,), (reduced,)).residual(vector.unsqueeze(0)) < 1e-13


# --- coefficients


@laws
@given(structures(), seeds)
def test_coefficients_are_least_squares(structure: Structure, seed: int) -> None:
    weight = random(3, *structure.dense, seed=seed)
    basis = block_basis(structure)
    expected, *_ = np.linalg.lstsq(basis, weight.flatten(1).T.numpy(), rcond=None)
    expected = torch.from_numpy(expected.T.copy()).reshape(3, *structure.reduced)
    found = structure.coefficients(weight)
    assert found.shape == expected.shape
    assert relative(found, expected, weight) < 1e-11


@laws
@given(structures(), seeds)
def test_expansion_is_the_basis_times_the_coefficients(structure: Structure, seed: int) -> None:
    coefficients = random(3, *structure.reduced, seed=seed)
    expected = coefficients.flatten(1) @ torch.from_numpy(block_basis(structure)).T
    expanded = structure.expand(coefficients)
    assert relative(expanded, expected.reshape(3, *structure.dense)) < 1e-14
    assert relative(structure.coefficients(expanded), coefficients, expanded) < 1e-12


@laws
@given(structures(), seeds, dtypes)
def test_expanding_the_coefficients_of_a_weight_gives_its_projection(
    structure: Structure, seed: int, dtype: torch.dtype
) -> None:
    weight = random(2, *structure.dense, seed=seed, dtype=dtype)
    projected = structure.project(weight)
    rebuilt = structure.expand(structure.coefficients(projected))
    assert rebuilt.dtype == dtype
    # Coefficients may be larger than the weight that they sum to: allow for their size.
    growth = 1 + float(structure.coefficients(weight.double()).norm() / weight.double().norm())
    assert relative(rebuilt, projected, weight) < EXACT[dtype] * growth


# --- residual


@laws
@given(structures(), seeds)
def test_residual_is_zero_inside_and_one_in_the_complement(structure: Structure, seed: int) -> None:
    weight = random(2, *structure.dense, seed=seed)
    assert structure.residual(structure.expand(random(2, *structure.reduced, seed=seed))) < 1e-14
    outside = weight - reference_projection(structure, weight)
    if not structure.is_dense:
        assert abs(structure.residual(outside) - 1) < 1e-12
    expected = float(outside.norm() / weight.norm())
    assert abs(structure.residual(weight) - expected) < 1e-12


def test_residual_of_a_float32_weight_is_computed_in_float64() -> None:
    structure = Structure((8, 3, 3), (4, 2, 2))
    inside = structure.expand(random(4, 4, 2, 2)).float()
    expected = float(
        (inside.double() - reference_projection(structure, inside)).norm() / inside.double().norm()
    )
    # What storing in float32 took away, and no more.
    assert structure.residual(inside) == pytest.approx(expected, rel=1e-6)
    assert expected < 1e-7
    assert structure.residual(torch.zeros(4, 8, 3, 3)) == 0
    assert structure.residual(inside.requires_grad_()) > 0


# --- wide axes


@pytest.mark.parametrize("reduced", [1025, 2000, 2, 1])
def test_a_wide_axis_keeps_its_digits(reduced: int) -> None:
    structure = Structure((2048,), (reduced,))
    weight = random(3, 2048, seed=reduced)
    (q,) = structure.orthonormal_basis()
    projected = structure.project(weight)
    assert relative(projected, weight @ q @ q.T, weight) < 1e-12
    assert relative(structure.expand(structure.coefficients(weight)), projected, weight) < 1e-12
    assert relative(structure.project(weight.float()), projected, weight) < 1e-6


# --- shape


def test_windows_ratio_and_bases() -> None:
    structure = Structure((4, 3, 5), (2, 3, 1))
    assert structure.windows == (3, 1, 5)
    assert structure.ratio == 60 / 6
    first, second, third = structure.basis()
    expected = torch.tensor([[1, 0], [1, 1], [1, 1], [0, 1]], dtype=torch.float64)
    assert torch.equal(first, expected)
    assert torch.equal(second, torch.eye(3, dtype=torch.float64))
    assert torch.equal(third, torch.ones(5, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dense", "reduced"),
    [
        ((4, 3), (5, 3)),
        ((4, 3), (0, 3)),
        ((4, 3), (2, -1)),
        ((4, 3), (2,)),
        ((4,), (2, 1)),
        ((), ()),
        ((0,), (0,)),
        ((-2,), (-2,)),
    ],
)
def test_an_impossible_structure_is_refused(
    dense: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    with pytest.raises(StructureError) as error:
        Structure(dense, reduced)
    assert str(dense) in str(error.value)
    assert str(reduced) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 4), (4, 3, 3), (2, 4, 3, 3, 1)])
def test_a_weight_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    structure = Structure((4, 3, 3), (2, 2, 2))
    for method in (structure.project, structure.coefficients, structure.expand):
        with pytest.raises(StructureError) as error:
            method(torch.zeros(shape))
        assert str(shape) in str(error.value)
    with pytest.raises(StructureError):
        structure.residual(torch.ones(shape))


@laws
@given(structures())
def test_json_round_trip(structure: Structure) -> None:
    adapter = TypeAdapter(Structure)
    text = adapter.dump_json(structure)
    restored = adapter.validate_json(text)
    assert restored == structure
    assert hash(restored) == hash(structure)
    assert adapter.dump_json(restored) == text


def test_json_of_an_impossible_structure_is_refused() -> None:
    with pytest.raises(ValidationError, match="between 1 and the dense size"):
        TypeAdapter(Structure).validate_json('{"dense": [3], "reduced": [4]}')
