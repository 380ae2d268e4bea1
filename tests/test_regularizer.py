"""The structural loss against its definition, and the limit on the residual."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structconv_cli.regularizer import limit_residual, residual_limit, structural_loss
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


def projection(structure: Structure, weight: torch.Tensor) -> torch.Tensor:
    """A A^+ W with A written out, a column per placed block of ones."""
    columns = []
    for corner in product(*(range(count) for count in structure.reduced)):
        block = np.zeros(structure.dense)
        ends = zip(corner, structure.windows, strict=True)
        block[tuple(slice(start, start + window) for start, window in ends)] = 1
        columns.append(block.ravel())
    basis = np.stack(columns, axis=1)
    flat = weight.detach().double().flatten(1).numpy()
    return torch.from_numpy(flat @ (basis @ np.linalg.pinv(basis)).T).reshape(weight.shape)


def relative_residual(structure: Structure, weight: torch.Tensor) -> float:
    exact = weight.detach().double()
    return float((exact - projection(structure, weight)).norm() / exact.norm())


# --- the loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_is_the_sum_of_relative_residuals(dtype: torch.dtype, tolerance: float) -> None:
    weights = [random(5, *s.dense, seed=i).to(dtype) for i, s in enumerate(STRUCTURES)]
    expected = sum(relative_residual(s, w) for s, w in zip(STRUCTURES, weights, strict=True))
    found = structural_loss(list(zip(weights, STRUCTURES, strict=True)))
    assert found.shape == ()
    assert found.dtype == dtype
    assert float(found) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_loss_is_zero_inside_and_one_in_the_complement(structure: Structure) -> None:
    weight = random(3, *structure.dense)
    inside = projection(structure, weight)
    assert float(structural_loss([(inside, structure)])) < 1e-14
    assert float(structural_loss([(weight - inside, structure)])) == pytest.approx(1, abs=1e-13)


@laws
@given(seeds, st.floats(1e-6, 1e6), st.sampled_from(STRUCTURES))
def test_loss_does_not_depend_on_scale(seed: int, scale: float, structure: Structure) -> None:
    weight = random(3, *structure.dense, seed=seed)
    for factor in (scale, -scale):
        scaled = float(structural_loss([(factor * weight, structure)]))
        assert scaled == pytest.approx(float(structural_loss([(weight, structure)])), rel=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradient_of_the_loss(structure: Structure) -> None:
    weight = random(2, *structure.dense).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: structural_loss([(w, structure)]), weight)


@laws
@given(seeds, st.sampled_from(STRUCTURES))
def test_a_step_down_the_gradient_shrinks_the_residual(seed: int, structure: Structure) -> None:
    weight = random(3, *structure.dense, seed=seed).requires_grad_()
    loss = structural_loss([(weight, structure)])
    loss.backward()
    residual = weight.detach() - projection(structure, weight)
    # Up the gradient is away from the subspace, and across the scale, which does not matter.
    assert float((weight.grad * residual).sum()) > 0
    assert abs(float((weight.grad * weight.detach()).sum())) < 1e-12
    stepped = weight.detach() - 1e-3 * weight.grad
    assert float(structural_loss([(stepped, structure)])) < float(loss.detach())


def test_no_layers_and_zero_weights_lose_nothing() -> None:
    assert float(structural_loss([])) == 0
    weight = torch.zeros(2, 4, 3, 3, requires_grad=True)
    loss = structural_loss([(weight, STRUCTURES[0])])
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool(torch.isfinite(weight.grad).all())


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
    limits = [residual_limit(step, steps) for step in range(steps + 1)]
    assert limits[0] == 1
    assert limits[-1] == 0
    assert residual_limit(steps + 3, steps) == 0
    assert all(a > b for a, b in pairwise(limits))
    # A cosine: half way down in the middle.
    if steps % 2 == 0:
        assert limits[steps // 2] == pytest.approx(0.5)


def test_no_steps_at_all_allow_no_residual() -> None:
    assert residual_limit(0, 0) == 0
