"""Wrappers around modules that leave what they compute alone: torch.compile's, DataParallel's."""

from typing import Any

import torch
from torch import nn

_INNER = "_orig_mod"


def unwrap(model: nn.Module) -> nn.Module:
    """Take off all wrappers, at any depth; wrapped parts are replaced in their parents, in place.

    Parameters stay the same objects; their names lose `_orig_mod.` and `module.`.
    """
    model = _inner(model)
    for module in list(model.modules()):
        compiled: Any = module
        if getattr(module, "_compiled_call_impl", None) is not None:
            compiled._compiled_call_impl = None
        for name, child in module._modules.items():
            if child is not None and _inner(child) is not child:
                module._modules[name] = _inner(child)
    return model


def _inner(module: nn.Module) -> nn.Module:
    while True:
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        inner: Any = None
        if isinstance(module, parallel):
            inner = module.module
        elif isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
            inner = module._modules[_INNER]
        if inner is None:
            return module
        module = inner
