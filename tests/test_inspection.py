"""`structconv inspect`: costs against PyTorch's own, times that add up, and bad input."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from test_lower_command import network, value
from torch import nn
from typer.testing import CliRunner

from structconv_cli.cli import app
from structconv_cli.inspection import Inspection, inspect_graph
from structconv_cli.json_file import read_json, write_json
from structconv_cli.onnx.example_inputs import example_inputs
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.target import Target

runner = CliRunner()


class Varied(nn.Module):
    """Strides, groups, a depthwise layer, an unequal kernel, two linear layers, dense and tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.group = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.depth = nn.Conv2d(12, 12, (1, 7), padding=(0, 3), groups=12)
        self.point = nn.Conv2d(12, 20, 1)
        self.head = nn.Linear(20, 9)
        self.last = nn.Linear(9, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depth(torch.relu(self.group(torch.relu(self.stem(x))))))
        return self.last(torch.relu(self.head(self.point(x).mean((2, 3)))))


def counted(model: nn.Module, image: torch.Tensor) -> dict[str, tuple[int, int]]:
    """(multiplications, parameters) by layer, counted from what PyTorch's layers put out."""
    found = {}

    def count(name: str, module: nn.Module, output: torch.Tensor) -> None:
        products = output[0].numel() * module.weight[0].numel()  # type: ignore[index, operator]
        found[name] = (products, sum(p.numel() for p in module.parameters()))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda module, _, output, name=name: count(name, module, output)
            )
    model(image)
    return found


@pytest.fixture(scope="module")
def varied() -> onnx.ModelProto:
    torch.manual_seed(0)
    return export_onnx(Varied(), torch.randn(2, 3, 16, 16))


def look(model: onnx.ModelProto, batch: int = 1, cache: Path | None = None) -> Inspection:
    target = Target(batch_size=batch)
    return inspect_graph(model, target, example_inputs(model, batch, {}), cache)


@pytest.mark.parametrize("batch", [1, 3])
def test_costs_are_those_that_pytorch_counts(varied: onnx.ModelProto, batch: int) -> None:
    torch.manual_seed(0)
    model = Varied()
    expected = counted(model, torch.randn(2, 3, 16, 16))
    result = look(varied, batch)
    assert {x.name: (x.macs, x.parameters) for x in result.layers} == expected
    assert [x.name for x in result.layers] == list(expected)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for layer in result.layers:
        assert layer.weight_shape == shapes[f"{layer.name}.weight"]
        assert layer.output_shape[:2] == (batch, layer.weight_shape[0])
        assert layer.structure is None
    described = {x.name: (x.stride, x.groups) for x in result.layers}
    assert described["stem"] == ((2, 2), 1)
    assert described["group"] == ((1, 1), 2)
    assert described["depth"] == ((1, 1), 12)
    assert described["head"] == ((), 1)
    assert result.macs == sum(macs for macs, _ in expected.values())
    assert result.parameters == sum(each for _, each in expected.values())


def test_times_add_up_and_are_known_the_second_time(
    varied: onnx.ModelProto, tmp_path: Path
) -> None:
    first = look(varied, cache=tmp_path / "timings.json")
    # The profiler counts whole microseconds, of which a tiny layer may take none.
    assert all(layer.ms is not None and layer.ms >= 0 for layer in first.layers)
    assert first.layers[0].ms
    total = sum(layer.ms or 0 for layer in first.layers) + sum(first.others.values())
    assert first.ms == pytest.approx(total, rel=1e-9)
    assert "1 threads" in first.environment
    assert look(varied, cache=tmp_path / "timings.json") == first
    write_json(first, tmp_path / "inspection.json")
    assert read_json(tmp_path / "inspection.json", Inspection) == first


def test_structure_that_is_there_is_told() -> None:
    structures = {layer.name: layer.structure for layer in look(network()).layers}
    assert structures["stem"] is None
    assert structures["a"] is not None
    assert structures["a"].reduced == (5, 2, 2)
    assert structures["a"] == structures["b"]


def test_a_model_that_cannot_be_run_is_listed_without_times(tmp_path: Path) -> None:
    strange = helper.make_node("Strange", ["ar"], ["odd"], "oddity", domain="my.domain")
    model = network(strange, outputs=[value("odd", (1, 8, 12, 10))], domains={"my.domain": 1})
    result = look(model)
    assert "my.domain" in result.note
    assert (result.ms, result.environment) == (None, "")
    assert [layer.ms for layer in result.layers] == [None, None, None]
    onnx.save(model, tmp_path / "model.onnx")
    said = runner.invoke(app, ["inspect", str(tmp_path / "model.onnx")])
    assert said.exit_code == 0
    assert "Not timed" in said.output
    assert "my.domain.Strange" in said.output.replace("\n", "")


def test_automatic_padding_is_no_obstacle() -> None:
    model = network()
    stem = model.graph.node[0]
    del stem.attribute[:]
    stem.attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    assert next(x.name for x in look(model).layers) == "stem"


def test_a_matmul_of_tokens_is_counted_by_its_rows() -> None:
    weight = np.ones((6, 4), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "fc.weight"], ["y"])],
        "net",
        [value("x", (1, 7, 6))],
        [value("y", (1, 7, 4))],
        [numpy_helper.from_array(weight, "fc.weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (layer,) = look(model).layers
    assert (layer.operator, layer.weight_shape, layer.macs) == ("MatMul", (4, 6), 7 * 4 * 6)


# The command ---------------------------------------------------------------------------------


def run(*words: object) -> tuple[int, str]:
    result = runner.invoke(app, ["inspect", *map(str, words)])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def words_for(tiny: Path) -> Iterator[object]:
    yield from (tiny / "tiny.pt", "--arch", f"{tiny / 'tiny.py'}:tiny")


def test_a_checkpoint_and_its_export_are_listed_alike(tiny: Path, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for shape in ("1x1x8x8", "input=1x1x8x8"):
        result = runner.invoke(
            app, ["inspect", *map(str, words_for(tiny)), "--input-shape", shape, "--json", "-"]
        )
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    assert [layer["name"] for layer in found[0]["layers"]] == ["stem", "conv", "head"]
    assert found[0]["inputs"] == {"input": [1, 1, 8, 8]}
    assert found[0]["layers"][1]["weight_shape"] == [16, 8, 3, 3]
    assert found[0] == found[1]


def test_the_table_fits_a_terminal_and_gives_totals(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "model.onnx")
    result = runner.invoke(app, ["inspect", str(tmp_path / "model.onnx")], terminal_width=80)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "3 layers" in result.output
    assert "2 weights already structured" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("missing.onnx",), "missing.onnx"),
        (("tiny.pt", "--arch", "tiny.py:tiny", "--input-shape", "1x3x8x8"), "channels"),
        (("tiny.pt", "--arch", "tiny.py:none", "--input-shape", "1x1x8x8"), "none"),
        (("open.onnx",), "--input-shape x=1x3x224x224"),
        (("open.onnx", "--input-shape", "z=1x3x9x9"), "no input z"),
        (("open.onnx", "--device", "tpu"), "tpu"),
        (("text.onnx",), "text file"),
    ],
)
def test_bad_input_is_explained(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    for name in ("tiny.pt", "tiny.py"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    onnx.save(network(image=("n", 3, "h", "w")), tmp_path / "open.onnx")
    (tmp_path / "text.onnx").write_text("not a model, but a good many words of text\n")
    monkeypatch.chdir(tmp_path)
    code, said = run(*words)
    assert code == 1, said
    assert told in said
    assert "Traceback" not in said


@pytest.mark.parametrize("shape", ["x=1x3", "", "input=", "input=0x3x8x8", "axb"])
def test_a_shape_that_is_none_is_wrong_usage(tiny: Path, shape: str) -> None:
    code, said = run(*words_for(tiny), "--input-shape", shape)
    assert code in (1, 2), said
    assert "shape" in said
