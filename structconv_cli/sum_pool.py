"""Sum-pooling along one axis: the cheap half of a structured convolution (paper, section 3)."""

import torch


def box_sum(
    x: torch.Tensor, axis: int, window: int, *, dilation: int = 1, stride: int = 1
) -> torch.Tensor:
    """Sum every `window` elements of `x` along `axis`, taken `dilation` apart.

    y[o] = sum_{i < window} x[o * stride + i * dilation], without padding: the axis shrinks from L
    to (L - dilation * (window - 1) - 1) // stride + 1.

    Partial sums of 1, 2, 4, ... elements are shared between outputs, so a stride-1 pool takes about
    log2(window) additions per output, and rounding grows with log2(window) only: a running sum
    (prefix sums, one subtraction) would lose digits over long axes.

    Raises:
        ValueError: the window does not fit on the axis.
    """
    length = x.shape[axis] - dilation * (window - 1)
    if window < 1 or length < 1:
        raise ValueError(
            f"a window of {window} with dilation {dilation} does not fit on an axis of length "
            f"{x.shape[axis]}"
        )
    if stride == 1:
        return _doubling_sum(x, axis, window, dilation, length)
    taps = [_strided(x, axis, i * dilation, length, stride) for i in range(window)]
    return torch.stack(taps).sum(0)


def _doubling_sum(
    x: torch.Tensor, axis: int, window: int, dilation: int, length: int
) -> torch.Tensor:
    """Add the partial sums that the window's binary digits name, each made from the one before."""
    pieces, covered, width = [], 0, 1
    while True:
        if window & width:
            pieces.append(x.narrow(axis, covered * dilation, length))
            covered += width
        if covered == window:
            return pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(0)
        extent = x.shape[axis] - width * dilation
        x = x.narrow(axis, 0, extent) + x.narrow(axis, width * dilation, extent)
        width *= 2


def _strided(x: torch.Tensor, axis: int, start: int, length: int, stride: int) -> torch.Tensor:
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, start + length, stride)
    return x[tuple(index)]
