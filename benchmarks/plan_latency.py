"""How well a plan's predicted latency agrees with what ONNX Runtime then measures.

For torchvision architectures with random weights (latency does not depend on them) a plan is made
for each target speed-up; its weights are projected, the graph is lowered as `structconv convert`
lowers it, and dense and lowered models are timed in turns, each in its own process:

    python benchmarks/plan_latency.py resnet18 resnet50 --speedups 1.5 2

Needs torchvision (see `architectures.py`). Prints a Markdown table.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from architectures import torchvision_model

from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import save_onnx
from structconv_cli.onnx.lower import Measured, lower
from structconv_cli.onnx.target import Target
from structconv_cli.planning.judgement import projected
from structconv_cli.planning.proposal import Planner
from structconv_cli.planning.settings import ProposalSettings
from structconv_cli.planning.targets import Targets
from structconv_cli.timing.benchmark import BenchmarkSettings, benchmark

SIZES = {"efficientnet_b1": 240}
HEAD = (
    "| model | target | predicted | its parts, measured | lowered, measured (95 %) | "
    "predicted / measured | MACs left |\n| --- | --- | --- | --- | --- | --- | --- |"
)


def rows(name: str, speedups: list[float], cache: Path, threads: int, batch: int) -> list[str]:
    """Plan one architecture for each speed-up; a table row for each."""
    side = SIZES.get(name, 224)
    model = export_onnx(torchvision_model(name), torch.randn(2, 3, side, side))
    feeds = {"input": torch.randn(batch, 3, side, side).numpy()}
    target = Target(threads=threads, batch_size=batch)
    start = time.perf_counter()
    planner = Planner(model, feeds, None, ProposalSettings(target, cache, tuned=False))
    first = time.perf_counter() - start
    found = []
    for speedup in speedups:
        start = time.perf_counter()
        proposal = planner.propose(Targets(speedup=speedup))
        seconds = time.perf_counter() - start
        prediction, structures = proposal.prediction, dict(proposal.plan.structures)
        how = Measured(target, feeds, cache)
        lowered, _ = lower(projected(planner.network, structures), structures, how)
        with tempfile.TemporaryDirectory() as folder:
            files = {kind: Path(folder) / f"{kind}.onnx" for kind in ("dense", "lowered")}
            save_onnx(model, files["dense"])
            save_onnx(lowered, files["lowered"])
            result = benchmark(
                files, BenchmarkSettings(threads=threads, batch_size=batch, round_ms=200.0)
            )
        measured = result.speedups[0]
        parts = prediction.ms_before / (prediction.measured_ms or prediction.ms_before)
        found.append(
            f"| {name} | {speedup:g} | {prediction.speedup:.2f} | {parts:.2f} | "
            f"{measured.median:.2f} ({measured.low:.2f} to {measured.high:.2f}) | "
            f"{prediction.speedup / measured.median:.2f} | "
            f"{prediction.after.multiplications / prediction.before.multiplications:.2f} |"
        )
        print(f"{found[-1]} {first:.0f} s to measure, {seconds:.0f} s to plan", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="+")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5])
    parser.add_argument("--cache", type=Path, default=Path("plan_timings.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    table = [
        row
        for name in arguments.architectures
        for row in rows(
            name, arguments.speedups, arguments.cache, arguments.threads, arguments.batch_size
        )
    ]
    print("\n".join([HEAD, *table]))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
