"""Real processes that start at once: forked from a server that has imported what they need.

For laws about what becomes of a process. How one starts, `python -m structconv_cli` itself, is
tested where the output of imports may matter.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver, reduction
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

import pytest

TESTS = Path(__file__).parent
SERVER = "forked_server"


def forked(
    target: Callable[..., object], *args: object, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start `target(*args)` in a process of its own, in this environment but for changes."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([SERVER, "pytest"])
    with pytest.MonkeyPatch.context() as patch:
        # The server does not get this process's sys.path.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path]))
        forkserver.ensure_running()
    environment = {**os.environ, **(env or {})}
    process = processes.Process(target=_call, args=(target, args, environment))
    process.start()
    return process


def _call(target: Callable[..., object], args: tuple[object, ...], env: Mapping[str, str]) -> None:
    # The server passes over what it cannot import.
    assert SERVER in sys.modules
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # it was read from the server's environment
    target(*args)


@dataclass(frozen=True)
class Ended:
    """What is left of a command: its exit status, or minus the signal, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """`structconv WORDS`, running as the leader of its own session; killed at the context's end.

    Attributes:
        pid: its process.
    """

    def __init__(
        self,
        *words: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        most_bytes: int | None = None,
        terminal: int | None = None,
    ) -> None:
        """Start it.

        Args:
            words: as on the command line.
            cwd: its working folder.
            env: changes of the environment.
            most_bytes: no file can become longer: writing more fails, as on a full disk.
            terminal: its standard streams; None for pipes, and nothing to read.
        """
        self._said = [b"", b""]
        pipes = [] if terminal is not None else [os.pipe(), os.pipe()]
        streams = [w for _, w in pipes] if terminal is None else [terminal, terminal]
        self._process = forked(
            _main,
            [str(word) for word in words],
            cwd,
            most_bytes,
            [_Descriptor(stream) for stream in streams],
            env=env,
        )
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._readers = [
            Thread(target=self._read, args=(index, r), daemon=True)
            for index, (r, _) in enumerate(pipes)
        ]
        for reader, (_, w) in zip(self._readers, pipes, strict=True):
            os.close(w)
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()

    def _read(self, index: int, pipe: int) -> None:
        with os.fdopen(pipe, "rb") as stream:
            self._said[index] = stream.read()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def interrupt(self, all_of_them: bool = True) -> None:
        """Interrupt all processes of the session, as Ctrl-C on a terminal does, or this alone."""
        (os.killpg if all_of_them else os.kill)(self.pid, signal.SIGINT)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float = 60) -> Ended:
        """Its end.

        Raises:
            AssertionError: it does not end in time.
        """
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it goes on"
        for reader in self._readers:
            reader.join(seconds)
        out, err = (said.decode() for said in self._said)
        return Ended(self._process.exitcode, out, err)


class _Descriptor:
    """An open file, the same in the process that gets it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detach, (reduction.DupFd(self.number),)


def _detach(descriptor: Any) -> int:
    return int(descriptor.detach())


def _main(words: list[str], cwd: Path, most_bytes: int | None, streams: list[int]) -> None:
    from structconv_cli.cli import main

    os.setsid()
    os.chdir(cwd)
    for standard, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, standard)
        os.close(stream)
    sys.stdout, sys.stderr = (
        open(stream, "w", buffering=1, errors=errors, closefd=False)  # noqa: SIM115
        for stream, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    sys.argv = ["structconv", *words]
    main()
