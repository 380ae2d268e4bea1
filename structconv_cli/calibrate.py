"""Re-estimating batch-norm statistics after weights have changed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.model.frozen import frozen_modules


def _run(model: nn.Module, batch: Any) -> Any:
    return model(batch)


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = _run,
) -> int:
    """Replace every batch norm's running mean and variance by those of `batches`, in place.

    A frozen one keeps its own.

    Args:
        model: any module; all of it but its batch norms runs in eval mode.
        batches: prepared images (B, C, H, W), B >= 2, or whatever `forward` takes; statistics are
            averaged with equal weight per batch.
        forward: runs the model on a batch.

    Returns:
        The number of batch norms re-estimated (0: the model has none to re-estimate).
    """
    frozen = frozen_modules(model)
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.track_running_stats
        and module not in frozen
    ]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average, rather than an exponential one
            norm.train()
        try:
            for batch in batches:
                forward(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)
