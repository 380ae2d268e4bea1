"""torchvision's and timm's architectures, with random weights, on a CPU build of torch alone.

`pip install --no-deps torchvision==0.28.0` installs a build whose compiled operators do not load
beside a CPU build of torch; architectures need none of them, once they are declared. timm imports
torchvision, and needs the same: `pip install --no-deps timm; pip install huggingface_hub pyyaml`.
"""

import torch
from torch import nn

_OPERATORS = torch.library.Library("torchvision", "DEF")
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def torchvision_model(name: str, seed: int = 0) -> nn.Module:
    """A torchvision classification model with random weights, in eval mode."""
    import torchvision

    torch.manual_seed(seed)
    return torchvision.models.get_model(name, weights=None).eval()


def timm_model(name: str, seed: int = 0) -> nn.Module:
    """A timm classification model with random weights, in eval mode."""
    import timm

    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model.eval()
