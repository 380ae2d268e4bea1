"""Files made to do harm: none may run code, take the memory or the time, or write elsewhere."""

import importlib.util
import io
import itertools
import json
import os
import pickle
import random
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from torch import nn

from structconv_cli.data.npz_archive import read_arrays
from structconv_cli.errors import DataError, RunFolderError, StructconvError
from structconv_cli.json_file import write_json
from structconv_cli.model import inert_pickle
from structconv_cli.model.checkpoint import load_checkpoint, save_like
from structconv_cli.model.checkpoint_kind import identify
from structconv_cli.model.exported_archive import exported_inputs, open_exported
from structconv_cli.onnx.file import load_onnx
from structconv_cli.run_folder import new_run_folder

SECONDS = 10
"""Most processor time that a pickle made to be slow may take; all take less than one."""


def touch(path: str) -> None:
    """What the payloads call: no name that is refused for what it is."""
    Path(path).touch()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return touch, (str(self.path),)


class Command(Payload):
    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


class WithState(Payload):
    """The payload is the state that an object is given."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"_metadata": Payload(self.path)}


class Module(nn.Module):
    def __init__(self, payload: object = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        if payload is not None:
            self.payload = payload

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Hooked:
    """A tensor whose backward hooks are the payload; torch itself does not save hooks."""

    def __init__(self, payload: object):
        self.payload = payload

    def __reduce__(self) -> Any:
        hooks = OrderedDict(hook=self.payload)
        storage = torch.ones(2).untyped_storage()
        typed = torch.storage.TypedStorage(
            wrap_storage=storage, dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (typed, 0, (2,), (1,), False, hooks)


def outcome(path: Path, opener: Callable[[Path], object]) -> str:
    """The message of a clean error; empty if the file was read."""
    try:
        opener(path)
    except StructconvError as error:
        return str(error)
    return ""


def refused(path: Path, opener: Callable[[Path], object] = load_checkpoint) -> str:
    with pytest.raises(StructconvError) as raised:
        opener(path)
    message = str(raised.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 1000
    return message


def save(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rewritten(source: bytes, path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy a zip archive with its members changed; None leaves one out."""
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


# --- code in pickles

POSITIONS: dict[str, Callable[[Any], object]] = {
    "top": lambda p: p,
    "value": lambda p: {"w": torch.ones(2), "x": p},
    "state_dict's value": lambda p: {"state_dict": {"w": torch.ones(2), "x": p}},
    "key": lambda p: {"w": torch.ones(2), p: 1},
    "list": lambda p: {"w": torch.ones(2), "x": [1, [p]]},
    "tuple": lambda p: {"w": torch.ones(2), "x": (p,)},
    "set": lambda p: {"w": torch.ones(2), "x": {p}},
    "first": lambda p: OrderedDict(x=p, w=torch.ones(2)),
    "tensor's hooks": lambda p: {"w": Hooked(p)},
    "module's attribute": lambda p: Module(p),
    "module beside": lambda p: {"model": Module(), "args": p},
}


@pytest.mark.parametrize("payload", [Payload, Command, WithState])
@pytest.mark.parametrize("position", POSITIONS)
def test_no_position_of_a_payload_is_run(tmp_path: Path, position: str, payload: type[Payload]):
    mark = tmp_path / "ran"
    value = POSITIONS[position](payload(mark))
    for legacy in (False, True):
        path = tmp_path / f"hostile{legacy}.pt"
        save(path, value, _use_new_zipfile_serialization=not legacy)
        for opener in (identify, load_checkpoint):
            message = outcome(path, opener)
            assert not message or str(path) in message
        if payload is Command:
            assert "posix.system" in refused(path)
    assert not mark.exists()
    # The payload works: what is tested is not a dud.
    with suppress(TypeError):  # keys that have no hash
        torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_no_part_of_a_torchscript_archive_is_run(tmp_path: Path, member: str, protocol: int):
    mark = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Module(), torch.zeros(1, 1, 4, 4)), buffer)
    hostile = pickle.dumps(Payload(mark), protocol=protocol)
    path = rewritten(
        buffer.getvalue(),
        tmp_path / "m.pt",
        lambda name, content: hostile if name.endswith("/" + member) else content,
    )
    identify(path)
    if member == "data.pkl":
        refused(path)
    else:
        load_checkpoint(path)
    assert not mark.exists()


# --- torch.export archives


@pytest.fixture(scope="module")
def exported() -> bytes:
    buffer = io.BytesIO()
    shapes = [{0: torch.export.Dim("batch")}]
    program = torch.export.export(Module(), (torch.zeros(2, 1, 4, 4),), dynamic_shapes=shapes)
    torch.export.save(program, buffer)
    return buffer.getvalue()


def open_all(path: Path) -> object:
    return exported_inputs(path), load_checkpoint(path), open_exported(path)


def changed_json(
    exported: bytes, path: Path, change: Callable[[str], str], member: str = "model.json"
) -> Path:
    def changed(name: str, content: bytes) -> bytes:
        if not name.endswith("/" + member):
            return content
        text = change(content.decode())
        assert text != content.decode()
        return text.encode()

    return rewritten(exported, path, changed)


CODE = "__import__('pathlib').Path('MARK').touch()"
EXPRESSION = "Symbol('s{}', positive=True, integer=True)"


def in_expression(code: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        start = text.index("Symbol('s")
        old = text[start : text.index(")", start) + 1]
        return text.replace(old, code)

    return change


ENUM = json.dumps({"__enum__": 1, "fqn": "antigravity:x", "name": "y"})

PROGRAMS: dict[str, Callable[[str], str]] = {
    "size": in_expression(CODE),
    "size with code inside": in_expression(f"Add(Integer(1), {CODE})"),
    "size with code as an assumption": in_expression(f"Symbol('s1', positive={CODE})"),
    "size with an attribute": in_expression("Integer.__class__"),
    "size that is a lambda": in_expression("(lambda: 1)()"),
    "huge power": in_expression("Pow(Pow(Pow(Integer(9), 8), 8), Pow(9, 9))"),
    "node's name": lambda text: text.replace('"conv2d"', json.dumps(f"y = {CODE} #")),
    "input's name": lambda text: text.replace('"p_conv_weight"', json.dumps(f"a=({CODE})")),
    "name over two lines": lambda text: text.replace('"conv2d"', json.dumps(f"y\n{CODE}\n")),
    "keyword as a name": lambda text: text.replace('"conv2d"', '"lambda"'),
    "parameter's name": lambda text: text.replace('"conv.bias"', json.dumps(f'a"+{CODE}+"')),
    "custom operator": lambda text: text.replace("torch.ops.aten.conv2d.default", "torch.load"),
    "operator that writes a file": lambda text: text.replace(
        "torch.ops.aten.conv2d.default", "torch.ops.aten.save.default"
    ),
    "operator that maps a file": lambda text: text.replace(
        "torch.ops.aten.conv2d.default", "torch.ops.aten.from_file.default"
    ),
    "operator by a path": lambda text: text.replace(
        "torch.ops.aten.conv2d.default", "torch.ops.aten.__class__.mro"
    ),
    "python function": lambda text: text.replace(
        "torch.ops.aten.conv2d.default", "_operator.methodcaller"
    ),
    "module to import": lambda text: text.replace(
        json.dumps('"context": "[]"')[1:-1], json.dumps(f'"context": {json.dumps(ENUM)}')[1:-1]
    ),
    "class to rebuild": lambda text: text.replace("builtins.tuple", "collections.namedtuple"),
    "deep nesting": lambda text: '{"graph_module": ' * 50_000,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_text_of_an_exported_program_is_run(tmp_path: Path, exported: bytes, name: str):
    mark = tmp_path / "ran"
    path = changed_json(
        exported,
        tmp_path / "m.pt2",
        lambda text: PROGRAMS[name](text).replace("MARK", str(mark)),
    )
    assert load_checkpoint(path).tensors.keys() == Module().state_dict().keys()
    refused(path, exported_inputs)
    refused(path, open_exported)
    assert not mark.exists()


def test_guards_and_notes_of_an_exported_program_are_dropped(tmp_path: Path, exported: bytes):
    mark = tmp_path / "ran"
    code = CODE.replace("MARK", str(mark))

    def change(text: str) -> str:
        program = json.loads(text)
        program["guards_code"] = [code, f"L['x'].size()[0] == {code}"]
        for node in program["graph_module"]["graph"]["nodes"]:
            node["metadata"]["source_fn_stack"] = f"a,torch.{code}"
            node["metadata"]["stack_trace"] = f"\n{code}\n"
        return json.dumps(program)

    path = changed_json(exported, tmp_path / "m.pt2", change)
    open_all(path)
    result = open_exported(path).module()(torch.zeros(3, 1, 4, 4))
    assert result.shape == (3, 2, 2, 2)
    assert not mark.exists()


def test_no_pickle_of_an_exported_program_is_run(tmp_path: Path, exported: bytes):
    mark = tmp_path / "ran"
    hostile = io.BytesIO()
    torch.save(((Payload(mark),), {}), hostile)

    def pickled(text: str) -> str:
        return text.replace('"use_pickle": false', '"use_pickle": true')

    changes: dict[str, Callable[[str, bytes], bytes]] = {
        "sample_inputs/model.pt": lambda _, content: hostile.getvalue(),
        "weights/weight_0": lambda _, content: hostile.getvalue(),
        "weights/model_weights_config.json": lambda _, content: pickled(content.decode()).encode(),
        "constants/model_constants_config.json": lambda _, content: (
            b'{"config": {"c": {"path_name": "custom_obj_0", "is_param": false, '
            b'"use_pickle": false, "tensor_meta": null}}}'
        ),
    }
    for ending, change in changes.items():
        path = rewritten(
            exported,
            tmp_path / "m.pt2",
            lambda name, content, ending=ending, change=change: (
                change(name, content) if name.endswith(ending) else content
            ),
        )
        refused(path, open_exported)
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(exported)) as old:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            archive.writestr(name, old.read(name))
        archive.writestr(f"{root}/data/aotinductor/model/model.so", b"\x7fELF")
    assert "compiled library" in refused(path, open_exported)
    assert not mark.exists()


# --- sizes that are lies


def torch_archive(path: Path, pickled: bytes, storage: bytes = bytes(16)) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", storage)
        archive.writestr("a/version", "3\n")
    return path


def tensor_pickle(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 4
) -> bytes:
    """A pickled state_dict of one tensor, on a storage of `count` float32."""

    class Record:
        def __reduce__(self) -> Any:
            function = torch._utils._rebuild_tensor_v2
            return function, (Storage(), offset, size, stride, False, OrderedDict())

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> Any:
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", count)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Record()})
    return buffer.getvalue()


def test_the_table_below_builds_on_a_readable_file(tmp_path: Path):
    path = torch_archive(tmp_path / "m.pt", tensor_pickle((2, 2), (2, 1)))
    assert load_checkpoint(path).tensors["w"].shape == (2, 2)


@pytest.mark.parametrize(
    ("size", "stride", "offset", "count"),
    [
        ((2, 2), (2, 1), 1, 4),  # reaches one element outside
        ((2,), (2**40,), 0, 4),
        ((2**40,), (0,), 0, 4),  # one element, expanded
        ((2**61, 2**61), (0, 0), 0, 4),
        ((2, 2), (2, 1), 2**61, 4),
        ((-1, -1), (1, 1), 0, 4),
        ((4,), (-1,), 3, 4),
        ((4,), (1,), -1, 4),
        ((4,), (1, 1), 0, 4),
        ((4,), (1,), 0, 2**40),  # the storage is not there
        ((4,), (1,), 0, -4),
        ((4,), (1,), 0, 5),
        ((1,) * 100, (1,) * 100, 0, 4),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    tmp_path: Path, size: Any, stride: Any, offset: int, count: int
):
    pickled = tensor_pickle(size, stride, offset, count)
    refused(torch_archive(tmp_path / "m.pt", pickled))


def test_many_expanded_tensors_are_refused_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = __import__("psutil").virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    path = torch_archive(tmp_path / "m.pt", tensor_pickle((1 << 20,), (0,)))
    assert "memory" in refused(path)


def test_zip_bombs_are_refused(tmp_path: Path):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tensor_pickle((4,), (1,)))
        archive.writestr("a/data/0", bytes(50 << 20))
    assert "times its size" in refused(path)


@pytest.mark.parametrize("claim", [0, 1, 2**31, 2**32 - 2])
def test_lies_about_the_size_of_a_part_are_refused(tmp_path: Path, claim: int):
    path = torch_archive(tmp_path / "m.pt", tensor_pickle((4,), (1,)))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    data[entry + 24 : entry + 28] = struct.pack("<I", claim)
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize("name", ["../../escape", "/etc/escape", "a/../../b", "C:/x", "..\\x"])
def test_parts_that_climb_out_are_refused(tmp_path: Path, name: str):
    path = torch_archive(tmp_path / "m.pt", tensor_pickle((4,), (1,)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    assert "out of the archive" in refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_doubled_parts_are_refused(tmp_path: Path):
    path = torch_archive(tmp_path / "m.pt", tensor_pickle((4,), (1,)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", b"other")
    assert "two parts of one name" in refused(path)


# --- pickles that take time or memory

DEEP = 100_000
END = b"."


def keyed(keys: Iterator[bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(key + b"N" for key in keys) + b"u" + END


def laugh(number: int) -> bytes:
    """A list of ten times the list before it."""
    return b"](" + (b"h" + bytes([number])) * 10 + b"eq" + bytes([number + 1])


PICKLES: dict[str, bytes] = {
    "deep list": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + END,
    "deep tuple as a key": b"\x80\x02}" + b")" + b"\x85" * DEEP + b"Ns" + END,
    "deep tuple in a set": b"\x80\x04\x8f(" + b")" + b"\x85" * DEEP + b"\x90" + END,
    "list in itself": b"\x80\x02}X\x01\x00\x00\x00a]q\x00h\x00as" + END,
    "dictionary in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s" + END,
    "keys of equal hash": keyed(
        b"\x8a\x10" + (i * (2**61 - 1)).to_bytes(16, "little") for i in range(2**8, 2**16)
    ),
    "huge place in the memo": b"\x80\x02}r\xff\xff\xff\x7f" + END,
    "text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc" + END,
    "bytes longer than any file": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc" + END,
    "number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n" + END,
    "billion laughs": b"\x80\x02]q\x00" + b"".join(map(laugh, range(200))) + END,
    "huge bytearray": b"\x80\x02}X\x01\x00\x00\x00wcbuiltins\nbytearray\n"
    b"\x8a\x06\x00\x00\x00\x00\x00\x40\x85Rs" + END,
    "empty stack": b"\x80\x02" + b"0" * 10 + END,
    "unknown extension": b"\x80\x02\x82\x01" + END,
    "no end": b"\x80\x02}" * 10,
    "call of a number": b"\x80\x02K\x01)R" + END,
    "state of a number": b"\x80\x02K\x01}b" + END,
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_take_time_or_memory_are_refused(tmp_path: Path, name: str):
    begin = time.process_time()
    refused(torch_archive(tmp_path / "m.pt", PICKLES[name]))
    assert time.process_time() - begin < SECONDS


def test_the_instructions_of_a_pickle_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inert_pickle, "MOST_INSTRUCTIONS", 1000)
    path = save(tmp_path / "m.pt", {"w": torch.ones(1), "history": list(range(2000))})
    assert "instructions" in refused(path)


def test_a_module_that_contains_itself_is_refused(tmp_path: Path):
    module = Module()
    module._modules["again"] = module
    assert "contains itself" in refused(save(tmp_path / "m.pt", module))


def test_a_module_with_exponentially_many_names_is_refused(tmp_path: Path):
    module: nn.Module = Module()
    for _ in range(60):
        module = nn.ModuleList([module, module])
    assert "too many modules" in refused(save(tmp_path / "m.pt", module))


@pytest.mark.parametrize("count", [-1, 2**40, 2**62])
def test_lies_of_the_legacy_form_are_refused(tmp_path: Path, count: int):
    path = save(tmp_path / "m.pt", {"w": torch.arange(4.0)}, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    data[-24:-16] = struct.pack("<q", count)
    path.write_bytes(data)
    refused(path)


# --- safetensors


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {
            "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "v": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
        {"w": [1]},
        {},
    ],
)
def test_lies_of_a_safetensors_header_are_refused(tmp_path: Path, header: object):
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    refused(path)


def test_a_sparse_file_larger_than_the_memory_is_refused(tmp_path: Path):
    size = 1 << 42
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + size)
        except OSError:
            pytest.skip("this file system has no files of 4 TiB")
    assert "memory" in refused(path)


def test_devices_and_pipes_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in refused(tmp_path / "pipe")
    assert "device" in refused(Path("/dev/zero"))


# --- .npz


def test_no_object_of_an_npz_archive_is_unpickled(tmp_path: Path):
    mark, path = tmp_path / "ran", tmp_path / "data.npz"
    np.savez(path, x=np.array([Payload(mark)], dtype=object))
    assert "without Python objects" in refused(path, read_arrays)
    assert not mark.exists()


def test_lies_of_an_npz_archive_are_refused(tmp_path: Path):
    path = tmp_path / "data.npz"
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "|u1", "fortran_order": False, "shape": (2**45,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", array.getvalue())
    with pytest.raises(DataError, match="cannot be read"):
        read_arrays(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../y.npy", array.getvalue())
    with pytest.raises(DataError, match="out of the archive"):
        read_arrays(path)


# --- ONNX


def functions(count: int, last: str) -> onnx.ModelProto:
    """A model whose functions each call the next one twice; the last one is called `last`."""
    make = onnx.helper
    opsets = [make.make_opsetid("", 18), make.make_opsetid("d", 1)]
    names = [*(f"F{number}" for number in range(count)), last]
    values = [make.make_tensor_value_info(x, onnx.TensorProto.FLOAT, [1]) for x in "xy"]
    made = [
        make.make_function(
            "d",
            name,
            ["a"],
            ["b"],
            [
                make.make_node(inner, ["a"], ["c"], domain="d"),
                make.make_node(inner, ["c"], ["b"], domain="d"),
            ],
            opsets,
        )
        for name, inner in itertools.pairwise(names)
    ]
    if last != "F0":
        made.append(
            make.make_function("d", last, ["a"], ["b"], [make.make_node("Relu", "a", "b")], opsets)
        )
    nodes = [make.make_node("F0", ["x"], ["y"], domain="d")]
    graph = make.make_graph(nodes, "g", values[:1], values[1:])
    return make.make_model(graph, functions=made, opset_imports=opsets, ir_version=10)


def test_functions_that_call_one_another_without_end_are_refused(tmp_path: Path):
    path = tmp_path / "m.onnx"
    for model, what in (
        (functions(3, "F0"), "call themselves"),
        (functions(200, "end"), "nested too deep"),
        (functions(40, "end"), "more than 1000000"),
    ):
        onnx.save(model, path)
        assert what in refused(path, load_onnx)
    onnx.save(functions(3, "end"), path)
    assert len(load_onnx(path).functions) == 4


# --- links


def test_nothing_is_written_through_a_link(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("verify.json", f"verify.json.{os.getpid()}.part"):
        (folder / name).symlink_to(outside)
    write_json({"a": 1}, folder / "verify.json")
    assert json.loads((folder / "verify.json").read_text()) == {"a": 1}
    checkpoint = load_checkpoint(save(tmp_path / "m.pt", {"w": torch.ones(1)}))
    for kind in ("torch", "safetensors"):
        for name in ("dense.pt", f".dense.pt.{os.getpid()}.partial"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(outside)
        object.__setattr__(checkpoint, "kind", kind)
        save_like(checkpoint, checkpoint.tensors, folder / "dense.pt")
        assert not (folder / "dense.pt").is_symlink()
        load_checkpoint(folder / "dense.pt")
    assert outside.read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_run_folder_is_not_prepared_in_one_of_someone_else(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / f".structconv-{os.getpid()}.part").symlink_to(outside)
    with (
        pytest.raises(RunFolderError, match="exists already"),
        new_run_folder(tmp_path / "run", force=False),
    ):
        pass
    (tmp_path / "link").symlink_to(outside)
    with (
        pytest.raises(RunFolderError, match="a link"),
        new_run_folder(tmp_path / "link", force=True),
    ):
        pass
    assert list(outside.iterdir()) == []


# --- damage at random


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("structconv_fuzz", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


KINDS = ["state_dict", "legacy", "module", "safetensors", "torchscript", "pt2", "onnx", "npz"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*KINDS, "plan.json", "run.json"])
def test_damaged_files_are_read_or_refused(tmp_path: Path, fuzz: ModuleType, kind: str):
    write, opener = fuzz.KINDS[kind]
    torch.manual_seed(0)
    content = write()
    path = tmp_path / "file"
    path.write_bytes(content)
    opener(path)
    count = 40 if kind == "pt2" else 120
    refusals = 0
    for number in range(count):
        path.write_bytes(fuzz.mutation(content, random.Random(f"suite {kind} {number}")))
        message = outcome(path, opener)
        refusals += bool(message)
        assert message.isprintable()
    assert refusals > count / 4


def test_safetensors_and_torch_agree_on_what_is_read(tmp_path: Path):
    state = dict(Module().state_dict())
    safetensors.torch.save_file(state, tmp_path / "a")
    save(tmp_path / "b", state)
    first, second = (load_checkpoint(tmp_path / name).tensors for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in state)
