"""`convert --max-drop`: plans tried after fine-tuning, backed off, held or given up."""

import json
import re
from pathlib import Path

import pytest
from test_plan_command import Place, convert, done, place, run
from typer.testing import Result

from structconv_cli.json_file import read_json
from structconv_cli.plan import read_plan
from structconv_cli.plan_choice import MOST_TRIED
from structconv_cli.planning.prediction import Prediction
from structconv_cli.run_folder import RunFolder

__all__ = ["place"]


def drop_of(folder: Path) -> float:
    stages = json.loads((folder / "convert.json").read_text())["finetune"]["stages"]
    return float(stages[0]["evaluation"]["score"] - stages[-1]["evaluation"]["score"])


def notes_of(folder: Path) -> list[str]:
    return list(json.loads((folder / "convert.json").read_text())["notes"])


GIVEN_UP = re.compile(r"A plan ([0-9.]+) times as fast lost ([0-9.]+) points")


LEARN_NOTHING = ("--epochs=1", "--lr=0")
"""Then the whole of a drop is left, of which most was expected to be paid back."""


@pytest.fixture(scope="module")
def fastest(place: Place) -> RunFolder:
    """The run of the fastest plan there is: whatever it loses is held."""
    out = place.folder / "fastest"
    done(convert(place, out, "--max-drop=100", *LEARN_NOTHING))
    return RunFolder(out)


def test_a_drop_that_is_held_at_once(fastest: RunFolder) -> None:
    assert drop_of(fastest.path) <= 100
    prediction = read_json(fastest.prediction, Prediction)
    assert prediction.targets.max_drop == 100
    # The fastest plan is wanted, whatever parameters it keeps.
    assert not prediction.notes
    assert dict(prediction.structures) == dict(read_plan(fastest.plan).structures)
    assert fastest.curve.read_bytes()[:4] == b"\x89PNG"
    assert not GIVEN_UP.search(" ".join(notes_of(fastest.path)))


def test_a_plan_that_loses_too_much_is_given_up_for_a_lighter_one(
    place: Place, fastest: RunFolder, tmp_path: Path
) -> None:
    lost = drop_of(fastest.path)
    most = max(0.0, lost - 0.5)
    result = convert(place, tmp_path / "run", f"--max-drop={most}", *LEARN_NOTHING)
    if result.exit_code:
        told = " ".join(result.stderr.split())
        if "keeps every layer as it is" in told:
            assert most <= 1, told  # this machine's timings made a fastest plan that loses nothing
            return
        # Without learning, lighter plans need not lose less: then all were given up.
        drops = [float(drop) for _, drop in GIVEN_UP.findall(told)]
        assert drops, told
        assert all(drop > most for drop in drops)
        assert not (tmp_path / "run").exists()
        return
    folder = RunFolder(tmp_path / "run")
    assert drop_of(folder.path) <= most
    tried = [
        tuple(map(float, found))
        for note in notes_of(folder.path)
        for found in GIVEN_UP.findall(note)
    ]
    # The first plan for this drop may hold it at once: it need not be the fastest of all.
    assert len(tried) < MOST_TRIED
    assert all(drop > most for _, drop in tried)
    losses = [read_json(run.prediction, Prediction).loss for run in (folder, fastest)]
    assert losses[0] <= losses[1]
    speedups = [speedup for speedup, _ in tried]
    speedups.append(round(read_json(folder.prediction, Prediction).speedup, 2))
    assert speedups == sorted(speedups, reverse=True)
    report = done(run("verify", folder.path, "--json", "-")).stdout
    assert json.loads(report)["exact"] is True


def assert_given_up(result: Result, folder: Path, *told: str) -> str:
    message = " ".join(result.stderr.split())
    assert result.exit_code == 1, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for text in told:
        assert text in message, message
    assert "Traceback" not in result.output
    assert list(folder.iterdir()) == []
    return message


def test_what_no_plan_holds_is_told_with_what_was_tried(
    place: Place, fastest: RunFolder, tmp_path: Path
) -> None:
    """Few MACs are asked for as well, so that there is nothing to back off to."""
    prediction = read_json(fastest.prediction, Prediction)
    share = 1.01 * prediction.after.multiplications / prediction.before.multiplications
    assert prediction.points is not None
    # A tenth is expected to be left after tuning: this plan is predicted to hold it.
    most = round(0.11 * prediction.points, 3)
    words = [f"--max-drop={most}", f"--target-macs={share}", *LEARN_NOTHING]
    result = convert(place, tmp_path / "run", *words)
    if not result.exit_code:  # the timings of this machine made a plan that loses little
        assert drop_of(tmp_path / "run") <= most
        return
    message = assert_given_up(
        result,
        tmp_path,
        f"loses at most {most:g} points after fine-tuning",
        "--epochs",
        "--max-drop",
    )
    tried = GIVEN_UP.findall(message)
    # No plan is tuned twice: that may take hours.
    assert len(set(tried)) == len(tried) >= 1
    assert all(float(drop) > most for _, drop in tried)


def test_a_target_that_the_model_meets_as_it_is_leaves_nothing_to_convert(
    place: Place, fastest: RunFolder, tmp_path: Path
) -> None:
    result = convert(place, tmp_path / "run", "--target-speedup=1", *LEARN_NOTHING)
    if not result.exit_code:  # by this machine's timings, something that costs nothing is faster
        prediction = read_json(RunFolder(tmp_path / "run").prediction, Prediction)
        assert prediction.loss < 1e-5
        return
    assert_given_up(result, tmp_path, "keeps every layer as it is", "stem: ", "ask for more")
