"""The sum-pool against its definition, one output at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structconv_cli.sum_pool import box_sum


def looped(x: torch.Tensor, axis: int, window: int, dilation: int, stride: int) -> torch.Tensor:
    moved = x.movedim(axis, 0)
    outputs = []
    start = 0
    while start + dilation * (window - 1) < len(moved):
        taps = [start + i * dilation for i in range(window)]
        outputs.append(sum(moved[tap] for tap in taps))
        start += stride
    return torch.stack(outputs).movedim(0, axis)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers as float64: their sums are exact, so sums must agree to the bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, shape, generator=generator).double()


@settings(max_examples=150, deadline=None)
@given(
    window=st.integers(1, 40),
    dilation=st.integers(1, 4),
    stride=st.integers(1, 4),
    spare=st.integers(0, 9),
    others=st.lists(st.integers(1, 3), max_size=3),
    place=st.integers(0, 3),
    negative=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_loop(
    window: int,
    dilation: int,
    stride: int,
    spare: int,
    others: list[int],
    place: int,
    negative: bool,
    seed: int,
) -> None:
    axis = min(place, len(others))
    shape = [*others[:axis], dilation * (window - 1) + 1 + spare, *others[axis:]]
    x = integers(*shape, seed=seed)
    kept = x.clone()
    axis -= x.ndim if negative else 0
    found = box_sum(x, axis, window, dilation=dilation, stride=stride)
    assert torch.equal(found, looped(x, axis, window, dilation, stride))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("window", range(1, 66))
def test_every_window_with_every_dilation_and_stride_equals_unfold(window: int) -> None:
    x = integers(2, 3 * 65 + 4, seed=window)
    for dilation in (1, 2, 3):
        spread = x.unfold(1, dilation * (window - 1) + 1, 1)[..., ::dilation].sum(-1)
        for stride in (1, 2, 3):
            found = box_sum(x, 1, window, dilation=dilation, stride=stride)
            assert torch.equal(found, spread[:, ::stride])


@pytest.mark.parametrize("stride", [1, 2])
def test_an_output_depends_on_its_window_only(stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 300, generator=generator)
    disturbed = x.clone()
    disturbed[0, 100] = 1e20
    window = 45
    before = box_sum(x, 1, window, stride=stride)
    after = box_sum(disturbed, 1, window, stride=stride)
    for output, (a, b) in enumerate(zip(before[0], after[0], strict=True)):
        start = output * stride
        assert (a == b) == (not start <= 100 < start + window)


def test_float32_rounding_grows_with_the_logarithm_of_the_window() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 8192, generator=generator)
    for window in (1023, 1024, 2047):
        found = box_sum(x, 1, window).double()
        exact = x.double().unfold(1, window, 1).sum(-1)
        depth = 2 * window.bit_length()  # doublings, then the sum of the pieces
        bound = depth * torch.finfo(torch.float32).eps / 2
        assert float(((found - exact) / exact).abs().max()) < bound


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient(stride: int) -> None:
    x = integers(2, 9, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: box_sum(x, 1, 3, dilation=2, stride=stride), x / 1000, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    x = torch.ones(1, 9, dtype=dtype)
    for window in (1, 2, 3):
        for stride in (1, 2):
            found = box_sum(x, 1, window, stride=stride)
            assert found.dtype == dtype
            assert bool((found == window).all())


@pytest.mark.parametrize(
    ("window", "dilation", "stride"), [(0, 1, 1), (-1, 1, 1), (8, 1, 1), (4, 3, 1), (8, 1, 2)]
)
def test_a_window_that_does_not_fit_is_refused(window: int, dilation: int, stride: int) -> None:
    x = torch.zeros(2, 7)
    with pytest.raises(ValueError, match=f"window of {window} .* length 7"):
        box_sum(x, 1, window, dilation=dilation, stride=stride)


@pytest.mark.parametrize(("window", "dilation"), [(7, 1), (4, 2), (3, 3), (2, 6)])
def test_the_largest_window_that_fits_leaves_one_output(window: int, dilation: int) -> None:
    x = integers(2, 7)
    for stride in (1, 3):
        found = box_sum(x, 1, window, dilation=dilation, stride=stride)
        assert torch.equal(found, x[:, ::dilation].sum(1, keepdim=True))
