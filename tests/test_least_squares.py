"""A fit is the best weight of its subspace on explicit patches, by an independent solver."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structconv_cli.errors import StructureError
from structconv_cli.reconstruction import subspace
from structconv_cli.reconstruction.activations import Moments
from structconv_cli.reconstruction.least_squares import DenseLayer, fit
from structconv_cli.structure import Structure

TABLE = [
    ((4, 3, 3), (4, 2, 2)),
    ((6, 3, 3), (4, 3, 3)),
    ((6, 3, 3), (4, 2, 3)),
    ((4, 3, 3), (1, 1, 1)),
    ((9,), (5,)),
    ((5, 4), (5, 2)),
    ((3, 2, 3, 2), (2, 2, 1, 1)),
]


def patches_of(count: int, size: int, seed: int, groups: int = 1) -> np.ndarray:
    """Correlated patches with a mean, (G, n, D)."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((groups, size, size)) / size**0.5
    return rng.standard_normal((groups, count, size)) @ mix + rng.standard_normal((groups, 1, size))


def moments_of(patches: np.ndarray) -> Moments:
    mean = patches.mean(1)
    centred = patches - mean[:, None]
    covariance = np.einsum("gni,gnj->gij", centred, centred) / patches.shape[1]
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance), patches.shape[1])


def layer(dense: tuple[int, ...], outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return (
        torch.from_numpy(rng.standard_normal((outputs, *dense))),
        torch.from_numpy(rng.standard_normal(outputs)),
    )


def full_basis(structure: Structure) -> np.ndarray:
    matrix = np.ones((1, 1))
    for axis in structure.basis():
        matrix = np.kron(matrix, axis.numpy())
    return matrix


def outputs(weight: torch.Tensor, bias: torch.Tensor, patches: np.ndarray) -> np.ndarray:
    """(G, n, C_out / G)."""
    groups = len(patches)
    rows = weight.numpy().reshape(groups, len(weight) // groups, -1)
    return np.einsum("gni,goi->gno", patches, rows) + bias.numpy().reshape(groups, 1, -1)


@pytest.fixture
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "_MOST_SHRINKAGE", 1e-14)
    monkeypatch.setattr(subspace, "_LEAST_RIDGE", 1e-14)


@pytest.mark.parametrize(("dense", "reduced"), TABLE)
@pytest.mark.usefixtures("no_ridge")
def test_a_fit_is_what_lstsq_finds_on_the_patches(
    dense: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    structure = Structure(dense, reduced)
    weight, bias = layer(dense, 5)
    patches = patches_of(400, prod(dense), 1)
    wanted = outputs(weight, bias, patches)[0]
    seen = np.concatenate([patches[0] @ full_basis(structure), np.ones((400, 1))], axis=1)
    solved = np.linalg.lstsq(seen, wanted)[0]
    found = fit(weight, bias, structure, moments_of(patches), rescale=False)
    expected = (full_basis(structure) @ solved[:-1]).T.reshape(weight.shape)
    np.testing.assert_allclose(found.weight, expected, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.bias, solved[-1], rtol=0, atol=1e-8)
    missed = np.square(seen @ solved - wanted).sum() / 400 / wanted.var(0).sum()
    assert found.error == pytest.approx(missed, abs=1e-9)


@pytest.mark.parametrize(("dense", "reduced"), TABLE)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_error_told_is_the_outputs(
    dense: tuple[int, ...], reduced: tuple[int, ...], rescale: bool, groups: int
) -> None:
    weight, bias = layer(dense, 6)
    patches = patches_of(100, prod(dense), 2, groups)
    moments = moments_of(patches)
    found = fit(weight, bias, Structure(dense, reduced), moments, rescale=rescale)
    before, after = outputs(weight, bias, patches), outputs(found.weight, found.bias, patches)
    error = np.square(after - before).mean(1).sum() / before.var(1).sum()
    assert found.error == pytest.approx(error, rel=1e-9)
    # A free bias keeps the mean; rescaling keeps the variance too.
    np.testing.assert_allclose(after.mean(1), before.mean(1), rtol=0, atol=1e-10)
    assert np.allclose(after.var(1), before.var(1), rtol=1e-9) == rescale


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(TABLE), st.integers(0, 99), st.integers(2, 300), st.booleans())
def test_a_fit_lies_in_the_subspace_and_beats_plain_projection(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], seed: int, count: int, rescale: bool
) -> None:
    structure = Structure(*sizes)
    weight, bias = layer(structure.dense, 4, seed)
    patches = patches_of(count, prod(structure.dense), seed)
    found = fit(weight, bias, structure, moments_of(patches), rescale=rescale)
    assert structure.residual(found.weight) <= 1e-12
    plain = structure.project(weight)
    before, after = outputs(weight, bias, patches), outputs(plain, bias, patches)
    projected = (after - before).var(1).sum() / before.var(1).sum()
    fitted = fit(weight, bias, structure, moments_of(patches), rescale=False).error
    assert fitted <= projected * (1 + 1e-9) + 1e-12
    assert found.residual == pytest.approx(structure.residual(weight), rel=1e-9)


@pytest.mark.parametrize(("dense", "reduced"), TABLE)
def test_without_data_it_is_plain_projection(
    dense: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    structure = Structure(dense, reduced)
    weight, bias = layer(dense, 5)
    found = fit(weight, bias, structure, None)
    matrix = full_basis(structure)
    expected = weight.flatten(1).numpy() @ matrix @ np.linalg.pinv(matrix)
    np.testing.assert_allclose(found.weight.flatten(1), expected, rtol=0, atol=1e-10)
    assert torch.equal(found.bias, bias)
    relative = np.linalg.norm(expected - weight.flatten(1).numpy()) / float(weight.norm())
    assert found.residual == pytest.approx(relative, rel=1e-9)
    assert found.error == found.residual**2


@pytest.mark.parametrize(("dense", "reduced"), TABLE)
def test_white_patches_ask_for_plain_projection(
    dense: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    structure = Structure(dense, reduced)
    weight, bias = layer(dense, 5)
    size = prod(dense)
    zeros, white = torch.zeros(1, size).double(), torch.eye(size).double()[None]
    found = fit(weight, bias, structure, Moments(zeros, white, 1000), rescale=False)
    torch.testing.assert_close(found.weight, structure.project(weight), rtol=0, atol=1e-10)
    assert found.error == pytest.approx(found.residual**2, rel=1e-9)


def test_directions_that_no_sample_shows_are_projected_plainly() -> None:
    structure = Structure((6,), (4,))
    weight, bias = layer((6,), 3)
    # The patches know of two directions inside the subspace's span at most.
    patches = np.zeros((1, 50, 6))
    patches[0, :, 0] = np.random.default_rng(0).standard_normal(50)
    found = fit(weight, bias, structure, moments_of(patches), rescale=False)
    assert float((found.weight - weight).norm()) <= 2 * float(weight.norm())
    assert found.error < fit(weight, bias, structure, None).error


def test_few_samples_are_not_learnt_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = Structure((40,), (30,))
    weight, bias = layer((40,), 8)
    patches = patches_of(4000, 40, 3)
    seen, unseen = moments_of(patches[:, :34]), patches[:, 34:]
    before = outputs(weight, bias, unseen)

    def missed(moments: Moments | None) -> float:
        found = fit(weight, bias, structure, moments, rescale=False)
        after = outputs(found.weight, found.bias, unseen)
        return float((after - before).var(1).sum() / before.var(1).sum())

    shrunk = missed(seen)
    assert shrunk < missed(None)
    monkeypatch.setattr(subspace, "_MOST_SHRINKAGE", 1e-14)
    # So few patches decide a 30-dimensional fit nearly exactly: most that they teach is chance.
    assert shrunk < 0.5 * missed(seen)


def test_a_dense_structure_changes_nothing() -> None:
    weight, bias = layer((4, 3, 3), 5)
    found = fit(weight, bias, Structure((4, 3, 3), (4, 3, 3)), moments_of(patches_of(9, 36, 0)))
    assert torch.equal(found.weight, weight)
    assert (found.error, found.residual) == (0.0, 0.0)


def test_a_weight_inside_the_subspace_stays() -> None:
    structure = Structure((6, 3, 3), (4, 2, 2))
    weight, bias = layer((6, 3, 3), 5)
    inside = structure.project(weight)
    found = fit(inside, bias, structure, moments_of(patches_of(200, 54, 0)))
    torch.testing.assert_close(found.weight, inside, rtol=0, atol=1e-10)
    assert found.error <= 1e-12


@pytest.mark.parametrize("rescale", [False, True])
def test_dead_inputs_and_dead_filters_stay_finite(rescale: bool) -> None:
    structure = Structure((4, 3, 3), (4, 2, 2))
    weight, bias = layer((4, 3, 3), 5)
    weight[1] = 0
    # Orthogonal to the subspace: its projection has no variance to be scaled.
    weight[2] -= structure.project(weight)[2]
    patches = patches_of(100, 36, 0)
    found = fit(weight, bias, structure, moments_of(patches), rescale=rescale)
    assert bool(found.weight.isfinite().all())
    assert torch.equal(found.weight[1], torch.zeros(4, 3, 3).double())
    silent = fit(weight, bias, structure, moments_of(0 * patches), rescale=rescale)
    torch.testing.assert_close(silent.weight, structure.project(weight), rtol=0, atol=1e-12)
    assert silent.error == silent.residual**2


def test_a_singular_system_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "_MOST_SHRINKAGE", 0.0)
    monkeypatch.setattr(subspace, "_LEAST_RIDGE", 0.0)
    structure = Structure((8,), (6,))
    weight, bias = layer((8,), 3)
    patches = patches_of(3, 8, 0)
    found = fit(weight, bias, structure, moments_of(patches), rescale=False)
    # Three patches, two of them free: they are met exactly.
    np.testing.assert_allclose(
        outputs(found.weight, found.bias, patches), outputs(weight, bias, patches), atol=1e-8
    )


def test_a_structure_of_other_sizes_is_told() -> None:
    weight, bias = layer((4, 3, 3), 5)
    with pytest.raises(StructureError, match=r"does not fit"):
        DenseLayer(weight, bias, None).fit(Structure((4, 3), (4, 2)))
