"""Describing all architectures of the installed libraries: once for each version of them.

They are built in processes of their own, as many as there are processors, which is quicker and
leaves this process without the memory that hundreds of models took.
"""

import gc
import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.library import LIBRARIES, Library, installed, model_names, version
from structconv_cli.model.recognition.catalogue import library_architectures
from structconv_cli.model.recognition.description import describe
from structconv_cli.model.recognition.index import Entry, read_index, write_index
from structconv_cli.model.skeleton import skeleton
from structconv_cli.onnx.timing_cache import default_path
from structconv_cli.progress import SILENT, Observer

_MOST_PROCESSES = 8
_SAVED_EVERY_S = 20.0
_LONGEST_S = 1800.0
_Answers = queue.Queue[tuple[int, bytes | None]]
"""What worker processes say: which of them, and a line; None when it has ended."""


def installed_entries(observer: Observer = SILENT) -> list[Entry]:
    """The descriptions of all architectures of torchvision and timm, as far as installed.

    They come from the cache folder; those that are missing there are made, which takes minutes,
    and kept, also when that is interrupted. A library that cannot be imported gives one entry with
    the reason.
    """
    entries = []
    for library in LIBRARIES:
        if installed(library):
            try:
                entries += _library_entries(library, observer)
            except ArchitectureError as error:  # said where nothing else fits
                entries.append(Entry(Architecture(f"{library}:"), None, str(error)))
    return entries


def describe_architecture(architecture: Architecture) -> Entry:
    """Build and describe one; an architecture that cannot be built gives the reason."""
    try:
        return Entry(architecture, describe(skeleton(architecture)))
    except ArchitectureError as error:
        return Entry(architecture, None, str(error))


def _library_entries(library: Library, observer: Observer) -> list[Entry]:
    environment = f"{library} {version(library)}, torch {importlib.metadata.version('torch')}"
    path = default_path().parent / f"architectures-{library}-{version(library)}.json"
    known = read_index(environment, path)
    if known and known[-1].architecture == _END:
        return known[:-1]
    with observer.stage(f"index of {library} (once)"):
        wanted = library_architectures(library)
        entries = {str(entry.architecture): entry for entry in known}
        missing = [one for one in wanted if str(one) not in entries]
        saved = time.monotonic()
        try:
            for entry in _described(missing):
                entries[str(entry.architecture)] = entry
                observer.steps(len(entries), len(wanted))
                if time.monotonic() - saved > _SAVED_EVERY_S:
                    write_index(entries.values(), environment, path)
                    saved = time.monotonic()
        finally:
            found = [entries[str(one)] for one in wanted if str(one) in entries]
            complete = [Entry(_END, None, "complete")] if len(found) == len(wanted) else []
            write_index([*found, *complete], environment, path)
        observer.note(f"{len(found)} architectures")
    return found


_END = Architecture("")
"""Stands at the end of a complete index."""


def _described(wanted: Sequence[Architecture]) -> Iterator[Entry]:
    """Describe architectures in several processes, in the order in which they are done."""
    count = min(os.cpu_count() or 1, _MOST_PROCESSES, max(1, len(wanted) // 20))
    # The worker imports what this process imports; -P keeps a stray numpy.py in the working
    # directory from being imported instead.
    path = os.pathsep.join(str(Path(entry or ".").absolute()) for entry in sys.path)
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "structconv_cli.model.recognition.indexing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which ends them
        )
        for _ in range(count)
    ]
    answers: _Answers = queue.Queue()
    shares = [wanted[number::count] for number in range(count)]
    threads = [
        threading.Thread(target=_collect, args=(number, worker, answers))
        for number, worker in enumerate(workers)
    ]
    deadline = time.monotonic() + _LONGEST_S
    try:
        for worker, share, thread in zip(workers, shares, threads, strict=True):
            assert worker.stdin is not None
            thread.start()
            worker.stdin.write(json.dumps([asdict(one) for one in share]).encode())
            worker.stdin.close()
        done, running = [0] * count, count
        while running:
            number, line = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is not None:
                done[number] += 1
                yield TypeAdapter(Entry).validate_json(line)
                continue
            running -= 1
            if done[number] < len(shares[number]):  # the next time goes on behind it
                yield Entry(shares[number][done[number]], None, "building it ended its process")
    except queue.Empty:  # the next time goes on from here
        return
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for thread in threads:
            if thread.is_alive():
                thread.join()


def _collect(number: int, worker: "subprocess.Popen[bytes]", answers: _Answers) -> None:
    assert worker.stdout is not None
    with worker.stdout:
        for line in worker.stdout:
            if line.endswith(b"\n"):
                answers.put((number, line))
    answers.put((number, None))


def _work() -> None:
    """Describe the architectures that stdin lists, one line of stdout for each."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes nowhere
    wanted = json.loads(sys.stdin.buffer.read())
    for library in LIBRARIES:
        if installed(library):
            model_names(library)  # imports it
    gc.freeze()
    for one in wanted:
        entry = describe_architecture(Architecture(one["reference"], one["arguments"]))
        answers.write(TypeAdapter(Entry).dump_json(entry) + b"\n")
        answers.flush()
        gc.collect()  # models refer to themselves, and would pile up


if __name__ == "__main__":
    _work()
