"""What else the machine did while a benchmark ran: other processes' load, a clock that fell."""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil

NOTABLE_LOAD = 0.2
"""Cores kept busy by others from which on it is said."""
NOTABLE_DRIFT = 1.1
"""Slowdown of the reference kernel from which on the machine is said to throttle."""
_LEAST_FOR_DRIFT = 6
_REFERENCE = bytes(1 << 19)
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


@dataclass(frozen=True)
class Conditions:
    """What else the machine did while it was measured.

    Attributes:
        seconds: Duration of the measurement.
        other_load: Cores that other processes kept busy, on average, among those that the models
            may use; None where the operating system does not tell.
        drift: Time of the reference kernel in the last third of the rounds over that in the first
            third; above 1 where the machine became slower. None with too few rounds to tell.
        reference_ms: Time (ms) of the reference kernel before every round: hashing a fixed block
            of bytes, the fastest of three times, which only the processor's clock decides.
    """

    seconds: float
    other_load: float | None
    drift: float | None
    reference_ms: tuple[float, ...]

    def warnings(self) -> tuple[str, ...]:
        """What a reader must know of them, one sentence each."""
        found = []
        if self.other_load is not None and self.other_load >= NOTABLE_LOAD:
            found.append(
                f"Other processes kept {self.other_load:.1f} cores busy during the measurement; "
                "figures of a quiet machine are narrower and may differ."
            )
        if self.drift is not None and self.drift >= NOTABLE_DRIFT:
            found.append(
                f"The machine became {self.drift - 1:.0%} slower while it was measured, as one "
                "that throttles does; let it cool down, or hold its clock, and measure again."
            )
        elif self.drift is not None and self.drift <= 1 / NOTABLE_DRIFT:
            found.append(
                f"The machine became {1 / self.drift - 1:.0%} faster while it was measured; "
                "measure again for latencies that are all of one clock."
            )
        return tuple(found)


class ConditionsMonitor:
    """Watches the machine from its creation on.

    Args:
        cores: The logical cores that the models may use.
    """

    def __init__(self, cores: Iterable[int]) -> None:
        self._cores = frozenset(cores)
        self._start = time.perf_counter()
        self._busy = _busy_seconds(self._cores)
        self._ours = -_own_seconds()
        self._reference: list[float] = []

    def before_round(self) -> None:
        """Run the reference kernel."""
        self._reference.append(_reference_ms())

    def ended(self, cpu_seconds: float) -> None:
        """Take note of what a process of ours, which has ended, used (s)."""
        self._ours += cpu_seconds

    def conditions(self) -> Conditions:
        """What was seen till now, when all processes of ours have ended."""
        seconds = time.perf_counter() - self._start
        busy = _busy_seconds(self._cores)
        load = None
        if busy is not None and self._busy is not None:
            ours = self._ours + _own_seconds()
            load = max(0.0, (busy - self._busy - ours) / seconds)
        return Conditions(seconds, load, drift(self._reference), tuple(self._reference))


def drift(reference_ms: Sequence[float]) -> float | None:
    """Time of the last third of the rounds over that of the first; None for too few rounds."""
    third = len(reference_ms) // 3
    if len(reference_ms) < _LEAST_FOR_DRIFT:
        return None
    return float(np.median(reference_ms[-third:]) / np.median(reference_ms[:third]))


def _reference_ms() -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter_ns()
        hashlib.sha256(_REFERENCE).digest()
        times.append(time.perf_counter_ns() - start)
    return min(times) / 1e6


def _busy_seconds(cores: frozenset[int]) -> float | None:
    times = psutil.cpu_times(percpu=True)
    if not cores or max(cores) >= len(times):
        return None
    return sum(getattr(times[core], kind, 0.0) for core in cores for kind in _BUSY)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
