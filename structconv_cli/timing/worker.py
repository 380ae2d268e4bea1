"""One ONNX Runtime session in a process of its own, driven by JSON lines.

Run as ``python -m structconv_cli.timing.worker``. Every line on standard input is one request,
an object whose ``op`` names a method of `Worker` and whose other members are its arguments; every
request is answered by one line on standard output, the method's result or ``{"error": reason}``.
The end of standard input ends the process.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort

LOG_ERRORS_ONLY = 3


class Worker:
    """A session, its input, and the clock around its runs."""

    _session: Any
    _feeds: dict[str, np.ndarray[Any, np.dtype[Any]]]

    def describe(self) -> dict[str, Any]:
        """Name the installed ONNX Runtime's version and its execution providers."""
        return {"onnxruntime": ort.__version__, "providers": ort.get_available_providers()}

    def load(self, file: str, provider: str, threads: int) -> dict[str, Any]:
        """Create the session for `file`; tell how long that took (ms), and the model's inputs.

        The dimensions of an input are numbers, or null where the model leaves them open.
        """
        if provider == "CUDAExecutionProvider" and hasattr(ort, "preload_dlls"):
            # CUDA and cuDNN that pip installed are not on the system's library path.
            ort.preload_dlls()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = LOG_ERRORS_ONLY
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

    def feed(self, inputs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        """Fill the named inputs: floats from a normal distribution, integers with zeros."""
        rng = np.random.default_rng(seed)
        self._feeds = {}
        # By name, so that models that list their inputs in another order get the same numbers.
        for item in sorted(inputs, key=lambda item: str(item["name"])):
            dtype = np.dtype(item["dtype"])
            if dtype.kind == "f":
                normal = rng.standard_normal(item["shape"], dtype=np.float32)
                value = np.asarray(normal, dtype=dtype)
            else:
                value = np.zeros(item["shape"], dtype=dtype)
            self._feeds[item["name"]] = value
        return {}

    def warm_up(self, milliseconds: float) -> dict[str, Any]:
        """Run at least once and until the time has passed; give the latency (ms) reached."""
        latencies = [self._run_ns()]
        while sum(latencies) < milliseconds * 1e6:
            latencies.append(self._run_ns())
        # The first runs allocate memory and wake threads; the rounds will not.
        settled = latencies[len(latencies) // 2 :]
        return {"latency_ms": float(np.median(settled)) / 1e6}

    def measure(self, runs: int) -> dict[str, Any]:
        """Run once untimed, then `runs` times; give each run's time in nanoseconds."""
        self._run_ns()
        return {"ns": [self._run_ns() for _ in range(runs)]}

    def _run_ns(self) -> int:
        start = time.perf_counter_ns()
        self._session.run(None, self._feeds)
        return time.perf_counter_ns() - start


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
