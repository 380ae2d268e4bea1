"""`structconv lower` as a user meets it: files of all sorts in, a lowered file or none out.

The networks are made here, their weights structured by least squares over the enumerated basis
(`structured_weight`); the reference is always the dense file in ONNX Runtime.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from forked import Command
from onnx import TensorProto, helper, numpy_helper
from test_onnx_lower import U, structured_weight
from typer.testing import CliRunner, Result

from structconv_cli.cli import app
from structconv_cli.onnx.forms import CHANNEL_FORMS, SPACE_FORMS

FIXED = ("--forms", "split+average")
OLD = b"what was here before"
IMAGE = (1, 3, 12, 10)

Value = onnx.ValueInfoProto


def value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> Value:
    return helper.make_tensor_value_info(name, kind, list(shape))


def conv(x: str, y: str, layer: str, **attributes: object) -> onnx.NodeProto:
    given = {"kernel_shape": [3, 3], "pads": [1] * 4, **attributes}
    return helper.make_node("Conv", [x, f"{layer}.weight"], [y], f"node {y}", **given)


def network(
    *extra: onnx.NodeProto,
    structured: bool = True,
    image: Sequence[int | str] = IMAGE,
    opset: int = 17,
    tensors: Mapping[str, np.ndarray] | None = None,
    inputs: Sequence[Value] = (),
    outputs: Sequence[Value] = (),
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """stem, then `a` (balanced) and `b` (general), both with c = 5 of 8 and n = 2 of 3.

    Tensors: x, s, sr, a, ar, b, and y = relu(b), the output.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {"stem": torch.randn(8, 3, 3, 3, generator=generator)}
    for seed, layer in enumerate("ab"):
        made = structured_weight((8, 3, 3), (5, 2, 2), 8, seed, balanced=layer == "a")
        weights[layer] = made if structured else torch.randn(8, 8, 3, 3, generator=generator)
    arrays = {f"{layer}.weight": weight.numpy() for layer, weight in weights.items()}
    nodes = [
        conv("x", "s", "stem"),
        helper.make_node("Relu", ["s"], ["sr"]),
        conv("sr", "a", "a"),
        helper.make_node("Relu", ["a"], ["ar"]),
        conv("ar", "b", "b"),
        helper.make_node("Relu", ["b"], ["y"]),
        *extra,
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", image), *inputs],
        [value("y", (image[0], 8, *image[2:])), *outputs],
        [numpy_helper.from_array(a, name) for name, a in {**arrays, **(tensors or {})}.items()],
    )
    opsets = [helper.make_opsetid(*item) for item in {"": opset, **(domains or {})}.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def outputs_of(
    model: onnx.ModelProto | Path, sizes: Mapping[str, int] | None = None, **fixed: np.ndarray
) -> list[np.ndarray]:
    """A model's outputs for normal noise, the same for every model with these inputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options)
    rng = np.random.default_rng(5)
    feeds = {
        entry.name: rng.standard_normal(
            [size if isinstance(size, int) else (sizes or {})[size] for size in entry.shape]
        ).astype(np.float32)
        for entry in session.get_inputs()
        if entry.name not in fixed
    }
    return session.run(None, {**feeds, **fixed})


def assert_equal_outputs(dense: Path, lowered: Path, **how: Any) -> None:
    """Equal to within a few sqrt(K) roundings for each layer of K summands, relative to the
    largest output: 4 sigma, times 8 for differences and pools, which at most double what is summed
    and average over four."""
    weights = [t.dims for t in onnx.load(dense).graph.initializer if len(t.dims) == 4]
    share = sum(4 * 8 * U * math.sqrt(math.prod(dims[1:])) for dims in weights)
    found, expected = outputs_of(lowered, **how), outputs_of(dense, **how)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(other).max())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(network(), tmp_path / "model.onnx")
    return tmp_path


def lower(*words: object) -> Result:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["lower", *map(str, words)])
    # Anything but an exit is a traceback for the user.
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert "Traceback" not in result.output
    return result


def words_of(text: str) -> str:
    return " ".join(text.split())


def lower_json(*words: object, status: int = 0) -> dict[str, Any]:
    result = lower(*words, "--json", "-")
    assert result.exit_code == status, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def assert_refused(
    model: Path, *told: str, status: int = 1, words: Sequence[object] = FIXED
) -> str:
    """Refused with these words; a file that is there already is left as it is, and none is made."""
    out = model.parent / "lowered.onnx"
    out.write_bytes(OLD)
    before = sorted(model.parent.iterdir())
    result = lower(model, "-o", out, *words)
    message = words_of(result.output)
    assert result.exit_code == status, message
    for text in told:
        assert text in message, message
    assert out.read_bytes() == OLD
    assert sorted(model.parent.iterdir()) == before
    out.unlink()
    assert lower(model, "-o", out, *words).exit_code == status
    assert not out.exists()
    return message


def structured_names(result: Mapping[str, Any]) -> set[str]:
    return {entry["name"] for entry in result["lowering"]["layers"]}


# What goes right ----------------------------------------------------------------------------


class TestMeasured:
    """One measured run, and a second one from what it knew."""

    @pytest.fixture(scope="class")
    @staticmethod
    def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("measured")
        onnx.save(network(), folder / "model.onnx")
        return folder

    @pytest.fixture(scope="class")
    @staticmethod
    def runs(home: Path) -> list[dict[str, Any]]:
        words = (home / "model.onnx", "-o", home / "lowered.onnx", "--timings", home / "t.json")
        results = []
        for _ in range(2):
            # Whether dense, average or split is fastest on so small a model is down to noise.
            result = lower(*words, "--json", "-")
            assert result.exit_code in (0, 3), result.output
            results.append(json.loads(result.stdout))
            assert (result.exit_code == 0) == (results[-1]["written"] is not None)
        return results

    def test_what_is_written_computes_the_same(
        self, home: Path, runs: list[dict[str, Any]]
    ) -> None:
        written = home / "lowered.onnx"
        assert written.exists() == (runs[1]["written"] is not None)
        if written.exists():
            onnx.checker.check_model(onnx.load(written), full_check=True)
            assert_equal_outputs(home / "model.onnx", written)
            assert runs[0]["bytes_after"] == written.stat().st_size

    def test_the_second_run_measures_nothing_and_chooses_alike(
        self, runs: list[dict[str, Any]]
    ) -> None:
        cold, warm = (run["lowering"] for run in runs)
        assert cold["timed"] > 0
        assert warm["timed"] == 0
        assert warm["known"] > 0
        assert warm["layers"] == cold["layers"]
        assert warm["dense"] == cold["dense"]
        assert warm["ms"] == cold["ms"]

    def test_the_first_run_knows_nothing(self, runs: list[dict[str, Any]]) -> None:
        assert runs[0]["lowering"]["known"] == 0

    def test_what_is_chosen_is_not_slower_than_dense_by_its_own_times(
        self, runs: list[dict[str, Any]]
    ) -> None:
        ms = runs[0]["lowering"]["ms"]
        assert min(ms.values()) <= ms["dense"]
        assert all(each > 0 for each in ms.values())
        if min(ms, key=ms.get) == "dense":
            assert runs[0]["written"] is None


def test_the_report_names_forms_reasons_and_the_proof(folder: Path) -> None:
    result = lower(folder / "model.onnx", "-o", folder / "lowered.onnx", *FIXED)
    shown = words_of(result.output)
    assert result.exit_code == 0
    assert "stem its weight is not structured" in shown.replace("│ ", "")
    assert "Exact" in shown
    assert "difference + AveragePool + Conv" in shown
    assert max(map(len, result.output.splitlines())) <= 80
    assert_equal_outputs(folder / "model.onnx", folder / "lowered.onnx")
    assert sorted(p.name for p in folder.iterdir()) == ["lowered.onnx", "model.onnx"]


@pytest.mark.parametrize(
    "form",
    [
        *CHANNEL_FORMS[1:],
        *SPACE_FORMS[1:],
        *(f"{c}+{s}" for c in CHANNEL_FORMS[1:] for s in SPACE_FORMS[1:]),
    ],
)
def test_every_form_that_can_be_asked_for_is_exact(folder: Path, form: str) -> None:
    out = folder / "lowered.onnx"
    result = lower_json(folder / "model.onnx", "-o", out, "--forms", form)
    assert structured_names(result) == {"a", "b"}
    assert result["lowering"]["timed"] == 0
    assert all(check["passed"] for check in result["checks"])
    assert_equal_outputs(folder / "model.onnx", out)


def test_a_fixed_form_gives_the_same_bytes_in_any_process(folder: Path) -> None:
    lower_json(folder / "model.onnx", "-o", folder / "here.onnx", *FIXED)
    words = ["lower", "model.onnx", "-o", "there.onnx", *FIXED, "--json", "-"]
    done = subprocess.run(
        [sys.executable, "-m", "structconv_cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["written"] == "there.onnx"
    assert (folder / "here.onnx").read_bytes() == (folder / "there.onnx").read_bytes()


def test_the_model_may_be_replaced_by_the_result(folder: Path) -> None:
    shutil.copy(folder / "model.onnx", folder / "dense.onnx")
    assert lower(folder / "model.onnx", "-o", folder / "model.onnx", *FIXED).exit_code == 0
    assert (folder / "model.onnx").read_bytes() != (folder / "dense.onnx").read_bytes()
    assert_equal_outputs(folder / "dense.onnx", folder / "model.onnx")


def test_open_axes_stay_open(tmp_path: Path) -> None:
    onnx.save(network(image=("n", 3, "h", "w")), tmp_path / "model.onnx")
    out = tmp_path / "lowered.onnx"
    words = ("--input-shape", "x=1x3x12x10", "--batch-size", 2)
    result = lower_json(tmp_path / "model.onnx", "-o", out, *FIXED, *words)
    assert structured_names(result) == {"a", "b"}
    for n, h, w in ((1, 12, 10), (3, 7, 20)):
        assert_equal_outputs(tmp_path / "model.onnx", out, sizes={"n": n, "h": h, "w": w})
    # Each batch of the whole-model check, and a larger image.
    subjects = {check["subject"] for check in result["checks"] if check["what"] == "output"}
    assert subjects >= {f"x {n}x3x12x10" for n in (1, 2, 5)}
    assert any("x3x44x42" in subject for subject in subjects)


def test_an_open_batch_needs_no_shape(tmp_path: Path) -> None:
    onnx.save(network(image=("n", *IMAGE[1:])), tmp_path / "model.onnx")
    out = tmp_path / "lowered.onnx"
    lower_json(tmp_path / "model.onnx", "-o", out, *FIXED)
    for n in (1, 4):
        assert_equal_outputs(tmp_path / "model.onnx", out, sizes={"n": n})


def test_several_inputs_and_outputs_keep_their_names_and_order(tmp_path: Path) -> None:
    side = value("side", (1, 8, 12, 10))
    extra = (
        helper.make_node("Add", ["ar", "side"], ["sum"]),
        conv("sum", "c", "a"),
        helper.make_node("Transpose", ["sr"], ["turned"], perm=[0, 2, 3, 1]),
    )
    outputs = [
        value("c", (1, 8, 12, 10)), value("turned", (1, 12, 10, 8)), value("ar", (1, 8, 12, 10))
    ]  # fmt: skip
    dense = network(*extra, inputs=[side], outputs=outputs)
    onnx.save(dense, tmp_path / "model.onnx")
    out = tmp_path / "lowered.onnx"
    result = lower_json(tmp_path / "model.onnx", "-o", out, *FIXED)
    assert structured_names(result) == {"a", "b"}
    lowered = onnx.load(out)
    assert list(lowered.graph.input) == list(dense.graph.input)
    assert list(lowered.graph.output) == list(dense.graph.output)
    assert_equal_outputs(tmp_path / "model.onnx", out)


def test_a_plan_is_obeyed(folder: Path) -> None:
    layers = [{"name": "a", "structure": {"dense": [8, 3, 3], "reduced": [8, 2, 2]}}]
    (folder / "plan.json").write_text(json.dumps({"layers": layers}))
    words = (folder / "model.onnx", "-o", folder / "lowered.onnx", *FIXED)
    result = lower_json(*words, "--plan", folder / "plan.json")
    assert structured_names(result) == {"a"}
    assert_equal_outputs(folder / "model.onnx", folder / "lowered.onnx")


def test_weights_in_a_file_beside_the_model(folder: Path) -> None:
    external(folder, "weights.bin")
    out = folder / "elsewhere.onnx"
    lower_json(folder / "model.onnx", "-o", out, *FIXED)
    (folder / "weights.bin").rename(folder / "gone.bin")
    # The result needs no other file.
    onnxruntime.InferenceSession(out)
    (folder / "gone.bin").rename(folder / "weights.bin")
    assert_equal_outputs(folder / "model.onnx", out)


# What cannot be lowered in part -------------------------------------------------------------


def branch(outer: str, layer: str) -> onnx.NodeProto:
    """An If, both branches of which convolve an outer tensor with a structured weight."""
    weight = numpy_helper.from_array(
        structured_weight((8, 3, 3), (5, 2, 2), 8, 9, True).numpy(), f"{layer}.weight"
    )
    convolve = conv(outer, "inner", layer)
    shape = (1, 8, 12, 10)
    one = helper.make_graph([convolve], "then", [], [value("inner", shape)], [weight])
    double = [convolve, helper.make_node("Add", ["inner", outer], ["more"])]
    two = helper.make_graph(double, "else", [], [value("more", shape)], [weight])
    return helper.make_node(
        "If", ["which"], ["branched"], "choice", then_branch=one, else_branch=two
    )


def test_control_flow_is_left_alone_and_said_so(tmp_path: Path) -> None:
    dense = network(
        branch("ar", "inside"),
        inputs=[value("which", (), TensorProto.BOOL)],
        outputs=[value("branched", (1, 8, 12, 10))],
    )
    onnx.save(dense, tmp_path / "model.onnx")
    out = tmp_path / "lowered.onnx"
    result = lower_json(tmp_path / "model.onnx", "-o", out, *FIXED)
    # ar is read whole by the sub-graph, and in parts by b.
    assert structured_names(result) == {"a", "b"}
    assert any("sub-graphs" in note and "choice" in note for note in result["notes"])
    (kept,) = [node for node in onnx.load(out).graph.node if node.op_type == "If"]
    assert kept == dense.graph.node[-1]
    for which in (True, False):
        assert_equal_outputs(tmp_path / "model.onnx", out, which=np.array(which))


def test_custom_operators_are_left_alone_and_named(tmp_path: Path) -> None:
    strange = helper.make_node("Strange", ["ar"], ["odd"], "oddity", domain="my.domain")
    dense = network(strange, outputs=[value("odd", (1, 8, 12, 10))], domains={"my.domain": 1})
    onnx.save(dense, tmp_path / "model.onnx")
    out = tmp_path / "lowered.onnx"
    result = lower_json(tmp_path / "model.onnx", "-o", out, *FIXED)
    assert structured_names(result) == {"a", "b"}
    assert any("my.domain.Strange" in note for note in result["notes"])
    lowered = onnx.load(out)
    assert strange in lowered.graph.node
    # Without its strange node, which no runtime here runs, each model computes the same.
    for model, name in ((dense, "d.onnx"), (lowered, "l.onnx")):
        model.graph.node.remove(strange)
        del model.graph.output[1:]
        onnx.save(model, tmp_path / name)
    assert_equal_outputs(tmp_path / "d.onnx", tmp_path / "l.onnx")


def test_operators_of_other_domains_that_onnxruntime_knows_are_left_alone(tmp_path: Path) -> None:
    quick = helper.make_node("QuickGelu", ["ar"], ["q"], "quick", domain="com.microsoft")
    dense = network(quick, outputs=[value("q", (1, 8, 12, 10))], domains={"com.microsoft": 1})
    onnx.save(dense, tmp_path / "model.onnx")
    out = tmp_path / "lowered.onnx"
    result = lower_json(tmp_path / "model.onnx", "-o", out, *FIXED)
    assert structured_names(result) == {"a", "b"}
    assert any("com.microsoft.QuickGelu" in note for note in result["notes"])
    assert quick in onnx.load(out).graph.node
    assert_equal_outputs(tmp_path / "model.onnx", out)


def test_an_opset_too_old_is_told_with_the_remedy(tmp_path: Path) -> None:
    onnx.save(network(opset=6), tmp_path / "old.onnx")
    result = lower(tmp_path / "old.onnx", "-o", tmp_path / "lowered.onnx", *FIXED)
    assert result.exit_code == 1
    assert "opset 6" in words_of(result.output)
    assert "version_converter" in words_of(result.output)
    assert not (tmp_path / "lowered.onnx").exists()


@pytest.mark.parametrize("opset", [7, 10, 13, 21])
def test_other_opsets(tmp_path: Path, opset: int) -> None:
    onnx.save(network(opset=opset), tmp_path / "model.onnx")
    out = tmp_path / "lowered.onnx"
    for form in ("split+average", "sliced+ones"):
        result = lower_json(tmp_path / "model.onnx", "-o", out, "--forms", form)
        assert structured_names(result) == {"a", "b"}
        assert onnx.load(out).opset_import == onnx.load(tmp_path / "model.onnx").opset_import
        assert_equal_outputs(tmp_path / "model.onnx", out)


# What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b"a few words, no model", "text file"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\xff" * 200, "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (network().SerializeToString()[:700], "damaged"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "invalid"),
    ],
    ids=["empty", "text", "zip", "pickle", "noise", "lfs", "truncated", "without a graph"],
)
def test_not_an_onnx_file(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert_refused(tmp_path / "model.onnx", "model.onnx", told)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", "is a folder")
    assert_refused(tmp_path / "gone.onnx", "gone.onnx", "No such file")


def external(folder: Path, location: str) -> None:
    """Move the model's weights to a file, and say that they are at another location."""
    onnx.save_model(
        network(),
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    if location != "weights.bin":
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            (entry,) = [e for e in tensor.external_data if e.key == "location"]
            entry.value = location
        (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_external_data_missing(folder: Path) -> None:
    external(folder, "weights.bin")
    (folder / "weights.bin").unlink()
    assert_refused(folder / "model.onnx", "weights.bin", "missing")


@pytest.mark.parametrize("way", ["parent", "absolute", "link"])
def test_external_data_outside_the_models_folder(tmp_path: Path, way: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    external(home, "weights.bin")
    shutil.move(home / "weights.bin", tmp_path / "outside.bin")
    location = {"parent": "../outside.bin", "absolute": str(tmp_path / "outside.bin")}.get(way)
    if location is None:
        (home / "weights.bin").symlink_to(tmp_path / "outside.bin")
    else:
        external(home, location)
        (home / "weights.bin").unlink()
    told = "expected a path relative" if way == "absolute" else "leads out of the model's folder"
    assert_refused(home / "model.onnx", told)


@pytest.mark.parametrize("words", [FIXED, ()], ids=["fixed", "measured"])
def test_no_structured_layer(tmp_path: Path, words: Sequence[str]) -> None:
    onnx.save(network(structured=False), tmp_path / "model.onnx")
    told = "No structured layer found"
    assert_refused(tmp_path / "model.onnx", told, status=3, words=words)


def test_no_layer_at_all(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", IMAGE)], [value("y", IMAGE)]
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "model.onnx")
    assert_refused(tmp_path / "model.onnx", "No structured layer found", status=3)


def test_no_structured_layer_beside_one_that_cannot_be_read(tmp_path: Path) -> None:
    model = network(structured=False)
    stem = model.graph.node[0]
    del stem.attribute[:]
    stem.attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    onnx.save(model, tmp_path / "model.onnx")
    assert_refused(tmp_path / "model.onnx", "No structured layer found", status=3)


def test_the_dense_form_writes_nothing(folder: Path) -> None:
    assert_refused(folder / "model.onnx", "Nothing written", status=3, words=("--forms", "dense"))


def quantised_nodes() -> dict[str, list[onnx.NodeProto]]:
    linear = ["q", "scale", "zero", "w8", "scale", "zero8", "scale", "zero"]
    return {
        "QLinearConv": [
            helper.make_node("QuantizeLinear", ["sr", "scale", "zero"], ["q"], "first"),
            helper.make_node("QLinearConv", linear, ["r"], "second", kernel_shape=[1, 1]),
            helper.make_node("DequantizeLinear", ["r", "scale", "zero"], ["out"]),
        ],
        "DynamicQuantizeLinear": [
            helper.make_node("DynamicQuantizeLinear", ["sr"], ["q", "qs", "z"], "first"),
            helper.make_node("ConvInteger", ["q", "w8", "z"], ["r"], kernel_shape=[1, 1]),
            helper.make_node("Cast", ["r"], ["out"], to=1),
        ],
        "QuantizeLinear": [
            helper.make_node("QuantizeLinear", ["sr", "scale", "zero"], ["q"], "first"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["out"]),
        ],
    }


@pytest.mark.parametrize("kind", quantised_nodes())
def test_quantised_models(tmp_path: Path, kind: str) -> None:
    tensors = {
        "scale": np.array(0.1, np.float32),
        "zero": np.array(128, np.uint8),
        "zero8": np.array(0, np.int8),
        "w8": np.ones((8, 8, 1, 1), np.int8),
    }
    model = network(
        *quantised_nodes()[kind], tensors=tensors, outputs=[value("out", (1, 8, 12, 10))]
    )
    # ONNX Runtime takes the model: it is not refused for being damaged.
    assert len(outputs_of(model)) == 2
    onnx.save(model, tmp_path / "model.onnx")
    assert_refused(tmp_path / "model.onnx", "quantised", "first", "lower the float32 model first")


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--forms", "spilt"), 1, "there is no form 'spilt'"),
        (("--forms", ""), 1, "there is no form ''"),
        (("--forms", "split+"), 1, "there is no form ''"),
        ((*FIXED, "--input-shape", "x"), 2, "NAME=1x3x224x224"),
        ((*FIXED, "--input-shape", "x=1x3xhxw"), 2, "NAME=1x3x224x224"),
        ((*FIXED, "--input-shape", "=1x3x8x8"), 2, "NAME=1x3x224x224"),
        ((*FIXED, "--input-shape", "x=1x3x-8x8"), 2, "NAME=1x3x224x224"),
        ((*FIXED, "--input-shape", "z=1x3x12x10"), 1, "no input z; its inputs are x"),
        ((*FIXED, "--input-shape", "x=1x3x12"), 1, "does not fit"),
        ((*FIXED, "--input-shape", "x=1x4x12x10"), 1, "does not fit"),
        ((*FIXED, "--plan", "gone.json"), 1, "gone.json"),
        (("--device", "cuda"), 1, "CUDAExecutionProvider"),
    ],
)
def test_bad_options(folder: Path, words: Sequence[str], status: int, told: str) -> None:
    if "cuda" in words and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    out = folder / "lowered.onnx"
    out.write_bytes(OLD)
    result = lower(folder / "model.onnx", "-o", out, *words)
    # Usage errors are drawn in a box.
    message = words_of(result.output.replace("│", " "))
    assert result.exit_code == status, message
    assert told in message
    assert out.read_bytes() == OLD


@pytest.mark.parametrize("words", [(), FIXED], ids=["measured", "fixed"])
def test_an_unknown_device(folder: Path, words: Sequence[str]) -> None:
    result = lower(folder / "model.onnx", "-o", folder / "o.onnx", "--device", "tpu", *words)
    assert result.exit_code in (1, 2)
    assert "tpu" in result.output
    assert not (folder / "o.onnx").exists()


def test_a_plan_that_does_not_fit(folder: Path) -> None:
    plan = folder / "plan.json"
    for name, dense, told in (
        ("zz", [8, 3, 3], "zz"),
        ("stem", [3, 3, 3], "not in its structured subspace"),
        ("a", [9, 3, 3], "a"),
    ):
        entry = {"name": name, "structure": {"dense": dense, "reduced": [dense[0], 2, 2]}}
        plan.write_text(json.dumps({"layers": [entry]}))
        assert_refused(folder / "model.onnx", told, words=(*FIXED, "--plan", plan))


def test_open_axes_without_their_sizes(tmp_path: Path) -> None:
    onnx.save(network(image=("n", 3, "h", "w")), tmp_path / "model.onnx")
    told = "--input-shape x=1x3x224x224"
    message = assert_refused(tmp_path / "model.onnx", "input x", told)
    assert "axis 2" in message


def test_an_axis_of_size_minus_one_is_open(tmp_path: Path) -> None:
    """Older exporters wrote -1 for an open axis, and ONNX Runtime takes it for one."""
    model = network(image=(-1, 3, 12, 10))
    onnx.save(model, tmp_path / "model.onnx")
    lower_json(tmp_path / "model.onnx", "-o", tmp_path / "lowered.onnx", *FIXED)


def test_an_input_that_is_no_tensor(tmp_path: Path) -> None:
    model = network(
        helper.make_node("SequenceLength", ["list"], ["length"]),
        inputs=[helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, [1])],
        outputs=[value("length", (), TensorProto.INT64)],
    )
    onnx.save(model, tmp_path / "model.onnx")
    result = lower(tmp_path / "model.onnx", "-o", tmp_path / "lowered.onnx", *FIXED)
    # Lowered or refused, but not with a traceback.
    assert result.exit_code in (0, 1)


def test_an_output_that_cannot_be_written(folder: Path) -> None:
    before = sorted(folder.iterdir())
    for out in (folder / "nowhere/lowered.onnx", folder):
        result = lower(folder / "model.onnx", "-o", out, *FIXED)
        assert result.exit_code == 1, result.output
        assert str(out) in result.output.replace("\n", "")
        assert sorted(folder.iterdir()) == before


# Real processes that are cut short ----------------------------------------------------------


def command(folder: Path, *words: str, most_bytes: int | None = None) -> Command:
    """The command on a model that takes long to measure; its temporary files in `scratch`."""
    (folder / "lowered.onnx").write_bytes(OLD)
    (folder / "scratch").mkdir()
    words = ("lower", "model.onnx", "-o", "lowered.onnx", *words)
    scratch = {"TMPDIR": str(folder / "scratch")}
    return Command(*words, cwd=folder, env=scratch, most_bytes=most_bytes)


@pytest.fixture
def wait() -> Iterator[Callable[[Callable[[], bool]], None]]:
    def until(done: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end
            time.sleep(0.005)

    return until


def profiles(folder: Path) -> bool:
    return any((folder / "scratch").rglob("profile*"))


def compares(folder: Path) -> bool:
    return any((folder / "scratch").rglob("*.onnx"))


@pytest.mark.parametrize(
    ("measuring", "group"), [(profiles, False), (compares, True)], ids=["profile", "compare"]
)
def test_ctrl_c_while_measuring(
    folder: Path, measuring: Callable[[Path], bool], group: bool, wait: Callable[..., None]
) -> None:
    """A terminal sends the signal to the whole group; `kill -INT` to the one process."""
    with command(folder, "--timings", "t.json") as process:
        wait(lambda: measuring(folder) or not process.running)
        children = psutil.Process(process.pid).children(recursive=True)
        process.interrupt(all_of_them=group)
        ended = process.wait(30)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "nothing was written to lowered.onnx" in words_of(ended.stderr)
    assert (folder / "lowered.onnx").read_bytes() == OLD
    # .ses is ONNX Runtime's own.
    assert {path.name for path in (folder / "scratch").iterdir()} <= {".ses"}
    assert {p.name for p in folder.iterdir()} <= {"lowered.onnx", "model.onnx", "scratch", "t.json"}
    wait(lambda: not any(child.is_running() for child in children))


def test_a_full_disk(folder: Path) -> None:
    with command(folder, *FIXED, most_bytes=2048) as process:
        ended = process.wait()
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "File too large" in words_of(ended.stderr)
    assert (folder / "lowered.onnx").read_bytes() == OLD
    assert sorted(p.name for p in folder.iterdir()) == ["lowered.onnx", "model.onnx", "scratch"]
