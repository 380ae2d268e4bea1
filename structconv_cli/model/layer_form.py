"""What a module computed in a forward pass, if that was one convolution or linear map.

It is told by watching: the tensors with which the module called PyTorch's function, and what lay
between its input and that call. So a class need not be known to be understood.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from structconv_cli.layer_spec import Kind
from structconv_cli.model.padded_conv import PaddedConv1d, PaddedConv2d, PaddedConv3d, Pads

FUNCTIONS: dict[Callable[..., Any], Kind] = {
    functional.conv1d: "conv1d",
    functional.conv2d: "conv2d",
    functional.conv3d: "conv3d",
    functional.linear: "linear",
}
_MODULES = {
    "conv1d": (nn.Conv1d, PaddedConv1d),
    "conv2d": (nn.Conv2d, PaddedConv2d),
    "conv3d": (nn.Conv3d, PaddedConv3d),
}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a function of `FUNCTIONS`.

    Attributes:
        kind: which.
        input, weight, bias, output: its tensors, the very objects.
        stride, padding, dilation, groups: as they were given, numbers for all axes or lists.
    """

    kind: Kind
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    output: torch.Tensor
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Form:
    """One convolution or linear map.

    Attributes:
        kind: which.
        weight, bias: its tensors; the module's own parameters, or what it computed from them.
        stride, dilation: one entry per spatial axis; empty for a linear map.
        padding: (before, after) per spatial axis.
        padding_mode: zeros, reflect, replicate or circular.
        groups: number of channel groups.
    """

    kind: Kind
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...] = ()
    padding: Pads = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1

    def same_geometry(self, other: "Form") -> bool:
        """Whether only tensors differ."""
        names = ("kind", "stride", "padding", "dilation", "padding_mode", "groups")
        return all(getattr(self, name) == getattr(other, name) for name in names)


class CallRecorder(TorchFunctionMode):
    """Hands every call of a function of `FUNCTIONS` to `record`."""

    def __init__(self, record: Callable[[Call], None]) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function and record it."""
        result = func(*args, **(kwargs or {}))
        kind = FUNCTIONS.get(func) if callable(func) else None
        if kind is not None:
            self._record(_call(kind, result, *args, **(kwargs or {})))
        return result


def _call(
    kind: Kind,
    output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *settings: Any,
    **named: Any,
) -> Call:
    names = ("stride", "padding", "dilation", "groups")
    return Call(
        kind, input, weight, bias, output, **dict(zip(names, settings, strict=False)), **named
    )


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """The calls made inside, in order."""
    calls: list[Call] = []
    with CallRecorder(calls.append):
        yield calls


def form_of(module: nn.Module, x: torch.Tensor) -> Form | str:
    """What a module computes from inputs of the shape of `x`, or why that is no single layer.

    The module's forward pass is run twice, on noise, hooks included.

    Args:
        module: in eval mode.
        x: one of its inputs; its shape and dtype count.
    """
    forms = []
    for _ in range(2):
        noise = torch.randn(x.shape).to(x.dtype)
        with torch.no_grad(), recorded_calls() as calls:
            output = module(noise)
        if len(calls) != 1:
            return f"its forward pass computes {len(calls)} convolutions or linear maps"
        (call,) = calls
        if output is not call.output:
            return "its forward pass goes on behind its convolution"
        form = _form(module, noise, call)
        if isinstance(form, str):
            return form
        forms.append(form)
    one, other = forms
    if not one.same_geometry(other) or not _same(one.weight, other.weight):
        return "its weight depends on its input"
    if not _same(one.bias, other.bias):
        return "its bias depends on its input"
    return one


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)


def _form(module: nn.Module, x: torch.Tensor, call: Call) -> Form | str:
    if call.kind == "linear":
        if call.input is not x:
            return "its forward pass changes its input"
        return Form("linear", call.weight, call.bias)
    dims = call.weight.ndim - 2
    mode = getattr(module, "padding_mode", "zeros")
    around: Pads | None
    if call.input is x:
        around, mode = ((0, 0),) * dims, "zeros"
    elif mode != "zeros":
        around = _pads_of_mode(module, x, call.input, mode)
    else:
        around = _zeros_around(x, call.input, dims)
    if around is None:
        return "its forward pass changes its input"
    dilation = _per_axis(call.dilation, dims)
    inside = _own_padding(call, dilation, dims)
    if mode != "zeros" and any(b != a for b, a in (*around, *inside)):
        return f"it pads unevenly, by {mode}"
    pads = tuple(
        (before + b, after + a) for (before, after), (b, a) in zip(around, inside, strict=True)
    )
    return Form(
        call.kind,
        call.weight,
        call.bias,
        _per_axis(call.stride, dims),
        pads,
        dilation,
        mode,
        call.groups,
    )


def _per_axis(value: Any, dims: int) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in value) if isinstance(value, Sequence) else (int(value),)
    return sizes * dims if len(sizes) == 1 else sizes


def _own_padding(call: Call, dilation: Sequence[int], dims: int) -> Pads:
    if call.padding == "valid":
        return ((0, 0),) * dims
    if call.padding == "same":
        kernel = call.weight.shape[2:]
        totals = [d * (n - 1) for d, n in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in _per_axis(call.padding, dims))


def _pads_of_mode(
    module: nn.Module, x: torch.Tensor, padded: torch.Tensor, mode: str
) -> Pads | None:
    flat = getattr(module, "_reversed_padding_repeated_twice", None)
    if flat is None:
        return None
    expected = functional.pad(x, list(flat), mode=mode)
    if not _same_values(expected, padded):
        return None
    return tuple(zip(flat[-2::-2], flat[-1::-2], strict=True))


def _zeros_around(x: torch.Tensor, padded: torch.Tensor, dims: int) -> Pads | None:
    """How many zeros lie before and behind `x` in `padded`; None if it is something else."""
    if padded.ndim != x.ndim or padded.shape[:-dims] != x.shape[:-dims]:
        return None
    pads = []
    for axis in range(x.ndim - dims, x.ndim):
        total = padded.shape[axis] - x.shape[axis]
        filled = padded.abs().movedim(axis, 0).flatten(1).sum(1).nonzero()
        if total < 0 or not len(filled):
            return None
        before = int(filled[0])
        pads.append((before, total - before))
    if any(after < 0 for _, after in pads):
        return None
    flat = [size for pair in reversed(pads) for size in pair]
    return tuple(pads) if _same_values(functional.pad(x, flat), padded) else None


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def module_of(form: Form, like: nn.Module) -> nn.Module:
    """A plain module of this form, in `like`'s mode; tensors that are parameters are shared."""
    bias = form.bias is not None
    if form.kind == "linear":
        outputs, inputs = form.weight.shape
        module: nn.Module = nn.Linear(inputs, outputs, bias, device="meta")
    else:
        module = _convolution(form, bias)
    module.weight = _parameter(form.weight)
    if form.bias is not None:
        module.bias = _parameter(form.bias)
    return module.train(like.training)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def _convolution(form: Form, bias: bool) -> nn.Module:
    plain, padded = _MODULES[form.kind]
    even = all(before == after for before, after in form.padding)
    outputs, per_group, *kernel = form.weight.shape
    make: Any = plain if even else padded
    module: nn.Module = make(
        per_group * form.groups,
        outputs,
        tuple(kernel),
        form.stride,
        tuple(before for before, _ in form.padding) if even else 0,
        form.dilation,
        form.groups,
        bias,
        form.padding_mode if even else "zeros",
        device="meta",
    )
    if isinstance(module, PaddedConv1d | PaddedConv2d | PaddedConv3d):
        module.pad_by(form.padding)
    return module
