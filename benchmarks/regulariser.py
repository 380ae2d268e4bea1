"""What the structural regulariser adds to a training step.

    python benchmarks/regulariser.py resnet50 --batch 16 --size 224
    python benchmarks/regulariser.py resnet50 --batch 16 --channels 0.5

A step (forward, backward, SGD) and the regulariser's share of it are timed in turns on random
images: the gradient and the falling limit of the regularised phase, and the projection of the phase
inside the subspaces. Needs torchvision (`pip install --no-deps torchvision==0.28.0`).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from architectures import torchvision_model
from torch.nn import functional

from structconv_cli.model.inventory import take_inventory
from structconv_cli.planning.rule import rule_plan
from structconv_cli.rewrite import structured_parameters
from structconv_cli.training.descent import Descent
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.schedule import Schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--channels", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = torchvision_model(options.model).train()
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(1000, (options.batch,))
    plan = rule_plan(take_inventory(model.eval(), images[:2]), 2, options.channels)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    weights = structured_parameters(model, plan.structures)
    descent = Descent(weights, Schedule(Recipe(2, 1.0), 1000))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def regularised() -> None:
        descent.before_step(500)
        descent.after_step(500)

    parts: dict[str, Callable[[], None]] = {
        "step": step,
        "regularised phase": regularised,
        "inside the subspaces": lambda: descent.after_step(1500),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.rounds + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
    whole = times["step"][1:]
    print(
        f"{options.model}, {len(plan.structures)} layers structured, {options.batch} images of "
        f"{options.size} pixels, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name in list(parts)[1:]:
        shares = sorted(100 * a / b for a, b in zip(times[name][1:], whole, strict=True))
        print(
            f"{name}: {statistics.median(shares):.2f} % of a step "
            f"({shares[0]:.2f} to {shares[-1]:.2f} %)"
        )


if __name__ == "__main__":
    main()
