"""Which parts of a model are not to be trained."""

from torch import nn


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """The modules inside parts that have parameters, of which none is trained (requires_grad).

    What has no parameters, such as dropout, is frozen with the part that it lies in. A frozen
    parameter beside trained layers freezes nothing else.
    """
    frozen: set[nn.Module] = set()
    for module in model.modules():
        held = list(module.parameters())
        if held and not any(parameter.requires_grad for parameter in held):
            frozen.update(module.modules())
    return frozen
