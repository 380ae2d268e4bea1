"""The command line: parse, call the library, show the result, choose the exit status.

Exit status: 0 done; 1 the input, the files or the machine do not allow it (one paragraph says why);
2 wrong usage; 3 done, but a check failed; 130 interrupted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from structconv_cli import __version__, options
from structconv_cli.errors import StructconvError

if TYPE_CHECKING:
    from structconv_cli.convert import ConvertRequest

CHECK_FAILED = 3
INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes trained CNNs measurably faster on ONNX Runtime, and proves the rewrite exact.",
    epilog="Exit status: 0 done, 1 an error in the input, 2 wrong usage, 3 a check failed.",
)

_RUN = Annotated[
    Path, typer.Argument(help="Run folder that `structconv convert` wrote.", show_default=True)
]
_JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no tables.")]


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="structconv")
    except KeyboardInterrupt:
        # Outside a command: while modules load.
        sys.exit(INTERRUPTED)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"structconv {__version__}")
        raise typer.Exit


@app.command(
    epilog="Example: structconv convert sample_models/resnet20_digits.pt "
    "--arch sample_models/resnet_cifar.py:resnet20 --arch-arg in_channels=1 --data digits"
)
def convert(
    checkpoint: options.Checkpoint,
    arch: options.Arch,
    data: options.Data,
    arch_arg: options.ArchArg = None,
    out: options.Out = Path("structconv-run"),
    force: options.Force = False,
    n: options.N = 2,
    channels: options.Channels = 1.0,
    plan: options.PlanFile = None,
    epochs: options.Epochs = 6,
    sr_epochs: options.SrEpochs = None,
    sr_lambda: options.SrLambda = 0.1,
    distill: options.Distill = 0.5,
    batch_size: options.BatchSize = 64,
    lr: options.LearningRate = 0.02,
    augment: options.Augment = "crop",
    size: options.Size = None,
    mean: options.Mean = "",
    std: options.Std = "",
    val_split: options.ValSplit = None,
    seed: options.Seed = 0,
    forms: options.Forms = "measure",
    timings: options.Timings = None,
) -> None:
    """Fine-tune a trained CNN into its structured form, rewrite, export and verify it."""
    console = Console()
    with _failures(written=f"nothing was written to {out}"):
        from structconv_cli.convert import ConvertRequest
        from structconv_cli.data.spec import DataSpec
        from structconv_cli.finetune import FineTuneSettings
        from structconv_cli.model.architecture import Architecture, parse_arguments
        from structconv_cli.onnx.choose import Target
        from structconv_cli.onnx.lower import LoweringSettings
        from structconv_cli.onnx.timing_cache import default_path

        request = ConvertRequest(
            checkpoint=checkpoint,
            architecture=Architecture(arch, parse_arguments(arch_arg or [])),
            data=DataSpec(
                data, size, _floats("--mean", mean), _floats("--std", std), val_split, seed
            ),
            settings=FineTuneSettings(
                epochs=epochs,
                regularised_epochs=_regularised_epochs(epochs, sr_epochs),
                batch_size=batch_size,
                learning_rate=lr,
                sr_lambda=sr_lambda,
                distillation=distill,
                augment=_augmentation(augment),
                seed=seed,
            ),
            n=n,
            channels=channels,
            plan_file=plan,
            out=out,
            force=force,
            lowering=LoweringSettings(forms, Target(), timings or default_path()),
            command=tuple(sys.argv),
        )
        exact = _convert(request, console)
    if not exact:
        raise typer.Exit(CHECK_FAILED)


@app.command(epilog="Example: structconv lower model.onnx -o lowered.onnx --threads 2")
def lower(
    model: Annotated[
        Path, typer.Argument(help="ONNX model whose weights are structured.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)
    ],
    plan: options.PlanFile = None,
    forms: options.Forms = "measure",
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per run to be fast for.")] = 1,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(help="Sizes of an input with open axes: NAME=1x3x224x224.", metavar="SHAPE"),
    ] = None,
    timings: options.Timings = None,
    json: _JSON = False,
) -> None:
    """Write an ONNX model's structured layers in their fastest exact forms.

    The structure is found in the weights, or told by --plan. Every node of the result is checked
    against the original; exit status 3 if a check fails or no layer is structured, and then nothing
    is written.
    """
    with _failures(written=f"nothing was written to {output}"):
        from structconv_cli.json_file import to_json
        from structconv_cli.lowering import lower_file
        from structconv_cli.onnx.choose import Target
        from structconv_cli.onnx.lower import LoweringSettings
        from structconv_cli.onnx.timing_cache import default_path
        from structconv_cli.report import lower_report
        from structconv_cli.terminal import observer_for

        target = Target(device, threads, batch_size)
        result = lower_file(
            model,
            output,
            LoweringSettings(forms, target, timings or default_path()),
            plan_file=plan,
            shapes=_shapes(input_shape or []),
            observer=observer_for(Console(stderr=True)),
        )
        if json:
            typer.echo(to_json(result), nl=False)
        else:
            Console().print(lower_report(result))
    if result.written is None:
        raise typer.Exit(CHECK_FAILED)


@app.command(epilog="Example: structconv verify structconv-run")
def verify(run: _RUN = Path("structconv-run"), json: _JSON = False) -> None:
    """Check that a run's rewrite is exact, and measure what structure cost.

    Exit status 3 if it is not exact. The result is also written to verify.json in the run folder.
    """
    with _failures():
        from structconv_cli.convert import verify_run
        from structconv_cli.json_file import to_json
        from structconv_cli.report import verify_report
        from structconv_cli.terminal import observer_for

        result = verify_run(run, observer_for(Console(stderr=True)))
        if json:
            typer.echo(to_json(result), nl=False)
        else:
            Console().print(verify_report(result))
    if not result.exact:
        raise typer.Exit(CHECK_FAILED)


@app.command(epilog="Example: structconv benchmark structconv-run --threads 2 --batch-size 8")
def benchmark(
    run: _RUN = Path("structconv-run"),
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per run.")] = 1,
    rounds: Annotated[int, typer.Option(min=5, help="Interleaved rounds to measure.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the input and the order.")] = 0,
    json: _JSON = False,
) -> None:
    """Time the original and the structured model in ONNX Runtime, in turns, and compare them.

    The result is also written to benchmark.json in the run folder.
    """
    with _failures():
        from structconv_cli.json_file import to_json, write_json
        from structconv_cli.report import benchmark_report
        from structconv_cli.run_folder import RunFolder
        from structconv_cli.terminal import observer_for
        from structconv_cli.timing.benchmark import BenchmarkSettings
        from structconv_cli.timing.benchmark import benchmark as measure

        folder = RunFolder(run)
        folder.info()
        settings = BenchmarkSettings(
            device=device, threads=threads, batch_size=batch_size, rounds=rounds, seed=seed
        )
        models = {"original": folder.original_onnx, "structured": folder.structured_onnx}
        observer = observer_for(Console(stderr=True))
        with observer.stage("benchmark"):
            result = measure(models, settings, progress=observer.steps)
        write_json(result, folder.benchmark_result)
        if json:
            typer.echo(to_json(result), nl=False)
        else:
            Console().print(benchmark_report(result))


def _convert(request: "ConvertRequest", console: Console) -> bool:
    from structconv_cli.convert import convert as run_pipeline
    from structconv_cli.report import convert_report
    from structconv_cli.terminal import observer_for

    result, verification = run_pipeline(request, observer_for(Console(stderr=True)))
    console.print(convert_report(result, verification))
    console.print(
        f"Wrote [bold]{request.out}[/] with structured.onnx. How much faster it is here: "
        "`structconv benchmark"
        + ("`." if request.out == Path("structconv-run") else f" {request.out}`."),
        highlight=False,
    )
    return verification.exact


@contextmanager
def _failures(written: str = "") -> Iterator[None]:
    """Turn what can go wrong outside this program into one paragraph and an exit status."""
    after = f" Nothing is half-written: {written}." if written else ""
    try:
        yield
    except StructconvError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        Console(stderr=True).print(f"[yellow]Stopped.[/]{after}", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{place}. Check the disk's space and permissions.{after}")
    except MemoryError:
        _fail(f"not enough memory. Use a smaller --batch-size, --size or dataset.{after}")


def _fail(message: str) -> None:
    console = Console(stderr=True)
    text = Text.assemble(("Error: ", "bold red"), message)
    console.print(text, soft_wrap=not console.is_terminal)
    raise typer.Exit(1)


def _regularised_epochs(epochs: int, chosen: int | None) -> int:
    if chosen is None:
        return -(-epochs // 3)
    if chosen > epochs:
        raise typer.BadParameter(f"--sr-epochs {chosen} is more than --epochs {epochs}.")
    return chosen


def _augmentation(text: str) -> tuple[str, ...]:
    kinds = tuple(kind for kind in text.split(",") if kind and kind != "none")
    unknown = [kind for kind in kinds if kind not in ("crop", "flip")]
    if unknown:
        raise typer.BadParameter(f"--augment knows crop, flip and none; found {unknown[0]}.")
    return kinds


def _shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            shapes[name] = (0,)
        if not name or min(shapes[name]) < 1:
            raise typer.BadParameter(f"--input-shape takes NAME=1x3x224x224; found {text!r}.")
    return shapes


def _floats(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers separated by commas, such as 0.5,0.5,0.5; found {text!r}."
        ) from None
