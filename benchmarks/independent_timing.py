"""Speed-ups that `structconv benchmark` reports, beside those of an independent plain script.

    python benchmarks/independent_timing.py original.onnx structured.onnx --repeats 10

The plain script starts a process for one model, runs it for some seconds, prints its median time
and ends; then the same for the other model, in turns. Its speed-up is the median over the repeats
of the ratio of two successive processes. It knows nothing of rounds, blocks or workers.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, time
import numpy, onnxruntime
file, threads, batch, seconds = sys.argv[1], *map(float, sys.argv[2:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
one = session.get_inputs()[0]
shape = [int(batch) if not isinstance(d, int) else d for d in one.shape]
feed = {one.name: numpy.random.rand(*shape).astype(numpy.float32)}
until = time.time() + seconds / 4
while time.time() < until:
    session.run(None, feed)
times = []
until = time.time() + seconds
while time.time() < until:
    start = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - start)
print(sorted(times)[len(times) // 2])
"""


def seconds_of(file: Path, options: argparse.Namespace) -> float:
    words = [str(file), str(options.threads), str(options.batch_size), str(options.seconds)]
    command = [sys.executable, "-c", SCRIPT, *words]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def plain_ratios(baseline: Path, candidate: Path, options: argparse.Namespace) -> list[float]:
    ratios = []
    for _ in range(options.repeats):
        found = {}
        for file in random.sample([baseline, candidate], 2):
            found[file] = seconds_of(file, options)
        ratios.append(found[baseline] / found[candidate])
    return ratios


def reported(baseline: Path, candidate: Path, options: argparse.Namespace) -> str:
    """The first speed-up in what the command prints as JSON."""
    command = [sys.executable, "-m", "structconv_cli", "benchmark", str(baseline), str(candidate)]
    command += ["--threads", str(options.threads), "--batch-size", str(options.batch_size)]
    command += ["--duration", str(2 * options.repeats * options.seconds), "--json", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("baseline", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="processes of each model")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed runs of one process")
    options = parser.parse_args()

    ratios = plain_ratios(options.baseline, options.candidate, options)
    plain = statistics.median(ratios)
    found = json.loads(reported(options.baseline, options.candidate, options))
    setting = found["settings"][0]
    speedup = setting["speedups"][0]
    print(
        f"{options.candidate}: plain script {plain:.3f} (single pairs {min(ratios):.3f} to "
        f"{max(ratios):.3f}), structconv {speedup['median']:.3f} ({speedup['low']:.3f} to "
        f"{speedup['high']:.3f}); apart by {abs(plain / speedup['median'] - 1):.1%}; other load "
        f"{setting['conditions']['other_load']:.2f} cores"
    )


if __name__ == "__main__":
    main()
