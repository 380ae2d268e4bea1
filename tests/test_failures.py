"""What goes wrong outside this program: one paragraph and a status, whoever raised it."""

from collections.abc import Callable

import pytest
import torch
import typer

from structconv_cli.commands.failures import failures


def of_the_gpu() -> None:
    # The error that torch raises where a GPU's memory is full; there is none here to fill.
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def of_python() -> None:
    bytearray(1 << 62)


@pytest.mark.parametrize("fails", [lambda: torch.empty(1 << 60), of_the_gpu, of_python])
def test_a_lack_of_memory_is_said(
    fails: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stop, failures("nothing was written", lambda: "Go on so."):
        fails()
    assert stop.value.exit_code == 1
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("Error: not enough memory. Use a smaller --batch-size")
    assert told.endswith("nothing was written. Go on so.")


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="ours"), failures():
        raise RuntimeError("ours")
