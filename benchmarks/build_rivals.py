"""A low-rank and a channel-pruned variant of a run's original, as fast as its structured model.

    python benchmarks/build_rivals.py structconv-run --arch model.py:build --epochs 6
    structconv benchmark structconv-run --against structconv-run-rivals/low_rank.onnx \\
        --against structconv-run-rivals/pruned.onnx

- low_rank: Tucker-2 (`pip install tensorly`) or spatial SVD of k x k convolutions, SVD of 1x1
  convolutions and linear layers; ranks in multiples of 8.
- pruned: whole channels, by Torch-Pruning (`pip install --no-deps torch-pruning==1.6.1`).

For each way of either (--low-rank-ways, --pruned-ways), the ratio is searched whose latency on ONNX
Runtime, measured in turns with structured.onnx, meets it within 2 %; where rounding allows none,
the next faster one. The ways compete by accuracy on training images after batch norm is
re-estimated. The best one is fine-tuned with the run's recipe, without a structural phase, the
original as the teacher: for as many epochs as the structured model was, unless --epochs says
otherwise. Each ONNX file says of itself how it was made; a JSON file beside it has the details.
What is there already is not made again.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from equal_latency import meet, screen, speed_over
from torch import nn

from structconv_cli.conversion import ConvertResult
from structconv_cli.cost import dense_cost
from structconv_cli.data.dataset import Dataset, load_dataset
from structconv_cli.errors import StructconvError
from structconv_cli.json_file import read_json, write_json
from structconv_cli.model.architecture import Architecture, parse_arguments
from structconv_cli.model.inventory import take_inventory
from structconv_cli.model.opening import open_model
from structconv_cli.model_graph import model_channels
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import save_onnx
from structconv_cli.progress import Observer
from structconv_cli.run_folder import RunFolder
from structconv_cli.tasks.choice import task_for
from structconv_cli.timing.benchmark import BenchmarkSettings
from structconv_cli.training.finetune import finetune
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import FineTuneResult

LOW_RANK, PRUNED = "low_rank", "pruned"
LOW_RANK_WAYS = tuple(
    f"{method}-{by}-8-from-{narrowest}"
    for method, by, narrowest in product(("tucker", "spatial"), ("energy", "share"), (0, 32))
)
PRUNED_WAYS = tuple(
    f"{where}-{ranked}-8" for where, ranked in product(("all", "blocks"), ("global", "local"))
)
SEARCH_BLOCKS = 3
"""Times that processes are started anew for each measurement: some are luckier than others."""


@dataclass(frozen=True)
class WayResult:
    """A way at the ratio that meets the target.

    Attributes:
        way: In words.
        ratio: See `equal_latency.Met`.
        speed: Latency of structured.onnx over that of the variant, while it was searched.
        screened: The metric on training images before the fine-tune, batch norm re-estimated.
    """

    way: str
    ratio: float
    speed: float
    screened: float


@dataclass(frozen=True)
class RivalResult:
    """A rival that was built.

    Attributes:
        name: Of its file, without suffix.
        how: What its ONNX file says of itself.
        ways: Those that met the target, the one that went on first.
        unreachable: Those that are slower at any ratio.
        multiplications, parameters: Of the whole rival; the former for one image, of its
            convolutions and linear layers.
        tuning: Its fine-tune; the last stage is the result.
    """

    name: str
    how: str
    ways: tuple[WayResult, ...]
    unreachable: tuple[str, ...]
    multiplications: int
    parameters: int
    tuning: FineTuneResult


class RivalError(StructconvError):
    """A rival cannot be built."""


class Log(Observer):
    """Prints notes."""

    def note(self, text: str) -> None:
        say(text)


def say(text: str) -> None:
    print(f"    {text}", flush=True)


@dataclass(frozen=True, eq=False)
class Source:
    """What the rivals are built from.

    Attributes:
        run: The finished run.
        original: The user's model, of plain layers, in eval mode.
        data: What it was tuned and judged on.
        recipe: How the rivals are fine-tuned.
    """

    run: RunFolder
    original: nn.Module
    data: Dataset
    recipe: Recipe

    @property
    def example(self) -> torch.Tensor:
        """Two prepared validation images."""
        return self.data.prepare(self.data.val.first(2))


def open_source(options: argparse.Namespace) -> Source:
    """Read a run, its checkpoint and its data.

    Raises:
        StructconvError: One of them cannot be used.
    """
    run = RunFolder(options.run)
    info = run.info()
    if info.data is None or info.kind == "onnx":
        raise RivalError(
            f"{options.run} is of "
            + ("an ONNX file" if info.kind == "onnx" else "no images")
            + "; rivals are fine-tuned, and so need a run of a checkpoint with --data."
        )
    recipe = read_json(run.convert_result, ConvertResult).finetune.recipe
    # A file that run.json names is not run; the user names it.
    named = options.arch and Architecture(options.arch, parse_arguments(options.arch_arg))
    opened = open_model(options.checkpoint or Path(info.checkpoint), named, Log())
    data = load_dataset(info.data, channels=model_channels(opened.model))
    epochs = recipe.epochs if options.epochs is None else options.epochs
    recipe = replace(recipe, epochs=epochs, regularised=0.0)
    example = data.prepare(data.val.first(2))
    return Source(run, opened.plain(example).model.eval(), data, recipe)


def low_rank_variant(source: Source, way: str, ratio: float) -> nn.Module:
    from low_rank import WAYS, low_ranked

    (chosen,) = (known for known in WAYS if known.way == way)
    model = copy.deepcopy(source.original)
    return low_ranked(model, replace(chosen, ratio=ratio))[0]


def pruned_variant(source: Source, way: str, ratio: float) -> nn.Module:
    from pruning import WAYS, pruned, with_convolved_shortcuts

    (chosen,) = (known for known in WAYS if known.way == way)
    model = with_convolved_shortcuts(copy.deepcopy(source.original))
    return pruned(model, source.example, replace(chosen, ratio=ratio))


VARIANTS: Mapping[str, Callable[[Source, str, float], nn.Module]] = {
    LOW_RANK: low_rank_variant,
    PRUNED: pruned_variant,
}
WORDS = {
    LOW_RANK: "low rank ({way})",
    PRUNED: "channels pruned by Torch-Pruning ({way})",
}


def build(name: str, source: Source, out: Path, options: argparse.Namespace) -> RivalResult:
    """Search, fine-tune and write a rival.

    Raises:
        RivalError: No way of making it is as fast as the structured model.
    """
    found, unreachable = _met(name, source, out, options)
    if not found:
        raise RivalError(
            f"{name} is slower than {source.run.structured_onnx} at any ratio, in every way tried "
            f"({', '.join(unreachable)}). Name other ways, or another run."
        )
    (best, model), *_ = found
    epochs = source.recipe.epochs
    how = WORDS[name].format(way=f"{best.way}, ratio {best.ratio:.3f}")
    how += f", fine-tuned for {epochs} epoch{'s' * (epochs != 1)}"
    print(f"{name}: {how}", flush=True)
    task = task_for(source.data, source.recipe)
    hardware = Hardware(device=options.train_device, precision=options.precision)
    hardware.check()
    tuned, tuning = finetune(
        model,
        {},
        task,
        source.recipe,
        hardware=hardware,
        teacher=source.original,
        observer=Log(),
    )
    proto = export_onnx(tuned, source.example)
    proto.doc_string = how
    save_onnx(proto, out / f"{name}.onnx")
    layers = take_inventory(tuned, source.example).layers
    return RivalResult(
        name=name,
        how=how,
        ways=tuple(way for way, _ in found),
        unreachable=unreachable,
        multiplications=sum(
            dense_cost(x.spec, x.output_size, x.calls).multiplications for x in layers
        ),
        parameters=sum(parameter.numel() for parameter in tuned.parameters()),
        tuning=tuning,
    )


def _met(
    name: str, source: Source, out: Path, options: argparse.Namespace
) -> tuple[list[tuple[WayResult, nn.Module]], tuple[str, ...]]:
    """The ways that meet the target, the best first, and the others."""
    settings = BenchmarkSettings(
        threads=options.threads,
        batch_size=options.batch_size,
        rounds=options.search_rounds,
        blocks=SEARCH_BLOCKS,
    )
    scratch = out / f".{name}.onnx"
    found, unreachable = [], []
    for way in getattr(options, f"{name}_ways"):
        print(f"{name}: {way}", flush=True)
        met = meet(
            lambda ratio, way=way: VARIANTS[name](source, way, ratio),  # type: ignore[misc]
            lambda model: speed_over(
                source.run.structured_onnx, model, source.example, scratch, settings
            ),
            say,
        )
        if met is None:
            unreachable.append(way)
            continue
        model = copy.deepcopy(met.model)
        result = WayResult(way, met.ratio, met.speed, screen(model, source.data))
        say(f"{way} at {met.ratio:.3f}: {result.screened:.2f} before the fine-tune")
        found.append((result, met.model))
    scratch.unlink(missing_ok=True)
    sign = 1 if task_for(source.data, source.recipe).metric.higher_is_better else -1
    found.sort(key=lambda entry: -sign * entry[0].screened)
    return found, tuple(unreachable)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    add("run", type=Path, help="folder that `structconv convert` wrote")
    add("--arch", help="what builds the original, as for `structconv convert`; it is run")
    add("--arch-arg", action="append", default=[], metavar="KEY=VALUE")
    add("--checkpoint", type=Path, help="the original's weights (default: the run's)")
    add("--out", type=Path, help="folder to write (default: RUN-rivals)")
    add("--rivals", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--low-rank-ways", nargs="+", choices=LOW_RANK_WAYS, default=list(LOW_RANK_WAYS),
        help="how ranks are chosen (default: all)")  # fmt: skip
    add("--pruned-ways", nargs="+", choices=PRUNED_WAYS, default=list(PRUNED_WAYS),
        help="which channels are pruned (default: all)")  # fmt: skip
    add("--epochs", type=int, help="of the fine-tune (default: the run's)")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--train-device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=1, help="of ONNX Runtime (default: 1)")
    add("--batch-size", type=int, default=1, help="images in one run (default: 1)")
    add("--search-rounds", type=int, default=12, help="turns while the ratio is searched")
    add("--torch-threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.torch_threads)
    out: Path = options.out or options.run.with_name(f"{options.run.absolute().name}-rivals")
    source = open_source(options)
    out.mkdir(parents=True, exist_ok=True)
    for name in options.rivals:
        file = out / f"{name}.json"
        if file.exists():
            print(f"{name}: {file} is there already")
            continue
        result = build(name, source, out, options)
        write_json(result, file)
        last = result.tuning.stages[-1].evaluation.score
        print(f"{name}: {result.tuning.metric.text(last)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except StructconvError as error:
        raise SystemExit(f"Error: {error}") from None
