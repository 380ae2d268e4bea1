"""Time and memory of projecting and rewriting a torchvision model (random weights).

    python benchmarks/rewrite.py resnet50 --channels 0.5

Prints seconds for projection, rewriting, ONNX export and lowering, and the process's peak memory
before and after the first two. One process, torch's default threads.
"""

import argparse
import resource
import time

import torch
from architectures import torchvision_model

from structconv_cli.model.inventory import take_inventory
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.lower import lower
from structconv_cli.planning.rule import rule_plan
from structconv_cli.rewrite import project_weights, residuals, rewrite


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--n", type=int, default=2)
    parser.add_argument("--channels", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()

    model = torchvision_model(options.model)
    images = torch.randn(2, 3, options.size, options.size)
    inventory = take_inventory(model, images)
    plan = rule_plan(inventory, options.n, options.channels)
    print(f"{options.model}: {len(plan.structures)} of {len(plan.layers)} layers structured")
    print(f"peak memory before: {peak_mib():.0f} MiB")

    start = time.perf_counter()
    project_weights(model, plan.structures)
    projected = time.perf_counter()
    rewrite(model, plan.structures)
    rewritten = time.perf_counter()
    print(f"project {projected - start:.2f} s, rewrite {rewritten - projected:.2f} s")
    print(f"peak memory after: {peak_mib():.0f} MiB")
    print(f"largest residual {max(residuals(model, plan.structures).values()):.1e}")

    start = time.perf_counter()
    graph = export_onnx(model, images)
    exported = time.perf_counter()
    lower(graph, plan.structures)
    print(f"export {exported - start:.2f} s, lower {time.perf_counter() - exported:.2f} s")


if __name__ == "__main__":
    main()
