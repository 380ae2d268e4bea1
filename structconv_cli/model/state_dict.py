"""Where a state_dict lies in what a checkpoint holds, and what wrappers put before its names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from structconv_cli.errors import CheckpointError
from structconv_cli.model.checkpoint_kind import REMEDY
from structconv_cli.quoting import legible

T = TypeVar("T")

_NESTINGS = ("state_dict", "model_state_dict", "model")
_AVERAGED = (
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "module_ema",
    "ema_model",
    "params_ema",
)
_WRAPPERS = ("module.", "_orig_mod.")
# What torch.optim.swa_utils.AveragedModel puts beside the tensors of the module it wraps.
_WRAPPER_TENSORS = frozenset({"n_averaged"})


def find_nesting(path: Path, loaded: Mapping[Any, Any]) -> str | None:
    """Find the key under which the state_dict lies; None is the top level.

    Args:
        path: the file, for the messages.
        loaded: what it holds.

    Raises:
        CheckpointError: there are no named tensors, or several candidates for the state_dict.
    """
    counts = {key: _count_tensors(value) for key, value in loaded.items() if isinstance(key, str)}
    for key in (*_NESTINGS, "ema"):
        if counts.get(key):
            return key
    at_top = _count_tensors(loaded)
    # A checkpoint may keep a tensor of its own, such as a random state, beside its state_dict.
    nested = [key for key, count in counts.items() if count > at_top]
    known = [key for key in _AVERAGED if key in nested]
    others = [key for key in nested if key not in _AVERAGED]
    if known and len(others) <= 1:
        return (others or known)[0]
    if len(nested) == 1:
        return nested[0]
    if nested:
        raise CheckpointError(
            f"The checkpoint {path} holds several sets of tensors, under "
            f"{', '.join(legible(key) for key in nested[:10])}: save "
            "the one to convert by itself, with torch.save(checkpoint[KEY], FILE)."
        )
    if not at_top:
        keys = ", ".join(legible(key) for key in list(loaded)[:10]) or "none"
        raise CheckpointError(
            f"The checkpoint {path} holds no named tensors, neither at its top level nor under one "
            f"of its keys ({keys}): {REMEDY}."
        )
    return None


def averaged_beside(loaded: Mapping[Any, Any], chosen: str | None) -> tuple[str, ...]:
    """Keys of averaged weights (EMA) that lie beside the state_dict under `chosen`."""
    return tuple(key for key in _AVERAGED if key != chosen and _count_tensors(loaded.get(key)))


def wrapper_prefix(names: Mapping[str, Tensor]) -> str:
    """Return what DistributedDataParallel, torch.compile and the like put before all names."""
    wrapped = [name for name in names if name not in _WRAPPER_TENSORS]
    prefix = ""
    while wrapped:
        wrapper = next(
            (w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in wrapped)), None
        )
        if wrapper is None:
            break
        prefix += wrapper
    return prefix


def unwrapped(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What lies behind a prefix, by names without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _count_tensors(value: object) -> int:
    """Count the tensors in a mapping with text keys; any other value has none."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return 0
    return sum(isinstance(entry, Tensor) for entry in value.values())
