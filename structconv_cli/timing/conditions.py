"""What else the machine did while a benchmark ran: other processes' load, a clock that fell."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conditions:
    """What else the machine did while it was measured.

    Attributes:
        seconds: Duration of the rounds.
        other_load: Cores that other processes kept busy, on average; None where the operating
            system does not tell.
        drift: Time of the reference kernel in the last third of the rounds over that in the first
            third; above 1 where the machine became slower. None with too few rounds to tell.
        reference_ms: Time (ms) of the reference kernel, a fixed matrix product, before every
            round.
    """

    seconds: float
    other_load: float | None
    drift: float | None
    reference_ms: tuple[float, ...]
