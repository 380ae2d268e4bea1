"""A model in which all that can be structured is a plain module, and the way back from it.

    plain       unwrap, materialise -> plain layers -> one module for tied ones -> a traced graph
    trainable   the graph of an exported program
    restore     tensors of the plain model -> those of the user's own

The graph is the last resort, for convolutions that are no module's only work: it is harder to read.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.call_sites import CallSite, call_sites
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.model.folded_weight import FoldedLayer
from structconv_cli.model.inventory import run_once
from structconv_cli.model.plain_layers import Replaced, is_plain, merge_tied, replace_layers
from structconv_cli.model.signature import are_close, tensors_of
from structconv_cli.model.traced_module import (
    check_batch,
    export_model,
    traced_module,
)
from structconv_cli.model.user_names import UserNames
from structconv_cli.model.wrappers import unwrap


@dataclass(frozen=True, eq=False)
class Plain:
    """A model of plain layers.

    Attributes:
        model: computes what the user's does in eval mode; in the user's model's mode.
        names: by name of its tensors, the names that the user's model has for them; several where
            it has tied ones, none for a computed weight.
        folded: layers whose weight the user's model computes.
        notes: what the user should know, one sentence each.
    """

    model: nn.Module
    names: dict[str, tuple[str, ...]]
    folded: tuple[FoldedLayer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_as_it_was(self) -> bool:
        """Whether tensors have the same names and values as in the user's model."""
        return not self.folded and all(name in names for name, names in self.names.items())


def plain(model: nn.Module, *inputs: Tensor) -> Plain:
    """Make what can be structured plain modules, changing as little as possible.

    Args:
        model: the user's, with its weights. Lazy modules are materialised in place; nothing else
            changes.
        inputs: an example of each input, B >= 2 rows, of the sizes that will be used.

    Raises:
        ArchitectureError: the model does not run on these inputs.
    """
    # Wrapped by torch.compile, it would be compiled for these runs.
    with torch.compiler.set_stance("force_eager"):
        before = tensors_of(run_once(model, inputs))
    materialised(model)
    work = copy.deepcopy(model)
    users = UserNames(work)
    work, layers = replace_layers(unwrap(work), inputs)
    merge_tied(work)
    found = Plain(work, users.of_tensors(work), _folded(layers, users), _notes(layers))
    if layers and not _same(before, work, inputs):
        # A layer is more than its forward pass: something else reads its weight or attributes.
        work = unwrap(copy.deepcopy(model))
        users = UserNames(work)
        found = Plain(work, users.of_tensors(work))
    functional = _functional(found.model, inputs)
    if not functional:
        return found
    return _traced(found, functional, before, inputs)


def trainable(program: torch.export.ExportedProgram, *inputs: Tensor) -> Plain:
    """The plain model of an exported program (a .pt2 archive), in eval mode.

    Args:
        program: exported in either mode; it stays as it is.
        inputs: an example of each input, to see that it takes batches of any size.

    Raises:
        ArchitectureError: the program takes keyword arguments, is random, or is for one batch size.
    """
    _check_arguments(program)
    traced = traced_module(program)
    check_batch(traced.model, inputs)
    folded = tuple(
        FoldedLayer(_owner(c.name), _owner(c.name), nn.Identity(), c.sources, False)
        for c in traced.computed
    )
    return Plain(traced.model, traced.names, folded, _irreversible(folded))


def restore(
    found: Plain, tensors: Mapping[str, Tensor], original: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A state_dict for the user's own model from one of the plain model.

    Args:
        found: what the plain model is.
        tensors: its state_dict, changed by training or structuring.
        original: the user's state_dict; what the plain model does not have stays as it is there.

    Returns:
        The same names as in `original`, in that order, but for layers that cannot compute just any
        weight: of these, `LAYER.folded_weight` takes the place of what it was computed from.
    """
    restored = dict(original)
    for key, names in found.names.items():
        restored |= {name: tensors[key] for name in names if name in original}
    for layer in found.folded:
        before = f"{layer.layer}." if layer.layer else ""
        weight, bias = (
            tensors.get(f"{before}{name}") if not found.names.get(f"{before}{name}") else None
            for name in ("weight", "bias")
        )
        own = layer.restored(weight, bias)
        if not layer.reversible:
            for name in layer.sources:
                if not any(name in names for names in found.names.values()):
                    restored.pop(name, None)
            restored |= own
        else:
            restored |= {name: value for name, value in own.items() if name in original}
    return restored


def _check_arguments(program: torch.export.ExportedProgram) -> None:
    spec = program.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(range(spec.num_leaves), spec)
    if kwargs or not all(isinstance(value, int) for value in args):
        raise ArchitectureError(
            "the exported program takes keyword arguments, or tensors inside tuples, lists or "
            "dicts; expected tensors by position. Export it with all inputs in `args`."
        )


def materialised(model: nn.Module) -> nn.Module:
    """The same model, its lazy modules' sizes filled in: they have run, or had weights loaded."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not module.in_channels:
            transposed = module.transposed
            per_group = module.weight.shape[0 if transposed else 1]
            module.in_channels = per_group * (1 if transposed else module.groups)
        elif isinstance(module, nn.Linear) and not module.in_features:
            module.in_features = module.weight.shape[1]
    return model


def _folded(layers: Sequence[Replaced], users: UserNames) -> tuple[FoldedLayer, ...]:
    return tuple(x.folded_layer(users.of(x.original)[0]) for x in layers if x.folded)


def _notes(layers: Sequence[Replaced]) -> tuple[str, ...]:
    kinds = Counter(layer.kind for layer in layers if layer.folded)
    notes = [
        f"{count} layers ({kind}) compute their weights from others; the computed weights are "
        "tuned and structured."
        for kind, count in kinds.items()
    ]
    stuck = [layer.name for layer in layers if layer.folded and not layer.reversible]
    return (*notes, *_no_way_back(stuck))


def _irreversible(folded: Sequence[FoldedLayer]) -> tuple[str, ...]:
    return _no_way_back([layer.path for layer in folded if not layer.reversible])


def _no_way_back(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"{len(names)} layers ({listed}) cannot compute just any weight: in structured_dense they "
        "have a folded_weight, which a model with plain convolutions in their place takes. The "
        "ONNX files are not affected.",
    )


def _same(before: Sequence[Tensor], model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    try:
        after = tensors_of(run_once(model, inputs))
    except ArchitectureError:
        return False
    return len(before) == len(after) and all(
        one.shape == other.shape and are_close(one, other)
        for one, other in zip(before, after, strict=True)
    )


def _functional(model: nn.Module, inputs: Sequence[Tensor]) -> list[CallSite]:
    """Convolutions in no plain module whose weight is the model's, and no fixed filter's."""
    modules = dict(model.named_modules())
    buffers = {id(buffer) for buffer in model.buffers()}
    outside = [
        (number, site)
        for number, site in enumerate(_sites(model, inputs))
        if site.kind != "linear"
        and not site.is_depthwise
        and not is_plain(modules[site.owner])
        and id(site.weight) not in buffers
    ]
    if all(isinstance(site.weight, nn.Parameter) for _, site in outside):
        return [site for _, site in outside]
    # A weight that other inputs change is not the model's.
    moved = _sites(model, [_other(x) for x in inputs])
    return [
        site
        for number, site in outside
        if number < len(moved) and torch.equal(site.weight, moved[number].weight)
    ]


def _sites(model: nn.Module, inputs: Sequence[Tensor]) -> list[CallSite]:
    with torch.no_grad(), eval_mode(model), call_sites(model) as sites:
        model(*inputs)
    return sites


def _other(x: Tensor) -> Tensor:
    return x + torch.rand_like(x) if x.is_floating_point() else x


def _traced(
    found: Plain, functional: Sequence[CallSite], before: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Plain:
    """The model as a graph, if it can be traced; else as it was, with a note."""
    owners = ", ".join(dict.fromkeys(site.owner or "the model itself" for site in functional))
    try:
        traced = traced_module(export_model(found.model, *inputs))
    except ArchitectureError as error:
        note = f"Convolutions that {owners} computes by function calls are kept: {error}"
        return replace(found, notes=(*found.notes, note))
    if not _same(before, traced.model, inputs):
        note = f"Convolutions that {owners} computes by function calls are kept: a graph of the "
        return replace(found, notes=(*found.notes, note + "model gives other outputs."))
    note = (
        f"{owners} computes convolutions by function calls, so the model was traced as a graph: of "
        "what acts in training only, dropout and batch norm remain."
    )
    computed = tuple(
        FoldedLayer(_owner(c.name), _owner(c.name), nn.Identity(), _users(found, c.sources), False)
        for c in traced.computed
    )
    names = {name: _users(found, inner) for name, inner in traced.names.items()}
    back = {inner: name for name, inners in traced.names.items() for inner in inners}
    folded = tuple(
        replace(layer, layer=_owner(back[_weight(layer)]))
        for layer in found.folded
        if _weight(layer) in back
    )
    notes = (*found.notes, note, *_irreversible(computed))
    model = traced.model.train(found.model.training)
    return Plain(model, names, (*folded, *computed), notes)


def _weight(layer: FoldedLayer) -> str:
    return f"{layer.layer}.weight" if layer.layer else "weight"


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _users(found: Plain, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(user for name in names for user in found.names.get(name, ()))
