"""What there is to know about an architecture without running it: its tensors and its modules.

Two models with the same tensors may compute different things: strides, padding, activations and
epsilons leave no trace in a state_dict. The modules' classes and settings tell them apart.
"""

import functools
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from structconv_cli.model.skeleton import Shape, shapes_of

# Settings without effect on a model in eval mode.
_IGNORED = frozenset(
    {
        "training", "inplace", "momentum", "track_running_stats", "drop_prob", "drop_rate",
        "drop_path_rate", "scale_by_keep", "grad_checkpointing", "memory_efficient",
        "pretrained_cfg", "default_cfg", "feature_info", "requires_grad", "p",
    }
)  # fmt: skip
_MOST_HASHED = 1 << 16


@dataclass(frozen=True)
class Description:
    """An architecture's tensors and modules.

    Attributes:
        tensors: the state_dict's shapes by name, in order, without batch-norms' counters.
        structure: a digest of all modules' names, classes and settings: models of the same digest
            compute the same from the same tensors.
    """

    tensors: dict[str, Shape]
    structure: str


def describe(model: nn.Module) -> Description:
    """Describe a model, whose parameters may be on the meta device."""
    digest = hashlib.blake2b("\n".join(module_lines(model)).encode(), digest_size=8)
    return Description(shapes_of(model.state_dict()), digest.hexdigest())


def module_lines(model: nn.Module) -> Iterator[str]:
    """One line for each module: its name, class and settings."""
    for name, module in model.named_modules():
        words = " ".join(f"{key}={value}" for key, value in settings(module).items())
        yield f"{name or 'the model'}: {_named(type(module))} {words}".rstrip()


def settings(module: nn.Module) -> dict[str, str]:
    """What a module's outputs may depend on besides its tensors, as text, by name."""
    found = {
        key: _plain(value)
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and key not in _IGNORED
    }
    unsaved = module._non_persistent_buffers_set
    for key, buffer in module.named_buffers(recurse=False):
        if key in unsaved and not buffer.is_meta and buffer.numel() < _MOST_HASHED:
            data = buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found[key] = hashlib.blake2b(data, digest_size=8).hexdigest()
    return found


def _plain(value: object) -> str:
    """A setting as text; of objects that have no text of their own, the class."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"({','.join(_plain(item) for item in value)})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_plain(k)}:{_plain(v)}' for k, v in value.items())}}}"
    if isinstance(value, functools.partial):
        return f"{_plain(value.func)}{_plain(value.args)}{_plain(value.keywords)}"
    if inspect.isroutine(value) or isinstance(value, type):
        return _named(value)
    return _named(type(value))


def _named(value: object) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    return f"{getattr(value, '__module__', None) or ''}.{name}".lstrip(".")
