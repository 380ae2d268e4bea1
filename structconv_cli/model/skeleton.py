"""A model without the memory of its weights: to see its modules and the shapes of its tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

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
        with _parameters_on_meta():
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
