"""A verification in few lines: of every kind of check, the one that came nearest to its limit."""

from collections.abc import Iterable
from dataclasses import dataclass

from structconv_cli.exactness import Check


@dataclass(frozen=True)
class CheckKind:
    """Checks of one kind.

    Attributes:
        what: the kind.
        count, failed: how many there are, and how many of them failed.
        index: where the one that came nearest to its tolerance stands in the list.
        tightest: that one.
        used: its error as a share of its tolerance, at most 1 if it passed; None where there is
            nothing to divide.
    """

    what: str
    count: int
    failed: int
    index: int
    tightest: Check
    used: float | None


def kinds_of(checks: Iterable[Check]) -> tuple[CheckKind, ...]:
    """Checks by their kind, in the order of their first."""
    groups: dict[str, list[tuple[int, Check]]] = {}
    for index, check in enumerate(checks):
        groups.setdefault(check.what, []).append((index, check))
    kinds = []
    for what, members in groups.items():
        index, tightest = max(members, key=lambda member: _rank(member[1]))
        failed = sum(not check.passed for _, check in members)
        kinds.append(CheckKind(what, len(members), failed, index, tightest, _used(tightest)))
    return tuple(kinds)


def _used(check: Check) -> float | None:
    if check.error is None or check.tolerance <= 0:
        return None
    return check.error / check.tolerance


def _rank(check: Check) -> tuple[bool, float]:
    used = _used(check)
    return not check.passed, 0.0 if used is None else used
