"""How well predicted losses rank plans: against the accuracy that conversions really lose.

    python benchmarks/sensitivity.py resnet20_cifar10_jpeg.pt --data cifar10_jpeg
    python benchmarks/sensitivity.py resnet56-4bfd9763.th --data cifar10_jpeg --plans 20
    python benchmarks/sensitivity.py resnet20_cifar10_jpeg.pt --data cifar10_jpeg --train --plans 8

Draws random plans for a CIFAR-10 ResNet (`sample_models/resnet_cifar.py`): a structure or none for
every convolution but the first, from gentle to harsh. The prediction is the sum over its layers.
What it really costs is the top-1 accuracy lost on test images after all its layers are structured
at once: by plain projection, and by least squares, with batch norm re-estimated; with --train also
after an epoch of fine-tuning on a part of the training images.

Prints Spearman's rank correlation of every predictor with every real loss. --data is the extracted
`cifar10_jpeg.zip`; checkpoints are looked for in ../shared/checkpoints.
"""

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from torch import nn

from structconv_cli.calibrate import reestimate_batch_norm
from structconv_cli.data.dataset import Dataset, load_dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import Split
from structconv_cli.model.checkpoint import load_checkpoint, load_into
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.onnx.export import export_onnx
from structconv_cli.planning.sensitivity import (
    PredictedLoss,
    SensitivitySettings,
    predict_losses,
)
from structconv_cli.reconstruction.activations import second_moments
from structconv_cli.reconstruction.least_squares import DenseLayer
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.rewrite import project_weights
from structconv_cli.structure import Structure
from structconv_cli.tasks.classification import Classification
from structconv_cli.training.finetune import finetune
from structconv_cli.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT.parent / "shared" / "checkpoints"
KERNELS = ((3, 3), (2, 3), (3, 2), (2, 2), (1, 3), (3, 1), (1, 1))
CALIBRATION = 1024

Plan = Mapping[str, Structure]
Floats = npt.NDArray[np.float64]


def load(checkpoint: str) -> nn.Module:
    sys.path.insert(0, str(ROOT))
    from sample_models import resnet_cifar

    model: nn.Module = getattr(resnet_cifar, checkpoint[:8])()
    load_into(model, load_checkpoint(CHECKPOINTS / checkpoint))
    return model.eval()


def some(
    dataset: Dataset, split: Split, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    images, labels = split.fetch(order)
    return dataset.prepare(images), labels


def draw_plans(model: nn.Module, count: int, seed: int) -> list[Plan]:
    """From 15 to 95 % of the layers structured, half of the plans with channel windows too."""
    rng = np.random.default_rng(seed)
    shapes = {
        name: tuple(module.weight.shape[1:])
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    shapes.pop(next(iter(shapes)))
    plans = []
    for index in range(count):
        share, mild = rng.uniform(0.15, 0.95), rng.uniform(0.5, 4)
        weights = np.exp(-mild * np.array([9 / (a * b) - 1 for a, b in KERNELS]) / 4)
        plan: dict[str, Structure] = {}
        for name, dense in shapes.items():
            if rng.random() > share:
                continue
            kernel = KERNELS[rng.choice(len(KERNELS), p=weights / weights.sum())]
            narrow = index % 2 and rng.random() < 0.25
            channels = dense[0] // 2 + 1 if narrow else dense[0]
            structure = Structure(dense, (channels, *kernel))
            if not structure.is_dense:
                plan[name] = structure
        plans.append(plan)
    return plans


def fitted(model: nn.Module, plan: Plan, layers: Mapping[str, DenseLayer]) -> nn.Module:
    """All of a plan's layers by least squares on what the original reads; batch norm is to come."""
    changed = copy.deepcopy(model)
    modules = dict(changed.named_modules())
    for name, structure in plan.items():
        weight = modules[name].get_parameter("weight")
        weight.data.copy_(layers[name].fit(structure).weight)
    return changed


def projected(model: nn.Module, plan: Plan) -> nn.Module:
    changed = copy.deepcopy(model)
    project_weights(changed, plan)
    return changed


def trained(model: nn.Module, plan: Plan, data: Dataset, images: int) -> nn.Module:
    """One epoch inside the subspaces, on a part of the training images."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(3))[:images]
    train, val = data.train.part(order), data.val.part(torch.arange(64))
    part = dataclasses.replace(data, train=train, val=val)
    recipe = Recipe(1, 0, augment=("crop", "flip"))
    task = Classification(part, recipe.batch_size, recipe.augment)
    return finetune(model, plan, task, recipe)[0]


def predictors(
    graph: object, plans: list[Plan], samples: Samples, seconds: float
) -> dict[str, Floats]:
    """Every predictor's sum over each plan."""
    candidates: dict[str, dict[Structure, None]] = {}
    for plan in plans:
        for layer, structure in plan.items():
            candidates.setdefault(layer, {})[structure] = None
    bare = Samples(samples.inputs)
    print(f"{sum(map(len, candidates.values()))} candidates of {len(candidates)} layers")

    def predict(data: Samples, **how: object) -> Mapping[str, Mapping[Structure, PredictedLoss]]:
        start = time.perf_counter()
        settings = SensitivitySettings(**how)  # type: ignore[arg-type]
        found = predict_losses(graph, {n: list(s) for n, s in candidates.items()}, data, settings)  # type: ignore[arg-type]
        entries = [entry for layer in found.values() for entry in layer.values()]
        measured = sum(entry.how == "measured" for entry in entries)
        print(f"  {measured} of {len(entries)} measured in {time.perf_counter() - start:.1f} s")
        return found

    labelled, divergence = predict(samples, seconds=1e9), predict(bare, seconds=1e9)
    raw = predict(bare, seconds=1e9, rescale=False)
    short = predict(bare, seconds=seconds)
    short_labelled = predict(samples, seconds=seconds)

    def total(
        found: Mapping[str, Mapping[Structure, PredictedLoss]],
        value: Callable[[PredictedLoss], float],
    ) -> Floats:
        return np.array([sum(value(found[n][s]) for n, s in p.items()) for p in plans])

    return {
        "layers structured": np.array([float(len(plan)) for plan in plans]),
        "residual^2": total(divergence, lambda e: e.residual**2),
        "fit error": total(divergence, lambda e: e.error),
        "cross-entropy, interpolated": total(short_labelled, lambda e: e.loss),
        "divergence, interpolated": total(short, lambda e: e.loss),
        "top-1 points, measured": total(labelled, lambda e: e.points or 0.0),
        "cross-entropy, measured": total(labelled, lambda e: e.loss),
        "divergence, not rescaled": total(raw, lambda e: e.loss),
        "divergence, measured": total(divergence, lambda e: e.loss),
        "  sum of square roots": total(divergence, lambda e: e.loss**0.5),
        "  sum of log(1 + x)": total(divergence, lambda e: float(np.log1p(e.loss))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--samples", type=int, default=512, help="half are run, half fitted to")
    parser.add_argument("--seconds", type=float, default=10, help="of the interpolated predictors")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--train-images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    model = load(options.checkpoint)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = load_dataset(DataSpec(options.data, mean=mean, std=std), channels=3)
    graph = export_onnx(model, torch.zeros(2, 3, 32, 32))
    plans = draw_plans(model, options.plans, options.seed)
    images, labels = some(data, data.train, options.samples, 0)
    found = predictors(
        graph, plans, Samples({"input": images.numpy()}, labels.numpy()), options.seconds
    )

    calibration, _ = some(data, data.train, CALIBRATION, 1)
    tests, truth = some(data, data.val, options.images, 2)
    modules = dict(model.named_modules())
    names = {name for plan in plans for name in plan}
    layers = {
        name: DenseLayer(
            modules[name].get_parameter("weight").detach(),
            torch.zeros(len(modules[name].weight)),
            moments,
        )
        for name, moments in second_moments(graph, names, {"input": images.numpy()}).items()
    }

    def accuracy(changed: nn.Module, *, calibrate: bool = True) -> float:
        if calibrate:
            reestimate_batch_norm(changed, calibration.split(256))

        pairs = zip(tests.split(250), truth.split(250), strict=True)
        with torch.no_grad(), eval_mode(changed):
            right = sum(int((changed(x).argmax(1) == y).sum()) for x, y in pairs)
        return 100 * right / len(truth)

    base = accuracy(model, calibrate=False)
    real: dict[str, list[float]] = {}
    start = time.perf_counter()
    for plan in plans:
        real.setdefault("projected", []).append(base - accuracy(projected(model, plan)))
        real.setdefault("fitted", []).append(base - accuracy(fitted(model, plan, layers)))
        if options.train:
            tuned = trained(model, plan, data, options.train_images)
            real.setdefault("trained", []).append(base - accuracy(tuned, calibrate=False))
    print(f"accuracy {base:.1f} %; {len(plans)} plans in {time.perf_counter() - start:.0f} s")
    for name, losses in real.items():
        print(f"points lost, {name}: {' '.join(f'{loss:.1f}' for loss in sorted(losses))}")
    print(f"{'Spearman, ' + str(len(plans)) + ' plans':30}" + "".join(f"{n:>11}" for n in real))
    for name, values in found.items():
        row = "".join(f"{spearmanr(values, losses).statistic:11.3f}" for losses in real.values())
        print(f"{name:30}{row}")


if __name__ == "__main__":
    main()
