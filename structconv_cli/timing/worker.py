"""One ONNX Runtime session in a process of its own, driven by JSON lines.

Run as ``python -m structconv_cli.timing.worker``. Every line on standard input is one request,
an object whose ``op`` names a method of `Worker` and whose other members are its arguments; every
request is answered by one line on standard output, the method's result or ``{"error": reason}``.
The end of standard input ends the process.
"""

import base64
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

LOG_ERRORS_ONLY = 3
STEADY = 1.02
"""Ratio of successive windows' latencies within which a model is steady."""
LONGEST_WARM_UP = 10
"""Bound of a warm-up, in multiples of the least one."""
_WINDOWS = 4
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class Worker:
    """A session, its input, and the clock around its runs."""

    _session: Any
    _feeds: dict[str, np.ndarray[Any, np.dtype[Any]]]
    _empty_bytes: int | None = None

    def describe(self, affinity: list[int], empty: str) -> dict[str, Any]:
        """Hold this process to some cores; name ONNX Runtime's version and providers.

        Args:
            affinity: Logical cores; empty for all that are allowed.
            empty: A trivial model in base64, whose session is what memory is counted from.
        """
        if affinity:
            os.sched_setaffinity(0, affinity)
        ort.InferenceSession(base64.b64decode(empty), _options(1, False), providers=[_CPU])
        if _STATUS.is_file() and os.access(_CLEAR, os.W_OK):
            _CLEAR.write_text(_RESET_PEAK)
            self._empty_bytes = _resident_bytes("VmHWM")
        return {"onnxruntime": ort.__version__, "providers": ort.get_available_providers()}

    def load(self, file: str, provider: str, threads: int, spinning: bool) -> dict[str, Any]:
        """Create the session for `file`; tell how long that took (ms), and the model's inputs.

        The dimensions of an input are numbers, or null where the model leaves them open.
        """
        if provider == "CUDAExecutionProvider" and hasattr(ort, "preload_dlls"):
            # CUDA and cuDNN that pip installed are not on the system's library path.
            ort.preload_dlls()
        options = _options(threads, spinning)
        start = time.perf_counter_ns()
        self._session = ort.InferenceSession(file, options, providers=[provider])
        load_ns = time.perf_counter_ns() - start
        return {
            "load_ms": load_ns / 1e6,
            "provider": self._session.get_providers()[0],
            "inputs": [
                {
                    "name": node.name,
                    "type": node.type,
                    "shape": [d if isinstance(d, int) and d >= 0 else None for d in node.shape],
                }
                for node in self._session.get_inputs()
            ],
        }

    def feed(self, inputs: list[dict[str, Any]], seed: int, given: str = "") -> dict[str, Any]:
        """Fill the named inputs: from a file, or floats by a normal distribution, integers by 0.

        Args:
            inputs: Name, dtype and shape of each.
            seed: Seeds what is random.
            given: An .npz file of arrays by name, whose rows are repeated to fill a batch; empty
                for random inputs.
        """
        rng = np.random.default_rng(seed)
        arrays = dict(np.load(given)) if given else {}
        self._feeds = {}
        # By name, so that models that list their inputs in another order get the same numbers.
        for item in sorted(inputs, key=lambda item: str(item["name"])):
            dtype = np.dtype(item["dtype"])
            if given:
                value = np.resize(arrays[item["name"]], item["shape"]).astype(dtype)
            elif dtype.kind == "f":
                normal = rng.standard_normal(item["shape"], dtype=np.float32)
                value = np.asarray(normal, dtype=dtype)
            else:
                value = np.zeros(item["shape"], dtype=dtype)
            self._feeds[item["name"]] = value
        return {}

    def warm_up(self, milliseconds: float) -> dict[str, Any]:
        """Run for this time at least, and until steady, but not for long; give the latency (ms).

        A window is a quarter of the time. The model is steady when the lower quartile of a window's
        latencies is no longer below that of the window before.
        """
        window_ns, spent_ns = milliseconds * 1e6 / _WINDOWS, 0
        quartiles: list[float] = []
        while True:
            latencies = [self._run_ns()]
            while sum(latencies) < window_ns:
                latencies.append(self._run_ns())
            spent_ns += sum(latencies)
            quartiles.append(float(np.quantile(latencies, 0.25)))
            steady = len(quartiles) > 1 and quartiles[-2] <= STEADY * quartiles[-1]
            least = spent_ns >= milliseconds * 1e6
            if least and (steady or spent_ns >= LONGEST_WARM_UP * milliseconds * 1e6):
                return {
                    "latency_ms": float(np.median(latencies)) / 1e6,
                    "warmup_ms": spent_ns / 1e6,
                    "steady": steady,
                }

    def measure(self, runs: int) -> dict[str, Any]:
        """Run once untimed, then `runs` times; give each run's time in nanoseconds."""
        self._run_ns()
        return {"ns": [self._run_ns() for _ in range(runs)]}

    def usage(self) -> dict[str, Any]:
        """Peak memory (bytes) above that of an empty session, or null; processor time (s)."""
        peak = None
        if self._empty_bytes is not None:
            peak = max(0, _resident_bytes("VmHWM") - self._empty_bytes)
        times = os.times()
        return {"peak_bytes": peak, "cpu_s": times.user + times.system}

    def _run_ns(self) -> int:
        start = time.perf_counter_ns()
        self._session.run(None, self._feeds)
        return time.perf_counter_ns() - start


_CPU = "CPUExecutionProvider"


def _options(threads: int, spinning: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = LOG_ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return options


def _resident_bytes(field: str) -> int:
    """A field of /proc/self/status, which unlike getrusage does not count the parent's memory."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Answer requests until standard input ends."""
    # Libraries print to descriptor 1 as they please; the answers need one of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        operation = getattr(worker, request.pop("op"))
        try:
            answer = operation(**request)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no base class
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:
            # The parent died; os._exit, since closing `answers` would flush, and fail, again.
            os._exit(1)


if __name__ == "__main__":
    main()
