"""ONNX files, hostile ones among them: each loads whole, or is refused in plain words."""

import os
import resource
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from structconv_cli.errors import OnnxError
from structconv_cli.onnx import external_data, file
from structconv_cli.onnx.external_data import LIMIT
from structconv_cli.onnx.file import load_onnx, save_onnx
from structconv_cli.onnx.lowerable import check_lowerable

IMAGES = ("b", 2, 8, 8)
PAYLOAD = bytes(range(16))


def weight(name: str = "w", **fields: object) -> TensorProto:
    """Four float32 values, or what the given fields say."""
    given = {"data_type": TensorProto.FLOAT, "dims": [4], "raw_data": PAYLOAD, **fields}
    return TensorProto(name=name, **given)


def external(location: str, name: str = "w", **entries: object) -> TensorProto:
    """The same four values, in another file."""
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def in_constant(tensor: TensorProto, output: str = "constant") -> NodeProto:
    return helper.make_node("Constant", [], [output], value=tensor)


def in_branch(node: NodeProto) -> NodeProto:
    """A node inside both branches of an If."""
    out = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [4])
    body = helper.make_graph([node], "body", [], [out])
    branches = {"then_branch": body, "else_branch": body}
    return helper.make_node("If", ["condition"], ["branched"], name="branch", **branches)


def model(
    *nodes: NodeProto, tensors: tuple[TensorProto, ...] = (), opset: int = 18, **extra: object
) -> ModelProto:
    """A model of an image input x, one output y = Relu(x), and what else is given."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu"), *nodes],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, IMAGES),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, IMAGES)],
        list(tensors),
    )
    domains = {"": opset, "my.domain": 1, "com.microsoft": 1}
    opsets = [helper.make_opsetid(*item) for item in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **extra)


def function(*nodes: NodeProto) -> onnx.FunctionProto:
    body = [*nodes, helper.make_node("Relu", ["a"], ["r"])]
    return helper.make_function(
        "my.domain", "Block", ["a"], ["r"], body, [helper.make_opsetid("", 18)]
    )


def sparse(tensor: TensorProto) -> ModelProto:
    indices = helper.make_tensor("indices", TensorProto.INT64, [4], [0, 2, 4, 6])
    result = model()
    result.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [8]))
    return result


def rich() -> ModelProto:
    """A bit of everything that a file can hold."""
    return model(
        helper.make_node("Conv", ["x", "kernel"], ["c"], name="conv"),
        in_constant(weight()),
        in_branch(in_constant(weight(), "inner")),
        helper.make_node("Block", ["c"], ["d"], domain="my.domain"),
        helper.make_node("Foo", ["d"], ["e"], domain="my.domain", strings=["text"]),
        tensors=(
            numpy_helper.from_array(np.ones((3, 2, 3, 3), np.float32), "kernel"),
            helper.make_tensor("typed", TensorProto.FLOAT, [2], [1.0, 2.0]),
            helper.make_tensor("half", TensorProto.FLOAT16, [2], [1.0, 2.0]),
            helper.make_tensor("nibbles", TensorProto.INT4, [3], [1, 2, 3]),
            helper.make_tensor("complex", TensorProto.COMPLEX64, [1], [1 + 2j]),
            helper.make_tensor("texts", TensorProto.STRING, [2], [b"a", b"\xff"]),
            helper.make_tensor("scalar", TensorProto.INT64, [], [3]),
            helper.make_tensor("none", TensorProto.FLOAT, [0, 2**40], []),
        ),
        functions=[function()],
    )


def write(proto: ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


@contextmanager
def memory_of(extra: int) -> Iterator[None]:
    """Let the process take only so many more bytes of address space."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# Where a tensor can hide in a model.
HOLDERS: dict[str, Callable[[TensorProto], ModelProto]] = {
    "initialiser": lambda t: model(tensors=(t,)),
    "constant": lambda t: model(in_constant(t)),
    "sub-graph": lambda t: model(in_branch(in_constant(t))),
    "function": lambda t: model(functions=[function(in_constant(t))]),
    "sparse": sparse,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, with data inside it and out of it, and links of all sorts."""
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    for place in (home, home / "sub", tmp_path):
        (place / "data").write_bytes(PAYLOAD)
    (tmp_path / "secret").write_bytes(b"a private text..")
    for name, target in {
        "near": "data",
        "near-sub": "sub",
        "out": "../secret",
        "out-far": str(tmp_path / "secret"),
        "out-twice": "out",
        "out-sub": "..",
        "loop": "loop",
        "dangling": "../nothing",
    }.items():
        (home / name).symlink_to(target)
    os.mkfifo(home / "pipe")
    return home


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    "location", ["data", "./data", "sub/data", "sub/../data", "near", "near-sub/data"]
)
def test_data_in_the_models_folder_becomes_part_of_the_model(
    location: str, holder: str, folder: Path
) -> None:
    path = write(HOLDERS[holder](external(location)), folder / "model.onnx")
    assert load_onnx(path) == HOLDERS[holder](weight())


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("{outside}/secret", "expected a path relative"),
        ("{outside}/home/data", "expected a path relative"),
        ("../secret", "leads out of"),
        ("sub/../../secret", "leads out of"),
        ("..", "leads out of"),
        ("out", "leads out of"),
        ("out-far", "leads out of"),
        ("out-twice", "leads out of"),
        ("out-sub/secret", "leads out of"),
        ("out-sub/home/../secret", "leads out of"),
        ("dangling", "leads out of"),
        ("loop", "'?loop'?"),
        ("absent", "absent, which is missing"),
        ("sub", "not a regular file"),
        ("pipe", "not a regular file"),
        ("", "without a name"),
        ("a\0b", "cannot be opened"),
        ("x" * 5000, "x{80}"),
        ("\x1b[31mred", r"\?\[31mred"),
    ],
)
def test_data_elsewhere_is_refused_and_nothing_is_read(
    location: str, words: str, holder: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("read before all places were checked")

    monkeypatch.setattr(external_data, "load_external_data_for_tensor", read)
    hostile = HOLDERS[holder](external(location.format(outside=folder.parent)))
    hostile.graph.initializer.insert(0, external("data", "innocent"))
    path = write(hostile, folder / "model.onnx")
    with pytest.raises(OnnxError, match=words) as caught:
        load_onnx(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": -1},
        {"length": -1},
        {"length": 17},
        {"offset": 1, "length": 16},
        {"offset": 17, "length": 0},
        {"offset": 17},
        {"offset": 2**70, "length": 16},
        {"length": 2**70},
        {"offset": "one"},
        {"length": ""},
        {"length": "9" * 5000},
    ],
)
def test_data_beyond_its_file_is_refused(entries: dict[str, object], folder: Path) -> None:
    path = write(model(tensors=(external("data", **entries),)), folder / "model.onnx")
    with pytest.raises(OnnxError, match=r"which has only 16 bytes"), memory_of(2**28):
        load_onnx(path)


def test_offsets_are_kept_and_keys_of_other_tools_pass(folder: Path) -> None:
    (folder / "data").write_bytes(bytes(64) + PAYLOAD + bytes(8))
    tensor = external("data", offset=64, length=16, checksum="0", prepacked="1")
    path = write(model(tensors=(tensor,)), folder / "model.onnx")
    assert load_onnx(path).graph.initializer[0].raw_data == PAYLOAD


def test_what_onnx_saves_in_two_files_loads_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(
        rich(),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        size_threshold=0,
        convert_attribute=True,
        location="weights",
    )
    assert (tmp_path / "weights").stat().st_size > 200
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked").symlink_to(tmp_path)
    for place, name in ((".", "model.onnx"), ("elsewhere", "linked/model.onnx")):
        monkeypatch.chdir(tmp_path / place)
        assert load_onnx(Path(name)) == rich()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (weight(dims=[2**40]), "raw_data|16 bytes"),
        (weight(dims=[2**62, 2**62]), "tensor"),
        (weight(dims=[3]), "16 bytes"),
        (weight(dims=[]), "16 bytes"),
        (weight(dims=[-1]), "tensor"),
        (weight(dims=[-2, -2]), "tensor"),
        (weight(dims=[2**40], raw_data=None, float_data=[1.0]), "tensor"),
        (weight(dims=[1], raw_data=None, float_data=[1.0, 2.0]), "2 values"),
        (weight(dims=[2**40], data_type=TensorProto.INT4), "tensor"),
        (weight(data_type=TensorProto.DOUBLE), "tensor"),
        (weight(data_type=0), "UNDEFINED|data type|data_type"),
        (weight(data_type=99), "data type|data_type"),
    ],
)
def test_shapes_that_the_data_does_not_fill_take_no_memory(
    tensor: TensorProto, words: str, tmp_path: Path
) -> None:
    path = write(model(tensors=(tensor,)), tmp_path / "model.onnx")
    with pytest.raises(OnnxError, match=words), memory_of(2**28):
        load_onnx(path)


def test_models_above_two_gigabytes_are_refused_unread(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as sink:
        sink.truncate(LIMIT + 1)
    shared = tmp_path / "shared"
    with shared.open("wb") as sink:
        sink.truncate(2**22)
    many = [external("shared", f"w{i}", length=2**22) for i in range(512)]
    whole = write(model(tensors=(external("large"),)), tmp_path / "whole.onnx")
    parts = write(model(tensors=tuple(many)), tmp_path / "parts.onnx")
    for path in (large, whole, parts):
        with pytest.raises(OnnxError, match=r"holds 2\.0 GB"), memory_of(2**28):
            load_onnx(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"not a model", "text file"),
        (b'{"a": 1, "and a longer text": "than a few bytes"}\n', "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\x18\0\0\0ORTM" + bytes(64), "ONNX Runtime's own format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "no ONNX model"),
        (bytes(64), "no ONNX model"),
        (bytes(range(256)), "no ONNX model"),
        (ModelProto(ir_version=10).SerializeToString(), "no ONNX model"),
    ],
)
def test_other_files_are_named_for_what_they_are(
    content: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxError, match=rf"model\.onnx is .*{words}"):
        load_onnx(path)


def test_archives_folders_pipes_and_absent_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("zip", r"torch\.save"),
        ("folder", "is a folder"),
        ("pipe", "device or pipe"),
        ("absent", "No such file"),
        ("zip/inside", "Not a directory"),
    ):
        with pytest.raises(OnnxError, match=words):
            load_onnx(tmp_path / name)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(rich().SerializeToString().replace(b"conv", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(OnnxError, match="name of a NodeProto"):
        load_onnx(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    # Nothing at its end that the model could do without, as functions are.
    proto = rich()
    del proto.functions[:], proto.opset_import[2]
    content = proto.SerializeToString()
    path = write(proto, tmp_path / "model.onnx")
    assert load_onnx(path) == proto
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(OnnxError):
            load_onnx(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "model.onnx"


def survives(content: bytes, path: Path) -> bool:
    """Whether bytes load as a model that goes on; else they must be refused, by an OnnxError."""
    path.write_bytes(content)
    try:
        proto = load_onnx(path)
        check_lowerable(proto)
        save_onnx(proto, path)
    except OnnxError:
        return False
    return True


def test_flipped_bits_load_or_are_refused(scratch: Path) -> None:
    content = rich().SerializeToString()
    outcomes = []
    with memory_of(2**29):
        for bit in range(0, 8 * len(content), 3):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            outcomes.append(survives(bytes(damaged), scratch))
    assert 0.1 < np.mean(outcomes) < 0.9


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_load_or_are_refused(data: st.DataObject, scratch: Path) -> None:
    content = bytearray(rich().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 8, len(content))))
        content[start:end] = data.draw(st.binary(max_size=8))
    survives(bytes(content), scratch)


def test_a_saved_model_loads_as_it_was_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for proto in (model(), rich()):
        save_onnx(proto, path)
        assert load_onnx(path) == proto
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_saving_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("precious")
    link.symlink_to(target)
    save_onnx(model(), link)
    assert (target.read_text(), link.is_symlink(), load_onnx(link)) == ("precious", False, model())


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    save_onnx(model(), path)
    with pytest.raises(OnnxError, match=r"model\.onnx"):
        save_onnx(model(helper.make_node("NoSuchOperator", ["x"], ["z"])), path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        save_onnx(rich(), tmp_path / "folder")
    monkeypatch.setattr(file, "LIMIT", 100)
    with pytest.raises(OnnxError, match=r"model\.onnx holds more than"):
        save_onnx(rich(), path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "folder", path]
    assert path.read_bytes() == model().SerializeToString()


def test_what_protobuf_cannot_serialise_is_too_large(tmp_path: Path) -> None:
    class Unserialisable:
        def SerializeToString(self) -> bytes:  # noqa: N802
            raise file.EncodeError("Failed to serialize proto")

    with pytest.raises(OnnxError, match="holds more than"):
        save_onnx(Unserialisable(), tmp_path / "model.onnx")


CUSTOM = helper.make_node("Foo", ["x"], ["c"], name="custom", domain="my.domain")
FUSED = helper.make_node("FusedConv", ["x", "x"], ["f"], domain="com.microsoft")


def test_custom_operators_pass_the_full_check(tmp_path: Path) -> None:
    after = helper.make_node("Add", ["c", "f"], ["sum"])
    inner = helper.make_node("Foo", ["x"], ["z"], domain="my.domain")
    proto = model(CUSTOM, FUSED, after, in_branch(inner), functions=[function()])
    save_onnx(proto, tmp_path / "model.onnx")
    assert load_onnx(tmp_path / "model.onnx") == proto


@pytest.mark.parametrize(
    ("domain", "op_type"),
    [
        *(
            (domain, op_type)
            for domain in ("", "com.microsoft")
            for op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
        ),
        ("", "QLinearConv"),
        ("", "QLinearMatMul"),
        ("", "ConvInteger"),
        ("ai.onnx", "MatMulInteger"),
        *(("com.microsoft", f"Q{name}") for name in ("Gemm", "LinearAdd", "Attention", "MoE")),
        ("com.microsoft", "DynamicQuantizeMatMul"),
        ("com.microsoft", "MatMulIntegerToFloat"),
    ],
)
def test_quantised_models_are_refused_wherever_the_node_is(domain: str, op_type: str) -> None:
    node = helper.make_node(op_type, ["x"], ["q"], name="first", domain=domain)
    later = helper.make_node("QLinearConv", ["q"], ["r"], name="later")
    for proto in (model(node, later), model(in_branch(node)), model(functions=[function(node)])):
        with pytest.raises(OnnxError, match=rf"first \({op_type}\).*float32.*then quantise"):
            check_lowerable(proto)


def test_operators_that_only_sound_quantised_pass() -> None:
    gelu = helper.make_node("QuickGelu", ["x"], ["q"], domain="com.microsoft")
    foreign = helper.make_node("QLinearConv", ["x"], ["q"], domain="my.domain")
    assert len(check_lowerable(model(gelu, foreign))) == 1


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_old_opsets_are_refused(domain: str) -> None:
    for opset in (1, 6, 7, 22):
        proto = model(opset=opset)
        proto.opset_import[0].domain = domain
        if opset < 7:
            with pytest.raises(OnnxError, match=rf"opset {opset};.* 7.*ONNX Runtime"):
                check_lowerable(proto)
        else:
            assert check_lowerable(proto) == ()
    del proto.opset_import[:]
    with pytest.raises(OnnxError, match=r"no ai\.onnx opset"):
        check_lowerable(proto)


def conv(name: str, kind: int, *, constant: bool = False) -> tuple[NodeProto, NodeProto | None]:
    """A convolution, and its weight as a constant node where it is one."""
    value = helper.make_tensor(f"{name}.weight", kind, [1, 2, 1, 1], [1, 2])
    node = helper.make_node("Conv", ["x", value.name], [f"{name}.out"], name=name)
    return node, helper.make_node("Constant", [], [value.name], value=value) if constant else None


def test_what_is_left_alone_is_said_in_few_words() -> None:
    branches = [in_branch(in_constant(weight())) for _ in range(5)]
    for i, branch in enumerate(branches):
        branch.name = f"if{i}"
    notes = check_lowerable(
        model(
            CUSTOM,
            FUSED,
            CUSTOM,
            helper.make_node("Block", ["x"], ["b"], domain="my.domain"),
            *branches,
            functions=[function()],
        )
    )
    assert notes == (
        "Nodes with sub-graphs are left alone (5 in all): if0 (If), if1 (If), if2 (If) and 2 more.",
        "Nodes of operator sets other than ai.onnx are left alone (3 in all): my.domain.Foo and "
        "com.microsoft.FusedConv.",
        "Model-local functions are left alone (1 in all): my.domain.Block.",
    )


def test_convolutions_of_other_types_are_named() -> None:
    half, half_weight = conv("half", TensorProto.FLOAT16, constant=True)
    brain, _ = conv("brain", TensorProto.BFLOAT16)
    double, _ = conv("double", TensorProto.DOUBLE)
    single, single_weight = conv("single", TensorProto.FLOAT, constant=True)
    unknown, _ = conv("unknown", TensorProto.FLOAT16)
    assert half_weight
    assert single_weight
    proto = model(half_weight, single_weight, half, brain, double, single, unknown)
    proto.graph.initializer.append(
        helper.make_tensor("brain.weight", TensorProto.BFLOAT16, [1, 2, 1, 1], [1, 2])
    )
    proto.graph.value_info.append(
        helper.make_tensor_value_info("double.weight", TensorProto.DOUBLE, None)
    )
    proto.graph.value_info.add(name="unknown.weight")
    assert check_lowerable(proto) == (
        "Convolutions whose weights are not float32 are left alone (3 in all): half (float16), "
        "brain (bfloat16) and double (double).",
    )


def test_names_are_fit_for_a_terminal() -> None:
    node = helper.make_node("Foo", ["x"], ["c"], domain="my.domain")
    node.op_type = "\x1b[2J" + "x" * 1000
    (note,) = check_lowerable(model(node))
    assert note.isprintable()
    assert len(note) < 200
    unnamed = helper.make_node("QLinearConv", ["x"], ["out"])
    with pytest.raises(OnnxError, match=r"node is out \(QLinearConv\)"):
        check_lowerable(model(unnamed))
