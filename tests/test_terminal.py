"""What is told of long work where nobody watches: lines in a log."""

import io

import pytest
from rich.console import Console

from structconv_cli import terminal
from structconv_cli.terminal import LogObserver, observer_for


def log() -> tuple[LogObserver, io.StringIO]:
    stream = io.StringIO()
    observer = observer_for(Console(file=stream, width=40))
    assert isinstance(observer, LogObserver)
    return observer, stream


def test_each_stage_has_a_line_with_its_outcome() -> None:
    observer, stream = log()
    with observer.stage("data"):
        observer.note("[12] training images, and a path that is wider than the console is: /a/b/c")
    with observer.stage("training"):
        pass
    first, second = stream.getvalue().splitlines()
    assert first.startswith("data: done after 0.0 s; [12] training images, and a path that is")
    assert first.endswith("/a/b/c")
    assert second == "training: done after 0.0 s"


def test_a_stage_that_fails_is_said_to_have_failed() -> None:
    observer, stream = log()
    with pytest.raises(ZeroDivisionError), observer.stage("data"):
        raise ZeroDivisionError
    assert stream.getvalue().startswith("data: failed after")


def test_a_long_stage_tells_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_SILENCE", -1.0)
    observer, stream = log()
    with observer.stage("conversion"):
        with observer.stage("training"):
            observer.note("epoch 1 of 2")
            observer.note("epoch 2 of 2")
        observer.note("written")
    assert stream.getvalue().splitlines()[:2] == [
        "training: epoch 1 of 2",
        "training: epoch 2 of 2",
    ]
    assert "conversion: written" in stream.getvalue()
