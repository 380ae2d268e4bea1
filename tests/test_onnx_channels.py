"""Which channels a tensor carries: sets of combinations, as matrices and applied to arrays."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from structconv_cli.onnx.channels import Channels, carried_matrix, combined, spread
from structconv_cli.onnx.spaces import Need

COUNT = 12
indices = st.lists(st.integers(0, COUNT - 1), max_size=10)


@st.composite
def combinations(draw: st.DrawFn) -> Channels:
    """Any x[plus] - x[minus] and the sum of x[total], as ranges that may touch or repeat."""
    plus = draw(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=8))
    same = st.lists(st.integers(0, COUNT - 1), min_size=len(plus), max_size=len(plus))
    minus = draw(st.one_of(st.just([]), same))
    total = draw(st.one_of(st.just([]), st.lists(st.integers(0, COUNT - 1), unique=True)))
    found = Channels.of(plus, minus)
    return Channels(found.plus, found.minus, Channels.of(total).plus)


def spelled(channels: Channels, array: np.ndarray) -> np.ndarray:
    """The definition, entry by entry along axis 0."""
    plus = [i for start, stop in channels.plus for i in range(start, stop)]
    minus = [i for start, stop in channels.minus for i in range(start, stop)]
    total = [i for start, stop in channels.total for i in range(start, stop)]
    rows = [array[i] - (array[minus[place]] if minus else 0) for place, i in enumerate(plus)]
    rows += [sum((array[i] for i in total), np.zeros(array.shape[1:]))] if total else []
    return np.stack(rows)


@given(combinations(), st.integers(0, 2), st.integers(0, 9))
def test_apply_and_the_matrix_are_the_definition(channels: Channels, axis: int, seed: int) -> None:
    # Integers: sums and products are exact.
    array = np.random.default_rng(seed).integers(-99, 99, (COUNT, 2, 3)).astype(np.float32)
    expected = spelled(channels, array)
    assert expected.shape[0] == channels.size
    matrix = channels.matrix(COUNT)
    assert matrix.shape == (channels.size, COUNT)
    assert np.array_equal(np.tensordot(matrix, array, 1), expected)
    moved = np.moveaxis(array, 0, axis)
    assert np.array_equal(channels.apply(moved, axis), np.moveaxis(expected, 0, axis))


@given(indices, st.integers(0, 9))
def test_a_selection_is_applied_to_the_bit(chosen: list[int], seed: int) -> None:
    channels = Channels.of(chosen)
    assert channels.is_selection
    bits = np.random.default_rng(seed).integers(0, 2**32, COUNT, dtype=np.uint32)
    array = bits.view(np.float32)
    array = np.where(np.isnan(array), np.float32(1), array)
    applied = channels.apply(array).astype(np.float32)
    assert applied.tobytes() == array[np.array(chosen, int)].tobytes()


@given(indices)
def test_ranges_hold_the_indices_in_order_and_are_as_few_as_can_be(chosen: list[int]) -> None:
    channels = Channels.of(chosen)
    assert list(channels.indices) == chosen
    assert channels.size == len(chosen)
    assert all(start < stop for start, stop in channels.plus)
    breaks = sum(b != a + 1 for a, b in itertools.pairwise(chosen))
    assert len(channels.plus) == (breaks + 1 if chosen else 0)
    # Made from its own indices it is equal, so that sets of channels can be compared.
    assert Channels.of(channels.indices) == channels


@given(st.integers(1, 40))
def test_all_channels_are_the_identity(count: int) -> None:
    channels = Channels.all(count)
    assert np.array_equal(channels.matrix(count), np.eye(count))
    assert channels == Channels.of(range(count))


@given(st.lists(combinations(), min_size=1, max_size=3), st.integers(0, 9))
def test_the_matrix_of_all_parts_makes_them_all(parts: list[Channels], seed: int) -> None:
    carried = tuple((f"part {place}", channels) for place, channels in enumerate(parts))
    array = np.random.default_rng(seed).integers(-99, 99, (COUNT, 4)).astype(np.float64)
    expected = np.concatenate([spelled(channels, array) for channels in parts])
    assert np.array_equal(carried_matrix(carried, COUNT) @ array, expected)


@st.composite
def channel_structures(draw: st.DrawFn) -> tuple[int, int, bool]:
    balanced = draw(st.booleans())
    count = draw(st.integers(2 + balanced, 24))
    return count, draw(st.integers(2 if balanced else 1, count - 1)), balanced


@given(channel_structures(), st.integers(0, 9))
def test_what_a_structured_layer_needs_is_all_that_it_reads(
    structure: tuple[int, int, bool], seed: int
) -> None:
    """Every row of weights whose residue-class sums are equal (zero where balanced) is a
    combination of the needed rows, which are as many as the subspace has dimensions."""
    count, reduced, balanced = structure
    need = Need.of(count, reduced, balanced)
    rows = need.combined.matrix(count)
    assert len(rows) == np.linalg.matrix_rank(rows) == reduced - balanced
    window = count - reduced + 1
    weight = np.random.default_rng(seed).standard_normal(count)
    classes = np.arange(count) % window
    for residue in range(window):
        members = classes == residue
        wanted = 0.0 if balanced else 1.0
        weight[members] += (wanted - weight[members].sum()) / members.sum()
    solution = np.linalg.lstsq(rows.T, weight, rcond=None)[0]
    assert np.abs(rows.T @ solution - weight).max() <= 1e-9 * np.abs(weight).max()
    # What the last of each class is lessened by has the same residue.
    assert all(
        (a - b) % window == 0
        for a, b in zip(need.difference.indices, need.difference.subtracted, strict=True)
    )


@st.composite
def proper(draw: st.DrawFn) -> Channels:
    """Combinations that take no channel from itself."""
    channels = draw(combinations())
    pairs = [
        (one, other if one != other else (other + 1) % COUNT)
        for one, other in zip(channels.indices, channels.subtracted, strict=False)
    ]
    if not pairs:
        return channels
    found = Channels.of([one for one, _ in pairs], [other for _, other in pairs])
    return Channels(found.plus, found.minus, channels.total)


@given(st.lists(proper(), min_size=1, max_size=3), st.booleans(), st.integers(0, 9))
def test_spreading_is_the_transpose(parts: list[Channels], absolute: bool, seed: int) -> None:
    carried = tuple((str(position), channels) for position, channels in enumerate(parts))
    matrix = carried_matrix(carried, COUNT)
    matrix = np.abs(matrix) if absolute else matrix
    rng = np.random.default_rng(seed)
    kernel = rng.integers(-99, 99, (4, len(matrix), 3)).astype(np.float32)
    expected = np.einsum("omk,mc->ock", kernel, matrix)
    assert np.array_equal(spread(carried, kernel, COUNT, absolute=absolute), expected)
    array = rng.integers(-99, 99, (COUNT, 2)).astype(np.float32)
    assert np.array_equal(combined(carried, array, absolute=absolute), matrix @ array)


@given(proper())
def test_norms_are_those_of_the_matrix_rows(channels: Channels) -> None:
    expected = np.linalg.norm(channels.matrix(COUNT), axis=1)
    np.testing.assert_allclose(channels.norms, expected, rtol=1e-15)
