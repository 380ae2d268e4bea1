"""Tensors from what a pickle says of them, checked against the bytes that are really there."""

import math
from collections import OrderedDict
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from structconv_cli.model.pickle_records import Global, Instance, Persistent, PickleError, State

_MEMORY_SHARE = 0.6
_FREELY_EXPANDED = 1 << 20
_DEEPEST = 100

DTYPES: dict[str, torch.dtype] = {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
"""torch's element types by their full names, such as "torch.float32"."""

_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_REBUILT = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 4,
    "torch._utils._rebuild_tensor_v3": 4,
}
_WRAPPED = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}


class Storages(Protocol):
    """Where the bytes lie that tensors are made of, by their keys."""

    def read(self, key: str) -> bytes:
        """All bytes of a storage."""


class ForeignError(Exception):
    """A value is no plain data; says what it is."""


class TensorReader:
    """Makes tensors, and other plain data, of a pickle's records.

    All it makes takes at most 60 % of the memory that was available at the beginning.
    """

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self._bases: dict[tuple[str, torch.dtype], Tensor] = {}
        self._made: dict[int, Any] = {}
        self._room = int(_MEMORY_SHARE * psutil.virtual_memory().available)

    def plain(self, value: Any, depth: int = 0) -> Any:
        """Plain data with tensors in it, of a pickle's value with records in it.

        Raises:
            ForeignError: it needs a class or function that is not torch's own for plain tensors.
            PickleError: a tensor does not lie inside its storage, or too much memory is needed.
        """
        if value is None or isinstance(value, bool | int | float | str | bytes | bytearray):
            return value
        if depth > _DEEPEST:
            raise ForeignError("a value that is nested too deep")
        if id(value) in self._made:
            made = self._made[id(value)]
            if made is _BEING_MADE:
                raise ForeignError("a value that holds itself")
            return made
        self._made[id(value)] = _BEING_MADE
        try:
            made = self._convert(value, depth + 1)
        except BaseException:
            del self._made[id(value)]
            raise
        self._made[id(value)] = made
        return made

    def _convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, State):
            state = OrderedDict((k, self.plain(v, depth)) for k, v in value.items())
            if value._metadata is not None:
                state._metadata = self.plain(value._metadata, depth)  # type: ignore[attr-defined]
            return state
        if isinstance(value, dict):
            if any(isinstance(key, Global | Instance | Persistent) for key in value):
                raise ForeignError("keys that are no plain data")
            return {key: self.plain(v, depth) for key, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)([self.plain(v, depth) for v in value])
        if isinstance(value, Global):
            if value.name in DTYPES:
                return DTYPES[value.name]
            raise ForeignError(value.name)
        if isinstance(value, Instance):
            return self._instance(value, depth)
        raise ForeignError("a storage without a tensor")

    def _instance(self, value: Instance, depth: int) -> Any:
        if is_tensor(value):
            return self.tensor(value)
        first = value.args[0] if value.args else None
        if value.name == "_codecs.encode" and isinstance(first, str):
            self._spend(len(first))
            try:
                return first.encode("latin-1")
            except UnicodeEncodeError:
                raise PickleError("has bytes that are none") from None
        if value.name == "torch.device" and isinstance(first, str):
            try:
                return torch.device(first)
            except RuntimeError:
                raise PickleError("names a device that is none") from None
        if value.name in ("builtins.set", "__builtin__.set") and isinstance(first, list):
            self._spend(100 * len(first))
            if all(isinstance(part, str | int | float | None) for part in first):
                return set(first)
        raise ForeignError(value.name)

    def tensor(self, record: Instance) -> Tensor:
        """A tensor; several of one storage share its memory.

        Raises:
            ForeignError: it is of a kind that is not read, such as a quantized one.
            PickleError: it does not lie inside its storage, or too much memory is needed.
        """
        record = _unwrapped(record)
        if record.name not in _REBUILT or len(record.args) < 4:
            raise ForeignError(record.name)
        storage, offset, size, stride, *more = record.args
        dtype, key, count = storage_of(storage)
        if record.name.endswith("_v3") and len(more) >= 3:
            stored, dtype = dtype, _dtype(more[2])
            count = count * stored.itemsize // dtype.itemsize
        if record.name.endswith("_v2") and len(more) >= 3 and more[2]:
            raise ForeignError("a tensor with its conjugation or sign put off")
        check_inside(count, offset, size, stride)
        self._spend(math.prod(size) * dtype.itemsize)
        base = self._base(key, dtype, count)
        return torch.as_strided(base, tuple(size), tuple(stride), offset)

    def _base(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if (key, dtype) not in self._bases:
            content = self._storages.read(key)
            self._bases[key, dtype] = flat_tensor(content, dtype, count)
        base = self._bases[key, dtype]
        if len(base) < count:
            raise PickleError(f"claims two sizes of its storage {key}")
        return base

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise PickleError(
                f"holds tensors of more than {_MEMORY_SHARE:.0%} of the memory available"
            )


def is_tensor(value: object) -> bool:
    """Whether a pickle's value stands for a tensor or parameter that can be read."""
    try:
        return isinstance(value, Instance) and _unwrapped(value).name in _REBUILT
    except ForeignError:
        return False


def flat_tensor(content: bytes, dtype: torch.dtype, count: int) -> Tensor:
    """One-dimensional tensor of `count` elements, whose bytes must be just these.

    Raises:
        PickleError: there are more or fewer bytes.
    """
    if len(content) != count * dtype.itemsize:
        raise PickleError(
            f"has {len(content)} bytes where {count} elements of {dtype} take "
            f"{count * dtype.itemsize}"
        )
    if not content:
        return torch.empty(0, dtype=dtype)
    # A copy that can be written to.
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if dtype is torch.bool:
        # Any other byte than 0 and 1 is no bool, and undefined behaviour for who computes with it.
        return flat != 0
    return flat.view(dtype)


def check_inside(count: int, offset: object, size: object, stride: object) -> None:
    """Check that a tensor of these sizes and strides lies inside a storage of `count` elements.

    Raises:
        PickleError: it reaches outside, or claims far more elements than there are.
    """
    sizes, strides = _whole(size), _whole(stride)
    (start,) = _whole((offset,))
    if len(sizes) != len(strides) or len(sizes) > 64:
        raise PickleError("has a tensor of impossible sizes and strides")
    number = math.prod(sizes)
    last = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if number and last >= count:
        raise PickleError(
            f"has a tensor of shape {shape(sizes)} that reaches outside its storage of {count} "
            "elements"
        )
    if start > count or number > max(count, _FREELY_EXPANDED):
        raise PickleError(
            f"has a tensor of shape {shape(sizes)}, far larger than its storage of {count} elements"
        )


def shape(sizes: tuple[int, ...]) -> str:
    """Sizes as text."""
    return "x".join(str(n) for n in sizes[:8]) or "scalar"


def _whole(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise PickleError("has a tensor whose sizes are no list")
    if any(type(n) is not int or not 0 <= n < 2**62 for n in values):
        raise PickleError("has a tensor whose sizes or strides are no numbers from 0")
    return tuple(values)


def _unwrapped(record: Instance) -> Instance:
    """The plain tensor inside a parameter or a tensor with attributes."""
    for _ in range(8):
        args = record.args
        if record.name in _WRAPPED and args and isinstance(args[0], Instance):
            record = args[0]
        elif (
            record.name == "torch._tensor._rebuild_from_type_v2"
            and len(args) >= 3
            and isinstance(args[0], Global)
            and isinstance(args[2], tuple)
        ):
            record = Instance(args[0].name, args[2])
        else:
            return record
    raise ForeignError("a tensor that is wrapped too often")


def storage_of(value: object) -> tuple[torch.dtype, str, int]:
    """Element type, key and number of elements of a storage that a pickle refers to.

    Raises:
        ForeignError: it is of an unknown kind.
        PickleError: it is none.
    """
    place = value.id if isinstance(value, Persistent) else None
    if not isinstance(place, tuple) or len(place) < 5 or place[0] not in ("storage", b"storage"):
        raise PickleError("has a tensor without a storage")
    kind, key, count = place[1], place[2], place[4]
    if len(place) > 5 and place[5] is not None:
        raise ForeignError("a tensor in the form of a release of torch before 0.4")
    if not isinstance(kind, Global) or not isinstance(key, str) or type(count) is not int:
        raise PickleError("has a storage of no known form")
    if not 0 <= count < 2**48:
        raise PickleError(f"has a storage of {count} elements")
    name = kind.name.removeprefix("torch.storage.").removeprefix("torch.")
    if name == "UntypedStorage":
        return torch.uint8, key, count
    if name.removesuffix("Storage") not in _STORAGES:
        raise ForeignError(kind.name)
    return _STORAGES[name.removesuffix("Storage")], key, count


def _dtype(value: object) -> torch.dtype:
    if isinstance(value, Global) and value.name in DTYPES:
        return DTYPES[value.name]
    raise PickleError("has a tensor of an unknown element type")


_BEING_MADE = object()
