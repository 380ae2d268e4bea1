"""How to run models in a benchmark, and for how long."""

import math
from dataclasses import dataclass

from structconv_cli.errors import BenchmarkError


@dataclass(frozen=True)
class BenchmarkSettings:
    """How to run the models, and for how long.

    Attributes:
        provider: ONNX Runtime's execution provider, by its short ("cpu", "cuda") or long name.
        threads: ONNX Runtime's intra-op threads for each model. When they are as many as the
            cores, anything else that runs on the machine stalls whole runs.
        batch_size: Images in one run.
        rounds: Turns that each model has.
        round_ms: Time (ms) that the timed runs of one turn fill, about.
        warmup_ms: Least time (ms) for which each model runs before it is timed.
        seed: Seeds the input, the order of the turns and the interval.
        duration_s: Time (s) that the rounds are to fill, in place of a number of rounds.
        blocks: Parts of the rounds; for each, all processes are started anew.
        spinning: Whether ONNX Runtime's waiting threads spin, as they do by default.
        affinity: Logical cores that the models are held to; empty for all that are allowed.

    Raises:
        BenchmarkError: A value is out of its range.
    """

    provider: str = "cpu"
    threads: int = 1
    batch_size: int = 1
    rounds: int = 30
    round_ms: float = 50.0
    warmup_ms: float = 300.0
    seed: int = 0
    duration_s: float | None = None
    blocks: int = 1
    spinning: bool = True
    affinity: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = ("threads", 1), ("batch_size", 1), ("rounds", 1), ("blocks", 1), ("seed", 0)
        for name, least in counts:
            value = getattr(self, name)
            if value < least:
                raise BenchmarkError(
                    f"The benchmark setting {name} is {value}; it must be at least {least}. "
                    f"Give {name} a value of {least} or more."
                )
        if not (math.isfinite(self.round_ms) and self.round_ms > 0):
            raise BenchmarkError(
                f"The benchmark setting round_ms is {self.round_ms}; it must be a number of "
                "milliseconds above 0. Give a positive round_ms, such as 50."
            )
        if not (math.isfinite(self.warmup_ms) and self.warmup_ms >= 0):
            raise BenchmarkError(
                f"The benchmark setting warmup_ms is {self.warmup_ms}; it must be a number of "
                "milliseconds, 0 or more. Give such a warmup_ms, for example 300."
            )
        duration = self.duration_s
        if duration is not None and not (math.isfinite(duration) and duration > 0):
            raise BenchmarkError(
                f"The benchmark setting duration_s is {duration}; it must be a number of seconds "
                "above 0. Give a positive duration, such as 20."
            )

    @property
    def block_count(self) -> int:
        """Blocks that there are: no more than rounds."""
        return self.blocks if self.duration_s is not None else min(self.blocks, self.rounds)

    def rounds_in(self, block: int) -> int:
        """Rounds of a block, counted from 0: as equal as can be."""
        each, more = divmod(self.rounds, self.block_count)
        return each + (block < more)
