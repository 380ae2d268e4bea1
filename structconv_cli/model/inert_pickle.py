"""Reading a pickle without running it: a stack machine that builds data and only records the rest.

A pickle is a program. Here its instructions are decoded by `pickletools.genops`, numbers, texts and
containers are built, and whatever it would import or call becomes a `Global` or an `Instance`: the
name, the arguments and the state that it was given. No name is ever looked up, and nothing that was
named is ever called.

What a hostile pickle could do to such a machine is bounded too. Its instructions are counted; keys
of dictionaries are those whose hash is quick; nothing is ever copied, so that memory grows with the
file and not with how often it refers to itself.
"""

import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from structconv_cli.model.pickle_records import (
    Global,
    Instance,
    Persistent,
    Pickled,
    PickleError,
    State,
)
from structconv_cli.quoting import told

MOST_INSTRUCTIONS = 5_000_000
_MOST_TUPLE_KEYS = 10_000
_BIGGEST_KEY = 2**60


def read_pickle(file: BinaryIO) -> Pickled:
    """Read one pickle of any protocol; the file is left behind its end.

    Raises:
        PickleError: it is damaged, too long, or of a form that is not read.
    """
    machine = _Machine()
    try:
        machine.run(pickletools.genops(file))
        value = machine.stack.pop()
    except PickleError:
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
        AttributeError,
    ) as error:
        raise PickleError(f"holds a damaged pickle ({told(error)})") from None
    return Pickled(value, tuple(machine.globals), tuple(machine.references))


class _Machine:
    """The pickle's stack and memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, None] = {}
        self.references: list[Persistent] = []
        self.tuple_keys = 0

    def run(self, instructions: Iterator[tuple[Any, Any, Any]]) -> None:
        for count, (instruction, argument, _) in enumerate(instructions, 1):
            if count > MOST_INSTRUCTIONS:
                raise PickleError(f"has more than {MOST_INSTRUCTIONS} instructions")
            name = instruction.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif action := _ACTIONS.get(name):
                action(self, argument)
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise PickleError(f"has the instruction {name}, which is not read")

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        found = self.stack
        self.stack = self.outer.pop()
        return found

    def put(self, index: int | None = None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def name_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("imports a name that is no text")
        full = f"{module}.{name}"
        if not full.isprintable() or len(full) > 500:
            raise PickleError("imports a name that is no name")
        self.globals[full] = None
        self.stack.append(Global(full))

    def call(self, callee: object, args: object) -> None:
        if isinstance(callee, Persistent):
            # A class beside which old files keep its source.
            place = callee.id
            known = isinstance(place, tuple) and len(place) > 1 and place[0] == "module"
            callee = place[1] if known else callee
        if not isinstance(callee, Global):
            raise PickleError("calls something that is no name")
        if not isinstance(args, tuple):
            raise PickleError("makes a call without a tuple of arguments")
        if callee.name == "collections.OrderedDict" and not args:
            self.stack.append(State())
            return
        if callee.name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple | list):
            self.stack.append(args[0])
            return
        self.stack.append(Instance(callee.name, args))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, State):
            if isinstance(state, dict):
                target._metadata = state.get("_metadata")
        elif isinstance(target, Instance):
            target.state = state
        else:
            raise PickleError(f"gives a state to a {type(target).__name__}")

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Instance):
            target.items.extend(values)
        else:
            raise PickleError(f"appends to a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if len(values) % 2:
            raise PickleError("sets a key without a value")
        if isinstance(target, Instance):
            target.pairs.extend(values)
            return
        if not isinstance(target, dict):
            raise PickleError(f"sets keys of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[self.key(key)] = value

    def key(self, key: Any) -> Any:
        """Let keys pass whose hash is neither slow, deep nor easily made to collide."""
        if isinstance(key, int) and abs(key) >= _BIGGEST_KEY:
            raise PickleError("has a key that is a huge number")
        if isinstance(key, tuple):
            self.tuple_keys += 1
            simple = all(isinstance(part, str | int | float | bytes | None) for part in key)
            if self.tuple_keys > _MOST_TUPLE_KEYS or len(key) > 100 or not simple:
                raise PickleError("has too many or too deep tuples as keys")
        elif not isinstance(key, str | int | float | bytes | None | Global | Instance | Persistent):
            raise PickleError(f"has a key of type {type(key).__name__}")
        return key

    def make_frozenset(self, values: list[Any]) -> None:
        self.stack.append(frozenset(self.key(value) for value in values))

    def add_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Instance):
            target.items.extend(values)
        elif isinstance(target, set):
            target.update(self.key(value) for value in values)
        else:
            raise PickleError(f"adds to a {type(target).__name__}")

    def make_dict(self, values: list[Any]) -> None:
        self.stack.append({})
        self.set_items(values)

    def reduce(self) -> None:
        args = self.stack.pop()
        self.call(self.stack.pop(), args)

    def new(self, keywords: bool) -> None:
        named = self.stack.pop() if keywords else None
        args = self.stack.pop()
        self.call(self.stack.pop(), args)
        if named and isinstance(self.stack[-1], Instance):
            self.stack[-1].pairs.append(named)

    def stack_global(self) -> None:
        name = self.stack.pop()
        self.name_global(self.stack.pop(), name)

    def make_object(self) -> None:
        callee, *args = self.since_mark()
        self.call(callee, tuple(args))

    def instantiate(self, argument: str) -> None:
        args = tuple(self.since_mark())
        module, _, name = argument.partition(" ")
        self.name_global(module, name)
        self.call(self.stack.pop(), args)

    def refer(self, place: Any) -> None:
        self.references.append(Persistent(place))
        self.stack.append(self.references[-1])

    def make_list(self) -> None:
        found = self.since_mark()
        self.stack.append(found)

    def make_tuple(self) -> None:
        found = tuple(self.since_mark())
        self.stack.append(found)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise PickleError("takes from an empty stack")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()


_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "NONE",
    ]
)

_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_SET": lambda m, _: m.stack.append(set()),
    "MARK": lambda m, _: m.mark(),
    "LIST": lambda m, _: m.make_list(),
    "TUPLE": lambda m, _: m.make_tuple(),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "DICT": lambda m, _: m.make_dict(m.since_mark()),
    "FROZENSET": lambda m, _: m.make_frozenset(m.since_mark()),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.set_one(),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "ADDITEMS": lambda m, _: m.add_items(m.since_mark()),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "PUT": lambda m, index: m.put(index),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
    "MEMOIZE": lambda m, _: m.put(),
    "GET": lambda m, index: m.stack.append(m.memo[index]),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": lambda m, argument: m.name_global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.new(keywords=False),
    "NEWOBJ_EX": lambda m, _: m.new(keywords=True),
    "OBJ": lambda m, _: m.make_object(),
    "INST": lambda m, argument: m.instantiate(argument),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, argument: m.refer(argument),
    "BINPERSID": lambda m, _: m.refer(m.stack.pop()),
}
