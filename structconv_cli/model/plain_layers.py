"""Plain modules in the place of modules that compute one convolution or linear map in another way.

Such are subclasses (with TensorFlow's padding, say), layers whose weight is computed from
parameters (weight norm, spectral norm, standardisation, pruning masks), and modules of the user's
own that call PyTorch's function. Each is told by what it does, not by its class.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from structconv_cli.layer_spec import CONVOLUTIONS
from structconv_cli.model.call_sites import CallSite, call_sites
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.model.folded_weight import FoldedLayer, foreign_hooks, is_reversible
from structconv_cli.model.layer_form import Form, form_of, module_of

PLAIN = (*CONVOLUTIONS, nn.Linear)


@dataclass(frozen=True, eq=False)
class Replaced:
    """What became of a module.

    Attributes:
        name: its name.
        kind: its class's name.
        module: the plain module in its place.
        original: the module itself.
        source: a copy of it, as it was.
        folded: whether the plain module's weight or bias was computed.
        reversible: whether any weight can be written into the module itself.
    """

    name: str
    kind: str
    module: nn.Module
    original: nn.Module
    source: nn.Module
    folded: bool
    reversible: bool

    def folded_layer(self, path: str) -> FoldedLayer:
        """The record of a folded layer which the user calls `path`."""
        prefix = f"{path}." if path else ""
        sources = tuple(prefix + name for name in self.source.state_dict())
        return FoldedLayer(self.name, path, self.source, sources, self.reversible)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is exactly a plain convolution or linear layer with its own parameters."""
    own = all(name in module._parameters for name in ("weight", "bias"))
    return type(module) in PLAIN and own and not module._forward_pre_hooks


def replace_layers(
    model: nn.Module, inputs: Sequence[torch.Tensor]
) -> tuple[nn.Module, tuple[Replaced, ...]]:
    """Put plain modules in place, wherever that changes nothing; returns the model, changed.

    Args:
        model: is changed in place, unless it is itself such a module.
        inputs: a batch of its inputs, on which it runs.
    """
    with torch.no_grad(), eval_mode(model), call_sites(model) as sites:
        model(*inputs)
    modules = dict(model.named_modules())
    replaced = []
    with eval_mode(model):
        for name in dict.fromkeys(site.owner for site in sites):
            if not is_plain(modules[name]):
                mine = [site for site in sites if site.owner == name]
                found = _replaced(name, modules[name], mine)
                if found is not None:
                    replaced.append(found)
    for entry in replaced:
        model = _put(model, modules[entry.name], entry.module)
    return model, tuple(replaced)


def _replaced(name: str, module: nn.Module, sites: Sequence[CallSite]) -> Replaced | None:
    if foreign_hooks(module) or _has_parts(module):
        return None
    forms: list[Form] = []
    for site in sites:
        if site.input is None or site.input.ndim < 2:
            return None
        form = form_of(module, site.input)
        if isinstance(form, str) or (forms and not forms[0].same_geometry(form)):
            return None
        forms.append(form)
    form = forms[0]
    if not _is_trained(module, form):
        return None
    folded = _is_computed(form.weight) or _is_computed(form.bias)
    reversible = True
    x = sites[0].input
    if folded:
        assert x is not None
        reversible = is_reversible(module, x, form.weight, form.bias)
    plain = module_of(form, module)
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if folded and not trained:
        plain.requires_grad_(False)
    source = copy.deepcopy(module) if folded else module
    return Replaced(name, type(module).__name__, plain, module, source, folded, reversible)


def _has_parts(module: nn.Module) -> bool:
    """Whether there are modules inside, other than those that compute a weight."""
    return any(name != "parametrizations" for name, _ in module.named_children())


def _is_trained(module: nn.Module, form: Form) -> bool:
    """Whether the weight is or comes from the module's parameters: it may be a fixed filter."""
    buffers = {id(buffer) for buffer in module.buffers()}
    return id(form.weight) not in buffers and any(True for _ in module.parameters())


def _is_computed(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not isinstance(tensor, nn.Parameter)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


def merge_tied(model: nn.Module) -> dict[str, str]:
    """Make one module of plain modules that share all parameters and settings, in place.

    Returns:
        What each merged module's name was, and which it is now, the first one's.
    """
    firsts: dict[tuple[object, ...], tuple[str, nn.Module]] = {}
    merged = {}
    for name, module in list(model.named_modules()):
        if not is_plain(module) or module._forward_hooks:
            continue
        tensors = [id(parameter) for parameter in module._parameters.values()]
        key = (type(module), *tensors, module.extra_repr(), module.training)
        first = firsts.setdefault(key, (name, module))
        if first[1] is not module:
            _put(model, module, first[1])
            merged[name] = first[0]
    return merged
