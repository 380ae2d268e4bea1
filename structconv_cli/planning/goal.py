"""From targets to a choice, the best trade-offs, and what to say where a target cannot be met."""

from collections.abc import Sequence

from structconv_cli.errors import PlanError
from structconv_cli.planning.choice import Choice, Quantity, choose
from structconv_cli.planning.clock import Clock
from structconv_cli.planning.options import ModelOptions
from structconv_cli.planning.targets import Targets

_CURVE_POINTS = 10
_HOLDING = 3
SPARING = 1.25
"""How many times the least predicted loss a plan may have, to spare parameters: of the same MACs,
networks that keep more of them come out of fine-tuning with less loss (`benchmarks/README.md`)."""
_NEARLY = 0.999
"""Of the parameters that could be kept: a little fewer may lose much less."""


def fastest(options: ModelOptions) -> Choice:
    """The choice that takes least time, whatever it loses."""
    found = choose(options, "ms", ())
    assert found is not None, "the dense model is always possible"
    return found


def solve(
    options: ModelOptions,
    targets: Targets,
    clock: Clock,
    most_loss: float | None,
    correction: float = 1.0,
    *,
    tuned: bool = False,
) -> Choice:
    """The choice that meets the targets.

    Args:
        options: what there is to choose from.
        targets: what is to be reached; one of them at least.
        clock: of the whole model.
        most_loss: the loss that stands for `targets.max_drop`; None if that is not asked for.
        correction: by which predicted times were found to be too short.
        tuned: whether it is fine-tuned: then parameters are spared (`sparing`) within the targets.

    Raises:
        PlanError: no choice meets them: what the best would be, and what holds it.
    """
    limits = _limits(options, targets, clock, correction)
    if limits:
        bounded = [*limits, ("loss", most_loss)] if most_loss is not None else limits
        found, paying = None, targets.macs is not None or targets.parameters is not None
        if paying:
            # What saves operations and costs time is taken only where nothing else saves enough.
            found = choose(options, "loss", bounded, paying=True)
        if found is None:
            found, paying = choose(options, "loss", bounded), False
        if tuned and found is not None:
            found = sparing(options, found, bounded, paying=paying)
    else:
        found = choose(options, "ms", [("loss", most_loss)] if most_loss is not None else [])
    if found is not None:
        return found
    raise PlanError(_unreachable(options, targets, clock, limits, most_loss, correction))


def sparing(
    options: ModelOptions,
    least: Choice,
    limits: Sequence[tuple[Quantity, float]],
    *,
    paying: bool = False,
) -> Choice:
    """The choice that keeps the most parameters for at most `SPARING` times the least loss.

    Args:
        options: what there is to choose from.
        least: the choice with the least predicted loss within the limits.
        limits: the most of each quantity.
        paying: whether structures that make nothing faster are left out.
    """
    bounded = [*limits, ("loss", SPARING * least.loss)]
    found = choose(options, "kept", bounded, paying=paying)
    # The solver's tolerances may leave nothing where the least loss is tiny.
    if found is None or found.cost.parameters <= least.cost.parameters:
        return least
    # Of those that keep as many, or nearly, the one with the least loss.
    bounded.append(("kept", _NEARLY * found.total("kept")))
    return choose(options, "loss", bounded, paying=paying) or found


def best_measured(tried: Sequence[tuple[Choice, float]], most: float) -> tuple[Choice, float]:
    """Of choices with their measured times: the one that loses least within a time, else the
    fastest.

    Args:
        tried: one at least.
        most: the time (ms).
    """

    def rank(found: tuple[Choice, float]) -> tuple[bool, float]:
        chosen, ms = found
        return ms > most, ms if ms > most else chosen.loss

    return min(tried, key=rank)


def curve(options: ModelOptions, quickest: Choice) -> tuple[Choice, ...]:
    """The least loss at each of some times from the dense model's to the fastest plan's."""
    dense = options.dense_ms
    found = []
    for step in range(1, _CURVE_POINTS):
        # Even ratios: what is twice as fast is as far from four times as from once.
        speedup = (dense / quickest.ms) ** (step / _CURVE_POINTS)
        choice = choose(options, "loss", [("ms", dense / speedup)])
        if choice is not None:
            found.append(choice)
    least = choose(options, "loss", [("ms", quickest.ms * (1 + 1e-9))])
    return _undominated([*found, least or quickest])


def _undominated(points: Sequence[Choice]) -> tuple[Choice, ...]:
    """Points, slowest first, without those that a later one equals or beats in time and loss."""
    kept: list[Choice] = []
    for point in points:
        while kept and kept[-1].loss >= point.loss:
            kept.pop()
        if not kept or point.ms < kept[-1].ms:
            kept.append(point)
    return tuple(kept)


def _limits(
    options: ModelOptions, targets: Targets, clock: Clock, correction: float
) -> list[tuple[Quantity, float]]:
    limits: list[tuple[Quantity, float]] = []
    dense = options.dense_cost
    if targets.speedup is not None:
        wanted = clock.whole(options.dense_ms) / targets.speedup
        limits.append(("ms", clock.nodes(wanted / correction)))
    if targets.latency_ms is not None:
        limits.append(("ms", clock.nodes(targets.latency_ms / correction)))
    if targets.macs is not None:
        limits.append(("macs", targets.macs * dense.multiplications))
    if targets.parameters is not None:
        limits.append(("parameters", targets.parameters * dense.parameters))
    return limits


def _unreachable(
    options: ModelOptions,
    targets: Targets,
    clock: Clock,
    limits: Sequence[tuple[Quantity, float]],
    most_loss: float | None,
    correction: float,
) -> str:
    """Which target is out of reach, what the best would be, and what holds it."""
    for quantity, most in limits:
        best = choose(options, quantity, ())
        assert best is not None, "the dense model is always possible"
        if best.total(quantity) > most:
            return _out_of_reach(options, targets, clock, quantity, best, correction)
    if most_loss is not None and limits:
        without = choose(options, "loss", limits)
        if without is not None:
            return (
                f"no plan meets the other targets and --max-drop {targets.max_drop:g} together: "
                f"the least predicted loss within them is {without.loss:.3g}, and a drop of "
                f"{targets.max_drop:g} points stands for {most_loss:.3g}. Relax one of them."
            )
    return (
        "each target can be reached alone, but no plan reaches all of them together. Relax one of "
        "them: `structconv plan` without targets shows the trade-offs."
    )


def _out_of_reach(
    options: ModelOptions,
    targets: Targets,
    clock: Clock,
    quantity: Quantity,
    best: Choice,
    correction: float,
) -> str:
    dense = options.dense_cost
    if quantity == "macs":
        share = best.cost.multiplications / dense.multiplications
        asked = f"--target-macs {targets.macs:g}"
        reached, remedy = f"{share:.3g} of the MACs", f"--target-macs {_above(share)}"
    elif quantity == "parameters":
        share = best.cost.parameters / dense.parameters
        asked = f"--target-params {targets.parameters:g}"
        reached, remedy = f"{share:.3g} of the parameters", f"--target-params {_above(share)}"
    else:
        whole = clock.whole(best.ms) * correction
        speedup = clock.whole(options.dense_ms) / whole
        if targets.speedup is not None:
            asked = f"--target-speedup {targets.speedup:g}"
            # The dense model, unchanged, is always as fast as itself.
            remedy = f"--target-speedup {max(1.0, int(speedup * 100) / 100):g}"
        else:
            asked = f"--target-latency {targets.latency_ms:g}ms"
            remedy = f"--target-latency {_above(whole)}ms"
        reached = f"{whole:.3g} ms, {speedup:.2f} times as fast"
    return (
        f"{asked} cannot be reached: the best plan there is reaches {reached}, at a predicted loss "
        f"of {best.loss:.3g}. What holds it: {_holding(options, quantity, best)}. Ask for less: "
        f"{remedy}."
    )


def _above(value: float) -> str:
    """A number rounded up to three digits or so."""
    return f"{value * 1.005:.3g}"


def _holding(options: ModelOptions, quantity: Quantity, best: Choice) -> str:
    """The layers that most of what is left belongs to."""
    total = best.total(quantity)

    def left(index: int) -> float:
        option = best.options[index]
        if quantity == "ms":
            return option.ms
        cost = option.cost
        return cost.multiplications if quantity == "macs" else cost.parameters

    order = sorted(range(len(best.options)), key=left, reverse=True)[:_HOLDING]
    words = [f"{options.layers[i].name} ({100 * left(i) / total:.0f} %)" for i in order]
    if quantity == "ms":
        rest = total - sum(option.ms for option in best.options)
        words.append(f"and all that is no such layer ({100 * rest / total:.0f} %)")
    return ", ".join(words)
