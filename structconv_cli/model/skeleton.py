"""A model without the memory of its weights: to see its modules and the shapes of its tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.architecture import Architecture, build_model

Shape = tuple[int, ...]


def skeleton(architecture: Architecture) -> nn.Module:
    """Build a model whose parameters are on the meta device, if its factory allows.

    Buffers, and all else that the factory computes, are real. A factory that computes with the
    values of its parameters gives a whole model.

    Raises:
        ArchitectureError: as `build_model`.
    """
    try:
        with _parameters_on_meta(), _NoValues():
            return build_model(architecture)
    except ArchitectureError as error:
        if error.__cause__ is None:  # nothing was run
            raise
    return build_model(architecture)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shapes of a state_dict, in its order.

    The counters of batch-norms, which old files lack, are left out; so are lazy parameters, which
    have none yet.
    """
    return {
        name: tuple(value.shape)
        for name, value in tensors.items()
        if isinstance(value, Tensor)
        and not nn.parameter.is_lazy(value)
        and not name.endswith("num_batches_tracked")
    }


class _NoValues(TorchFunctionMode):
    """What is done in place to a tensor without values is left out: most of the time of building
    goes into random weights."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # torch.nn.init's functions hand all that they were given on by name.
        changed = args[0] if args else kwargs.get("tensor")
        if isinstance(changed, Tensor) and changed.is_meta and _in_place(function):
            return changed
        return function(*args, **kwargs)


def _in_place(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and name not in _CHANGING_SHAPE


_CHANGING_SHAPE = frozenset(
    {"requires_grad_", "resize_", "resize_as_", "set_", "t_", "transpose_", "swapaxes_"}
    | {"swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "rename_", "detach_"}
)
"""And other functions in place that are about more than values."""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def replace(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or nn.parameter.is_lazy(parameter):
            return None
        empty = torch.empty_like(parameter, device="meta")
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
