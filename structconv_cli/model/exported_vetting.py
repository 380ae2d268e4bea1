"""What a torch.export archive may say: every text in it, checked before torch reads it.

torch trusts the program inside such an archive. It evaluates sizes with `sympy.sympify` (which is
`eval`), pastes the names of nodes and parameters into Python source that it executes, executes
guards as Python, imports the modules that enumerations name, and looks operators up by any path. So
only a program in which every text is of a known, narrow form is handed on; guards, stack traces and
other notes, which the computation does not need, are taken out.
"""

import json
import keyword
import re
from typing import Any

import torch

from structconv_cli.model.size_expression import SYMBOL, check_expression
from structconv_cli.quoting import shown
from structconv_cli.zip_archive import ArchiveError

_MOST_NODES = 100_000
_MOST_TEXT = 1000
_INT64 = range(-(2**63), 2**63)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PATH = re.compile(r"([A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)?", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_.+<>=-]*", re.ASCII)
_STACK = re.compile(r"[A-Za-z0-9_.,;@]*", re.ASCII)
_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)", re.ASCII)
_PYTHON = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|pow"
    r"|getitem)|math\.(ceil|floor|trunc)|torch\.sym_(int|float|max|min|ite|not|sum)"
    r"|torch\._sym_sqrt"
)
_UNDERSCORED = re.compile(
    r"_native_batch_norm_legit(_no_training|_functional)?|_unsafe_view|_softmax|_log_softmax"
    r"|_to_copy|_assert_scalar|_assert_tensor_metadata|_adaptive_avg_pool[23]d|_convolution"
    r"|_weight_norm|_local_scalar_dense|_functional_assert_scalar"
)
_REFUSED_OPERATORS = re.compile(r"from_file|save|warn|set_.*|resize.*|.*_seed|record_stream")
_TYPES = re.compile(
    r"(Optional\[|List\[)*(Tensor|int|SymInt|number|bool|float|complex|Device|str)\]*"
)
_TEXT_ARGUMENTS = frozenset(
    [
        "approximate",
        "rounding_mode",
        "equation",
        "mode",
        "indexing",
        "reduce",
        "side",
        "padding",
        "interpolation",
        "norm",
        "pad_mode",
        "padding_side",
        "assert_msg",
        "ord",
    ]
)
_CONTAINERS = frozenset(
    ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
)
_DROPPED = frozenset(("guards_code", "stack_trace", "custom"))
_NAMES = frozenset(("name", "as_name", "forward_arg_names", "field_names"))
_PATHS = frozenset(
    (
        "fqn",
        "parameter_name",
        "buffer_name",
        "tensor_constant_name",
        "user_input_name",
        "target_name",
    )
)
_KEYED_BY_NAME = frozenset(
    ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values")
)


def clean_program(program: Any) -> dict[str, Any]:
    """A copy of a program (`models/NAME.json`), without what is not needed and could do harm.

    Raises:
        ArchiveError: a text in it is not of the form that torch.export writes.
    """
    if not isinstance(program, dict) or not isinstance(program.get("graph_module"), dict):
        raise ArchiveError("holds a program of an unknown form")
    graph = program["graph_module"].get("graph")
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    if not isinstance(nodes, list) or len(nodes) > _MOST_NODES:
        raise ArchiveError(f"holds no list of nodes, or more than {_MOST_NODES}")
    if program["graph_module"].get("treespec_namedtuple_fields"):
        raise ArchiveError("takes or returns named tuples, which are not read")
    cleaned = {key: _clean(key, value) for key, value in program.items()}
    cleaned["guards_code"] = []
    cleaned["graph_module"]["metadata"] = {}
    return cleaned


def clean_config(config: Any) -> dict[str, Any]:
    """A copy of the table of an archive's weights or constants, checked like a program.

    Raises:
        ArchiveError: it has entries that are pickled or no tensors, or is of an unknown form.
    """
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise ArchiveError("holds a table of weights of an unknown form")
    cleaned = {}
    for name, entry in entries.items():
        _require(_PATH, "name of a tensor", name)
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise ArchiveError(
                f"holds {shown(name)} as a pickle; expected plain tensors. Export the model "
                "without objects of its own"
            )
        file = entry.get("path_name")
        _require(_NAME, "name of a part", file)
        if not isinstance(entry.get("tensor_meta"), dict) or not str(file).startswith(
            ("weight_", "tensor_")
        ):
            raise ArchiveError(f"holds {shown(name)}, which is no tensor")
        cleaned[name] = {key: _clean(key, value) for key, value in entry.items()}
    return {"config": cleaned}


def _clean(key: str, value: Any, depth: int = 0) -> Any:
    """A value that stands under `key`, with the texts in it checked by what the key means."""
    if depth > 100:
        raise ArchiveError("holds a program that is nested too deep")
    if key in _DROPPED:
        return [] if key == "guards_code" else ""
    if isinstance(value, list):
        return [_clean(key, each, depth + 1) for each in value]
    if isinstance(value, dict):
        return _clean_dict(key, value, depth + 1)
    if isinstance(value, str):
        return _clean_text(key, value)
    if isinstance(value, int) and value not in _INT64:
        raise ArchiveError(f"has a number that is too large, under {shown(key)}")
    return value


def _clean_dict(key: str, value: dict[str, Any], depth: int) -> dict[str, Any]:
    if key == "metadata":
        stack = value.get("nn_module_stack")
        kept = isinstance(stack, str) and _STACK.fullmatch(stack)
        return {"nn_module_stack": stack} if kept else {}
    if key == "device":
        return {"type": "cpu", "index": None}
    if key in ("custom_obj_values", "treespec_namedtuple_fields") and value:
        raise ArchiveError("holds objects of classes of its own, which are not read")
    cleaned = {}
    for name, each in value.items():
        if name in ("as_graph", "as_custom_obj", "custom_obj", "token"):
            raise ArchiveError(f"holds a part of a kind that is not read ({name})")
        if key in _KEYED_BY_NAME:
            _require_name(name)
        elif key == "range_constraints":
            _require(SYMBOL, "name of a size", name)
        else:
            _require(_NAME, "entry", name)
        cleaned[name] = _clean(name, each, depth)
    return cleaned


def _clean_text(key: str, value: str) -> str:
    if key == "expr_str":
        check_expression(value)
    elif key in ("target", "as_operator"):
        _check_operator(value)
    elif key in _NAMES:
        # Arguments of operators that have no name in their schema are written so.
        if value:
            _require_name(value)
    elif key in _PATHS:
        _require(_PATH, "name", value)
    elif key in ("in_spec", "out_spec"):
        _check_tree(value)
    elif key in ("as_string", "as_strings"):
        if len(value) > _MOST_TEXT or not value.isprintable():
            raise ArchiveError("has a text argument that is long or not printable")
    elif key == "as_device":
        return "cpu"
    elif key == "verifiers":
        if value not in ("TRAINING", "ATEN", "EDGE"):
            raise ArchiveError(f"is of an unknown dialect, {shown(value)}")
    else:
        _require(_PLAIN, f"text under {shown(key)}", value)
    return value


def _require_name(value: object) -> None:
    _require(_NAME, "name", value)
    if keyword.iskeyword(str(value)) or len(str(value)) > _MOST_TEXT:
        raise ArchiveError(f"has a name that is none, {shown(value)}")


def _require(form: re.Pattern[str], what: str, value: object) -> None:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ArchiveError(
            f"has a {what} that torch.export would not write, {shown(value)}; torch would paste "
            "it into code, so the archive is not opened"
        )


def _check_operator(target: str) -> None:
    """Let pass torch's own operators on tensors and numbers, without those that touch files."""
    if _PYTHON.fullmatch(target):
        return
    found = _ATEN.fullmatch(target)
    if found is None or not _is_plain_operator(*found.groups()):
        raise ArchiveError(
            f"uses the operator {shown(target)}; only torch's own operators on tensors and "
            "arithmetic are run. Export the model without custom operators and control flow"
        )


def _is_plain_operator(name: str, overload: str) -> bool:
    if name.startswith("_") and not _UNDERSCORED.fullmatch(name):
        return False
    if _REFUSED_OPERATORS.fullmatch(name):
        return False
    packet = getattr(torch.ops.aten, name, None)
    operator = getattr(packet, overload, None) if packet is not None else None
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    return all(
        _TYPES.fullmatch(str(argument.type))
        and ("str" not in str(argument.type) or argument.name in _TEXT_ARGUMENTS)
        for argument in operator._schema.arguments
        if not str(argument.type).startswith("Optional[Generator")
    )


def _check_tree(text: str) -> None:
    """Check how inputs or outputs are nested: in tuples, lists and dictionaries only."""
    try:
        version, root = json.loads(text)
        waiting, count = [root], 0
        while waiting:
            tree = waiting.pop()
            count += 1
            kind, context, children = tree["type"], tree["context"], tree["children_spec"]
            keys = json.loads(context) if isinstance(context, str) else context
            if kind in ("builtins.dict", "collections.OrderedDict"):
                known = isinstance(keys, list) and all(_is_key(name) for name in keys)
            else:
                known = (kind is None or kind in _CONTAINERS) and keys is None
            if not known or version != 1 or count > 10_000:
                raise ArchiveError(
                    f"takes or returns an object of a kind that is not read, {shown(kind)}; "
                    "expected tensors in tuples, lists and dictionaries"
                )
            waiting += children
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        raise ArchiveError("nests its inputs or outputs in an unknown way") from None


def _is_key(name: object) -> bool:
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not keyword.iskeyword(name)
