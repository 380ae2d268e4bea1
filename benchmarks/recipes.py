"""How to fine-tune into a structure: recipes compared at equal epochs.

    python benchmarks/recipes.py run default half --epochs 3 --data cifar10_jpeg --work recipes
    python benchmarks/recipes.py table --work recipes

ResNet-20 (or 56) on CIFAR-10 as JPEG files, every 3x3 convolution but the stem to n=2 (2.2 times
fewer MACs), or a plan (--plan). `default` is what `structconv convert` does (it chooses `crop,flip`
for these images itself); in the others half of the loss follows the original, unless their names
say otherwise (`RECIPES`). `dense` is the original tuned as long by the default, without structure:
what the epochs themselves bring; `dense-labels`
adapts a network to new data. Results are kept in WORK, one file each, with the tuned weights beside
it; `table` prints them in Markdown. A run that was stopped goes on from its last epoch when it is
started again.

To compare plans, a short training tells more than test accuracy does: WORK for each plan, and
`--epochs 3 --per-class 1000 --aside 1000`, which judges on training images kept aside.

Steps are computed in bfloat16 unless --precision fp32 is given: half of the time on a processor
that has it, several times as long on one that has not.
"""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from planning import CHECKPOINTS, MEAN, ROOT, STD, Log, architecture, uniform_structures
from torch import Tensor, nn

from structconv_cli.data.dataset import load_dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import Split
from structconv_cli.json_file import read_json, write_json
from structconv_cli.model.checkpoint import load_checkpoint, load_into
from structconv_cli.onnx.export import export_onnx
from structconv_cli.plan import read_plan
from structconv_cli.reconstruction.apply import apply_to_module, layers_without_bias
from structconv_cli.reconstruction.result import ReconstructionSettings
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.reconstruction.sequential import reconstruct
from structconv_cli.structure import Structure
from structconv_cli.tasks.classification import Classification
from structconv_cli.training.finetune import finetune
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.recipe import OPTIMIZERS, Recipe
from structconv_cli.training.record import FineTuneResult
from structconv_cli.unfinished import Unfinished

WHOLE = -1.0
"""Stands for all epochs."""

BASE = Recipe(1, 0.0, distillation=0.5, augment=("crop", "flip"))
FOLLOWING = {"distillation": Classification.following}
FITTED = {"aim": "least squares"}
HALF = {"regularised": 0.1, **FITTED}
PROXIMAL = {"regularised": 1 / 3, "residual": "proximal", "sr_lambda": 2.0}
RISING = {"regularised": WHOLE, "residual": "free", "strength": "rising", "sr_lambda": 2.0}

Row = tuple[str, int, str, int]
"""Network, training images, recipe, seed."""

RECIPES: Mapping[str, dict[str, Any]] = {
    "default": {**HALF, **FOLLOWING},
    "dense": FOLLOWING,
    "dense-half": {},
    "dense-labels": {"distillation": 0.0},
    "half": HALF,
    "half-hints": {**HALF, "hints": 1.0},
    "half-ema": {**HALF, "averaging": 0.998},
    "half-lr01": {**HALF, "learning_rate": 0.01},
    "half-lr05": {**HALF, "learning_rate": 0.05},
    "half-linear": {**HALF, "annealing": "linear"},
    "half-adamw": {**HALF, "optimizer": "adamw", **OPTIMIZERS["adamw"]},
    "half-wd1": {**HALF, "weight_decay": 1e-4},
    "half-plain": {**HALF, "augment": ()},
    "half-crop": {**HALF, "augment": ("crop",)},
    "half-flip": {**HALF, "augment": ("flip",)},
    "labels": {**HALF, "distillation": 0.0},
    "labels-hints": {**HALF, "hints": 1.0, "distillation": 0.0},
    "third": {"regularised": 1 / 3},
    "tenth": {"regularised": 0.1},
    "tenth-labels": {"regularised": 0.1, "distillation": 0.0},
    "subspace": {},
    "subspace-labels": {"distillation": 0.0},
    "subspace-d9": {"distillation": 0.9},
    "subspace-lr05": {"learning_rate": 0.05},
    "fitted": FITTED,
    "fitted-labels": {**FITTED, "distillation": 0.0},
    "paper": {"regularised": WHOLE, "residual": "free", "distillation": 0.0},
    "free": {"regularised": WHOLE, "residual": "free"},
    "rising": RISING,
    "rising-labels": {**RISING, "distillation": 0.0},
    "proximal": PROXIMAL,
    "proximal-labels": {**PROXIMAL, "distillation": 0.0},
}


@dataclass(frozen=True)
class Outcome:
    """One run."""

    network: str
    name: str
    images: int
    precision: str
    seconds: float
    result: FineTuneResult

    @property
    def epochs(self) -> int:
        return self.result.recipe.epochs

    def row(self) -> Row:
        return self.network, self.images, self.name, self.result.recipe.seed

    def cell(self) -> str:
        scores = {stage.stage: stage.evaluation.score for stage in self.result.stages}
        final = self.result.stages[-1].evaluation
        entered = scores["batch norm re-estimated"]
        return f"{final.score:.2f} ({entered:.2f}), loss {final.loss:.4f}"


def run(options: argparse.Namespace, name: str, unfinished: Unfinished, weights: Path) -> Outcome:
    """Tune by the recipe of this name; the tuned weights are written to `weights`."""
    changes = dict(RECIPES[name])
    share = changes.pop("regularised", 0.0)
    share = 1.0 if share == WHOLE else share
    recipe = replace(
        BASE,
        epochs=options.epochs,
        regularised=share * options.epochs,
        seed=options.seed,
        **changes,
    )
    data = load_dataset(DataSpec(str(options.data), mean=MEAN, std=STD), channels=3)
    if options.aside:
        data = replace(data, val=part_of_each(data.train, slice(-options.aside, None)))
    if options.per_class or options.aside:
        kept = slice(options.per_class or -options.aside)
        data = replace(data, train=part_of_each(data.train, kept))
    model = architecture(options.network)
    original = options.weights or options.checkpoints / CHECKPOINTS[options.network]
    load_into(model, load_checkpoint(original))
    structures = {} if name.startswith("dense") else structures_of(model, options)
    task = Classification(data, recipe.batch_size, recipe.augment, recipe.seed)
    model = model.float().eval()
    tuned, result = finetune(
        model,
        structures,
        task,
        recipe,
        hardware=Hardware(
            precision=options.precision,
            channels_last=options.channels_last,
            compiled=options.compile,
        ),
        keeper=unfinished,
        observer=Log(),
        fit=lambda: fitted(model, structures, task),
        judge_epochs=False,
    )
    torch.save(tuned.state_dict(), weights)
    seconds = sum(stage.seconds for stage in result.stages)
    images = len(data.train)
    return Outcome(options.network, name, images, options.precision, seconds, result)


def part_of_each(split: Split, examples: slice) -> Split:
    """Some examples of each class."""
    labels = split.labels
    assert labels is not None
    found = [(labels == label).nonzero()[examples, 0] for label in labels.unique()]
    return split.part(torch.cat(found))


def structures_of(model: nn.Module, options: argparse.Namespace) -> Mapping[str, Structure]:
    if options.plan is not None:
        return read_plan(options.plan).structures
    return uniform_structures(model, options.structure)


def fitted(
    original: nn.Module, structures: Mapping[str, Structure], task: Classification
) -> dict[str, Tensor]:
    """The model's parameters, fitted by least squares on 500 training images."""
    model = copy.deepcopy(original)
    (images,), _ = task.samples(500)
    graph = export_onnx(model, images[:2])
    settings = ReconstructionSettings(without_bias=layers_without_bias(model, graph))
    found = reconstruct(graph, structures, Samples({"input": images.numpy()}), settings)
    apply_to_module(model, graph, found)
    return dict(model.named_parameters())


def table(work: Path) -> None:
    found = [read_json(file, Outcome) for file in sorted(work.glob("*.json"))]
    budgets = sorted({outcome.epochs for outcome in found})
    rows: dict[Row, dict[int, str]] = {}
    for outcome in found:
        rows.setdefault(outcome.row(), {})[outcome.epochs] = outcome.cell()
    print("accuracy (%) by epochs, in brackets as it entered the subspaces; loss\n")
    print("| network | images | recipe | seed |", *(f"{epochs} |" for epochs in budgets))
    print("| --- " * (4 + len(budgets)) + "|")
    for (*words, seed), cells in sorted(rows.items()):
        scores = [cells.get(epochs, "") for epochs in budgets]
        print("|", " | ".join([*map(str, words), str(seed), *scores]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []])
    parser.add_argument("--network", choices=list(CHECKPOINTS), default="resnet20")
    parser.add_argument("--structure", default="2x2")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--per-class", type=int, help="train with so many images of each class")
    parser.add_argument(
        "--aside", type=int, help="judge on so many training images of each class, the last ones"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("recipes"))
    parser.add_argument("--checkpoints", type=Path, default=ROOT.parent / "shared" / "checkpoints")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    for name in options.names:
        file = options.work / f"{options.network}-{options.epochs}-{name}-{options.seed}.json"
        if options.part == "run" and not file.exists():
            print(f"== {name}", flush=True)
            unfinished = Unfinished(file.with_suffix(".partial"), {})
            unfinished.path.mkdir(exist_ok=True)
            write_json(run(options, name, unfinished, file.with_suffix(".pt")), file)
            unfinished.discard()
    table(options.work)


if __name__ == "__main__":
    main()
