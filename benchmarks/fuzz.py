"""Damages valid files at random and opens them: each must be read, or refused with a clean error.

    python benchmarks/fuzz.py                       all kinds, 100,000 mutations each
    python benchmarks/fuzz.py npz --count 2000      one kind, fewer

Mutation number i of a kind depends on the seed and i alone, so that any finding can be repeated
with --first i --count 1. Each kind runs in a process of its own with a limit on memory; a parent
watches it, kills it where one file takes too long, and goes on behind the file that ended it.
Whatever is neither "read" nor "refused" is printed, and makes the exit status 1.
"""

import argparse
import io
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import safetensors.torch
import torch
from torch import nn

from structconv_cli.data.npz_archive import read_arrays
from structconv_cli.errors import StructconvError
from structconv_cli.json_file import to_json
from structconv_cli.model.checkpoint import load_checkpoint
from structconv_cli.model.checkpoint_kind import Kind, identify
from structconv_cli.model.exported_archive import exported_inputs, open_exported
from structconv_cli.onnx.file import load_onnx
from structconv_cli.plan import KeptLayer, LayerPlan, Plan, read_plan
from structconv_cli.run_folder import RunFolder, RunInfo
from structconv_cli.structure import Structure

MEMORY = 2 << 30
"""Most bytes that opening one file may add to the process."""
GROWTH = 256 << 20
"""Growth of the process's peak memory that is reported, in bytes, for files of a few kB."""
SECONDS = 10
"""Longest that opening one file may take."""

Opener = Callable[[Path], object]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Small().eval(), torch.zeros(1, 2, 5, 5)), buffer)
    return buffer.getvalue()


def exported() -> bytes:
    buffer = io.BytesIO()
    shapes = [{0: torch.export.Dim("batch")}]
    example = (torch.zeros(2, 2, 5, 5),)
    program = torch.export.export(Small().eval(), example, dynamic_shapes=shapes)
    torch.export.save(program, buffer)
    return buffer.getvalue()


def onnx_model() -> bytes:
    make = onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((4, 2, 3, 3), np.float32), "w")
    values = [
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, size, size])
        for name, channels, size in (("x", 2, 5), ("y", 4, 3))
    ]
    nodes = [make.make_node("Conv", ["x", "w"], ["c"]), make.make_node("Relu", ["c"], ["y"])]
    graph = make.make_graph(nodes, "g", values[:1], values[1:], [weight])
    opsets = [make.make_opsetid("", 18)]
    return make.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.zeros((8, 4, 4), np.uint8), y=np.arange(8))
    return buffer.getvalue()


RUN = RunInfo(
    "structconv-run/2",
    "0.1.0",
    "2026-01-01T00:00:00Z",
    ("structconv", "convert"),
    "/m.pt",
    None,
    "classification",
    None,
    "0" * 64,
    {},
)
PLAN = Plan(
    (
        LayerPlan("conv", Structure((4, 3, 3), (4, 2, 2))),
        KeptLayer("fc", "it is linear"),
    )
)


def open_checkpoint(path: Path) -> object:
    return identify(path), load_checkpoint(path)


def open_archive(path: Path) -> object:
    found = open_checkpoint(path)
    if identify(path) is Kind.EXPORTED:
        exported_inputs(path)
        open_exported(path)
    return found


def open_run(path: Path) -> object:
    folder = path.parent / "run"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(path.read_bytes())
    return RunFolder(folder).info()


KINDS: dict[str, tuple[Callable[[], bytes], Opener]] = {
    "state_dict": (lambda: saved(Small().state_dict()), open_checkpoint),
    "legacy": (
        lambda: saved(Small().state_dict(), _use_new_zipfile_serialization=False),
        open_checkpoint,
    ),
    "module": (lambda: saved(Small()), open_checkpoint),
    "safetensors": (lambda: safetensors.torch.save(Small().state_dict()), open_checkpoint),
    "torchscript": (scripted, open_checkpoint),
    "pt2": (exported, open_archive),
    "onnx": (onnx_model, load_onnx),
    "npz": (npz, read_arrays),
    "plan.json": (lambda: to_json(PLAN), read_plan),
    "run.json": (lambda: to_json(RUN), open_run),
}

INTERESTING = [b"\x00", b"\xff" * 4, b"\x7f" + b"\xff" * 7, b"\x00" * 8, b"\x80", b"9" * 30, b'"']


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes: flipped, overwritten, cut out, doubled, moved, or the end cut off."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not data:
            break
        start = rng.randrange(len(data))
        length = min(rng.choice([1, 1, 2, 4, 8, 64]), len(data) - start)
        match rng.randrange(7):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start : start + length] = rng.randbytes(length)
            case 2:
                del data[start : start + length]
            case 3:
                data[start:start] = data[start : start + length]
            case 4:
                data[start:start] = rng.choice(INTERESTING)
            case 5:
                other = rng.randrange(len(data))
                data[start : start + length] = data[other : other + length]
            case 6 if rng.random() < 0.2:
                del data[start:]
    return bytes(data)


def mutation(content: bytes, rng: random.Random) -> bytes:
    """Damage a file; a zip archive half of the time inside a part, with its checksum made right."""
    if not content.startswith(b"PK") or rng.random() < 0.3:
        return damaged(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(entry, archive.read(entry)) for entry in archive.infolist()]
    texts = [i for i, (entry, _) in enumerate(parts) if entry.filename.endswith((".pkl", ".json"))]
    chosen = rng.choice(texts) if texts and rng.random() < 0.8 else rng.randrange(len(parts))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for index, (entry, part) in enumerate(parts):
            name, packing = entry.filename, entry.compress_type
            archive.writestr(name, damaged(part, rng) if index == chosen else part, packing)
    return buffer.getvalue()


class TooLong(BaseException):
    """One file took too long."""


def too_long(*_: object) -> None:
    raise TooLong


def worker(kind: str, content: bytes, seed: int, first: int, last: int, out: Connection) -> None:
    """Open the mutations from `first` to `last`, and say before each that it begins."""
    torch.set_num_threads(1)
    _, opener = KINDS[kind]
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "file")
        path.write_bytes(content)
        opener(path)  # what torch imports late
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for i in range(first, last):
            out.send(("begin", i, ""))
            path.write_bytes(mutation(content, random.Random(f"{seed} {kind} {i}")))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.alarm(SECONDS)
            try:
                opener(path)
                result, text = "read", ""
            except StructconvError as error:
                result, text = "refused", str(error)
                if not text.isprintable() or len(text) > 2000:
                    result = "bad message"
            except TooLong:
                result, text = "too long", traceback.format_exc()
            except MemoryError:
                result, text = "memory", traceback.format_exc()
            except (Exception, SystemExit, KeyboardInterrupt):  # noqa: BLE001 - what is looked for
                result, text = "traceback", traceback.format_exc()
            finally:
                signal.alarm(0)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            if grown > GROWTH:
                result, text = "memory", f"{grown >> 20} MiB more"
            out.send((result, i, "" if result in ("read", "refused") else text))
    out.send(("end", last, ""))


def fuzz(kind: str, content: bytes, seed: int, first: int, count: int) -> Counter[str]:
    """Outcomes of `count` mutations, by name; findings are printed."""
    outcomes: Counter[str] = Counter()
    last, at = first + count, first
    while at < last:
        mine, theirs = multiprocessing.Pipe(False)
        arguments = (kind, content, seed, at, last, theirs)
        process = multiprocessing.get_context("fork").Process(target=worker, args=arguments)
        process.start()
        theirs.close()
        try:
            while mine.poll(60 + 3 * SECONDS):
                result, at, text = mine.recv()
                if result == "end":
                    break
                if result != "begin":
                    outcomes[result] += 1
                    if text:
                        print(f"{kind} {at}: {result}\n{text}", flush=True)
                    at += 1
                    if (at - first) % 5000 == 0:
                        print(f"{kind}: {at - first} so far, {dict(outcomes)}", flush=True)
            else:
                process.kill()
                outcomes["hang"] += 1
                print(f"{kind} {at}: hang", flush=True)
                at += 1
        except EOFError:
            process.join()
            outcomes["crash"] += 1
            print(f"{kind} {at}: crash, exit status {process.exitcode}", flush=True)
            at += 1
        process.join()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--count", type=int, default=100_000, help="mutations of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    clean = True
    for kind in options.kinds or KINDS:
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        content = KINDS[kind][0]()
        begin = time.monotonic()
        outcomes = fuzz(kind, content, options.seed, options.first, options.count)
        took = time.monotonic() - begin
        told = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
        print(f"{kind} ({len(content)} bytes): {told}; {took:.0f} s", flush=True)
        clean &= set(outcomes) <= {"read", "refused"}
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
