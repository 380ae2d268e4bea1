"""Where a model's forward pass calls PyTorch's convolution and linear functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from structconv_cli.layer_spec import Kind
from structconv_cli.model.layer_form import Call, CallRecorder


@dataclass(frozen=True, eq=False)
class CallSite:
    """One call.

    Attributes:
        owner: the name of the innermost module whose forward pass makes it.
        kind: the function.
        weight: its weight, the very object.
        is_depthwise: whether every filter reads one channel only, of several.
        input: the owner's one input; None if it takes another number of tensors.
    """

    owner: str
    kind: Kind
    weight: torch.Tensor
    is_depthwise: bool
    input: torch.Tensor | None


@contextmanager
def call_sites(model: nn.Module) -> Iterator[list[CallSite]]:
    """The calls that the model's forward passes make inside, in order.

    TorchScript's are not seen.
    """
    sites: list[CallSite] = []
    frames: list[tuple[str, torch.Tensor | None]] = [("", None)]

    def record(call: Call) -> None:
        owner, x = frames[-1]
        depthwise = call.groups > 1 and call.weight.shape[1] == 1
        sites.append(CallSite(owner, call.kind, call.weight, depthwise, x))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            one = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            # Its shape counts; the values need not be kept.
            frames.append((name, torch.empty_like(args[0], device="meta") if one else None))

        def leave(*_: Any) -> None:
            frames.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with CallRecorder(record):
            yield sites
    finally:
        for handle in handles:
            handle.remove()
