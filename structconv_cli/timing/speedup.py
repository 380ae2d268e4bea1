"""How much faster one model is than another, judged from rounds in which both were timed.

A speed-up is judged from the rounds, not from the runs: the two figures of one round were taken
close together in time, so that what slows the whole machine for a while slows both, and leaves
their ratio.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from structconv_cli.errors import BenchmarkError

CONFIDENCE = 0.95
"""Probability that a speed-up's interval is made for."""

RESOLUTION = 1.01
"""Ratio that a speed-up must exceed to be called a difference.

Two processes that run the same file keep a ratio of their own for as long as they live, some tenths
of a percent away from 1, so that narrow intervals miss 1. More rounds do not average that away.
"""

MINIMUM_ROUNDS = 5
"""Fewest rounds from which an interval is computed."""

FASTER = "faster"
SLOWER = "slower"
NO_DIFFERENCE = "no significant difference"
TOO_FEW_ROUNDS = "too few rounds"

_RESAMPLES = 2000


@dataclass(frozen=True)
class Speedup:
    """How many times faster one model is than another.

    Attributes:
        baseline: Name of the model compared with.
        candidate: Name of the model judged.
        median: Median over the rounds of baseline time / candidate time; above 1 is faster.
        low: Lower end of the median's bootstrap interval; None with too few rounds for one.
        high: Upper end of that interval; None with too few rounds.
        confidence: The interval's confidence.
        verdict: ``"faster"``, ``"slower"``, ``"no significant difference"``, or ``"too few
            rounds"``, which is no verdict.
    """

    baseline: str
    candidate: str
    median: float
    low: float | None
    high: float | None
    confidence: float
    verdict: str


def compare_rounds(
    baseline: str,
    candidate: str,
    baseline_ms: Sequence[float],
    candidate_ms: Sequence[float],
    seed: int = 0,
) -> Speedup:
    """Judge a candidate's speed from the two models' figures (ms), one each for every round.

    The median is taken of the logarithms of the ratios, so that the comparison the other way
    round gives the reciprocal: for an even number of rounds it lies at the geometric mean of the
    two middle ratios. The verdict is "faster" or "slower" only if the whole interval lies on one
    side of 1 and the median is more than `RESOLUTION` away: smaller differences are beneath what
    this procedure resolves.

    Raises:
        BenchmarkError: The figures are fewer than `MINIMUM_ROUNDS`, not paired, or not positive
            numbers.
    """
    if len(baseline_ms) != len(candidate_ms) or len(baseline_ms) < MINIMUM_ROUNDS:
        raise BenchmarkError(
            f"Model '{baseline}' has {len(baseline_ms)} rounds and model '{candidate}' has "
            f"{len(candidate_ms)}. A comparison needs the same number from both, at least "
            f"{MINIMUM_ROUNDS}; run them in one benchmark with that many rounds."
        )
    if not all(math.isfinite(ms) and ms > 0 for ms in (*baseline_ms, *candidate_ms)):
        raise BenchmarkError(
            f"A round of model '{baseline}' or '{candidate}' has a time that is not a positive "
            "number of milliseconds. Run the benchmark again."
        )
    logarithms = np.log(np.asarray(baseline_ms) / np.asarray(candidate_ms))
    interval = bootstrap(
        (logarithms,),
        np.median,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        # Not `rng`, which SciPy knows only from 1.15 on.
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    median = math.exp(np.median(logarithms))
    low = math.exp(interval.low)
    high = math.exp(interval.high)
    verdict = NO_DIFFERENCE
    if low > 1 and median > RESOLUTION:
        verdict = FASTER
    elif high < 1 and median < 1 / RESOLUTION:
        verdict = SLOWER
    return Speedup(
        baseline=baseline,
        candidate=candidate,
        median=median,
        low=low,
        high=high,
        confidence=CONFIDENCE,
        verdict=verdict,
    )
