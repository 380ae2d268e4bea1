"""How long each node of a model takes inside the whole model, from ONNX Runtime's profiler."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

_WARM_UP = 3


@dataclass(frozen=True)
class NodeTime:
    """One node of the optimised graph.

    Attributes:
        name: the node's name, as ONNX Runtime's optimisers left it.
        op_type: its operator.
        ms: median time (ms) of the node in one run of the model.
    """

    name: str
    op_type: str
    ms: float


def node_times(
    model: bytes | str,
    feeds: Mapping[str, npt.NDArray[np.generic]],
    *,
    provider: str,
    threads: int,
    runs: int,
) -> tuple[NodeTime, ...]:
    """Profile a model; its nodes in the order in which they run.

    Args:
        model: the model's bytes, or its file.
        feeds: input by name.
        provider: ONNX Runtime's execution provider.
        threads: intra-op threads.
        runs: timed runs, after a few to warm up.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model, options, providers=[provider])
        for _ in range(_WARM_UP + runs):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[int, list[float]] = {}
    names: dict[int, tuple[str, str]] = {}
    for event in _outer([e for e in events if _is_node(e)]):
        index = int(event["args"]["node_index"])
        names[index] = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
        times.setdefault(index, []).append(event["dur"] / 1e3)
    return tuple(
        NodeTime(*names[index], float(np.median(values[_WARM_UP:])))
        for index, values in times.items()
    )


def _is_node(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time")


def _outer(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Events that lie within no other: nodes of sub-graphs run within their If, Loop or Scan."""
    found: list[Mapping[str, Any]] = []
    end = -1
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        # Times are whole microseconds: neighbours may seem to overlap by one.
        if event["ts"] + event["dur"] / 2 >= end:
            found.append(event)
            end = event["ts"] + event["dur"]
    return found
