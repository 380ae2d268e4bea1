"""Checkpoints converted without training: with unlabelled images, and with no data at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner, Result

from structconv_cli.cli import app

SHAPE = "--input-shape=1x1x8x8"


def convert(tiny: Path, out: Path, *words: str) -> Result:
    command = ["convert", f"{tiny}/tiny.pt", f"--arch={tiny}/tiny.py:tiny", "--no-finetune"]
    environment = {"COLUMNS": "80"}
    return CliRunner(env=environment).invoke(
        app, [*command, "--forms=split+average", f"--out={out}", *words]
    )


def verified(out: Path) -> str:
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["verify", str(out)])
    assert result.exit_code == 0, result.output
    return result.output


def test_weights_are_projected_where_there_is_no_data(tiny: Path, tmp_path: Path) -> None:
    result = convert(tiny, tmp_path / "run", SHAPE)
    assert result.exit_code == 0, result.output
    assert "what that costs in accuracy is not measured" in " ".join(result.output.split())
    said = json.loads((tmp_path / "run/convert.json").read_text())
    assert said["finetune"]["stages"] == []
    assert json.loads((tmp_path / "run/run.json").read_text())["task"] == "none"
    assert "Its accuracy is unmeasured" in verified(tmp_path / "run")
    # The nearest weight of 2x2: what the projection alone gives.
    from structconv_cli.structure import Structure

    before = torch.load(tiny / "tiny.pt")["conv.weight"]
    after = torch.load(tmp_path / "run/structured_dense.pt")["conv.weight"]
    nearest = Structure((8, 3, 3), (8, 2, 2)).project(before.double()).float()
    torch.testing.assert_close(after, nearest, rtol=1e-5, atol=1e-6)


def test_images_without_labels_are_fitted_on(tiny: Path, tmp_path: Path) -> None:
    images = np.load(tiny / "data.npz")["x"]
    np.savez(tmp_path / "images.npz", x=images)
    result = convert(tiny, tmp_path / "run", f"--data={tmp_path}/images.npz")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "on 24 validation images, labels unknown" in told
    assert "The images have no labels" in told
    assert "labels unknown" in verified(tmp_path / "run")
    said = json.loads((tmp_path / "run/convert.json").read_text())
    assert said["reconstruction"]["images"] == 216


ALIKE = """
from torch import nn

def alike():
    layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
"""


def test_a_shift_that_nothing_could_be_found_for_is_told(tiny: Path, tmp_path: Path) -> None:
    # Two batch norms that compute the same: which of them is behind a layer cannot be told.
    (tmp_path / "alike.py").write_text(ALIKE)
    namespace: dict[str, Any] = {}
    exec(ALIKE, namespace)
    torch.manual_seed(0)
    torch.save(namespace["alike"]().state_dict(), tmp_path / "alike.pt")
    command = ["convert", f"{tmp_path}/alike.pt", f"--arch={tmp_path}/alike.py:alike"]
    data = [f"--data={tiny}/data.npz", "--val-split=0.25", "--no-finetune", "--forms=split"]
    done = CliRunner().invoke(app, [*command, *data, f"--out={tmp_path}/run"])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "run/convert.json").read_text())
    assert any("Outputs of 3 keep a shift" in note for note in said["notes"]), said["notes"]


def test_the_file_takes_any_batch(tiny: Path, tmp_path: Path) -> None:
    assert convert(tiny, tmp_path / "run", SHAPE).exit_code == 0
    session = onnxruntime.InferenceSession(tmp_path / "run/structured.onnx")
    (scores,) = session.run(None, {"input": np.zeros((7, 1, 8, 8), np.float32)})
    assert scores.shape == (7, 3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([SHAPE, "--data={tiny}/data.npz"], "the model has the size of its data"),
        ([SHAPE, "--size=8"], "--augment are for --data"),
        ([SHAPE, "--max-drop=1"], "not judged by labels"),
        (["--input-shape=1x1x8"], "does not run on images of shape"),
        (["--input-shape=a=1x1x8x8"], "of 1 inputs has input"),
    ],
)
def test_what_does_not_hang_together(
    words: list[str], told: str, tiny: Path, tmp_path: Path
) -> None:
    result = convert(tiny, tmp_path / "run", *(word.format(tiny=tiny) for word in words))
    assert result.exit_code in (1, 2)
    assert told in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_fine_tuning_needs_data(tiny: Path, tmp_path: Path) -> None:
    command = ["convert", f"{tiny}/tiny.pt", f"--arch={tiny}/tiny.py:tiny", SHAPE]
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*command, f"--out={tmp_path}/run"])
    assert result.exit_code == 2
    assert "fine-tuning takes labelled data" in result.output
