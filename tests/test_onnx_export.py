"""Exporting: a dynamic batch, the parameters' names, no trace of the user's files, no output."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

import structconv_cli
from structconv_cli.errors import OnnxError
from structconv_cli.onnx.export import OPSET, export_onnx
from structconv_cli.onnx.file import load_onnx, save_onnx, set_metadata

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """A little of everything: batch norm, reflect padding, groups, linear layers of both forms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.tokens = nn.Linear(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = self.grouped(functional.relu(self.mirror(x)))
        x = functional.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        result: Tensor = self.head(x.mean(1))
        return result


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.normal_()
    return model


@pytest.fixture(scope="module")
def exported(net: Net) -> onnx.ModelProto:
    return export_onnx(net, images(2))


def tensors_of(model: onnx.ModelProto) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
    }


def run(model: onnx.ModelProto, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(result)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_exported_model_computes_what_pytorch_does_at_any_batch(
    net: Net, exported: onnx.ModelProto, batch: int
) -> None:
    x = images(batch, seed=batch)
    with torch.no_grad():
        expected = net.double()(x.double())
    net.float()
    assert tuple(expected.shape) == (batch, 5)
    torch.testing.assert_close(run(exported, x).double(), expected, rtol=0, atol=1e-5)


def test_batch_axis_is_dynamic_by_name_on_both_sides(exported: onnx.ModelProto) -> None:
    (source,), (target,) = exported.graph.input, exported.graph.output
    assert (source.name, target.name) == ("input", "output")
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (source, target)
    ]
    assert shapes == [["batch", 3, 8, 8], ["batch", 5]]


def test_opset_and_checker(exported: onnx.ModelProto) -> None:
    assert [(o.domain, o.version) for o in exported.opset_import] == [("", OPSET)] == [("", 18)]
    onnx.checker.check_model(exported, full_check=True)


def test_initialisers_bear_the_parameters_names(net: Net, exported: onnx.ModelProto) -> None:
    found = tensors_of(exported)
    parameters = dict(net.named_parameters())
    layers = ["stem", "mirror", "grouped", "tokens", "head"]
    assert {f"{layer}.weight" for layer in layers} <= set(found)
    for name in ("mirror.weight", "mirror.bias", "grouped.weight", "grouped.bias", "head.weight"):
        assert torch.equal(found[name], parameters[name])
    assert torch.equal(found["tokens.weight"], parameters["tokens.weight"].T)
    users = {
        node.input[1]: node.op_type
        for node in exported.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
    }
    assert users == {
        "stem.weight": "Conv",
        "mirror.weight": "Conv",
        "grouped.weight": "Conv",
        "tokens.weight": "MatMul",
        "head.weight": "Gemm",
    }


def test_batch_norm_is_folded_into_the_convolution(net: Net, exported: onnx.ModelProto) -> None:
    assert "BatchNormalization" not in {node.op_type for node in exported.graph.node}
    norm = net.norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    found = tensors_of(exported)
    expected = net.stem.weight.double() * scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found["stem.weight"].double(), expected, rtol=1e-6, atol=0)
    (node,) = [n for n in exported.graph.node if len(n.input) > 1 and n.input[1] == "stem.weight"]
    shift = norm.bias.double() - norm.running_mean.double() * scale
    torch.testing.assert_close(found[node.input[2]].double(), shift, rtol=1e-5, atol=1e-6)


def test_reflect_padding_is_a_node_of_its_own(exported: onnx.ModelProto) -> None:
    (pad,) = [node for node in exported.graph.node if node.op_type == "Pad"]
    assert helper.get_node_attr_value(pad, "mode") == b"reflect"
    (conv,) = [
        n for n in exported.graph.node if n.op_type == "Conv" and n.input[1] == "mirror.weight"
    ]
    assert conv.input[0] == pad.output[0]
    assert not any(helper.get_node_attr_value(conv, "pads"))


def test_nothing_tells_of_the_users_files(exported: onnx.ModelProto) -> None:
    content = exported.SerializeToString()
    path = Path(__file__)
    for trace in (
        path.name,
        path.stem,
        str(path.parent),
        str(ROOT),
        "Net",
        "forward",
        "/home",
        ".py",
    ):
        assert trace.encode() not in content, trace


def test_the_model_is_unchanged_but_for_eval_mode(net: Net) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    training = Net()
    training.load_state_dict(before)
    export_onnx(training.train(), images(3))
    after = training.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_batch_of_one_is_refused(net: Net) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        export_onnx(net, images(1))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.sum() > 0:
            y = -y
        return y.mean((2, 3))


class FixedBatch(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)).view(2, -1)


class Constant(Branching):
    """Its graph is traced with the batch as a Python number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(int(x.shape[0]), -1)[:, :4] + torch.zeros(2, 4)


class Silent(Branching):
    """Fails while it is exported, without a message."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise NotImplementedError
        return self.conv(x).mean((2, 3))


class Asserting(Branching):
    def forward(self, x: Tensor) -> Tensor:
        assert not torch.compiler.is_exporting()
        return self.conv(x).mean((2, 3))


class LookingUp(Branching):
    def forward(self, x: Tensor) -> Tensor:
        sizes: dict[str, int] = {}
        return self.conv(x).mean((2, 3)) * sizes["batch"]


@pytest.mark.parametrize("model", [Branching, FixedBatch, Constant, Silent, Asserting, LookingUp])
def test_models_that_cannot_be_exported_are_refused(model: Callable[[], nn.Module]) -> None:
    with pytest.raises(OnnxError, match="export") as caught:
        export_onnx(model(), images(2))
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


class Multiplied(nn.Module):
    """Multiplies with parameters of its own, which are no linear layers' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.mixer = nn.Module()
        self.mixer.query = nn.Parameter(torch.randn(4, 4))
        self.project = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        result: Tensor = (y @ self.mixer.query) @ self.project
        return result


def test_parameters_of_no_linear_layer_keep_their_names() -> None:
    model = Multiplied()
    found = tensors_of(export_onnx(model, images(2)))
    for name, value in model.named_parameters():
        assert name in found, sorted(found)
        assert torch.equal(found[name], value)


_SCRIPT = """
import warnings
import torch
from torch import nn
from structconv_cli.onnx.export import export_onnx
class Talking(nn.Module):
    def forward(self, x):
        print("tracing")
        return x
model = nn.Sequential(
    Talking(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
)
export_onnx(model, torch.zeros(2, 3, 8, 8))
"""


def test_export_prints_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=_environment(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _environment() -> dict[str, str]:
    package = Path(structconv_cli.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(package)}


def test_saved_models_load_as_they_were(exported: onnx.ModelProto, tmp_path: Path) -> None:
    save_onnx(exported, tmp_path / "model.onnx")
    assert load_onnx(tmp_path / "model.onnx") == exported


def test_an_invalid_model_is_not_saved(exported: onnx.ModelProto, tmp_path: Path) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(exported)
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(OnnxError, match=r"model\.onnx"):
        save_onnx(broken, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_metadata_reaches_onnx_runtime(exported: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    set_metadata(model, {"key": "a value"})
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert session.get_modelmeta().custom_metadata_map == {"key": "a value"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 64,
        b"not a model",
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"PK\x03\x04",
        bytes(range(256)),
    ],
    ids=["empty", "zeros", "text", "png", "zip", "bytes"],
)
def test_files_of_another_kind_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxError, match=r"model\.onnx"):
        load_onnx(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(OnnxError, match=path.name):
            load_onnx(path)


def test_a_truncated_file_is_refused_wherever_it_ends(
    exported: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    content = exported.SerializeToString()
    ends = [*range(0, len(content), len(content) // 60), *range(len(content) - 12, len(content))]
    for end in ends:
        path.write_bytes(content[:end])
        with pytest.raises(OnnxError):
            load_onnx(path)


def test_weights_outside_the_file_are_refused(exported: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../elsewhere.bin")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(OnnxError):
        load_onnx(path)
