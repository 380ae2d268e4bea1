"""The structural loss's gradient and proximal step, and the limit on the residual."""

from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structconv_cli.regularizer import (
    add_structural_gradient,
    falling,
    limit_residual,
    shrink_residual,
)
from structconv_cli.structure import Structure

laws = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
STRUCTURES = [
    Structure((4, 3, 3), (2, 2, 2)),
    Structure((4, 3, 3), (4, 2, 2)),
    Structure((6,), (3,)),
    Structure((5, 3), (3, 1)),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def projector(structure: Structure) -> np.ndarray:
    """A A^+ with A written out, a column per placed block of ones: in fractions, so that no
    rounding but that of its entries is in it."""
    columns = []
    for corner in product(*(range(count) for count in structure.reduced)):
        block = np.zeros(structure.dense, dtype=int)
        ends = zip(corner, structure.windows, strict=True)
        block[tuple(slice(start, start + window) for start, window in ends)] = 1
        columns.append(block.ravel().tolist())
    basis = sympy.Matrix(columns).T
    exact = basis * (basis.T * basis).inv() * basis.T
    return np.array(exact.tolist(), dtype=np.float64)


def projection(structure: Structure, weight: torch.Tensor) -> torch.Tensor:
    """A A^+ W."""
    flat = weight.detach().double().flatten(1).numpy()
    return torch.from_numpy(flat @ projector(structure).T).reshape(weight.shape)


def relative_residual(structure: Structure, weight: torch.Tensor) -> float:
    exact = weight.detach().double()
    return float((exact - projection(structure, weight)).norm() / exact.norm())


def loss(structure: Structure, weight: torch.Tensor) -> torch.Tensor:
    """The paper's, for one layer, differentiable: its projection is a constant matrix."""
    size = weight[0].numel()
    matrix = projection(
        structure, torch.eye(size, dtype=weight.dtype).reshape(-1, *structure.dense)
    )
    flat = weight.flatten(1)
    return (flat - flat @ matrix.flatten(1)).norm() / flat.norm()


def gradient(structure: Structure, weight: torch.Tensor, strength: float) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = torch.zeros_like(weight)
    add_structural_gradient(parameter, structure, strength)
    assert torch.equal(parameter.detach(), weight)
    return parameter.grad


# --- the loss's gradient


@laws
@given(seeds, st.floats(1e-3, 1e3), st.floats(0.01, 10), st.sampled_from(STRUCTURES))
def test_gradient_is_that_of_the_loss(
    seed: int, scale: float, strength: float, structure: Structure
) -> None:
    weight = (scale * random(3, *structure.dense, seed=seed)).requires_grad_()
    loss(structure, weight).backward()
    assert weight.grad is not None
    expected = strength * weight.grad
    found = gradient(structure, weight.detach(), strength)
    assert float((found - expected).norm() / expected.norm()) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradient_in_float32(structure: Structure) -> None:
    weight = random(3, *structure.dense)
    exact = gradient(structure, weight, 0.1)
    found = gradient(structure, weight.float(), 0.1)
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def test_the_gradient_is_added() -> None:
    weight = random(3, *STRUCTURES[0].dense)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = torch.ones_like(weight)
    add_structural_gradient(parameter, STRUCTURES[0], 0.1)
    assert torch.allclose(parameter.grad - 1, gradient(STRUCTURES[0], weight, 0.1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_gradient_at_the_kink_and_at_zero(structure: Structure) -> None:
    for weight in (torch.zeros(2, *structure.dense), torch.ones(2, *structure.dense)):
        found = gradient(structure, weight, 1.0)
        # Ones are inside every structure; what rounding leaves has a direction, but no meaning.
        assert bool(torch.isfinite(found).all())
    assert not bool(gradient(structure, torch.zeros(2, *structure.dense), 1.0).any())


def test_a_frozen_weight_is_left_alone() -> None:
    parameter = torch.nn.Parameter(random(3, *STRUCTURES[0].dense), requires_grad=False)
    add_structural_gradient(parameter, STRUCTURES[0], 1.0)
    assert parameter.grad is None


# --- the proximal step


@laws
@given(seeds, st.floats(0.001, 10), st.sampled_from(STRUCTURES))
def test_shrinking_is_the_proximal_step(seed: int, step: float, structure: Structure) -> None:
    start = random(3, *structure.dense, seed=seed)
    found = start.clone()
    shrink_residual(found, structure, step)

    def objective(weight: torch.Tensor) -> float:
        residual = (weight - projection(structure, weight)).norm()
        return float(step * residual / start.norm() + (weight - start).square().sum() / 2)

    best = objective(found)
    for other in range(10):
        nudge = 1e-3 * random(3, *structure.dense, seed=other)
        assert objective(found + nudge) > best
    gap = projection(structure, found) - projection(structure, start)
    assert float(gap.norm()) < 1e-12 * float(start.norm())


def test_shrinking_reaches_exactly_zero() -> None:
    structure = STRUCTURES[0]
    weight = random(3, *structure.dense)
    for _ in range(100):
        shrink_residual(weight, structure, 1.0)
    assert torch.equal(weight, structure.project(weight)) or (
        relative_residual(structure, weight) < 1e-15
    )


# --- the limit


@laws
@given(seeds, st.floats(0, 0.999), st.floats(0.01, 0.99), st.sampled_from(STRUCTURES))
def test_limited_residual(seed: int, limit: float, start: float, structure: Structure) -> None:
    raw = random(3, *structure.dense, seed=seed)
    inside, outside = projection(structure, raw), raw - projection(structure, raw)
    # A weight whose relative residual is `start`.
    outside *= start / (1 - start**2) ** 0.5 * inside.norm() / outside.norm()
    weight = inside + outside
    limited = weight.clone()
    limit_residual(limited, structure, limit)
    if start <= limit:
        assert float((limited - weight).norm()) < 1e-12 * float(weight.norm())
    else:
        assert relative_residual(structure, limited) == pytest.approx(limit, abs=1e-9)
        # What is left of the residual still points the same way.
        left = limited - inside
        cosine = float((left * outside).sum() / outside.norm())
        assert cosine == pytest.approx(float(left.norm()), abs=1e-12)
    gap = projection(structure, limited) - inside
    assert float(gap.norm()) < 1e-12 * float(weight.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_limit_zero_is_projection(structure: Structure, dtype: torch.dtype) -> None:
    weight = random(3, *structure.dense).to(dtype)
    expected = structure.project(weight)
    limit_residual(weight, structure, 0.0)
    assert torch.equal(weight, expected)
    assert relative_residual(structure, weight) < 4 * torch.finfo(dtype).eps


def test_limit_works_in_place_on_a_parameter() -> None:
    structure = STRUCTURES[0]
    parameter = torch.nn.Parameter(random(3, *structure.dense).float())
    place = parameter.data_ptr()
    limit_residual(parameter, structure, 0.1)
    assert parameter.data_ptr() == place
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert relative_residual(structure, parameter) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1.0])
def test_a_zero_weight_stays_zero(limit: float) -> None:
    weight = torch.zeros(2, 4, 3, 3)
    limit_residual(weight, STRUCTURES[0], limit)
    assert torch.equal(weight, torch.zeros(2, 4, 3, 3))


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_limit_falls_from_one_to_exactly_zero(steps: int) -> None:
    limits = [falling(step, steps) for step in range(steps + 1)]
    assert limits[0] == 1
    assert limits[-1] == 0
    assert falling(steps + 3, steps) == 0
    assert all(a > b for a, b in pairwise(limits))
    # A cosine: half way down in the middle.
    if steps % 2 == 0:
        assert limits[steps // 2] == pytest.approx(0.5)


def test_no_steps_at_all_allow_no_residual() -> None:
    assert falling(0, 0) == 0
