"""Profiling nodes: every node once, in order, with its own time, and no file left behind."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from structconv_cli.timing.node_times import NodeTime, node_times

CPU = "CPUExecutionProvider"
SIZE = (1, 16, 32, 32)


def model(*nodes: onnx.NodeProto, **tensors: np.ndarray) -> bytes:
    """x (1, 16, 32, 32) and the condition `which`; y is the last node's output."""
    output = nodes[-1].output[0]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, SIZE),
            helper.make_tensor_value_info("which", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def feeds(which: bool = True) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    return {"x": x, "which": np.array(which)}


def kernel(count: int = 16, size: int = 3) -> np.ndarray:
    shape = (count, 16, size, size)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def conv(x: str, y: str, weight: str, size: int = 3) -> onnx.NodeProto:
    pads = [size // 2] * 4
    return helper.make_node("Conv", [x, weight], [y], f"n_{y}", kernel_shape=[size] * 2, pads=pads)


def unfused() -> bytes:
    """Operators that ONNX Runtime neither fuses nor drops."""
    return model(
        conv("x", "a", "w"),
        helper.make_node("Softplus", ["a"], ["b"], "n_b"),
        helper.make_node("Softmax", ["b"], ["c"], "n_c", axis=1),
        conv("c", "y", "w"),
        w=kernel(),
    )


def profile(
    content: bytes | str,
    runs: int = 5,
    threads: int = 1,
    values: Mapping[str, np.ndarray] | None = None,
) -> tuple[NodeTime, ...]:
    return node_times(content, values or feeds(), provider=CPU, threads=threads, runs=runs)


def base(name: str) -> str:
    """A node's name without what ONNX Runtime's layout optimiser hangs on it."""
    return name.removesuffix("_nchwc").removeprefix("n_")


def test_every_node_once_in_the_order_of_running() -> None:
    found = profile(unfused())
    named = [entry for entry in found if entry.op_type not in ("ReorderInput", "ReorderOutput")]
    assert [entry.op_type for entry in named] == ["Conv", "Softplus", "Softmax", "Conv"]
    assert [base(entry.name) for entry in named] == ["a", "b", "c", "y"]


def test_times_are_positive_and_together_at_most_the_wall_time() -> None:
    content, runs = unfused(), 9
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = 1
    runner = onnxruntime.InferenceSession(content, session, providers=[CPU])
    for _ in range(20):
        runner.run(None, feeds())
    start = time.perf_counter()
    found = profile(content, runs)
    # Runs to warm up among them: at least `runs`.
    wall = (time.perf_counter() - start) * 1e3 / runs
    assert all(entry.ms > 0 for entry in found)
    assert sum(entry.ms for entry in found) <= wall


def test_a_heavier_node_takes_longer() -> None:
    """64 times the multiplications: far beyond noise."""
    content = model(
        conv("x", "light", "w1", 1),
        helper.make_node("Softplus", ["light"], ["b"], "n_b"),
        conv("b", "heavy", "w8", 9),
        w1=kernel(16, 1),
        w8=kernel(16, 9),
    )
    ms = {base(entry.name): entry.ms for entry in profile(content)}
    assert ms["heavy"] > 5 * ms["light"]


def test_a_file_is_profiled_like_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(unfused())
    kinds = [entry.op_type for entry in profile(unfused(), 2)]
    assert [entry.op_type for entry in profile(str(path), 2)] == kinds


@pytest.mark.parametrize("threads", [1, 2])
def test_no_profile_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    profile(unfused(), 2, threads)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_where_a_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wrong = {**feeds(), "x": np.zeros((1, 3, 32, 32), np.float32)}
    with pytest.raises(Exception, match="Got: 3"):
        profile(unfused(), 2, values=wrong)
    assert list(tmp_path.iterdir()) == []


def chosen(inner: Sequence[onnx.NodeProto], output: str) -> onnx.NodeProto:
    shape = helper.make_tensor_value_info(output, TensorProto.FLOAT, SIZE)
    body = helper.make_graph(list(inner), "body", [], [shape])
    return helper.make_node("If", ["which"], ["y"], "n_y", then_branch=body, else_branch=body)


def test_nodes_of_a_sub_graph_do_not_hide_those_of_the_graph() -> None:
    """Both graphs count their nodes from 0."""
    inner = [
        helper.make_node("Softsign", ["b"], ["i"], "n_i"),
        helper.make_node("Softsign", ["i"], ["inner"], "n_inner"),
    ]
    content = model(
        helper.make_node("Softplus", ["x"], ["a"], "n_a"),
        helper.make_node("Softplus", ["a"], ["b"], "n_b"),
        chosen(inner, "inner"),
    )
    names = [base(entry.name) for entry in profile(content)]
    assert [name for name in names if name in ("a", "b", "y")] == ["a", "b", "y"]


def test_nodes_of_a_sub_graph_are_not_counted_twice() -> None:
    content = model(
        helper.make_node("Softplus", ["x"], ["a"], "n_a"),
        chosen([conv("a", "inner", "w", 9)], "inner"),
        w=kernel(16, 9),
    )
    # The time of an If holds that of the nodes inside it.
    assert [entry.op_type for entry in profile(content)] == ["Softplus", "If"]
