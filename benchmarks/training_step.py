"""What the hardware options are worth: a fine-tuning step in each way to compute it.

    python benchmarks/training_step.py resnet20 --batch 64 --size 32
    python benchmarks/training_step.py resnet50 --batch 16 --size 224

A step is that of the default recipe: the original's outputs, the model's, loss, gradients, SGD. The
ways take turns, on random images; ratios are to float32 in the same round. CIFAR-10 ResNets are the
sample models; others are torchvision's (`pip install --no-deps torchvision==0.28.0`).
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from architectures import torchvision_model
from planning import CHECKPOINTS, architecture
from torch import Tensor, nn
from torch.nn import functional

from structconv_cli.tasks.distillation import divergence
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.optimizer import optimizer_for
from structconv_cli.training.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--uncompiled", action="store_true", help="leave out torch.compile")
    options = parser.parse_args()
    own = options.model in CHECKPOINTS
    model = architecture(options.model) if own else torchvision_model(options.model)
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(10, (options.batch,))
    ways = [
        Hardware(precision=precision, channels_last=channels_last, compiled=compiled)
        for precision, channels_last, compiled in product(
            ("fp32", "bf16"), (False, True), (False,) if options.uncompiled else (False, True)
        )
    ]
    steps = [step_of(copy.deepcopy(model), way, images, labels) for way in ways]
    times: list[list[float]] = [[] for _ in ways]
    for number in range(options.rounds + 3):
        for step, found in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if number >= 3:  # the first compile, and bring caches to rest
                found.append(time.perf_counter() - start)
    print(
        f"{options.model}, batch {options.batch}, {options.size} pixels, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds\n"
    )
    print("| precision | channels-last | compiled | of the time in float32 |")
    print("| --- | --- | --- | --- |")
    for way, found in zip(ways, times, strict=True):
        ratios = [mine / plain for mine, plain in zip(found, times[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        words = ["yes" if chosen else "" for chosen in (way.channels_last, way.compiled)]
        print(f"| {way.precision} | {' | '.join(words)} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


def step_of(model: nn.Module, way: Hardware, images: Tensor, labels: Tensor) -> Callable[[], None]:
    teacher = way.compile(way.place(copy.deepcopy(model)).eval())
    student = way.compile(way.place(model).train())
    images = way.move(images)
    optimizer = optimizer_for(model, Recipe(1, 0.0, learning_rate=1e-4))

    def step() -> None:
        with way.running():
            outputs = student(images)
            with torch.no_grad():
                taught = teacher(images)
            loss = functional.cross_entropy(outputs, labels) + divergence(outputs, taught)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
