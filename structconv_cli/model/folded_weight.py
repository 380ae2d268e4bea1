"""Weights that a layer computes from its parameters: made plain, and the way back.

A structured weight is written into the user's own layer by choosing parameters from which the layer
computes it. Whether that succeeded is measured, on the layer itself.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structconv_cli.model.layer_form import form_of

_CLOSE = 1e-4
_OWN_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """A layer of the user's, in whose place stands a plain one with the weight that it computed.

    Attributes:
        layer: the plain layer's name.
        path: the user's layer's name; names of its tensors start with it.
        source: the user's layer.
        sources: names of the tensors that the plain layer's stand for, all of the layer's.
        reversible: whether any weight can be written into the user's layer.
    """

    layer: str
    path: str
    source: nn.Module
    sources: tuple[str, ...]
    reversible: bool

    def restored(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """The user's tensors from which the layer computes a weight and bias; by the user's names.

        None is for what it does not compute. Where it cannot compute a weight, that has the name
        `PATH.folded_weight`: a model that computes its weights refuses it, and does not take it for
        something else.
        """
        before = f"{self.path}." if self.path else ""
        if not self.reversible:
            tensors = {"folded_weight": weight, "folded_bias": bias}
            return {before + name: value for name, value in tensors.items() if value is not None}
        layer = copy.deepcopy(self.source)
        write_weight(layer, weight, bias)
        # The others may have been tuned.
        written = {"weight"} if weight is not None else set()
        written |= {"bias"} if bias is not None else set()
        state = layer.state_dict()
        return {
            before + name: value
            for name, value in state.items()
            if any(name.removeprefix("parametrizations.").startswith(key) for key in written)
        }


def foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks other than those by which PyTorch computes weights."""
    return bool(module._forward_hooks) or not all(
        isinstance(hook, _OWN_HOOKS) for hook in module._forward_pre_hooks.values()
    )


def is_reversible(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether any weight can be written into a layer, tried with a random one.

    Args:
        module: a layer in eval mode, which stays as it is.
        x: an input of its; the shape and dtype count.
        weight, bias: what it computes now.
    """
    generator = torch.Generator().manual_seed(0)
    size = float(weight.abs().mean()) or 1.0
    wanted = (torch.randn(weight.shape, generator=generator) + 0.5).to(weight) * size
    shift = torch.randn(bias.shape, generator=generator).to(bias) if bias is not None else None
    layer = copy.deepcopy(module)
    try:
        write_weight(layer, wanted, shift)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError):
        return False
    form = form_of(layer, x)
    if isinstance(form, str):
        return False
    return _close(form.weight, wanted) and (
        shift is None or (form.bias is not None and _close(form.bias, shift))
    )


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= _CLOSE * wanted.norm())


@torch.no_grad()
def write_weight(layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
    """Choose a layer's parameters, in place, so that it computes a weight and bias in eval mode.

    Known are weight norm, spectral norm, pruning masks, and parametrisations with a right inverse.
    """
    if weight is not None:
        _write(layer, "weight", weight)
    if bias is not None:
        _write(layer, "bias", bias)


def _write(layer: nn.Module, name: str, value: Tensor) -> None:
    if parametrize.is_parametrized(layer, name):
        setattr(layer, name, value)
        for step in layer.parametrizations[name]:  # type: ignore[index]
            if isinstance(step, parametrizations._SpectralNorm):
                # In eval mode the norm is u' W v, whatever u and v are.
                step._u.div_(torch.dot(step._u, step._reshape_weight_to_matrix(value) @ step._v))
        return
    hooks = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, _OWN_HOOKS)]
    hooks = [h for h in hooks if getattr(h, "name", getattr(h, "_tensor_name", None)) == name]
    if not hooks:
        layer.get_parameter(name).copy_(value)
    elif isinstance(hooks[0], WeightNorm):
        dim = hooks[0].dim
        layer.get_parameter(f"{name}_g").copy_(torch.norm_except_dim(value, 2, dim))
        layer.get_parameter(f"{name}_v").copy_(value)
    elif isinstance(hooks[0], SpectralNorm):
        layer.get_parameter(f"{name}_orig").copy_(value)
        u, v = layer.get_buffer(f"{name}_u"), layer.get_buffer(f"{name}_v")
        u.div_(torch.dot(u, hooks[0].reshape_weight_to_matrix(value) @ v))
    else:
        layer.get_parameter(f"{name}_orig").copy_(value)
        layer.get_buffer(f"{name}_mask").fill_(1)
