"""The choice of options, against all combinations tried one by one; and what is asked of it.

Times, losses and costs are whole numbers here, so that equal means equal: neither the solver's gap
nor its tolerance lies between two of them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from structconv_cli.cost import Cost
from structconv_cli.errors import PlanError
from structconv_cli.planning import choice
from structconv_cli.planning.choice import Choice, Quantity, choose
from structconv_cli.planning.clock import Clock
from structconv_cli.planning.goal import SPARING, best_measured, curve, fastest, solve
from structconv_cli.planning.latency import State
from structconv_cli.planning.options import LayerOptions, ModelOptions, Option
from structconv_cli.planning.targets import Targets, parse_latency
from structconv_cli.structure import Structure

QUANTITIES: tuple[Quantity, ...] = ("ms", "loss", "macs", "parameters", "kept")


def option(
    ms: float,
    loss: float = 0.0,
    macs: int = 100,
    parameters: int = 100,
    source: State = "whole",
    sink: State = "whole",
) -> Option:
    reduced = (4, 2, 2) if loss else (4, 3, 3)
    cost = Cost(macs, macs // 2, parameters)
    return Option(Structure((4, 3, 3), reduced), source, sink, ms, cost, loss)


def model(
    *layers: LayerOptions,
    fixed_ms: float = 0.0,
    fixed: int = 0,
    unit_ms: Sequence[float] = (),
    unit_spaces: Sequence[frozenset[str]] | None = None,
    half_ms: dict[str, float] | None = None,
) -> ModelOptions:
    spaces = unit_spaces if unit_spaces is not None else [frozenset()] * len(unit_ms)
    cost = Cost(fixed, fixed, fixed)
    return ModelOptions(layers, fixed_ms, cost, tuple(unit_ms), tuple(spaces), half_ms or {})


def free(name: str, *options: Option) -> LayerOptions:
    return LayerOptions(name, None, None, None, options)


# All combinations ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """One way to take an option of every layer, written down without the solver."""

    options: tuple[Option, ...]
    parts: tuple[int, ...]
    halves: tuple[str, ...]
    totals: dict[Quantity, float]

    def keeps(self, limits: Sequence[tuple[Quantity, float]]) -> bool:
        return all(self.totals[quantity] <= most + 1e-9 for quantity, most in limits)


def combinations(options: ModelOptions) -> Iterator[Combination]:
    """Units and spaces first; a layer then has the options that go with both."""
    units, spaces = range(len(options.unit_ms)), list(options.half_ms)
    for in_parts in product((False, True), repeat=len(units)):
        parts = {unit for unit in units if in_parts[unit]}
        for in_halves in product((False, True), repeat=len(spaces)):
            halves = {name for name, half in zip(spaces, in_halves, strict=True) if half}
            if any(halves & options.unit_spaces[unit] for unit in parts):
                continue
            fitting = [
                [each for each in layer.options if goes_with(layer, each, parts, halves)]
                for layer in options.layers
            ]
            for taken in product(*fitting):
                yield combined(options, taken, parts, halves)


def pays(options: ModelOptions, combination: "Combination") -> bool:
    """No structure makes its layer slower, and no unit in parts its readers together."""
    added = {unit: options.unit_ms[unit] for unit in combination.parts}
    for layer, each in zip(options.layers, combination.options, strict=True):
        more = each.ms - layer.options[0].ms
        if each.source == "parts" and layer.unit is not None:
            added[layer.unit] += more
        elif each.source == each.sink == "whole" and more > 0:
            return False
    read = {layer.unit for layer in options.layers for each in layer.options
            if each.source == "parts"}  # fmt: skip
    return all(ms <= 1e-9 for unit, ms in added.items() if unit in read)


def goes_with(layer: LayerOptions, each: Option, parts: set[int], halves: set[str]) -> bool:
    assert {each.source, each.sink} <= {"whole", "parts", "half"}
    in_parts, in_half, out_half = (
        each.source == "parts",
        each.source == "half",
        each.sink == "half",
    )
    wanted = (layer.unit in parts, layer.source in halves, layer.sink in halves)
    return (in_parts, in_half, out_half) == wanted


def combined(
    options: ModelOptions, taken: tuple[Option, ...], parts: set[int], halves: set[str]
) -> Combination:
    totals: dict[Quantity, float] = {
        "ms": options.fixed_ms
        + sum(each.ms for each in taken)
        + sum(options.unit_ms[unit] for unit in parts)
        + sum(options.half_ms[name] for name in halves),
        "loss": sum(each.loss for each in taken),
        "macs": options.fixed_cost.multiplications + sum(x.cost.multiplications for x in taken),
        "parameters": options.fixed_cost.parameters + sum(x.cost.parameters for x in taken),
    }
    totals["kept"] = -totals["parameters"]
    named = tuple(name for name in options.half_ms if name in halves)
    return Combination(taken, tuple(sorted(parts)), named, totals)


def least(
    options: ModelOptions,
    objective: Quantity,
    limits: Sequence[tuple[Quantity, float]] = (),
    *,
    paying: bool = False,
) -> Combination | None:
    """The best combination."""
    found = [each for each in combinations(options) if each.keeps(limits)]
    if paying:
        found = [each for each in found if pays(options, each)]
    return min(found, key=lambda x: x.totals[objective], default=None)


# Random models ------------------------------------------------------------------------------


@st.composite
def random_models(draw: st.DrawFn) -> ModelOptions:
    """Up to four layers between up to two units and two selectable spaces; ties at random.

    As in a network, every unit and every space is read by some layer, and all options of a layer
    that reads a unit in parts or a space by halves say so.
    """
    names = ["s", "t"][: draw(st.integers(0, 2))]
    units = draw(st.integers(0, 2))
    count = draw(st.integers(max(1, len(names), units), 4))
    whole = st.integers(1, 20)
    layers = []
    for number in range(count):
        unit = number if number < units else draw(st.sampled_from([None, *range(units)]))
        source = draw(st.sampled_from([None, *names]))
        if count - number <= len(names):
            source = names[count - number - 1]
        sink = draw(st.sampled_from([None, *names]))
        states = [("whole", "whole")]
        states += [("parts", "whole")] if unit is not None else []
        states += [("half", "whole")] if source else []
        states += [("whole", "half")] if sink else []
        states += [("half", "half")] if source and sink else []
        if source == sink:  # both ends are one space
            states = [each for each in states if (each[0] == "half") == (each[1] == "half")]
        options = [option(draw(whole), 0.0, draw(whole), draw(whole))]
        for start, end in draw(st.lists(st.sampled_from(states), max_size=4)):
            loss = draw(st.integers(0, 12))
            options.append(option(draw(whole), loss, draw(whole), draw(whole), start, end))
        layers.append(LayerOptions(f"layer{number}", unit, source, sink, tuple(options)))
    inside = draw(st.lists(st.sampled_from([None, *range(units)]), min_size=2, max_size=2))
    return model(
        *layers,
        fixed_ms=draw(whole),
        fixed=draw(whole),
        unit_ms=[draw(st.integers(-3, 5)) for _ in range(units)],
        unit_spaces=[
            frozenset(name for name, unit in zip(names, inside, strict=False) if unit == number)
            for number in range(units)
        ],
        half_ms={name: float(draw(st.integers(-5, 3))) for name in names},
    )


limits_of = st.lists(st.tuples(st.sampled_from(QUANTITIES), st.integers(0, 100)), max_size=3)
# A share between the least and the most of each quantity, so that about half of the limits bind.
shares = st.lists(st.tuples(st.sampled_from(QUANTITIES), st.floats(0, 1)), max_size=3)


def limits_between(
    options: ModelOptions, between: Sequence[tuple[Quantity, float]]
) -> list[tuple[Quantity, float]]:
    """Whole numbers and a half, a share of the way from the least total to the greatest."""
    everything = list(combinations(options))
    limits = []
    for quantity, share in between:
        values = [each.totals[quantity] for each in everything]
        low, high = min(values), max(values)
        limits.append((quantity, int(low + share * (high - low)) + 0.5))
    return limits


@given(random_models(), st.sampled_from(QUANTITIES), shares, st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_choice_is_the_best_of_all_combinations(
    options: ModelOptions, objective: Quantity, between: list[tuple[Quantity, float]], paying: bool
) -> None:
    limits = limits_between(options, between)
    best = least(options, objective, limits, paying=paying)
    found = choose(options, objective, limits, paying=paying)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.total(objective) == pytest.approx(best.totals[objective], abs=1e-6)
    assert as_combination(options, found).keeps(limits)


@given(random_models(), limits_of)
@settings(max_examples=60, deadline=None)
def test_limits_that_no_combination_keeps_give_nothing(
    options: ModelOptions, limits: list[tuple[Quantity, float]]
) -> None:
    limits = [(quantity, most + 0.5) for quantity, most in limits]
    possible = any(each.keeps(limits) for each in combinations(options))
    assert (choose(options, "loss", limits) is not None) == possible


def as_combination(options: ModelOptions, choice: Choice) -> Combination:
    """The combination that a choice says it is: its ties hold, and its totals are right."""
    parts, halves = set(choice.parts), set(choice.halves)
    assert not any(halves & options.unit_spaces[unit] for unit in parts)
    for layer, each in zip(options.layers, choice.options, strict=True):
        assert each in layer.options
        assert goes_with(layer, each, parts, halves)
    same = combined(options, choice.options, parts, halves)
    assert (choice.parts, choice.halves) == (same.parts, same.halves)
    for quantity in QUANTITIES:
        assert choice.total(quantity) == pytest.approx(same.totals[quantity], abs=1e-9)
    return same


@given(random_models(), st.sampled_from(QUANTITIES))
@settings(max_examples=60, deadline=None)
def test_the_dense_model_is_always_possible(options: ModelOptions, objective: Quantity) -> None:
    dense: list[tuple[Quantity, float]] = [
        ("ms", options.dense_ms),
        ("loss", 0.0),
        ("macs", options.dense_cost.multiplications),
        ("parameters", options.dense_cost.parameters),
    ]
    found = choose(options, objective, dense)
    assert found is not None
    assert as_combination(options, found).keeps(dense)
    assert fastest(options).ms <= options.dense_ms


def test_all_readers_of_a_unit_read_parts_or_none_does() -> None:
    first = option(1, 1, source="parts")
    readers = [
        LayerOptions("a", 0, None, None, (option(10), first)),
        LayerOptions("b", 0, None, None, (option(10), option(30, 1, source="parts"))),
    ]
    # Together 31 + the unit's 2 against 20: a alone would gain.
    assert fastest(model(*readers, unit_ms=[2])).parts == ()
    readers[1] = replace(readers[1], options=(option(10), option(15, 1, source="parts")))
    found = fastest(model(*readers, unit_ms=[2], fixed_ms=5))
    assert (found.parts, found.ms) == ((0,), 5 + 1 + 15 + 2)
    assert fastest(model(*readers, unit_ms=[5])).parts == ()


def test_who_makes_a_space_and_who_reads_it_go_together() -> None:
    maker = LayerOptions("a", None, None, "s", (option(10), option(5, sink="half")))
    reader = LayerOptions("b", None, "s", None, (option(10), option(5, 3, source="half")))
    found = fastest(model(maker, reader, half_ms={"s": -1.0}))
    assert (found.halves, found.ms, found.loss) == (("s",), 9, 3)
    # A reader that cannot drop any keeps the whole.
    other = LayerOptions("c", None, "s", None, (option(10),))
    assert fastest(model(maker, reader, other, half_ms={"s": -1.0})).halves == ()
    # The maker's half, which costs no loss, is not had without the reader's.
    within = choose(model(maker, reader, half_ms={"s": -1.0}), "ms", [("loss", 2)])
    assert within is not None
    assert (within.halves, within.ms) == ((), 20)


def test_a_space_is_not_halved_and_carried_in_parts_at_once() -> None:
    """Each reader alone would like its own way."""
    one = LayerOptions("a", 0, None, None, (option(10), option(2, 1, source="parts")))
    other = LayerOptions("b", None, "s", None, (option(10), option(1, 1, source="half")))
    apart = model(one, other, unit_ms=[0], unit_spaces=[frozenset()], half_ms={"s": 0.0})
    assert (fastest(apart).parts, fastest(apart).halves, fastest(apart).ms) == ((0,), ("s",), 3)
    found = fastest(replace(apart, unit_spaces=(frozenset("s"),)))
    assert (found.parts, found.halves, found.ms) == ((), ("s",), 11)


# Targets ------------------------------------------------------------------------------------

SIMPLE = model(
    free("a", option(40, 0, 400, 50), option(20, 1, 200, 40), option(10, 4, 100, 30)),
    free("b", option(30, 0, 300, 40), option(15, 2, 150, 10)),
    free("c", option(20, 0, 200, 100)),
    fixed_ms=10,
    fixed=100,
)
"""100 ms, 1000 MACs, 290 parameters; at best 55 ms, 550 MACs and 240 parameters, at a loss of 6."""


@pytest.mark.parametrize(
    ("targets", "most_loss", "ms", "loss"),
    [
        (Targets(speedup=1.0), None, 100, 0),
        (Targets(speedup=1.25), None, 80, 1),
        (Targets(speedup=1.5), None, 65, 3),
        (Targets(speedup=100 / 55), None, 55, 6),
        (Targets(latency_ms=85.0), None, 80, 1),
        (Targets(latency_ms=84.0), None, 80, 1),
        (Targets(latency_ms=66.0), None, 65, 3),
        (Targets(macs=0.85), None, 80, 1),
        (Targets(macs=0.55), None, 55, 6),
        (Targets(parameters=261 / 290), None, 85, 2),
        (Targets(parameters=250 / 290), None, 65, 3),
        (Targets(speedup=1.1, parameters=261 / 290), None, 85, 2),
        (Targets(macs=0.9, parameters=0.95, latency_ms=79.0), None, 65, 3),
        (Targets(max_drop=1.0), 0.0, 100, 0),
        (Targets(max_drop=1.0), 2.5, 80, 1),
        (Targets(max_drop=1.0), 99.0, 55, 6),
        (Targets(max_drop=1.0, speedup=1.25), 2.0, 80, 1),
        (Targets(), None, 55, 6),
    ],
)
def test_the_plan_that_loses_least_within_the_targets(
    targets: Targets, most_loss: float | None, ms: float, loss: float
) -> None:
    found = solve(SIMPLE, targets, Clock(), most_loss)
    assert (found.ms, found.loss) == (ms, loss)


def limits_of_targets(
    options: ModelOptions, targets: Targets, clock: Clock, most_loss: float | None, slow: float
) -> list[tuple[Quantity, float]]:
    """What the targets mean, in totals; whole times are undone by trying them."""
    limits: list[tuple[Quantity, float]] = []
    if targets.macs is not None:
        limits.append(("macs", targets.macs * options.dense_cost.multiplications))
    if targets.parameters is not None:
        limits.append(("parameters", targets.parameters * options.dense_cost.parameters))
    if most_loss is not None:
        limits.append(("loss", most_loss))
    whole = targets.latency_ms
    if targets.speedup is not None:
        whole = clock.whole(options.dense_ms) / targets.speedup
    if whole is not None:
        times = [x.totals["ms"] for x in combinations(options)]
        fitting = [ms for ms in times if clock.whole(ms) * slow <= whole + 1e-9]
        limits.append(("ms", max(fitting, default=min(times) - 1)))
    return limits


clocks = st.builds(
    Clock, st.sampled_from([0.0, -0.5, 2.0, 30.0]), st.sampled_from([1.0, 0.6, 0.93, 1.7])
)
asked = st.one_of(
    st.builds(Targets, speedup=st.sampled_from([1.0, 1.05, 1.2, 1.5, 2.0, 3.0, 40.0])),
    st.builds(Targets, latency_ms=st.sampled_from([1.0, 5.0, 12.0, 20.0, 37.0, 60.0, 1500.0])),
    st.builds(Targets, macs=st.sampled_from([0.01, 0.3, 0.5, 0.7, 1.0])),
    st.builds(Targets, parameters=st.sampled_from([0.01, 0.3, 0.5, 0.7, 1.0])),
    st.builds(
        Targets,
        speedup=st.sampled_from([1.0, 1.2, 1.5]),
        macs=st.sampled_from([0.5, 0.7, 1.0]),
        max_drop=st.just(1.0),
    ),
)


@given(
    random_models(),
    asked,
    clocks,
    st.sampled_from([0.0, 2.5, 9.0]),
    st.sampled_from([1.0, 1.0, 1.03, 0.9, 1.5]),
)
@settings(max_examples=150, deadline=None)
def test_targets_are_met_at_the_least_loss_or_refused_with_a_remedy_that_works(
    options: ModelOptions, targets: Targets, clock: Clock, most: float, slow: float
) -> None:
    most_loss = most if targets.max_drop is not None else None
    limits = limits_of_targets(options, targets, clock, most_loss, slow)
    best = least(options, "loss", limits)
    if targets.macs is not None or targets.parameters is not None:
        best = least(options, "loss", limits, paying=True) or best
    if best is not None:
        found = solve(options, targets, clock, most_loss, slow)
        assert found.loss == pytest.approx(best.totals["loss"], abs=1e-6)
        assert as_combination(options, found).keeps(limits)
        return
    with pytest.raises(PlanError) as refused:
        solve(options, targets, clock, most_loss, slow)
    message = str(refused.value)
    alone = [least(options, "loss", [limit]) for limit in limits if limit[0] != "loss"]
    if all(each is not None for each in alone):
        assert "together" in message
        assert "Relax one of them" in message
        return
    remedy = remedy_in(message)
    # It is about one of the targets that were given.
    fields = ("speedup", "latency_ms", "macs", "parameters")
    (name,) = (name for name in fields if getattr(remedy, name) is not None)
    assert getattr(targets, name) is not None
    # What was measured slower than predicted is left as it is.
    slow = 1.0 if remedy.speedup == 1 else slow
    assert solve(options, remedy, clock, None, slow) is not None


@given(random_models(), asked, st.sampled_from([0.0, 2.5, 9.0]))
@settings(max_examples=100, deadline=None)
def test_a_plan_to_be_tuned_spares_parameters_for_a_little_more_loss(
    options: ModelOptions, targets: Targets, most: float
) -> None:
    most_loss = most if targets.max_drop is not None else None
    limits = limits_of_targets(options, targets, Clock(), most_loss, 1.0)
    paying = targets.macs is not None or targets.parameters is not None
    best = least(options, "loss", limits, paying=paying)
    if best is None and paying:
        best, paying = least(options, "loss", limits), False
    assume(best is not None)
    assert best is not None
    within = [*limits, ("loss", SPARING * best.totals["loss"])]
    sparing = least(options, "kept", within, paying=paying)
    assert sparing is not None
    found = solve(options, targets, Clock(), most_loss, tuned=True)
    assert as_combination(options, found).keeps(within)
    assert found.cost.parameters >= 0.998 * sparing.totals["parameters"]
    # Of those that keep as many, none has less loss.
    alike = least(options, "loss", [*within, ("kept", found.total("kept"))], paying=paying)
    assert alike is not None
    assert found.loss == pytest.approx(alike.totals["loss"], abs=1e-6)


def test_of_plans_that_keep_as_many_parameters_the_one_with_the_least_loss() -> None:
    sizes = [(5, 4.0, 40, 40), (4, 4.9, 40, 90), (5, 4.5, 40, 90), (5, 5.1, 40, 95)]
    options = model(free("a", option(10), *(option(*each) for each in sizes)))
    half = Targets(macs=0.5)
    assert solve(options, half, Clock(), None).loss == 4.0
    assert solve(options, half, Clock(), None, tuned=True).loss == 4.5


def remedy_in(message: str) -> Targets:
    """The targets that a message tells the user to give instead, read as the user would."""
    match = re.search(r"Ask for less: --target-(\w+) (\S+)\.$", message)
    assert match is not None, message
    name, value = match.groups()
    if name == "latency":
        return Targets(latency_ms=parse_latency(value))
    fields = {"speedup": "speedup", "macs": "macs", "params": "parameters"}
    return Targets(**{fields[name]: float(value)})


@pytest.mark.parametrize(
    ("targets", "asked_for", "reached", "holding", "remedy"),
    [
        (
            Targets(speedup=2.0),
            "--target-speedup 2 cannot",
            "55 ms, 1.82 times as fast, at a predicted loss of 6",
            "c (36 %), b (27 %), a (18 %), and all that is no such layer (18 %)",
            "--target-speedup 1.81",
        ),
        (
            Targets(latency_ms=54.5),
            "--target-latency 54.5ms cannot",
            "55 ms, 1.82 times as fast",
            "c (36 %)",
            "--target-latency 55.3ms",
        ),
        (
            Targets(macs=0.5),
            "--target-macs 0.5 cannot",
            "0.55 of the MACs, at a predicted loss of 6",
            "c (36 %), b (27 %), a (18 %)",
            "--target-macs 0.553",
        ),
        (
            Targets(parameters=0.2),
            "--target-params 0.2 cannot",
            "0.828 of the parameters",
            "c (42 %), a (12 %), b (4 %)",
            "--target-params 0.832",
        ),
        (
            Targets(parameters=0.2, speedup=1.2, macs=0.9),
            "--target-params 0.2 cannot",
            "0.828 of the parameters",
            "c (42 %)",
            "--target-params 0.832",
        ),
    ],
)
def test_what_is_out_of_reach_is_named_with_what_holds_it(
    targets: Targets, asked_for: str, reached: str, holding: str, remedy: str
) -> None:
    with pytest.raises(PlanError) as refused:
        solve(SIMPLE, targets, Clock(), None)
    for words in (asked_for, reached, holding):
        assert words in str(refused.value)
    assert str(refused.value).endswith(f"Ask for less: {remedy}.")
    assert solve(SIMPLE, remedy_in(str(refused.value)), Clock(), None).loss == 6


def test_a_drop_and_a_target_that_do_not_go_together() -> None:
    with pytest.raises(PlanError, match="together") as refused:
        solve(SIMPLE, Targets(speedup=1.5, max_drop=0.7), Clock(), 2.9)
    for words in ("--max-drop 0.7", "the least predicted loss within them is 3", "stands for 2.9"):
        assert words in str(refused.value)
    assert solve(SIMPLE, Targets(speedup=1.5, max_drop=0.7), Clock(), 3.0).loss == 3


def test_targets_that_exclude_one_another() -> None:
    """a can be fast or small."""
    either = free("a", option(10, 0, 10, 10), option(5, 1, 10, 10), option(10, 1, 10, 5))
    for targets in (Targets(speedup=2.0), Targets(parameters=0.5)):
        assert solve(model(either), targets, Clock(), None).loss == 1
    with pytest.raises(PlanError, match="each target can be reached alone"):
        solve(model(either), Targets(speedup=2.0, parameters=0.5), Clock(), None)


@pytest.mark.parametrize("ms", [0.0123, 7.0, 999.5, 1234.5, 98765.4])
def test_the_remedy_for_a_latency_of_any_size_can_be_typed(ms: float) -> None:
    options = model(free("a", option(2 * ms), option(ms, 1)))
    with pytest.raises(PlanError) as refused:
        solve(options, Targets(latency_ms=ms / 2), Clock(), None)
    remedy = remedy_in(str(refused.value))
    assert remedy.latency_ms is not None
    assert ms <= remedy.latency_ms <= 1.011 * ms


def test_a_model_that_cannot_be_made_faster_is_told_nothing_impossible() -> None:
    """Measured slower than predicted, even the dense model misses a speed-up of one."""
    options = model(free("a", option(10), option(12, 1)))
    with pytest.raises(PlanError) as refused:
        solve(options, Targets(speedup=1.5), Clock(), None, 1.2)
    assert remedy_in(str(refused.value)).speedup == 1


# The curve, the clock -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "losses", "best"),
    [
        ([9], [1], 0),
        ([9, 11], [1, 0], 0),  # a near miss is no match for what meets the target, however far
        ([1, 11], [5, 0], 0),
        ([8, 9, 10], [3, 2, 1], 2),  # of those that meet it, the one that loses least
        ([10, 9, 8], [1, 2, 3], 0),
        ([12, 11, 13], [1, 2, 0], 1),  # where none does, the fastest
    ],
)
def test_of_measured_plans_one_that_meets_the_time_is_taken(
    times: list[float], losses: list[float], best: int
) -> None:
    tried = [
        (Choice((), (), (), 1.0, loss, Cost(1, 1, 1)), ms)
        for ms, loss in zip(times, losses, strict=True)
    ]
    assert best_measured(tried, 10) == tried[best]


@given(random_models())
@settings(max_examples=80, deadline=None)
def test_along_the_curve_what_is_faster_loses_more(options: ModelOptions) -> None:
    assume(all(x.totals["ms"] > 0 for x in combinations(options)))
    quickest = fastest(options)
    points = curve(options, quickest)
    for one, other in pairwise(points):
        assert other.ms < one.ms
        assert other.loss > one.loss
    assert points[-1].ms == pytest.approx(quickest.ms)
    everything = list(combinations(options))
    for point in points:
        assert point.ms <= options.dense_ms
        within = [x.totals["loss"] for x in everything if x.totals["ms"] <= point.ms + 1e-9]
        assert point.loss == pytest.approx(min(within), abs=1e-6)


def test_the_curve_has_a_point_for_every_trade_off_of_a_small_model() -> None:
    options = replace(SIMPLE, fixed_ms=0.0)
    found = [(point.ms, point.loss) for point in curve(options, fastest(options))]
    best = [
        (ms, loss)
        for ms, loss in sorted(
            {(x.totals["ms"], x.totals["loss"]) for x in combinations(options)}, reverse=True
        )
        if not any(
            x.totals["ms"] <= ms and x.totals["loss"] <= loss
            for x in combinations(options)
            if (x.totals["ms"], x.totals["loss"]) != (ms, loss)
        )
    ]
    assert found == [point for point in best if point[0] < options.dense_ms]


@given(
    st.floats(-10, 100, allow_nan=False),
    st.floats(0.5, 2),
    st.floats(0.001, 1e4),
    st.floats(1.001, 5),
)
def test_a_clock_is_undone_by_its_inverse_and_keeps_the_order(
    offset: float, factor: float, ms: float, more: float
) -> None:
    clock = Clock(offset, factor)
    room = 1e-9 * (abs(offset) + ms)
    assert clock.nodes(clock.whole(ms)) == pytest.approx(ms, abs=room)
    assert clock.whole(clock.nodes(ms)) == pytest.approx(ms, abs=room)
    assert clock.whole(ms * more) > clock.whole(ms)
    # The two measured models lie on the line.
    assert Clock(2.0, 1.5).whole(4.0) == 8.0


def test_what_the_solver_prints_stays_off_standard_output(capfd: pytest.CaptureFixture[str]):
    print("before")
    with choice._nothing_printed():
        os.write(1, b"noise of compiled code")
    print("behind", flush=True)
    assert capfd.readouterr().out == "before\nbehind\n"
