import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structconv_cli.errors import CheckpointError
from structconv_cli.model.architecture import Architecture, build_model
from structconv_cli.model.checkpoint import Checkpoint, load_checkpoint, load_into, save_like
from structconv_cli.model.checkpoint_file import refuse_pickled_module, unpickle_module
from structconv_cli.model.checkpoint_kind import Kind, identify
from structconv_cli.model.exported_archive import exported_inputs, open_exported

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "checkpoints"
SAMPLE = ROOT / "sample_models"

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8]


class Net(nn.Module):
    def __init__(self, width: int = 4, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)


class Touching:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and torch.equal(first, second)
        )
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


def save(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def message_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# --- laws

shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    return torch.randint(0, 100, shape).to(dtype)


# The key "head" keeps a name that looks wrapped from making all of them so.
states = st.dictionaries(
    st.sampled_from(["conv.weight", "conv.bias", "module.x", "_orig_mod.y", "fc.weight"]),
    tensors(),
).flatmap(lambda state: tensors().map(lambda head: {"head": head, **state}))
nestings = st.sampled_from([None, "state_dict", "model_state_dict", "model", "ema", "net"])
prefixes = st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
extras = st.dictionaries(
    st.sampled_from(["epoch", "best", "args", "optimizer"]),
    st.integers() | st.text() | st.just({"state": {0: {"momentum": torch.ones(2)}}}),
)


@given(states, states, nestings, prefixes, extras, extras, st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_torch_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    state: dict[str, Tensor],
    tuned: dict[str, Tensor],
    nesting: str | None,
    prefix: str,
    outer: dict[str, Any],
    inner: dict[str, Any],
    legacy: bool,
):
    folder = tmp_path_factory.mktemp("round_trip", numbered=True)
    held: dict[str, Any] = OrderedDict((prefix + key, value) for key, value in state.items())
    held.update(inner)
    held._metadata = OrderedDict({"": {"version": 1}})
    path = folder / "original.bin"
    torch.save(
        held if nesting is None else {**outer, nesting: held},
        path,
        _use_new_zipfile_serialization=not legacy,
    )

    first = load_checkpoint(path)
    assert (first.nesting, first.prefix, first.kind) == (nesting, prefix, "torch")
    assert same(first.tensors, state)

    save_like(first, tuned, folder / "tuned.bin")
    second = load_checkpoint(folder / "tuned.bin")
    assert (second.nesting, second.prefix, second.kind) == (nesting, prefix, "torch")
    assert same(second.tensors, tuned)
    assert same(second.container, first.container)
    assert second.versions == first.versions == {"": {"version": 1}}
    if nesting is not None:
        assert list(torch.load(folder / "tuned.bin")) == [*outer, nesting]


@given(states, states, prefixes, st.dictionaries(st.text(), st.text(), max_size=2))
@settings(deadline=None, max_examples=30)
def test_safetensors_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    state: dict[str, Tensor],
    tuned: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, str],
):
    folder = tmp_path_factory.mktemp("round_trip", numbered=True)
    path = folder / "original.pt"
    held = {prefix + key: value for key, value in state.items()}
    safetensors.torch.save_file(held, path, metadata=metadata or None)

    first = load_checkpoint(path)
    assert (first.nesting, first.prefix, first.kind) == (None, prefix, "safetensors")
    assert first.container == metadata
    assert same(dict(sorted(first.tensors.items())), dict(sorted(state.items())))

    save_like(first, tuned, path)
    second = load_checkpoint(path)
    assert second.container == metadata
    assert (second.prefix, second.kind) == (prefix, "safetensors")
    assert same(dict(sorted(second.tensors.items())), dict(sorted(tuned.items())))


# --- where the tensors lie


def test_preferred_nestings_come_in_order(tmp_path: Path):
    held = {
        "rng": torch.zeros(9, dtype=torch.uint8),
        "ema": {"w": torch.full((1,), 4.0)},
        "model": {"w": torch.full((1,), 3.0)},
        "model_state_dict": {"w": torch.full((1,), 2.0)},
        "state_dict": {"w": torch.full((1,), 1.0)},
    }
    for value, nesting in enumerate(["state_dict", "model_state_dict", "model", "ema"], 1):
        checkpoint = load_checkpoint(save(tmp_path / "c.pt", held))
        assert checkpoint.nesting == nesting
        assert checkpoint.tensors["w"] == value
        del held[nesting]


def test_a_random_state_beside_an_unknown_key_is_not_the_model(tmp_path: Path):
    held = {"rng": torch.zeros(9, dtype=torch.uint8), "net": Net().state_dict(), "epoch": 3}
    assert load_checkpoint(save(tmp_path / "c.pt", held)).nesting == "net"


def test_an_averaged_model_is_unwrapped(tmp_path: Path):
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    checkpoint = load_checkpoint(save(tmp_path / "c.pt", averaged.state_dict()))
    assert checkpoint.prefix == "module."
    assert checkpoint.container == {"n_averaged": torch.tensor(0)}
    load_into(Net(), checkpoint)
    save_like(checkpoint, checkpoint.tensors, tmp_path / "d.pt")
    averaged.load_state_dict(torch.load(tmp_path / "d.pt"))


def test_the_kind_is_told_by_content(tmp_path: Path):
    path = tmp_path / "c.safetensors"
    assert load_checkpoint(save(path, Net().state_dict())).kind == "torch"


# --- files that are no checkpoints


def write_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), path)


def write_frozen(path: Path) -> None:
    traced = torch.jit.trace(nn.Conv2d(1, 2, 3).eval(), torch.zeros(1, 1, 4, 4))
    torch.jit.save(torch.jit.freeze(traced), path)


def write_onnx(path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [out])), path)


def write_onnx_backwards(path: Path) -> None:
    """The graph before the version: protobuf allows any order."""
    write_onnx(path)
    whole = onnx.load(path)
    version, whole.ir_version = onnx.ModelProto(ir_version=whole.ir_version), 0
    whole.ClearField("ir_version")
    path.write_bytes(whole.SerializeToString() + version.SerializeToString())


def write_half(path: Path, **options: Any) -> None:
    save(path, Net().state_dict(), **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_safetensors(path: Path, keep: int | None) -> None:
    data = safetensors.torch.save(Net().state_dict())
    path.write_bytes(data[:keep])


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


# What each file is, how to write it, and what the error must tell.
BAD_FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "absent": (lambda path: None, ["does not exist"]),
    "folder": (lambda path: path.mkdir(), ["is a folder"]),
    "empty": (lambda path: path.touch(), ["is empty"]),
    "truncated": (write_half, ["truncated"]),
    "truncated legacy": (
        lambda path: write_half(path, _use_new_zipfile_serialization=False),
        ["truncated"],
    ),
    "truncated safetensors header": (lambda path: write_safetensors(path, 50), ["truncated", "50"]),
    "truncated safetensors": (lambda path: write_safetensors(path, -9), ["truncated"]),
    "empty safetensors": (
        lambda path: path.write_bytes(safetensors.torch.save({})),
        ["holds no tensors"],
    ),
    "TorchScript without tensors": (write_torchscript, ["no named tensors", "torch.jit.freeze"]),
    "onnx": (write_onnx, ["an ONNX model"]),
    "npz": (lambda path: np.savez(path.open("wb"), x=np.zeros(2)), [".npz"]),
    "zip": (write_zip, ["zip archive that torch.save did not write"]),
    "jpeg": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0 and so on"), ["JPEG"]),
    "text": (lambda path: path.write_text("a short text"), ["b'a short '"]),
    "html": (lambda path: path.write_text("\n<!doctype html>"), ["HTML", "download"]),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        ["git lfs pull"],
    ),
    "namespace": (lambda path: save(path, Namespace(lr=1)), ["no named tensors", "(lr)"]),
    "quantized": (
        lambda path: save(path, {"w": torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)}),
        ["'w'", "qtensor", "before it was quantized"],
    ),
    "sparse": (lambda path: save(path, {"w": torch.eye(2).to_sparse()}), ["'w'", "sparse"]),
    "frozen TorchScript": (write_frozen, ["no named tensors"]),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), ["pickle"]),
    "list": (lambda path: save(path, [torch.zeros(1)]), ["type list"]),
    "tensor": (lambda path: save(path, torch.zeros(1)), ["type Tensor"]),
    "no tensors": (lambda path: save(path, {"epoch": 3, "model": {}}), ["epoch, model"]),
    "empty dictionary": (lambda path: save(path, {}), ["(none)"]),
    "several": (
        lambda path: save(path, {"critic": Net().state_dict(), "actor": Net().state_dict()}),
        ["several", "critic, actor"],
    ),
    "nan": (
        lambda path: save(
            path, {"module.a": torch.tensor([1, np.nan]), "module.b": torch.zeros(1)}
        ),
        ["1 of 2 tensors", "module.a"],
    ),
    "inf": (
        lambda path: save(path, {"a": torch.tensor(np.inf).half(), "b": torch.ones(1)}),
        ["1 of 2 tensors", "(a)"],
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:torch.quantize")
@pytest.mark.parametrize("name", BAD_FILES)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, name: str):
    write, told = BAD_FILES[name]
    path = tmp_path / "weights.pt"
    write(path)
    message = message_of(path)
    assert all(text in message for text in told), message


# --- modules, of which only the weights are read


class Wrapped(nn.Module):
    """Nested, shared and non-persistent parts, all of which `state_dict` names in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Net()
        self.layers = nn.ModuleList([nn.Conv2d(2, 2, 1, bias=False), nn.ReLU()])
        self.again = self.first.conv
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("fleeting", torch.arange(4), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.first.conv(x) + self.again(x)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, "model"])
def test_a_pickled_modules_state_dict_is_read(tmp_path: Path, legacy: bool, key: str | None):
    model = Wrapped()
    held = model if key is None else {key: model, "epoch": 3}
    path = save(tmp_path / "m.pt", held, _use_new_zipfile_serialization=not legacy)
    assert identify(path) is Kind.MODULE
    checkpoint = load_checkpoint(path)
    assert list(checkpoint.tensors) == list(model.state_dict())
    assert same(checkpoint.tensors, dict(model.state_dict()))
    assert (checkpoint.kind, checkpoint.nesting) == (Kind.MODULE, key)
    assert checkpoint.classes[0] == f"{__name__}.Wrapped"
    assert "none of its code was run" in checkpoint.notes[0]
    save_like(checkpoint, checkpoint.tensors, tmp_path / "state.pt")
    written = torch.load(tmp_path / "state.pt")
    assert same(dict(written if key is None else written[key]), dict(model.state_dict()))
    assert type(unpickle_module(path)) is Wrapped
    message = str(refuse_pickled_module(path))
    assert all(text in message for text in ["Wrapped", "--arch", "--trust-pickle", "state_dict()"])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_weights_of_torchscript_are_read(tmp_path: Path):
    model = Wrapped().eval()
    for name, scripted in {
        "traced": torch.jit.trace(model, torch.zeros(1, 1, 4, 4)),
        "scripted": torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))),
    }.items():
        path = tmp_path / name
        torch.jit.save(scripted, path)
        assert identify(path) is Kind.TORCHSCRIPT
        found = load_checkpoint(path).tensors
        expected = dict(scripted.state_dict())
        assert expected
        assert expected.keys() <= found.keys()
        assert same({key: found[key] for key in expected}, expected)
        message = str(refuse_pickled_module(path))
        assert "TorchScript" in message
        assert "--arch" in message
        assert "--trust-pickle" not in message


def test_an_exported_program_is_opened(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=[{0: batch}])
    path = tmp_path / "model.bin"
    with path.open("wb") as file:
        torch.export.save(program, file)
    assert identify(path) is Kind.EXPORTED
    assert same(load_checkpoint(path).tensors, dict(model.state_dict()))
    assert [(i.shape, i.dynamic) for i in exported_inputs(path)] == [((2, 3, 8, 8), (0,))]
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(open_exported(path).module()(x), model(x), rtol=0, atol=1e-6)


def test_an_exported_program_may_cut_to_the_end_and_have_names_with_dashes(tmp_path: Path):
    """Every x[:, 1:] ends at the largest number there is; RegNets have a "block1-0"."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.ModuleDict({"block1-0": nn.Conv2d(2, 4, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.stage["block1-0"](x[:, 1:, ::2])
            return found

    path, model, x = tmp_path / "cut.pt2", Cut().eval(), torch.randn(2, 3, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), path)
    torch.testing.assert_close(open_exported(path).module()(x), model(x), rtol=0, atol=1e-6)
    assert "stage.block1-0.weight" in load_checkpoint(path).tensors


def test_objects_beside_a_state_dict_are_left_out_and_named(tmp_path: Path):
    held = {"state_dict": Net().state_dict(), "args": Namespace(lr=1), "epoch": 3}
    checkpoint = load_checkpoint(save(tmp_path / "c.pt", held))
    assert same(checkpoint.tensors, dict(held["state_dict"]))
    assert "args (argparse.Namespace)" in checkpoint.notes[0]
    assert list(checkpoint.container) == ["state_dict", "epoch"]


def test_averaged_weights_beside_the_state_dict_are_named(tmp_path: Path):
    held = {"net": Net().state_dict(), "ema_state_dict": Net().state_dict()}
    checkpoint = load_checkpoint(save(tmp_path / "c.pt", held))
    assert checkpoint.nesting == "net"
    assert "ema_state_dict (averaged)" in checkpoint.notes[0]
    only = load_checkpoint(save(tmp_path / "c.pt", {"module_ema": Net().state_dict()}))
    assert (only.nesting, only.notes) == ("module_ema", ())


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (lambda path: write_safetensors(path, None), Kind.SAFETENSORS),
        (lambda path: save(path, Net().state_dict()), Kind.TORCH),
        (
            lambda path: save(path, Net().state_dict(), _use_new_zipfile_serialization=False),
            Kind.TORCH,
        ),
        (lambda path: write_onnx(path), Kind.ONNX),
        (lambda path: write_onnx_backwards(path), Kind.ONNX),
    ],
)
def test_kinds_are_told_apart_under_any_name(tmp_path: Path, write: Any, kind: Kind):
    path = tmp_path / "file.jpeg"
    write(path)
    assert identify(path) is kind


def test_a_run_folder_is_known(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"format": "structconv-run/2"}')
    assert identify(tmp_path) is Kind.RUN_FOLDER


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, legacy: bool):
    mark = tmp_path / "ran"
    path = save(
        tmp_path / "hostile.pt",
        {"state_dict": Net().state_dict(), "args": Touching(mark)},
        _use_new_zipfile_serialization=not legacy,
    )
    assert "posix.system" in message_of(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path, protocol: int):
    mark = tmp_path / "ran"
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(Touching(mark), protocol=protocol))
    message_of(path)
    assert not mark.exists()


@given(st.binary(min_size=1, max_size=80), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]))
@settings(deadline=None)
def test_any_bytes_are_refused_cleanly(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes
):
    path = tmp_path_factory.getbasetemp() / "any.pt"
    path.write_bytes(head + data)
    message_of(path)


# --- into a model


def checkpoint_of(state: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(Path("weights.pt"), state, None, "", {}, None, "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loading_casts_to_the_model(tmp_path: Path, dtype: torch.dtype):
    source, target = Net().to(dtype), Net()
    load_into(target, load_checkpoint(save(tmp_path / "c.pt", source.state_dict())))
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key].to(value.dtype))
    assert target.conv.weight.dtype == torch.float32


def test_batch_counters_may_be_missing():
    state = {key: value for key, value in Net().state_dict().items() if "num_batches" not in key}
    load_into(Net(), checkpoint_of(state))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda state: state.pop("bn.running_mean"),
            ["1 missing from the file (bn.running_mean)", "--arch"],
        ),
        (
            lambda state: state.update(extra=torch.zeros(1)),
            ["1 not in the model (extra)", "--arch"],
        ),
        (
            lambda state: state.update({"conv.weight": torch.zeros(4, 2, 3, 3)}),
            ["conv.weight is 4x2x3x3 in the file and 4x1x3x3 in the model"],
        ),
        (
            lambda state: state.update({"fc.weight": torch.zeros(7, 4), "fc.bias": torch.zeros(7)}),
            ["fc.weight is 7x4 in the file and 3x4", "--arch-arg num_classes=7"],
        ),
        (
            lambda state: state.update({"conv.bias": torch.tensor(0.0)}),
            ["conv.bias is scalar in the file"],
        ),
        (
            lambda state: state.update({f"extra{i}": torch.zeros(1) for i in range(7)}),
            ["7 not in the model (extra0, extra1, extra2, extra3, extra4, ...)"],
        ),
    ],
)
def test_what_does_not_fit_is_listed(change: Any, told: list[str]):
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = Net().state_dict()
    change(state)
    with pytest.raises(CheckpointError) as raised:
        load_into(model, checkpoint_of(dict(state)))
    assert all(text in str(raised.value) for text in ["weights.pt", *told]), raised.value
    assert same(dict(model.state_dict()), before)


def test_only_a_head_is_taken_for_a_head():
    with pytest.raises(CheckpointError) as raised:
        load_into(Net(width=5), checkpoint_of(Net(width=4).state_dict()))
    assert "num_classes" not in str(raised.value)


def test_an_unknown_wrapper_is_pointed_out():
    state = {f"backbone.{key}": value for key, value in Net().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"once 'backbone\.' before them is removed"):
        load_into(Net(), checkpoint_of(state))


# --- saving


def test_views_are_saved_without_what_they_view(tmp_path: Path):
    checkpoint = load_checkpoint(save(tmp_path / "c.pt", {"w": torch.zeros(2)}))
    save_like(checkpoint, {"w": torch.zeros(1_000_000)[:2]}, tmp_path / "d.pt")
    assert (tmp_path / "d.pt").stat().st_size < 10_000


def test_shared_tensors_and_parameters_are_saved(tmp_path: Path):
    shared = nn.Parameter(torch.ones(3, 2).T)
    for checkpoint in (
        load_checkpoint(save(tmp_path / "c.pt", {"w": torch.zeros(2)})),
        Checkpoint(Path("c"), {}, None, "", {}, None, "safetensors"),
    ):
        save_like(checkpoint, {"a": shared, "b": shared}, tmp_path / "d.pt")
        assert torch.equal(load_checkpoint(tmp_path / "d.pt").tensors["b"], shared)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_failed_save_leaves_what_was_there(tmp_path: Path, kind: Any):
    checkpoint = Checkpoint(Path("c"), {}, None, "", {}, None, kind)
    with pytest.raises(CheckpointError, match="absent"):
        save_like(checkpoint, {"a": torch.ones(1)}, tmp_path / "absent" / "d.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pt"):
        save_like(checkpoint, {"a": torch.ones(1)}, tmp_path / "folder.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.pt"]


# --- real files


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
@pytest.mark.parametrize(
    ("name", "factory", "nesting", "prefix"),
    [
        ("resnet20-12fca82f.th", "resnet20", "state_dict", "module."),
        ("resnet56-4bfd9763.th", "resnet56", "state_dict", "module."),
        ("resnet20_cifar10_jpeg.pt", "resnet20", None, ""),
    ],
)
def test_pretrained_networks(
    tmp_path: Path, name: str, factory: str, nesting: str | None, prefix: str
):
    checkpoint = load_checkpoint(SHARED / name)
    assert (checkpoint.nesting, checkpoint.prefix) == (nesting, prefix)
    assert checkpoint.tensors["conv1.weight"].shape == (16, 3, 3, 3)
    save_like(checkpoint, checkpoint.tensors, tmp_path / name)
    original, written = (torch.load(folder / name, "cpu") for folder in (SHARED, tmp_path))
    assert same(written, original)
    if (SAMPLE / "resnet_cifar.py").is_file():
        model = build_model(Architecture(f"{SAMPLE / 'resnet_cifar.py'}:{factory}"))
        load_into(model, checkpoint)
        assert torch.equal(model.state_dict()["conv1.weight"], checkpoint.tensors["conv1.weight"])
