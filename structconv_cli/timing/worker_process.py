"""The parent's side of a process that runs one model: see `worker` for the other."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from onnx import TensorProto, helper

from structconv_cli.errors import BenchmarkError

_REMEDIES = {
    "describe": "Check that ONNX Runtime is installed, and that the cores may be used.",
    "load": "Give an ONNX file that the installed ONNX Runtime can read and run.",
    "feed": "Use a smaller batch size if the machine ran out of memory.",
    "warm_up": (
        "Check that the model runs on this input; use a smaller batch size if the machine ran "
        "out of memory."
    ),
    "measure": "Use a smaller batch size if the machine ran out of memory.",
    "usage": "Check that /proc can be read.",
}


class WorkerProcess:
    """A process running `worker`, for one model; killed at the end of its context.

    Attributes:
        name: The caller's name for the model.
        file: The ONNX file.
        title: Both, as messages name the model.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.file = file
        self.title = f"Model '{name}' ({file})"
        self._asking = False

    def __enter__(self) -> Self:
        # A file, since nobody would empty a pipe and a worker with much to say would block.
        self._messages: IO[bytes] = tempfile.TemporaryFile()
        # The worker imports what this process imports; -P keeps a stray numpy.py in the working
        # directory from being imported instead.
        path = os.pathsep.join(str(Path(entry or ".").absolute()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "structconv_cli.timing.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C reaches every process of the terminal's session; this one is ended by us.
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._messages):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                # Closing flushes a request that the worker did not live to read.
                continue

    def describe(self, affinity: Sequence[int]) -> dict[str, Any]:
        """Hold the process to some cores, all if there are none; ONNX Runtime's version, providers.

        Raises:
            BenchmarkError: As in `ask`.
        """
        return self.ask("describe", affinity=list(affinity), empty=_empty_model())

    def usage(self) -> dict[str, Any] | None:
        """Peak memory (bytes, or None) and processor time (s); None if the process is not well."""
        if self._asking:
            return None
        try:
            return self.ask("usage")
        except BenchmarkError:
            return None

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Args:
            op: Name of a method of `worker.Worker`.
            arguments: What that method takes, as JSON can hold it.

        Raises:
            BenchmarkError: The method failed, or the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps({"op": op, **arguments}) + "\n"
        # An interruption leaves this set: the next answer would not be that of the next request.
        self._asking = True
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise BenchmarkError(self._obituary())
        self._asking = False
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            reason = _one_paragraph(answer["error"])
            raise BenchmarkError(f"{self.title} cannot be benchmarked: {reason}. {_REMEDIES[op]}")
        return answer

    def messages(self) -> str:
        """Give the end of what the worker printed, as one paragraph, or nothing."""
        self._messages.seek(0)
        return _one_paragraph(self._messages.read().decode(errors="replace"))[-500:]

    def _obituary(self) -> str:
        status = self._process.wait()
        reason = f"exit status {status}"
        if status < 0:
            reason = f"signal {signal.Signals(-status).name}"
        messages = self.messages()
        if messages:
            reason = f"{reason}; its last messages: {messages}"
        return (
            f"{self.title}: the process that ran it ended early ({reason}). If the machine ran "
            "out of memory, use a smaller batch size or fewer models at once."
        )


@cache
def _empty_model() -> str:
    """A model of one Identity node, in base64."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "empty", ends[:1], ends[1:])
    # Versions that every ONNX Runtime in use can read.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return base64.b64encode(model.SerializeToString()).decode()


def _one_paragraph(text: str) -> str:
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " ".join(without_colours.split()).rstrip(".")
