"""Targets that make sense, targets that do not, and times in words."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structconv_cli.errors import PlanError
from structconv_cli.planning.targets import Targets, parse_latency


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speedup", 1.0),
        ("speedup", 999.9),
        ("latency_ms", 1e-6),
        ("latency_ms", 1e9),
        ("macs", 1e-9),
        ("macs", 1.0),
        ("parameters", 1e-9),
        ("parameters", 1.0),
        ("max_drop", 0.0),
        ("max_drop", 100.0),
    ],
)
def test_the_ends_of_each_range_are_in_it(field: str, value: float) -> None:
    targets = Targets(**{field: value})
    assert getattr(targets, field) == value
    assert not targets.is_empty


NOT_NUMBERS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("field", "option", "values"),
    [
        ("speedup", "--target-speedup", [0.999, 0.0, -2.0, 1000.0]),
        ("latency_ms", "--target-latency", [0.0, -1.0]),
        ("macs", "--target-macs", [0.0, -0.5, 1.001, 50.0]),
        ("parameters", "--target-params", [0.0, -0.5, 1.001, 50.0]),
        ("max_drop", "--max-drop", [-0.001, 100.1]),
    ],
)
def test_what_is_out_of_range_is_refused_by_name_and_value(
    field: str, option: str, values: list[float]
) -> None:
    for value in [*values, *NOT_NUMBERS]:
        with pytest.raises(PlanError, match="expected") as refused:
            Targets(**{field: value})
        assert str(refused.value).startswith(f"{option} is {value:g}")


def test_two_words_on_time_are_one_too_many() -> None:
    with pytest.raises(PlanError, match="--target-speedup 2 and --target-latency 5ms both say"):
        Targets(speedup=2.0, latency_ms=5.0)


def test_all_others_go_together() -> None:
    assert not Targets(speedup=2.0, macs=0.5, parameters=0.4, max_drop=1.0).is_empty
    assert not Targets(latency_ms=2.0, macs=0.5, parameters=0.4, max_drop=1.0).is_empty
    assert Targets().is_empty


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("5", 5),
        ("5ms", 5),
        ("5 ms", 5),
        (" 5ms ", 5),
        ("5MS", 5),
        ("0.8s", 800),
        (".8 s", 800),
        ("1S", 1000),
        ("800us", 0.8),
        ("800\N{MICRO SIGN}s", 0.8),
        ("800 \N{GREEK SMALL LETTER MU}s", 0.8),
        ("12.5", 12.5),
        ("1e3", 1000),
        ("1e-1s", 100),
        ("1.24e+03ms", 1240),
        ("0", 0),
    ],
)
def test_times_in_words(text: str, ms: float) -> None:
    assert parse_latency(text) == pytest.approx(ms, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["", "ms", "fast", "-5ms", "5 m", "5 min", "5ns", "5,5ms", "1.2.3", "5ms 5ms", "nan"]
)
def test_words_that_are_no_time_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="expected a time such as 5ms, 800us or 1s") as refused:
        parse_latency(text)
    assert repr(text) in str(refused.value)


@given(st.floats(1e-6, 1e9), st.sampled_from([("ms", 1.0), ("us", 1e-3), ("s", 1e3), ("", 1.0)]))
def test_a_time_as_the_messages_write_it_is_read_back(
    value: float, unit: tuple[str, float]
) -> None:
    word, factor = unit
    assert parse_latency(f"{value:g}{word}") == pytest.approx(value * factor, rel=1e-5)
    assert parse_latency(f"{value!r} {word}") == pytest.approx(value * factor, rel=1e-12)
