"""How the models of a benchmark are measured."""

from dataclasses import dataclass

BLOCKS = 6
"""Times that all processes are started anew: the fewest blocks that a test can tell apart."""


@dataclass(frozen=True)
class Protocol:
    """How the models were measured.

    Attributes:
        rounds: Turns that each model was to have under each setting; None where a time was given.
        duration_s: Time (s) that the rounds of each setting were to fill; None where their number
            was given.
        blocks: Times that all processes were started anew under each setting.
        round_ms: Time (ms) that the timed runs of one turn fill, about.
        warmup_ms: Least time (ms) for which each model ran before it was timed.
        seed: Seed of the input, of the order of the turns and of the intervals.
        input: What the models were given: "random", or the user's images in words.
    """

    rounds: int | None = 30
    duration_s: float | None = None
    blocks: int = BLOCKS
    round_ms: float = 50.0
    warmup_ms: float = 300.0
    seed: int = 0
    input: str = "random"
