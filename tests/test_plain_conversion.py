"""Models whose convolutions are no plain modules, converted as a user does, and taken back."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from structconv_cli.cli import app

MODELS = """
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations


class Same(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(functional.pad(x, (0, 1, 1, 2)), self.weight, self.bias, 2)


class Standard(nn.Conv2d):
    def forward(self, x):
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, True)) / (flat.std(1, keepdim=True) + 1e-6)
        return functional.conv2d(x, weight.reshape_as(self.weight), self.bias, 1, 1)


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer = layer
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.layer(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = functional.conv2d(torch.relu(self.stem(x)), self.kernel, stride=2)
        return self.head(self.drop(torch.relu(self.norm(x)).mean((2, 3))))


def conv():
    return nn.Conv2d(8, 8, 3)

def calls():
    return Calls()

def normed():
    return Around(parametrizations.weight_norm(conv()))

def same():
    return Around(Same(8, 8, 3))

def standard():
    return Around(Standard(8, 8, 3))
"""
LAYERS = {
    "calls": "kernel",
    "normed": "layer",
    "same": "layer",
    "standard": "layer",
}


def built(name: str) -> torch.nn.Module:
    namespace: dict[str, object] = {}
    exec(MODELS, namespace)
    torch.manual_seed(0)
    model: torch.nn.Module = namespace[name]().eval()  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("name", "tuned"),
    [("calls", True), ("normed", True), ("same", False), ("standard", False)],
)
def test_a_model_is_converted_exactly_and_its_weights_fit_again(
    name: str, tuned: bool, tmp_path: Path
) -> None:
    model = built(name)
    (tmp_path / "models.py").write_text(MODELS)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    rng = np.random.default_rng(0)
    y = np.arange(48) % 4
    np.savez(tmp_path / "data.npz", x=rng.integers(0, 255, (48, 9, 9, 3)).astype(np.uint8), y=y)
    words = ["convert", f"{tmp_path}/model.pt", f"--arch={tmp_path}/models.py:{name}"]
    words += ["--forms=split", f"--out={tmp_path}/run"]
    words += (
        [f"--data={tmp_path}/data.npz", "--val-split=0.25", "--epochs=1", "--batch-size=16"]
        if tuned
        else ["--no-finetune", "--input-shape=1x3x9x9"]
    )
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    assert "The rewrite is exact" in result.output
    plan = json.loads((run / "plan.json").read_text())
    assert [x["name"] for x in plan["layers"] if "structure" in x] == [LAYERS[name]]

    x = rng.standard_normal((5, 3, 9, 9), dtype=np.float32)
    sessions = [
        onnxruntime.InferenceSession(run / f"{file}.onnx")
        for file in ("original", "structured_dense", "structured")
    ]
    original, dense, structured = (s.run(None, {"input": x})[0] for s in sessions)
    np.testing.assert_allclose(structured, dense, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        found = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(original, found, rtol=1e-4, atol=1e-5)
    assert np.abs(dense - original).max() > 1e-4

    state = torch.load(run / "structured_dense.pt", weights_only=True)
    if name == "standard":
        # It cannot compute just any weight, and so does not take this one for its own.
        assert "folded_weight" in " ".join(result.output.split())
        with pytest.raises(RuntimeError, match=r"layer\.folded_weight"):
            model.load_state_dict(state)
        return
    model.load_state_dict(state)
    with torch.no_grad():
        found = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(dense, found, rtol=1e-4, atol=1e-5)
