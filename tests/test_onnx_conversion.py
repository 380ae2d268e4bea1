"""`structconv convert model.onnx`: no training, unlabelled images or none, any sound graph."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import assert_error, run
from torch import nn

from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import load_onnx, save_onnx

pytestmark = pytest.mark.usefixtures("short_rounds")

SIZE, CLASSES = 8, 3


class Grouped(nn.Module):
    """Grouped, depthwise and pointwise convolutions; a Gemm head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.grouped(torch.relu(self.stem(x))))))
        return self.head(self.pointwise(x).mean((2, 3)))


class Two(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.third = nn.Conv2d(8, 4, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(self.first(left) + self.first(right))))


def exported(path: Path, model: nn.Module, *inputs: torch.Tensor) -> Path:
    save_onnx(export_onnx(model.eval(), *inputs), path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """tiny.onnx; labelled.npz in two parts; the folder images/ without labels."""
    folder = tmp_path_factory.mktemp("onnx")
    namespace: dict[str, Callable[[], nn.Module]] = {}
    exec((tiny / "tiny.py").read_text(), namespace)  # type: ignore[arg-type]
    model = namespace["tiny"]()
    model.load_state_dict(torch.load(tiny / "tiny.pt", weights_only=True))
    exported(folder / "tiny.onnx", model, torch.randn(2, 1, SIZE, SIZE))
    data = np.load(tiny / "data.npz")
    x, y = data["x"], data["y"]
    np.savez(
        folder / "labelled.npz", x_train=x[:180], y_train=y[:180], x_val=x[180:], y_val=y[180:]
    )
    shuffled = np.random.default_rng(1).permutation(y[:180])
    np.savez(
        folder / "shuffled.npz", x_train=x[:180], y_train=shuffled, x_val=x[180:], y_val=y[180:]
    )
    (folder / "images").mkdir()
    for index in range(60):
        Image.fromarray(x[index]).save(folder / "images" / f"{index}.png")
    return folder


def convert(place: Path, out: Path, *words: object, model: str = "tiny.onnx") -> dict[str, object]:
    result = run("convert", place / model, "--out", out, "--forms", "split", *words)
    assert result.exit_code == 0, result.output
    assert "The rewrite is exact" in result.output
    for name in json.loads((out / "run.json").read_text())["files"].values():
        assert (out / name).is_file()
    found: dict[str, object] = json.loads((out / "convert.json").read_text())
    return found


@pytest.fixture(scope="module")
def labelled(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labelled") / "run"
    convert(place, out, "--data", place / "labelled.npz")
    return out


def test_labels_judge_the_original_and_the_result(labelled: Path) -> None:
    found = json.loads((labelled / "convert.json").read_text())
    stages = found["finetune"]["stages"]
    assert [stage["stage"] for stage in stages] == ["original", "least squares"]
    assert [stage["evaluation"]["examples"] for stage in stages] == [60, 60]
    assert stages[0]["max_residual"] > 0.1
    assert stages[1]["max_residual"] < 1e-6
    assert found["finetune"]["recipe"]["epochs"] == 0
    approximation = json.loads((labelled / "verify.json").read_text())["approximation"]
    assert approximation["original"] == pytest.approx(stages[0]["evaluation"]["score"])
    assert approximation["structured"] == pytest.approx(stages[1]["evaluation"]["score"])
    (layer,) = [x for x in found["reconstruction"]["layers"] if x["method"] == "least squares"]
    assert layer["error"] < layer["projected"]
    assert found["reconstruction"]["images"] == 180
    assert json.loads((labelled / "run.json").read_text())["architecture"] is None


def test_the_run_verifies_and_benchmarks_again(labelled: Path) -> None:
    verified = run("verify", labelled)
    assert verified.exit_code == 0, verified.output
    assert "structured_dense.onnx" in verified.output
    assert "PyTorch against" not in verified.output
    assert run("benchmark", labelled, "--rounds", 5, "--blocks", 1).exit_code == 0


def test_one_per_cent_of_one_reduced_weight_is_found_and_named(
    labelled: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(labelled, tmp_path / "run"))
    state = load_file(folder / "structured.safetensors")
    weight = state["conv.weight"].flatten()
    weight[int(weight.abs().argmax())] *= 1.01
    save_file(state, folder / "structured.safetensors")
    found = run("verify", folder)
    assert found.exit_code == 3, found.output
    assert "First diverging layer: conv" in " ".join(found.output.split())


def test_labels_are_not_read_for_the_weights(place: Path, labelled: Path, tmp_path: Path) -> None:
    convert(place, tmp_path / "run", "--data", place / "shuffled.npz")
    one, other = (
        load_file(folder / "structured_dense.safetensors")
        for folder in (labelled, tmp_path / "run")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_flat_folder_of_images_without_labels(place: Path, tmp_path: Path) -> None:
    found = convert(place, tmp_path / "run", "--data", place / "images")
    assert found["finetune"]["stages"] == []
    assert any("no labels" in note for note in found["notes"])
    assert found["reconstruction"]["images"] == 54  # a tenth is held out
    assert run("verify", tmp_path / "run").exit_code == 0
    approximation = json.loads((tmp_path / "run/verify.json").read_text())["approximation"]
    assert approximation["examples"] == 6
    assert approximation["metric"] is None
    assert 0 < approximation["output_difference"] < 1
    assert approximation["agreement"] is not None


def test_without_data_weights_are_projected_and_accuracy_is_said_to_be_unmeasured(
    place: Path, tmp_path: Path
) -> None:
    found = convert(place, tmp_path / "run")
    assert {layer["method"] for layer in found["reconstruction"]["layers"]} == {"projection"}
    assert any("accuracy is not measured" in note for note in found["notes"])
    verified = run("verify", tmp_path / "run")
    assert verified.exit_code == 0
    assert "accuracy is unmeasured" in " ".join(verified.output.split()).lower()


def test_a_model_is_told_by_its_content(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "tiny.onnx", tmp_path / "model.bin")
    convert(tmp_path, tmp_path / "run", model="model.bin")


def test_targets_are_planned_and_met(place: Path, tmp_path: Path) -> None:
    words = ("--data", place / "labelled.npz", "--target-macs", 0.6)
    found = convert(place, tmp_path / "run", *words)
    assert found["after"]["multiplications"] <= 0.6 * found["before"]["multiplications"]
    assert (tmp_path / "run/prediction.json").is_file()


def test_a_drop_is_held(place: Path, tmp_path: Path) -> None:
    words = ("--data", place / "labelled.npz", "--max-drop", 50, "--target-macs", 0.7)
    found = convert(place, tmp_path / "run", *words)
    first, last = (stage["evaluation"]["score"] for stage in found["finetune"]["stages"])
    assert first - last <= 50


def test_a_plan_is_obeyed(place: Path, labelled: Path, tmp_path: Path) -> None:
    found = convert(place, tmp_path / "run", "--plan", labelled / "plan.json")
    layers = {layer["name"]: layer["structure"] for layer in found["layers"]}
    assert layers["conv"]["reduced"] == [8, 2, 2]
    assert layers["stem"] is None


def test_layers_of_every_kind_are_structured_or_kept_with_a_reason(
    place: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    exported(tmp_path / "grouped.onnx", Grouped(), torch.randn(2, 1, SIZE, SIZE))
    found = convert(tmp_path, tmp_path / "run", "--data", place / "images", model="grouped.onnx")
    notes = {x["name"]: x["note"] for x in found["layers"] if x["structure"] is None}
    assert set(notes) == {"stem", "depthwise", "pointwise", "head"}
    assert "depthwise" in notes["depthwise"]
    assert "linear" in notes["head"]
    assert "1x1 kernel" in notes["pointwise"]
    # The grouped layer had no bias, and got one for the shift.
    assert "grouped.bias" in load_file(tmp_path / "run/structured_dense.safetensors")


def with_matmul_head(path: Path) -> Path:
    """conv, conv, pool, MatMul with a weight of another name, a fixed batch of 2."""
    rng = np.random.default_rng(0)
    weights = {"W1": (8, 1, 3, 3), "W2": (8, 8, 3, 3), "W3": (8, CLASSES)}
    nodes = [
        helper.make_node("Conv", ["x", "W1"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "W2"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "W3"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [2, 1, SIZE, SIZE]), ("y", [2, CLASSES]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    save_onnx(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path
    )
    return path


def test_a_fixed_batch_foreign_names_and_a_matmul_head(place: Path, tmp_path: Path) -> None:
    with_matmul_head(tmp_path / "model.onnx")
    plan = {
        "layers": [
            {"name": "W2", "structure": {"dense": [8, 3, 3], "reduced": [8, 2, 2]}},
            {"name": "W3", "structure": {"dense": [8], "reduced": [5]}},
        ]
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for data in ("labelled.npz", "images", None):
        out = tmp_path / f"run-{data}"
        words = ("--data", place / data) if data else ()
        found = convert(tmp_path, out, *words, "--plan", tmp_path / "plan.json", model="model.onnx")
        assert run("verify", out).exit_code == 0
        assert len(found["finetune"]["stages"]) == (2 if data == "labelled.npz" else 0)
        words = ("--rounds", 5, "--blocks", 1, "--batch-size", 2)
        assert run("benchmark", out, *words).exit_code == 0


def test_two_inputs_need_no_data_and_take_none(place: Path, tmp_path: Path) -> None:
    inputs = torch.randn(2, 1, SIZE, SIZE), torch.randn(2, 1, SIZE, SIZE)
    exported(tmp_path / "two.onnx", Two(), *inputs)
    result = run(
        "convert", tmp_path / "two.onnx", "--data", place / "images", "--out", tmp_path / "r"
    )
    assert_error(result, "left, right", "Leave it out")
    assert not (tmp_path / "r").exists()
    found = convert(tmp_path, tmp_path / "run", model="two.onnx")
    (shared,) = [x for x in found["layers"] if x["name"] == "first"]
    assert shared["note"] == "it runs more than once"


def quantised(model: onnx.ModelProto) -> None:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["dq"])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int8), "q"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1).reshape(()), "s"))
    model.graph.node.insert(0, node)


def without_convolutions(model: onnx.ModelProto) -> None:
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("GlobalAveragePool", ["input"], ["output"]))
    del model.graph.initializer[:]
    shape = ["n", 1, 1, 1]
    value = helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, shape)
    model.graph.output[0].CopyFrom(value)


def one_row_for_all(model: onnx.ModelProto) -> None:
    name = model.graph.output[0].name
    model.graph.node.append(helper.make_node("ReduceMax", [name], ["most"], keepdims=0))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("most", onnx.TensorProto.FLOAT, []))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (quantised, "quantised"),
        (without_convolutions, "no convolution or linear layer"),
        (one_row_for_all, "one row per example"),
    ],
)
def test_a_graph_that_cannot_be_converted_is_refused(
    place: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None], told: str
) -> None:
    model = load_onnx(place / "tiny.onnx")
    change(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert_error(run("convert", tmp_path / "m.onnx", "--out", tmp_path / "run"), told)
    assert not (tmp_path / "run").exists()


def with_inputs_for_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        kind = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(kind)


def of_an_old_version(model: onnx.ModelProto) -> None:
    with_inputs_for_weights(model)
    model.ir_version = 3
    for entry in model.opset_import:
        entry.version = min(entry.version, 9)


def with_constant_nodes(model: onnx.ModelProto) -> None:
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    for index, tensor in enumerate(weights):
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(index, node)
        model.graph.initializer.remove(tensor)


@pytest.mark.parametrize(
    ("change", "noted"),
    [(with_inputs_for_weights, True), (of_an_old_version, False), (with_constant_nodes, False)],
)
def test_weights_however_they_are_held_are_structured(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], noted: bool
) -> None:
    model = load_onnx(with_matmul_head(tmp_path / "plain.onnx"))
    expected = convert(tmp_path, tmp_path / "expected", model="plain.onnx")
    change(model)
    onnx.checker.check_model(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    found = convert(tmp_path, tmp_path / "run", model="m.onnx")
    assert found["layers"] == expected["layers"]
    assert noted == any("as inputs too" in note for note in found["notes"])  # type: ignore[attr-defined]


def test_labels_that_do_not_fit_the_outputs_are_set_aside(place: Path, tmp_path: Path) -> None:
    """Class folders, for a model of one score and for one that gives maps; with a target too."""
    for index, path in enumerate(sorted((place / "images").iterdir())):
        folder = tmp_path / "data" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    score = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)]
    for name, layers in {"score": [*body, *score], "maps": body}.items():
        exported(tmp_path / f"{name}.onnx", nn.Sequential(*layers), torch.randn(2, 1, SIZE, SIZE))
        out, words = tmp_path / name, ("--data", tmp_path / "data", "--target-macs", 0.7)
        found = convert(tmp_path, out, *words, model=f"{name}.onnx")
        assert found["finetune"]["stages"] == []  # type: ignore[index]
        assert any("accuracy is unmeasured" in note for note in found["notes"])  # type: ignore[attr-defined]


def test_damaged_files_and_wrong_data_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes((place / "tiny.onnx").read_bytes()[:2000])
    out = ("--out", tmp_path / "run")
    assert_error(run("convert", tmp_path / "cut.onnx", *out), "cut.onnx", "damaged or invalid")
    assert_error(run("convert", tmp_path / "none.onnx", *out), "none.onnx")
    rng = np.random.default_rng(0)
    for shape, told in (((40, SIZE, SIZE, 3), "channel"), ((40, 4, 4), "the model takes")):
        np.savez(tmp_path / "x.npz", x=rng.integers(0, 255, shape).astype(np.uint8))
        fixed = with_matmul_head(tmp_path / "fixed.onnx")
        words = ("--data", tmp_path / "x.npz", "--out", tmp_path / "run")
        assert_error(run("convert", fixed, *words), told)
    y = np.arange(40) % 7
    np.savez(tmp_path / "y.npz", x=rng.integers(0, 255, (40, 8, 8)).astype(np.uint8), y=y)
    words = ("--data", tmp_path / "y.npz", "--out", tmp_path / "run")
    assert_error(run("convert", place / "tiny.onnx", *words), "largest label is 6")
    drop = ("--data", place / "images", "--max-drop", 1, "--out", tmp_path / "run")
    assert_error(run("convert", place / "tiny.onnx", *drop), "--max-drop", "one label each")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        *(["--arch=x.py:f"], ["--epochs=3"], ["--resume"], ["--distill=0.1"], ["--task=t.py"]),
        # Those that have a value where none is given, which may be the one given.
        *(["--recipe=default"], ["--batch-size=64"], ["--optimizer=sgd"], ["--accumulate=1"]),
        *(["--train-device=cpu"], ["--precision=bf16"], ["--channels-last"], ["--compile"]),
    ],
)
def test_options_that_need_a_checkpoint_are_refused(place: Path, words: list[str]) -> None:
    result = run("convert", place / "tiny.onnx", *words)
    assert_error(result, words[0].split("=")[0], "without training", status=2)


@pytest.mark.skipif(
    bool(find_spec("timm") or find_spec("torchvision")),
    reason="all of the installed libraries' architectures would be built, which takes minutes",
)
@pytest.mark.parametrize("command", ["convert", "plan", "inspect"])
def test_a_checkpoint_of_no_known_architecture_needs_to_be_told(
    command: str, tiny: Path, tmp_path: Path
) -> None:
    words = ["--out", tmp_path / "out"] if command != "inspect" else []
    words += ["--data", "digits"] if command == "convert" else []
    assert_error(run(command, tiny / "tiny.pt", *words), "--arch: FILE.py:FACTORY")
