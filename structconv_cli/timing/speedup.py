"""How much faster one model is than another, judged from rounds in which both were timed.

A speed-up is judged from the rounds, not from the runs: the two figures of one round were taken
close together in time, so that what slows the whole machine for a while slows both, and leaves
their ratio. The rounds of one block were run by the same processes, whose luck they share; so the
bootstrap draws blocks first, then rounds within them, and a difference must show in the blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from structconv_cli.errors import BenchmarkError

CONFIDENCE = 0.95
"""Probability that a speed-up's interval is made for."""

RESOLUTION = 1.01
"""Ratio that a speed-up must exceed to be called a difference.

Where memory happens to lie decides some tenths of a percent, and more rounds do not average that
away.
"""

MINIMUM_ROUNDS = 6
"""Fewest rounds, or blocks, from which a test at this confidence can find a difference."""

FASTER = "faster"
SLOWER = "slower"
NO_DIFFERENCE = "no significant difference"
TOO_FEW_ROUNDS = "too few rounds"

_RESAMPLES = 2000
_MOST_EXACT = 50
"""Most figures for which the signed-rank test is exact; ties and zeros need the approximation."""


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
    blocks: Sequence[int] | None = None,
) -> Speedup:
    """Judge a candidate's speed from the two models' figures (ms), one each for every round.

    The median is taken of the logarithms of the ratios, so that the comparison the other way
    round gives the reciprocal: for an even number of rounds it lies at the geometric mean of the
    two middle ratios. The verdict is "faster" or "slower" only if the whole interval lies on one
    side of 1, a signed-rank test finds the difference too, and the median is more than
    `RESOLUTION` away: smaller differences are beneath what this procedure resolves. The test is
    of the blocks' medians if there are `MINIMUM_ROUNDS` blocks, else of the rounds.

    Args:
        baseline: Name of the model compared with.
        candidate: Name of the model judged.
        baseline_ms: The baseline's figures.
        candidate_ms: The candidate's.
        seed: Seeds the bootstrap.
        blocks: The block of every round; None if all are of one.

    Raises:
        BenchmarkError: The figures are not paired, there are none, or they are not positive
            numbers.
    """
    if len(baseline_ms) != len(candidate_ms) or not len(baseline_ms):
        raise BenchmarkError(
            f"Model '{baseline}' has {len(baseline_ms)} rounds and model '{candidate}' has "
            f"{len(candidate_ms)}. A comparison needs the same number from both, at least one; "
            "run them in one benchmark."
        )
    if not all(math.isfinite(ms) and ms > 0 for ms in (*baseline_ms, *candidate_ms)):
        raise BenchmarkError(
            f"A round of model '{baseline}' or '{candidate}' has a time that is not a positive "
            "number of milliseconds. Run the benchmark again."
        )
    logarithms = np.log(np.asarray(baseline_ms) / np.asarray(candidate_ms))
    numbers = np.asarray(blocks) if blocks is not None else np.zeros(len(logarithms), int)
    groups = [logarithms[numbers == number] for number in np.unique(numbers)]
    median = math.exp(np.median(logarithms))
    if len(logarithms) < MINIMUM_ROUNDS:
        return Speedup(baseline, candidate, median, None, None, CONFIDENCE, TOO_FEW_ROUNDS)
    low, high = (math.exp(end) for end in _interval(groups, seed))
    units = logarithms
    if len(groups) >= MINIMUM_ROUNDS:
        units = np.array([np.median(group) for group in groups])
    verdict = NO_DIFFERENCE
    if _differs(units):
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


def _interval(groups: Sequence[npt.NDArray[np.float64]], seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the median: blocks are drawn, then rounds within each."""
    rng = np.random.default_rng(seed)
    size = max(len(group) for group in groups)
    # Drawing with replacement: a block of fewer rounds gives as many as it has.
    drawn = rng.integers(0, len(groups), (_RESAMPLES, len(groups)))
    lengths = np.array([len(group) for group in groups])
    padded = np.array([np.pad(group, (0, size - len(group))) for group in groups])
    columns = (rng.random((*drawn.shape, size)) * lengths[drawn][..., None]).astype(int)
    values = padded[drawn[..., None], columns]
    values[np.arange(size) >= lengths[drawn][..., None]] = np.inf
    # NumPy's nanmedian takes a hundred times as long.
    ordered = np.sort(values.reshape(_RESAMPLES, -1), axis=1)
    counts = lengths[drawn].sum(axis=1)
    rows = np.arange(_RESAMPLES)
    medians = (ordered[rows, (counts - 1) // 2] + ordered[rows, counts // 2]) / 2
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return float(low), float(high)


def _differs(units: npt.NDArray[np.float64]) -> bool:
    """Whether Wilcoxon's signed-rank test says that they are not symmetric about 0."""
    # Half a second, for which commands that compare nothing need not wait.
    from scipy.stats import wilcoxon

    if not units.any():
        return False
    sizes = np.abs(units)
    exact = len(units) <= _MOST_EXACT and sizes.all() and len(np.unique(sizes)) == len(sizes)
    return bool(wilcoxon(units, method="exact" if exact else "approx").pvalue < 1 - CONFIDENCE)
