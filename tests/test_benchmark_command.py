"""`structconv benchmark` as users call it: many models, settings, rivals, outputs, statuses."""

import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import psutil
import pytest
from forked import Command
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from structconv_cli.benchmarking.layers import compare_layers, layer_owners
from structconv_cli.benchmarking.result import BenchmarkResult
from structconv_cli.cli import app
from structconv_cli.json_file import from_json
from structconv_cli.report.benchmark_markdown import benchmark_markdown
from structconv_cli.timing.peak_rate import peak_macs_per_s

pytestmark = pytest.mark.usefixtures("short_rounds")

SCHEMA = Path(__file__).parents[1] / "docs/schema/benchmark.schema.json"
QUICK = ["--rounds", "6", "--blocks", "1"]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["benchmark", *map(str, words)])


def save_net(path: Path, kernel: int = 3, width: int = 8, bias: float = 0.0) -> Path:
    """Two convolutions, a mean, three scores; larger kernels take longer."""
    rng = np.random.default_rng(0)
    pads = [kernel // 2] * 4
    weights = {
        "first.weight": rng.standard_normal((width, 1, kernel, kernel)),
        "second.weight": rng.standard_normal((width, width, kernel, kernel)),
        "head.weight": rng.standard_normal((3, width)),
        "head.bias": np.full(3, bias),
    }
    nodes = [
        helper.make_node("Conv", ["input", "first.weight"], ["a"], "n_a", pads=pads),
        helper.make_node("Relu", ["a"], ["b"], "n_b"),
        helper.make_node("Conv", ["b", "second.weight"], ["c"], "n_c", pads=pads),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "n_d"),
        helper.make_node("Flatten", ["d"], ["e"], "n_e"),
        helper.make_node("Gemm", ["e", "head.weight", "head.bias"], ["scores"], "n_f", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(x.astype(np.float32), name) for name, x in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A slow and a quick model."""
    folder = tmp_path_factory.mktemp("nets")
    return save_net(folder / "slow.onnx", 7, 64), save_net(folder / "quick.onnx", 1, 64)


def test_settings_inputs_and_outputs(nets: tuple[Path, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.ones((2, 1, 8, 8), np.float32))
    words = ["--batch-size", "1,4", "--input", tmp_path / "rows.npy", "--baseline", "quick"]
    outputs = ["--json", "-", "--markdown", tmp_path / "out.md"]
    done = run(*nets, *QUICK, *words, *outputs, "--spinning", "off", "--blocks", "2")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    result = from_json(done.stdout, BenchmarkResult)
    assert [(s.threads, s.batch_size) for s in result.settings] == [(1, 1), (1, 4)]
    assert [model.name for model in result.models] == ["quick", "slow"]
    assert [model.role for model in result.models] == ["baseline", "candidate"]
    assert [model.size_bytes for model in result.models] == [
        nets[1].stat().st_size,
        nets[0].stat().st_size,
    ]
    assert not result.environment.spinning
    assert "rows.npy" in result.protocol.input
    for setting in result.settings:
        assert setting.blocks == (0, 0, 0, 1, 1, 1)
        assert setting.speedups[0].verdict == "slower"
    text = (tmp_path / "out.md").read_text()
    assert text == benchmark_markdown(result)
    assert text.count("slow is slower than quick") == 2
    assert len(re.findall(r"^\| (slow|quick) \|", text, re.MULTILINE)) == 4


def test_a_speed_up_is_held(nets: tuple[Path, Path]) -> None:
    words = [*nets, *QUICK, "--json", "-"]
    assert run(*words, "--fail-below", "1.01").exit_code == 0
    failed = run(*words, "--fail-below", "1e6")
    assert failed.exit_code == 3
    assert "quick (1 threads, batch 1)" in " ".join(failed.stderr.split())
    assert run(*nets, "--rounds", 2, "--fail-below", "0").exit_code == 3
    assert run(nets[0], *QUICK, "--fail-below", "1").exit_code == 2


def test_the_table_fits_80_columns(nets: tuple[Path, Path], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(*nets, *QUICK, "--per-layer", "--batch-size", "1,2")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    text = " ".join(done.stdout.split())
    for told in ("quick is", "times as fast as slow", "Where the time goes", "second", "of peak"):
        assert told in text


def test_rivals_and_their_accuracy(nets: tuple[Path, Path], tmp_path: Path) -> None:
    """The data's classes cannot be told apart, so that the biased model is right on a third."""
    biased = save_net(tmp_path / "biased.onnx", bias=0.0)
    model = onnx.load(biased)
    model.doc_string = "made\n  <b>by hand</b>."
    onnx.save(model, biased)
    rng = np.random.default_rng(0)
    data = tmp_path / "data.npz"
    np.savez(data, x=rng.integers(0, 255, (60, 8, 8)).astype(np.uint8), y=np.arange(60) % 3)
    words = ["--against", "int8", "--against", "fp16", "--against", biased]
    done = run(nets[0], *QUICK, *words, "--data", data, "--val-split", "0.5", "--json", "-")
    assert done.exit_code == 0, done.output
    result = from_json(done.stdout, BenchmarkResult)
    assert [model.name for model in result.models] == ["slow", "int8", "fp16", "biased"]
    assert {model.role for model in result.models[1:]} == {"rival"}
    assert "30 training images" in result.models[1].made
    assert [model.file for model in result.models] == [str(nets[0]), "", "", str(biased)]
    assert result.models[3].made == "made <b>by hand</b>"
    assert "made <b>by hand</b>" not in benchmark_markdown(result)
    assert result.models[1].size_bytes < 0.5 * result.models[0].size_bytes
    assert result.models[2].size_bytes < 0.7 * result.models[0].size_bytes
    assert result.quality is not None
    assert (result.quality.metric, result.quality.examples) == ("top-1 accuracy", 30)
    scores = [model.score for model in result.models]
    assert all(score is not None and 0 <= score <= 100 for score in scores)
    assert scores[2] == pytest.approx(scores[0], abs=10)


def test_a_given_rival_is_judged_on_the_data_of_the_run(
    nets: tuple[Path, Path], tmp_path: Path
) -> None:
    """The rival says class 2 to every image, and a third of them are of it."""
    out, data, rng = tmp_path / "run", tmp_path / "data.npz", np.random.default_rng(0)
    np.savez(data, x=rng.random((60, 8, 8)).astype(np.float32), y=np.arange(60) % 3)
    words = ["convert", nets[0], "--data", data, "--val-split", 0.5, "--out", out]
    done = CliRunner().invoke(app, [*map(str, words), "--forms", "split+average"])
    assert done.exit_code == 0, done.output
    rival = onnx.load(nets[1])
    (bias,) = (tensor for tensor in rival.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.array([0, 0, 1e6], np.float32), "head.bias"))
    onnx.save(rival, tmp_path / "rival.onnx")
    done = run(out, *QUICK, "--against", tmp_path / "rival.onnx", "--json", "-")
    assert done.exit_code == 0, done.output
    result = from_json(done.stdout, BenchmarkResult)
    assert result.quality is not None
    assert (result.quality.data, result.quality.examples) == (str(data), 30)
    assert [model.score is None for model in result.models] == [False] * 3
    assert result.models[2].score == pytest.approx(100 / 3)


def test_layers_are_joined_by_name(nets: tuple[Path, Path]) -> None:
    found = compare_layers((("slow", nets[0]), ("quick", nets[1])), 1, 2, {"second": "a form"})
    assert [layer.name for layer in found.layers] == ["first", "second", "head"]
    first, second, head = found.layers
    # 2 images of 8x8 pixels; 64 filters of 7x7 on 1 and on 64 channels.
    assert (first.before_macs, first.after_macs) == (2 * 64 * 64 * 49, 2 * 64 * 64)
    assert (second.before_macs, second.after_macs) == (2 * 64 * 64 * 64 * 49, 2 * 64 * 64 * 64)
    assert head.before_macs == 2 * 3 * 64
    assert second.form == "a form"
    assert second.before_bound_ms == pytest.approx(1e3 * second.before_macs / found.peak_macs_per_s)
    assert second.gained_ms > 0
    assert second.before_ms > 3 * second.after_ms


def test_what_was_made_for_several_layers_counts_to_the_first() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "minus"], ["difference"], "Conv"),
        helper.make_node("AveragePool", ["difference"], ["p"], "one.conv/AveragePool"),
        helper.make_node("Conv", ["p", "one.conv/weight"], ["y"], "one.conv/Conv"),
        helper.make_node("Conv", ["difference", "two.weight"], ["z"], "two/Conv_1"),
        helper.make_node("Add", ["y", "z"], ["sum"], "add"),
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    owners = layer_owners(helper.make_model(graph), ["one.conv", "two"])
    assert owners == {
        "difference": "one.conv",
        "p": "one.conv",
        "y": "one.conv",
        "z": "two",
        "sum": "",
    }


def test_the_peak_is_more_than_numpy_reaches_in_a_loop() -> None:
    """A lower bound that any processor passes: a million multiply-accumulates a second."""
    assert 1e6 < peak_macs_per_s(1) < 1e14


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["none.onnx"], 1, "no file none.onnx"),
        (["none"], 1, "no run folder at none"),
        (["NET", "NET"], 1, "named twice"),
        (["NET", "--baseline", "x"], 1, "no model 'x'"),
        (["NET", "--against", "int4"], 1, "--against int4"),
        (["NET", "--threads", "0"], 2, "--threads"),
        (["NET", "--batch-size", "1,x"], 2, "--batch-size"),
        (["NET", "--rounds", "0"], 2, "rounds"),
        (["NET", "--rounds", "6", "--duration", "1"], 2, "--duration"),
        (["NET", "--spinning", "maybe"], 2, "on or off"),
        (["NET", "--affinity", "9999"], 1, "9999"),
        (["NET", "--provider", "abacus"], 1, "'abacus'"),
        (["NET", "--json", "-", "--markdown", "-"], 2, "one result"),
        (["NET", "--json", "no/such/x.json"], 1, "does not exist"),
        (["NET", "--input", "none.npy"], 1, "none.npy cannot be read"),
        (["NET", "--data", "none"], 1, "does not exist"),
    ],
)
def test_mistakes(
    words: list[str],
    status: int,
    told: str,
    nets: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*(str(nets[0]) if word == "NET" else word for word in words))
    assert done.exit_code == status, done.output
    assert told in " ".join(re.sub("[│╭╮╰╯─]", "", done.stderr).split())
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_there_is(nets: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing, on a machine so busy that no round is done in a second."""
    words = [*map(str, nets), "--duration", "600", "--json", "kept.json"]
    with Command("benchmark", *words, cwd=tmp_path) as command:
        deadline = time.monotonic() + 60
        while len(psutil.Process(command.pid).children()) < len(nets):
            assert time.monotonic() < deadline
            assert command.running
            time.sleep(0.01)
        time.sleep(1.5)
        command.interrupt()
        ended = command.wait()
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    assert "Stopped" in ended.stderr
    if (tmp_path / "kept.json").exists():
        result = from_json((tmp_path / "kept.json").read_bytes(), BenchmarkResult)
        assert result.partial
        assert len(result.settings[0].models[0].round_ms) == len(result.settings[0].blocks) >= 1
