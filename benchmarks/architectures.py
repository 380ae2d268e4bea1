"""torchvision's and timm's architectures, with random weights, also on a CPU build of torch alone.

`pip install --no-deps torchvision==0.28.0 timm; pip install huggingface_hub pyyaml`.
"""

import torch
from torch import nn

from structconv_cli.model.architecture import Architecture, build_model


def torchvision_model(name: str, seed: int = 0) -> nn.Module:
    """A torchvision classification model with random weights, in eval mode."""
    return _model(f"torchvision:{name}", seed)


def timm_model(name: str, seed: int = 0) -> nn.Module:
    """A timm classification model with random weights, in eval mode."""
    return _model(f"timm:{name}", seed)


def lively(architecture: Architecture, channels: int, size: int, seed: int = 0) -> nn.Module:
    """A model with random weights that passes signals on as a trained one does, in eval mode.

    Weights that are made constant (scales of one, biases of zero, last layers of zero) are varied,
    and batch norms get the statistics of random images of `channels` x `size` x `size`.
    """
    model = _model(architecture.reference, seed, **architecture.arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.1 * torch.randn_like(parameter)
                if parameter.ndim == 1 and float(parameter.mean().abs()) < 0.05:
                    parameter += 0.05  # scales that start near zero hide what they scale
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train()
            norm.momentum = None  # the average of what is seen
            norm.reset_running_stats()
        if norms:
            model(torch.randn(8, channels, size, size))
    return model.eval()


def _model(reference: str, seed: int, **arguments: object) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(Architecture(reference, arguments)).eval()  # type: ignore[arg-type]
