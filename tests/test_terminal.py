"""What is told of long work where nobody watches: lines in a log."""

import io

import pytest
from rich.console import Console

from structconv_cli import terminal
from structconv_cli.terminal import LogObserver, observer_for


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> tuple[LogObserver, io.StringIO]:
    """One that is never silent."""
    monkeypatch.setattr(terminal, "_SILENCE", -1.0)
    return observed()


def observed() -> tuple[LogObserver, io.StringIO]:
    stream = io.StringIO()
    observer = observer_for(Console(file=stream, width=40))
    assert isinstance(observer, LogObserver)
    return observer, stream


def test_short_work_is_silent() -> None:
    observer, stream = observed()
    with observer.stage("data"):
        observer.note("12 images")
    assert not stream.getvalue()


def test_each_stage_has_a_line_with_its_outcome(log: tuple[LogObserver, io.StringIO]) -> None:
    observer, stream = log
    with observer.stage("data"):
        observer.note("[12] training images, and a path that is wider than the console is: /a/b/c")
    with observer.stage("training"):
        pass
    noted, first, second = stream.getvalue().splitlines()
    assert noted.startswith("data: [12] training images")
    assert first.startswith("data: done after 0.0 s; [12] training images, and a path that is")
    assert first.endswith("/a/b/c")
    assert second == "training: done after 0.0 s"


def test_what_fails_is_left_to_the_error_message(log: tuple[LogObserver, io.StringIO]) -> None:
    observer, stream = log
    with pytest.raises(ZeroDivisionError), observer.stage("data"):
        raise ZeroDivisionError
    assert not stream.getvalue()


def test_a_stage_goes_on_around_another(log: tuple[LogObserver, io.StringIO]) -> None:
    observer, stream = log
    with observer.stage("conversion"):
        with observer.stage("training"):
            observer.note("epoch 1 of 1")
        observer.note("written")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training: epoch 1 of 1"
    assert lines[2] == "conversion: written"
