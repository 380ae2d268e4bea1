"""Accuracy at equal measured latency: planned structure, uniform structures, channel pruning.

    python benchmarks/planning.py all --network resnet20 --data cifar10_jpeg --work planbench

On ONNX Runtime (one thread, batch 1, CPU), after the same short fine-tune, on CIFAR-10 as JPEG
files. The parts, each of which keeps its results in WORK/NETWORK, so that a rerun goes on where it
stopped; `all` runs them in this order:

- original: the trained network; ResNet-56 is first adapted to the JPEG files (--adapt-epochs).
- uniform: latency of one structure for all 3x3 convolutions but the stem. The latencies of some of
  them are the targets (--targets), so that they meet these exactly.
- prune: channel pruning with Torch-Pruning (`pip install --no-deps torch-pruning==1.6.1`). For each
  target and way of pruning, the ratio whose latency, measured in turns with the target's model,
  meets it within 2 %. The ways compete before the fine-tune: the --pruned best, by accuracy on
  training images after batch norm is re-estimated (EagleEye, Li et al., ECCV 2020), go on.
- plan: `structconv plan` for each target. A plan made otherwise can be put in its place, as
  WORK/NETWORK/TARGET.plan.json.
- tune: the same fine-tune for all (--epochs, --seed), with the original as the teacher of all. A
  uniform structure competes for a target that it is as fast as, unless its weights are a subset of
  those of another that competes.
- table: latency of the tuned models of each target, in turns, and a table in Markdown. Where
  several seeds were tuned, it gives the accuracy of each.

Padded shortcuts are written as 1x1 convolutions (see `pruning`), in the original and in everything
made from it.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from equal_latency import Met, judge, meet, screen, speed_over
from pruning import WAYS, Pruning, pruned, with_convolved_shortcuts
from torch import nn

from structconv_cli.cost import dense_cost, structured_cost
from structconv_cli.data.dataset import Dataset, load_dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.json_file import read_json, write_json
from structconv_cli.model.architecture import Architecture, build_model
from structconv_cli.model.checkpoint import load_checkpoint, load_into
from structconv_cli.model.inventory import take_inventory
from structconv_cli.onnx.example_inputs import example_inputs
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import save_onnx
from structconv_cli.onnx.lower import Measured, lower
from structconv_cli.onnx.target import Target
from structconv_cli.plan import read_plan
from structconv_cli.progress import Observer
from structconv_cli.rewrite import project_weights
from structconv_cli.structure import Structure
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.task import Evaluation
from structconv_cli.timing.benchmark import BenchmarkSettings, benchmark
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import RESOLUTION, Speedup
from structconv_cli.training.finetune import finetune
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import FineTuneResult

PARTS = ("original", "uniform", "prune", "plan", "tune", "table")

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = ("crop", "flip")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

CHECKPOINTS = {"resnet20": "resnet20_cifar10_jpeg.pt", "resnet56": "resnet56-4bfd9763.th"}
ADAPTED = ("resnet56",)
"""Networks that were trained on other files than the JPEG ones."""

UNIFORM: Mapping[str, tuple[tuple[int, int], float]] = {
    "2x3": ((2, 3), 1.0),
    "3x2": ((3, 2), 1.0),
    "2x2": ((2, 2), 1.0),
    "1x3": ((1, 3), 1.0),
    "3x1": ((3, 1), 1.0),
    "2x1": ((2, 1), 1.0),
    "1x2": ((1, 2), 1.0),
    "2x2-half": ((2, 2), 0.5),
    "1x1": ((1, 1), 1.0),
}
"""Kernel, and the fraction of input channels kept as differences."""

ORIGINAL = "original"
TUNED_ORIGINAL = "original-tuned"


@dataclass(frozen=True)
class PrunedResult:
    """A way of pruning at the ratio that meets a target.

    Attributes:
        pruning: The way and the ratio.
        widths: Output channels of every convolution.
        speed: Latency of the target's model over that of the pruned one: 1 meets the target.
        screened: Accuracy (%) on training images, batch norm re-estimated, before any training.
    """

    pruning: Pruning
    widths: tuple[int, ...]
    speed: float
    screened: float


@dataclass(frozen=True)
class PrunedResults:
    """What met one target, best first, and the ways that cannot reach it."""

    found: tuple[PrunedResult, ...]
    unreachable: tuple[str, ...]


@dataclass(frozen=True)
class TunedResult:
    """A variant after the fine-tune."""

    macs: int
    accuracy: float
    tuning: FineTuneResult


@dataclass(frozen=True, eq=False)
class Variant:
    """What is fine-tuned: the original in these structures, or pruned."""

    name: str
    structures: Mapping[str, Structure]
    pruning: Pruning | None = None


class Log(Observer):
    """Prints notes."""

    def note(self, text: str) -> None:
        print(f"    {text}", flush=True)


def resnet20() -> nn.Module:
    """The architecture of `original.pt` of ResNet-20, for `--arch`."""
    return with_convolved_shortcuts(architecture("resnet20"))


def resnet56() -> nn.Module:
    """The architecture of `original.pt` of ResNet-56, for `--arch`."""
    return with_convolved_shortcuts(architecture("resnet56"))


FACTORIES: Mapping[str, Callable[[], nn.Module]] = {"resnet20": resnet20, "resnet56": resnet56}


def architecture(network: str) -> nn.Module:
    return build_model(Architecture(f"{ROOT}/sample_models/resnet_cifar.py:{network}"))


class Study:
    """One network's parts, and the folder that holds what they found."""

    def __init__(self, network: str, options: argparse.Namespace) -> None:
        self.network, self.options = network, options
        self.folder: Path = options.work / network
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe = Recipe(
            epochs=options.epochs,
            regularised=-(-options.epochs // 3),
            distillation=0.5,
            augment=AUGMENT,
            seed=options.seed,
        )
        self._data: Dataset | None = None

    @property
    def data(self) -> Dataset:
        if self._data is None:
            spec = DataSpec(str(self.options.data), mean=MEAN, std=STD)
            data = load_dataset(spec, channels=3)
            count = min(self.options.train_images, len(data.train))
            chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1))
            left = torch.arange(0, len(data.val), max(1, len(data.val) // self.options.test_images))
            some = data.train.part(chosen[:count])
            self._data = replace(data, train=some, val=data.val.part(left))
        return self._data

    def model(self) -> nn.Module:
        """The original, which `original` wrote."""
        model = FACTORIES[self.network]()
        load_into(model, load_checkpoint(self.folder / "original.pt"))
        return model.eval()

    def original(self) -> None:
        file = self.folder / "original.pt"
        if file.exists():
            return
        model = architecture(self.network)
        load_into(model, load_checkpoint(self.options.checkpoints / CHECKPOINTS[self.network]))
        model = with_convolved_shortcuts(model).eval()
        if self.network in ADAPTED:
            epochs = self.options.adapt_epochs
            # Without a teacher: the network as it is would hold the adapted one back.
            recipe = replace(self.recipe, epochs=epochs, regularised=0, distillation=0.0, seed=0)
            model, record = tune(model, {}, self.data, recipe)
            write_json(record, self.folder / "adaptation.json")
        accuracy = judge(model, self.data)
        write_json(accuracy, self.folder / "original.json")
        write_onnx(model, {}, self.folder, f"{ORIGINAL}.onnx")
        torch.save(model.state_dict(), file)

    def uniform(self) -> None:
        file = self.folder / "uniform.json"
        if not file.exists():
            files = {ORIGINAL: self.folder / f"{ORIGINAL}.onnx"}
            for name in dict.fromkeys((*self.options.targets, *self.options.uniform)):
                model = self.model()
                structures = uniform_structures(model, name)
                project_weights(model, structures)
                files[name] = write_onnx(model, structures, self.folder, f"{name}.onnx")
            write_json(benchmark(files, BenchmarkSettings(rounds=self.options.rounds)), file)
        for name, gain in speedups(read_json(file, SettingResult)).items():
            print(f"{name:10} {gain.median:.3f} ({gain.low:.3f} to {gain.high:.3f})", flush=True)

    def uniform_speedups(self) -> dict[str, Speedup]:
        return speedups(read_json(self.folder / "uniform.json", SettingResult))

    def prune(self) -> None:
        for target in self.options.targets:
            file = self.folder / f"{target}.prune.json"
            if file.exists():
                continue
            found, unreachable = [], []
            for way in (way for way in WAYS if way.way in self.options.ways):
                met = self._meet(target, way)
                if met is None:
                    unreachable.append(way.way)
                    continue
                widths = [m.out_channels for m in met.model.modules() if isinstance(m, nn.Conv2d)]
                screened = screen(met.model, self.data)
                result = PrunedResult(
                    replace(way, ratio=met.ratio), tuple(widths), met.speed, screened
                )
                found.append(result)
                print(
                    f"{target}: {way.way:16} ratio {met.ratio:.3f}, {met.speed:.3f} of the "
                    f"target's speed, {screened:.1f} % before training",
                    flush=True,
                )
            found.sort(key=lambda result: -result.screened)
            write_json(PrunedResults(tuple(found), tuple(unreachable)), file)

    def _meet(self, target: str, way: Pruning) -> Met | None:
        """The ratio at which a way of pruning is as fast as the target's model."""
        file = self.folder / f"{target}.onnx"
        scratch = self.folder / "pruned.onnx"
        settings = BenchmarkSettings(rounds=self.options.prune_rounds)
        return meet(
            lambda ratio: pruned(self.model(), IMAGES, replace(way, ratio=ratio)),
            lambda model: speed_over(file, model, IMAGES, scratch, settings),
            lambda text: print(f"    {way.way} {text}", flush=True),
        )

    def plan_file(self, target: str) -> Path:
        return self.folder / f"{target}.plan.json"

    def plan(self) -> None:
        for target in self.options.targets:
            if self.plan_file(target).exists():
                continue
            # The target's latency at this time, rather than when uniform structures were timed.
            files = {name: self.folder / f"{name}.onnx" for name in (ORIGINAL, target)}
            result = benchmark(files, BenchmarkSettings(rounds=self.options.rounds))
            command = [sys.executable, "-m", "structconv_cli", "plan"]
            command += [str(self.folder / "original.pt"), "--arch", f"{__file__}:{self.network}"]
            command += ["--data", str(self.options.data), "--target-latency"]
            command += [f"{result.models[1].p50_ms:.4f}ms", "--out", str(self.plan_file(target))]
            command += ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)

    def variants(self, target: str) -> list[Variant]:
        """All that competes for one target; what is not there yet is left out, and named."""
        gains = self.uniform_speedups()
        least = gains[target].median / RESOLUTION
        fast = {
            name: uniform_structures(self.model(), name)
            for name, gain in gains.items()
            if gain.median >= least and name in self.options.uniform
        }
        found = [
            Variant(name, structures)
            for name, structures in fast.items()
            if not any(within(structures, other) for other in fast.values())
        ]
        file = self.folder / f"{target}.prune.json"
        if file.exists():
            for result in read_json(file, PrunedResults).found[: self.options.pruned]:
                name = f"{target}-pruned-{result.pruning.way}"
                found.append(Variant(name, {}, result.pruning))
        else:
            print(f"{target}: not pruned yet")
        if self.plan_file(target).exists():
            structures = read_plan(self.plan_file(target)).structures
            found.append(Variant(f"{target}-planned", structures))
        else:
            print(f"{target}: no plan yet")
        return [*found, Variant(TUNED_ORIGINAL, {})]

    def tuned(self, variant: Variant) -> Path:
        """The file of a variant's result; its model is beside it."""
        return (
            self.folder / f"tuned-{self.recipe.epochs}-{self.recipe.seed}" / f"{variant.name}.json"
        )

    def tune(self) -> None:
        for variant in [v for target in self.options.targets for v in self.variants(target)]:
            file = self.tuned(variant)
            if file.exists():
                continue
            print(f"{variant.name}: {self.recipe.epochs} epochs", flush=True)
            file.parent.mkdir(exist_ok=True)
            original = self.model()
            if variant.pruning:
                model = pruned(self.model(), IMAGES, variant.pruning)
                model, record = tune(model, {}, self.data, self.recipe, original)
            else:
                model, record = tune(original, variant.structures, self.data, self.recipe)
            write_onnx(model, variant.structures, self.folder, file.with_suffix(".onnx"))
            accuracy = record.stages[-1].evaluation.score
            write_json(TunedResult(macs(model, variant.structures), accuracy, record), file)

    def table(self) -> None:
        """Measure the tuned models, and write WORK/NETWORK/table.md."""
        accuracy = read_json(self.folder / "original.json", Evaluation).score
        lines: list[str] = []
        for target in self.options.targets:
            variants = [v for v in self.variants(target) if self.tuned(v).exists()]
            gains = self._measure_tuned(target, variants)
            lines += [
                f"\n{self.network}, as fast as {target}, {self.recipe.epochs} epochs:\n",
                "| variant | speed-up (95 % interval) | MACs (M) | accuracy (%) |",
                "| --- | --- | --- | --- |",
                f"| {ORIGINAL} | 1 | {macs(self.model(), {}) / 1e6:.1f} | {accuracy:.2f} |",
                *(self._line(variant, gains[variant.name]) for variant in variants),
            ]
        (self.folder / "table.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))

    def _measure_tuned(self, target: str, variants: list[Variant]) -> dict[str, Speedup]:
        files = {v.name: self.tuned(v) for v in variants}
        kept = self.folder / f"tuned-{self.recipe.epochs}-{self.recipe.seed}.{target}.json"
        if kept.exists():
            gains = speedups(read_json(kept, SettingResult))
            if set(gains) == set(files):
                return gains
        models = {name: file.with_suffix(".onnx") for name, file in files.items()}
        models = {ORIGINAL: self.folder / f"{ORIGINAL}.onnx", **models}
        result = benchmark(models, BenchmarkSettings(rounds=self.options.rounds))
        write_json(result, kept)
        return speedups(result)

    def _line(self, variant: Variant, gain: Speedup) -> str:
        pattern = f"tuned-{self.recipe.epochs}-*/{variant.name}.json"
        results = [read_json(file, TunedResult) for file in sorted(self.folder.glob(pattern))]
        speed = f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})"
        accuracy = ", ".join(f"{result.accuracy:.2f}" for result in results)
        return f"| {variant.name} | {speed} | {results[0].macs / 1e6:.1f} | {accuracy} |"


def uniform_structures(model: nn.Module, name: str) -> dict[str, Structure]:
    """One of `UNIFORM` for every 3x3 convolution but the first."""
    kernel, share = UNIFORM[name]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {
        layer: Structure(
            (module.in_channels, 3, 3),
            (min(module.in_channels, round(share * module.in_channels) + 1), *kernel),
        )
        for layer, module in list(layers.items())[1:]
        if module.kernel_size == (3, 3)
    }


def within(structures: Mapping[str, Structure], others: Mapping[str, Structure]) -> bool:
    """Whether every weight of these structures is one of the others too, and they are different.

    Subspaces of different reduced sizes are not nested, unless the larger axis is dense.
    """
    sizes = [
        (small, other, dense)
        for layer, structure in structures.items()
        for small, other, dense in zip(
            structure.reduced, others[layer].reduced, structure.dense, strict=True
        )
    ]
    nested = all(other in (small, dense) for small, other, dense in sizes)
    return nested and structures != others


def tune(
    model: nn.Module,
    structures: Mapping[str, Structure],
    data: Dataset,
    recipe: Recipe,
    teacher: nn.Module | None = None,
) -> tuple[nn.Module, FineTuneResult]:
    """The same fine-tune for all; a pruned model needs the original as its teacher."""
    task = Classification(data, recipe.batch_size, recipe.augment, recipe.seed)
    return finetune(model, structures, task, recipe, teacher=teacher, observer=Log())


def write_onnx(
    model: nn.Module, structures: Mapping[str, Structure], folder: Path, name: str | Path
) -> Path:
    """Export a model, lower its structured layers, and write it."""
    proto = export_onnx(model, IMAGES)
    if structures:
        how = Measured(Target(), example_inputs(proto, 1, {}), folder / "timings.json")
        proto, _ = lower(proto, structures, how)
    save_onnx(proto, folder / name)
    return folder / name


def macs(model: nn.Module, structures: Mapping[str, Structure]) -> int:
    """Multiplications for one image."""
    return sum(
        (
            structured_cost(layer.spec, structures[layer.spec.name], layer.output_size)
            if layer.spec.name in structures
            else dense_cost(layer.spec, layer.output_size)
        ).multiplications
        for layer in take_inventory(model, IMAGES).layers
    )


def speedups(result: SettingResult) -> dict[str, Speedup]:
    """By name, over the first model."""
    return {gain.candidate: gain for gain in result.speedups}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="+", choices=("all", *PARTS), metavar="PART", help=", ".join(PARTS))
    add("--network", choices=list(FACTORIES), required=True)
    add("--data", type=Path, required=True, help="folder with train/ and test/")
    add("--work", type=Path, required=True, help="folder of all that is kept")
    add("--checkpoints", type=Path, default=ROOT.parent / "shared" / "checkpoints")
    add("--targets", nargs="+", choices=list(UNIFORM), default=["2x2", "2x1"], metavar="NAME",
        help=f"of {', '.join(UNIFORM)} (default: 2x2 2x1)")  # fmt: skip
    add("--uniform", nargs="+", choices=list(UNIFORM), default=list(UNIFORM), metavar="NAME",
        help="uniform structures that compete (default: all)")  # fmt: skip
    add("--ways", nargs="+", choices=[way.way for way in WAYS], metavar="WAY",
        default=[way.way for way in WAYS], help="of pruning to try (default: all)")  # fmt: skip
    add("--train-images", type=int, default=50_000, help="of the fine-tune (default: all)")
    add("--test-images", type=int, default=10_000, help="evenly chosen (default: all)")
    add("--torch-threads", type=int, default=1)
    add("--epochs", type=int, default=3, help="of the fine-tune (default: 3)")
    add("--adapt-epochs", type=int, default=2, help="of the original ResNet-56 (default: 2)")
    add("--seed", type=int, default=0, help="of the fine-tune")
    add("--pruned", type=int, default=3, help="ways of pruning to fine-tune for each target")
    add("--rounds", type=int, default=30, help="turns of every model (default: 30)")
    add("--prune-rounds", type=int, default=12, help="turns while the ratio is searched")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.torch_threads)
    study = Study(options.network, options)
    for part in PARTS if "all" in options.parts else options.parts:
        print(f"== {part}", flush=True)
        getattr(study, part)()


if __name__ == "__main__":
    main()
