"""The scripts in benchmarks/ import what is there, and tell how they are called."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NEEDED = ("torchvision", "timm", "tensorly", "torch_pruning", "matplotlib", "datasets")
"""Packages that the benchmarks need and the tests do not."""


def exit_status(script: Path) -> object:
    """What a script that is run as a program exits with; None where it goes to its end."""
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in NEEDED:
            raise
        pytest.skip(f"{error.name} is not installed")
    return None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_tells_how_it_is_called(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    is_program = "__main__" in script.read_text()
    assert exit_status(script) == (0 if is_program else None)
    assert (script.name in capsys.readouterr().out) == is_program
