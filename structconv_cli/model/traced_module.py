"""A trainable module from a graph that `torch.export` made: a .pt2 archive's, or of a model's own.

Its convolutions, linear layers, batch norms and dropouts are modules, and so can be structured,
trained and put in eval mode; weights that are computed from parameters are computed once, for good.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from structconv_cli.errors import ArchitectureError, one_line
from structconv_cli.model.computed_weight import Computed, compute_weights
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.model.graph_layers import Layers, arguments
from structconv_cli.model.open_batch import open_batch
from structconv_cli.model.signature import are_close, tensors_of

_ATEN = torch.ops.aten
_ASSERTIONS = {
    _ATEN._assert_tensor_metadata.default,
    _ATEN._assert_scalar.default,
    _ATEN._assert_async.msg,
    _ATEN.sym_constrain_range.default,
    _ATEN.sym_constrain_range_for_size.default,
}


@dataclass(frozen=True, eq=False)
class Traced:
    """A module made of a graph.

    Attributes:
        model: takes and gives what the program's own model did; in eval mode.
        names: by tensor of the model, the names that the program has for it.
        computed: its weights that no single tensor of the program is.
    """

    model: fx.GraphModule
    names: dict[str, tuple[str, ...]]
    computed: tuple[Computed, ...]


def export_model(model: nn.Module, *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    """Trace a model in eval mode, its batch size left open.

    Args:
        model: stays as it is.
        inputs: an example of each, B >= 2 rows.

    Raises:
        ArchitectureError: it cannot be traced.
    """
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = tuple({0: batch} for _ in inputs)
    try:
        with torch.no_grad(), eval_mode(model):
            return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
        raise ArchitectureError(
            f"torch.export cannot trace the model: {one_line(error)[:300]} A model can be traced "
            "when its forward pass has no branches that depend on the data."
        ) from None


def traced_module(program: torch.export.ExportedProgram) -> Traced:
    """Make a trainable module of an exported program; the program stays as it is.

    Both modes of export are understood, and both with and without decompositions.

    Raises:
        ArchitectureError: the program has an input or a random function that a trainable module
            cannot have.
    """
    unlifted = program.module(check_guards=False)
    # A copy has no owner, whose attributes it would have to match all the time.
    graph = copy.deepcopy(unlifted.graph)
    tensors = {
        str(node.target): _attribute(unlifted, str(node.target))
        for node in graph.nodes
        if node.op == "get_attr"
    }
    names = _names(program, tensors)
    tensors = {name: _owned(tensor) for name, tensor in tensors.items()}
    _erase_side_effects(graph)
    open_batch(graph)
    computed = compute_weights(graph, tensors)
    graph.eliminate_dead_code(_has_effects)
    _forget_unused(graph, tensors)
    layers = Layers(tensors)
    layers.put_all(graph, training=_is_training(graph))
    _erase_updates(graph)
    graph.eliminate_dead_code(_has_effects)
    _check_random(graph)
    root: dict[str, Any] = {**tensors, **layers.modules}
    used = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    model = fx.GraphModule({name: root[name] for name in used}, graph, type(unlifted).__name__)
    model.eval()
    found = {name: names.get(layers.names.get(name, name), ()) for name in model.state_dict()}
    renamed = {before: now for now, before in layers.names.items()}
    folded = tuple(Computed(renamed.get(c.name, c.name), c.sources) for c in computed)
    return Traced(model, found, folded)


def check_batch(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Check that a model treats the examples of a batch alike, however many there are.

    Raises:
        ArchitectureError: it was exported for one batch size only.
    """
    longer = tuple(torch.cat([x, x[:1]]) for x in inputs)
    try:
        with torch.no_grad(), eval_mode(model):
            expected, outputs = tensors_of(model(*inputs)), tensors_of(model(*longer))
        fits, cause = _rows_alike(expected, outputs, len(longer[0]))
    except RuntimeError as error:
        fits, cause = False, one_line(error)[:200]
    if not fits:
        raise ArchitectureError(
            f"the exported program does not run on a batch of {len(longer[0])}: {cause}. Export it "
            "with an open batch size: torch.export.export(model, (x,), dynamic_shapes=({0: "
            'torch.export.Dim("batch")},)), with at least two examples in x.'
        )


def _rows_alike(
    expected: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], rows: int
) -> tuple[bool, str]:
    """Whether outputs for some rows are the first of those for more; else why not."""
    if not all(tensor.ndim and len(tensor) == rows for tensor in outputs):
        return False, "it puts out another number of rows for it"
    for few, more in zip(expected, outputs, strict=True):
        if not are_close(few.nan_to_num(), more[: len(few)].nan_to_num()):
            return False, "it computes something else for the same examples then"
    return True, ""


def _attribute(module: nn.Module, target: str) -> torch.Tensor:
    owner, _, name = target.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), name)
    return found


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return tensor.detach().clone() if isinstance(tensor, torch.Tensor) else tensor


def _names(
    program: torch.export.ExportedProgram, tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, ...]]:
    """By name in the graph, the program's names of the same tensor: tied ones have several."""
    by_tensor: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in program.state_dict.items():
        by_tensor.setdefault(_place(name, tensor), []).append(name)
    found = {}
    for name in tensors:
        if name in program.state_dict:
            found[name] = tuple(by_tensor[_place(name, program.state_dict[name])])
    return found


def _place(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    if not tensor.numel():
        return (name,)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _erase_side_effects(graph: fx.Graph) -> None:
    """Take out assertions; they know the dtype and device that the program was exported with."""
    for node in reversed(list(graph.nodes)):
        is_guard = node.op == "call_module" and str(node.target).startswith("_guards")
        if is_guard or (node.op == "call_function" and node.target in _ASSERTIONS):
            graph.erase_node(node)


def _has_effects(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def _erase_updates(graph: fx.Graph) -> None:
    """Take out the updates of batch norms' statistics, which their modules see to."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if node.target in (_ATEN.add_.Tensor, _ATEN.copy_.default):
            changed = node.args[0]
            if isinstance(changed, fx.Node) and changed.op == "get_attr":
                graph.erase_node(node)


def _is_training(graph: fx.Graph) -> bool:
    """Whether the program was exported in training mode: batch norms update their statistics."""
    return any(
        arguments(node).get("training") is True and arguments(node).get("running_mean") is not None
        for node in graph.nodes
        if node.op == "call_function" and "batch_norm" in str(node.target)
    )


def _forget_unused(graph: fx.Graph, tensors: dict[str, torch.Tensor]) -> None:
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    counter = "num_batches_tracked"
    used |= {f"{name.removesuffix('running_mean')}{counter}" for name in used if "running_" in name}
    for name in set(tensors) - used:
        del tensors[name]


def _check_random(graph: fx.Graph) -> None:
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise ArchitectureError(
                f"the exported program calls {node.target}, which is random, in its forward pass. "
                "It was exported in training mode: export it behind model.eval()."
            )
