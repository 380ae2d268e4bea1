"""How often a model measured against itself is said to differ: at most 5 times in 100 is promised.

    python benchmarks/self_check.py MODEL.onnx --trials 100 --loaders 1 --out quiet.jsonl

Each trial is one benchmark of the file against itself, as `structconv benchmark` makes them, with
shorter rounds. `--loaders` processes compute without end meanwhile. Each trial adds a line to
`--out`, from which `--summary` counts again. The two models are called "a" and "b".
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from structconv_cli.benchmarking.protocol import BLOCKS
from structconv_cli.timing.benchmark import benchmark
from structconv_cli.timing.settings import BenchmarkSettings
from structconv_cli.timing.speedup import NO_DIFFERENCE

_BURN = "while True: sum(range(10**6))"


@contextmanager
def load_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", _BURN])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def trial(file: Path, options: argparse.Namespace, seed: int) -> dict[str, object]:
    settings = BenchmarkSettings(
        threads=options.threads,
        rounds=options.rounds,
        round_ms=options.round_ms,
        warmup_ms=options.warmup_ms,
        blocks=options.blocks,
        seed=seed,
    )
    result = benchmark({"a": file, "b": file}, settings)
    found = result.speedups[0]
    return {
        "seed": seed,
        "loaders": options.loaders,
        "median": found.median,
        "low": found.low,
        "high": found.high,
        "verdict": found.verdict,
        "other_load": result.conditions.other_load,
        "seconds": result.conditions.seconds,
        "blocks": result.blocks,
        "rounds": [model.round_ms for model in result.models],
    }


def summary(lines: list[dict[str, object]]) -> str:
    verdicts = Counter(str(line["verdict"]) for line in lines)
    medians = np.array([line["median"] for line in lines], float)
    loads = np.array([line["other_load"] for line in lines], float)
    covered = sum(float(line["low"]) <= 1 <= float(line["high"]) for line in lines)  # type: ignore[arg-type]
    seconds = np.median([line["seconds"] for line in lines])  # type: ignore[type-var]
    return (
        f"{len(lines)} trials: {verdicts[NO_DIFFERENCE]} times '{NO_DIFFERENCE}' "
        f"({verdicts[NO_DIFFERENCE] / len(lines):.1%}), {dict(verdicts)}; interval holds 1 in "
        f"{covered}; median ratios {medians.min():.3f} to {medians.max():.3f}; other load "
        f"{np.median(loads):.2f} cores (median); {seconds:.1f} s a trial"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--loaders", type=int, default=0, help="processes that load the machine")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--round-ms", type=float, default=20.0)
    parser.add_argument("--warmup-ms", type=float, default=100.0)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", action="store_true", help="count what --out holds already")
    options = parser.parse_args()
    if not options.summary:
        if options.model is None:
            parser.error("name the model to measure against itself")
        with ExitStack() as stack, options.out.open("a") as out:
            for _ in range(options.loaders):
                stack.enter_context(load_process())
            for seed in range(options.trials):
                line = trial(options.model, options, seed)
                print(json.dumps(line), file=out, flush=True)
    print(summary([json.loads(line) for line in options.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
