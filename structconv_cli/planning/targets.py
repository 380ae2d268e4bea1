"""What a plan is to reach."""

import re
from dataclasses import dataclass

from structconv_cli.errors import PlanError


@dataclass(frozen=True)
class Targets:
    """Limits that a plan keeps; None for none.

    With any of the first four the plan that loses least within them is wanted; with `max_drop`
    alone the fastest one that is predicted to hold it, and with both the former must hold it too.

    Attributes:
        speedup: the dense model's time over the plan's, at least.
        latency_ms: the plan's time (ms) on the target, at most.
        macs: share of the dense model's MACs, at most, above 0 and at most 1.
        parameters: share of its parameters, at most, above 0 and at most 1.
        max_drop: top-1 accuracy that may be lost, in points.

    Raises:
        PlanError: a value is out of range, or two targets say the same thing twice.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    macs: float | None = None
    parameters: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if self.speedup is not None and self.latency_ms is not None:
            raise PlanError(
                f"--target-speedup {self.speedup:g} and --target-latency {self.latency_ms:g}ms "
                "both say how fast the model is to be. Give one of them."
            )
        if self.speedup is not None and not 1 <= self.speedup < 1000:
            raise PlanError(
                f"--target-speedup is {self.speedup:g}; expected a factor of 1 or more, such as "
                "1.5 for two thirds of the time."
            )
        if self.latency_ms is not None and not 0 < self.latency_ms < float("inf"):
            raise PlanError(
                f"--target-latency is {self.latency_ms:g} ms; expected a time above 0, such as 5ms."
            )
        for option, share in (("macs", self.macs), ("params", self.parameters)):
            if share is not None and not 0 < share <= 1:
                raise PlanError(
                    f"--target-{option} is {share:g}; expected the share of the original that may "
                    "be left, above 0 and at most 1, such as 0.5."
                )
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise PlanError(
                f"--max-drop is {self.max_drop:g}; expected points of accuracy, from 0 to 100."
            )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return self == Targets()

    @property
    def wants_the_fastest(self) -> bool:
        """Whether `max_drop` alone is asked for."""
        return not self.is_empty and self == Targets(max_drop=self.max_drop)


_LATENCY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(ms|us|μs|s)?\s*", re.IGNORECASE)
_UNITS = {"ms": 1.0, "us": 1e-3, "μs": 1e-3, "s": 1e3}


def parse_latency(text: str) -> float:
    """A time in ms from words such as "5ms", "0.8 s" or "5" (ms).

    Raises:
        PlanError: it is none.
    """
    match = _LATENCY.fullmatch(text)
    if match is None:
        raise PlanError(f"--target-latency is {text!r}; expected a time such as 5ms, 800us or 1s.")
    return float(match[1]) * _UNITS[(match[2] or "ms").casefold()]
