"""Sizes in a torch.export archive, which torch evaluates as Python: let pass only if arithmetic."""

import ast
import re

from structconv_cli.quoting import shown
from structconv_cli.zip_archive import ArchiveError

_MOST_TEXT = 1000
_BIGGEST = 2**62
SYMBOL = re.compile(r"(s|u|zf|zuf)[0-9]{1,9}", re.ASCII)
"""Names that torch gives to sizes that are not fixed."""

_EXPRESSIONS = frozenset(
    [
        "Integer",
        "Float",
        "Rational",
        "Add",
        "Mul",
        "Max",
        "Min",
        "Mod",
        "PythonMod",
        "FloorDiv",
        "CeilDiv",
        "CleanDiv",
        "Where",
        "ModularIndexing",
        "IntTrueDiv",
        "FloatTrueDiv",
        "CeilToInt",
        "FloorToInt",
        "TruncToInt",
        "ToFloat",
        "TruncToFloat",
        "RoundToInt",
        "Identity",
        "Equality",
        "Unequality",
        "Eq",
        "Ne",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "Lt",
        "Le",
        "Gt",
        "Ge",
        "And",
        "Or",
        "Not",
        "Abs",
    ]
)
_ASSUMPTIONS = frozenset(
    ["positive", "integer", "nonnegative", "nonzero", "real", "finite", "negative", "nonpositive"]
)


def check_expression(text: object) -> None:
    """Check that a size is arithmetic of symbols and whole numbers, and nothing else.

    Raises:
        ArchiveError: it is not.
    """
    if not isinstance(text, str) or len(text) > _MOST_TEXT:
        raise ArchiveError("holds a size that is no short text")
    try:
        _check_term(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _bad_expression(text) from None


def _check_term(term: ast.expr, text: str) -> None:
    if isinstance(term, ast.Constant) and isinstance(term.value, int | float):
        if abs(term.value) < _BIGGEST:
            return None
    elif (isinstance(term, ast.Name) and SYMBOL.fullmatch(term.id)) or (
        isinstance(term, ast.Name) and term.id in ("true", "false", "True", "False")
    ):
        return None
    elif isinstance(term, ast.UnaryOp) and isinstance(term.op, ast.USub):
        return _check_term(term.operand, text)
    elif isinstance(term, ast.BinOp) and isinstance(term.op, ast.Add | ast.Sub | ast.Mult):
        _check_term(term.left, text)
        return _check_term(term.right, text)
    elif isinstance(term, ast.Call) and isinstance(term.func, ast.Name):
        return _check_call(term.func.id, term, text)
    raise _bad_expression(text)


def _check_call(name: str, call: ast.Call, text: str) -> None:
    if name == "Symbol":
        symbol = call.args[0] if len(call.args) == 1 else None
        if (
            isinstance(symbol, ast.Constant)
            and isinstance(symbol.value, str)
            and SYMBOL.fullmatch(symbol.value)
            and all(
                word.arg in _ASSUMPTIONS
                and isinstance(word.value, ast.Constant)
                and type(word.value.value) is bool
                for word in call.keywords
            )
        ):
            return None
    elif name == "Pow" and len(call.args) == 2 and not call.keywords:
        # A power of powers would be a number of any length.
        exponent = ast.unparse(call.args[1])
        if re.fullmatch(r"(Integer\()?-?[0-8]\)?", exponent):
            return _check_term(call.args[0], text)
    elif name in _EXPRESSIONS and not call.keywords:
        if name == "Float" and any(isinstance(a, ast.Constant) for a in call.args):
            raise _bad_expression(text)
        for argument in call.args:
            _check_term(argument, text)
        return None
    raise _bad_expression(text)


def _bad_expression(text: str) -> ArchiveError:
    return ArchiveError(
        f"has a size that is no arithmetic of known operations: {shown(text)}. It could run code, "
        "so it is not evaluated"
    )
