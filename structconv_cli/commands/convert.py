"""`structconv convert`."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from structconv_cli import options, tuning_options
from structconv_cli.commands.failures import CHECK_FAILED, at_once_among_processes, failures
from structconv_cli.commands.parsed import (
    parse_augmentation,
    parse_data,
    parse_hardware,
    parse_targets,
)

if TYPE_CHECKING:
    from structconv_cli.conversion import ConvertRequest
    from structconv_cli.graph_preparation import OnnxRequest


def convert(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    arch: options.Arch = None,
    data: options.Data = None,
    task: options.Task = None,
    arch_arg: options.ArchArg = None,
    out: options.Out = Path("structconv-run"),
    force: options.Force = False,
    resume: tuning_options.Resume = False,
    n: options.N = 2,
    channels: options.Channels = 1.0,
    plan: options.PlanFile = None,
    target_speedup: options.TargetSpeedup = None,
    target_latency: options.TargetLatency = None,
    target_macs: options.TargetMacs = None,
    target_params: options.TargetParams = None,
    max_drop: options.MaxDrop = None,
    threads: options.RunThreads = 1,
    run_batch: options.RunBatch = 1,
    dry_run: options.DryRun = False,
    epochs: tuning_options.Epochs = None,
    no_finetune: tuning_options.NoFinetune = False,
    sr_epochs: tuning_options.SrEpochs = None,
    sr_lambda: tuning_options.SrLambda = None,
    recipe: tuning_options.RecipeName = "default",
    distill: tuning_options.Distill = None,
    hints: tuning_options.Hints = None,
    batch_size: tuning_options.BatchSize = 64,
    accumulate: tuning_options.Accumulate = 1,
    optimizer: tuning_options.OptimizerName = "sgd",
    lr: tuning_options.LearningRate = None,
    weight_decay: tuning_options.WeightDecay = None,
    stop_at_drop: tuning_options.StopAtDrop = None,
    augment: tuning_options.Augment = None,
    size: options.Size = None,
    mean: options.Mean = "",
    std: options.Std = "",
    val_split: options.ValSplit = None,
    ignore_label: options.IgnoreLabel = 255,
    workers: options.Workers = None,
    seed: options.Seed = 0,
    train_device: tuning_options.TrainDevice = "auto",
    precision: tuning_options.TrainPrecision = "fp32",
    channels_last: tuning_options.ChannelsLast = False,
    compile: tuning_options.Compile = False,
    forms: options.Forms = "measure",
    timings: options.Timings = None,
    input_shape: options.InputShape = None,
    trust_pickle: options.TrustPickle = False,
) -> None:
    """Fine-tune a trained CNN into its structured form, rewrite, export and verify it.

    An ONNX file is not tuned: its weights are fitted to unlabelled images, if there are any.
    """
    console = Console()
    kept = failures(f"nothing was written to {out}", lambda: _kept(out))
    with at_once_among_processes(), kept:
        from structconv_cli.commands.requests import (
            Wish,
            checkpoint_request,
            onnx_request,
            recipe_of,
        )
        from structconv_cli.commands.shapes import parse_shapes
        from structconv_cli.model.architecture import Architecture, parse_arguments
        from structconv_cli.model.signature import INPUT
        from structconv_cli.model_graph import is_onnx
        from structconv_cli.run_folder import model_file
        from structconv_cli.training.augmentation_choice import AUTO
        from structconv_cli.world import launched

        if data is None and (size or mean or std or val_split or augment):
            raise typer.BadParameter(
                "--size, --mean, --std, --val-split and --augment are for --data."
            )
        spec = None
        if data is not None:
            spec = parse_data(data, size, mean, std, val_split, seed, ignore_label, workers)
        tuning = recipe_of(
            recipe,
            epochs,
            no_finetune,
            sr_epochs,
            batch_size=batch_size,
            accumulate=accumulate,
            optimizer=optimizer,
            learning_rate=lr,
            weight_decay=weight_decay,
            sr_lambda=sr_lambda,
            distillation=distill,
            hints=hints,
            augment=parse_augmentation(augment) if augment else AUTO,
            seed=seed,
        )
        checkpoint = model_file(checkpoint)
        onnx = is_onnx(checkpoint)
        if launched() and (onnx or dry_run):
            raise typer.BadParameter(
                f"several processes were started, and {'an ONNX file' if onnx else '--dry-run'} "
                "trains nothing that they could share. Run it without torchrun."
            )
        wish = Wish(
            model=checkpoint,
            data=spec,
            shapes=parse_shapes(input_shape or [], only="" if onnx else INPUT),
            out=out,
            force=force,
            n=n,
            channels=channels,
            plan_file=plan,
            targets=parse_targets(
                target_speedup, target_latency, target_macs, target_params, max_drop
            ),
            threads=threads,
            run_batch=run_batch,
            forms=forms,
            timings=timings,
            seed=seed,
        )
        if onnx:
            for_checkpoints = {
                "--arch": arch,
                "--arch-arg": arch_arg,
                "--trust-pickle": trust_pickle,
                "--task": task,
                "--resume": resume,
                "--epochs": epochs,
                "--sr-epochs": sr_epochs,
                "--sr-lambda": sr_lambda,
                "--distill": distill,
                "--hints": hints,
                "--lr": lr,
                "--weight-decay": weight_decay,
                "--stop-at-drop": stop_at_drop,
                **{option: _was_given(context, name) for option, name in _TRAINING.items()},
            }
            exact = _convert_onnx(onnx_request(wish, for_checkpoints, dry_run), console)
        else:
            request = checkpoint_request(
                wish,
                Architecture(arch, parse_arguments(arch_arg or [])) if arch else None,
                task,
                tuning,
                parse_hardware(train_device, precision, channels_last, compile),
                resume,
                stop_at_drop,
                trust_pickle,
            )
            exact = _dry_run(request, console) if dry_run else _convert(request, console)
    if not exact:
        raise typer.Exit(CHECK_FAILED)


_TRAINING = {
    "--recipe": "recipe",
    "--batch-size": "batch_size",
    "--accumulate": "accumulate",
    "--optimizer": "optimizer",
    "--augment": "augment",
    "--train-device": "train_device",
    "--precision": "precision",
    "--channels-last": "channels_last",
    "--compile": "compile",
}
"""Training's options and their parameters, whose values do not tell whether they were given."""


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _dry_run(request: "ConvertRequest", console: Console) -> bool:
    from structconv_cli.convert import dry_run
    from structconv_cli.report.plan import plan_report
    from structconv_cli.terminal import observer_for

    plan = Path("plan.json")
    proposal = dry_run(request, plan, observer_for(Console(stderr=True)))
    console.print(plan_report(proposal.prediction))
    console.print(
        f"Dry run: wrote [bold]{plan}[/] and its prediction, and no run folder. The same command "
        f"with `--plan {plan}` in place of the target carries it out.",
        highlight=False,
    )
    return True


def _convert(request: "ConvertRequest", console: Console) -> bool:
    from structconv_cli.convert import convert as run_pipeline
    from structconv_cli.progress import SILENT
    from structconv_cli.report.conversion import convert_report
    from structconv_cli.terminal import observer_for
    from structconv_cli.world import launched_rank

    observer = SILENT if launched_rank() else observer_for(Console(stderr=True))
    outcome = run_pipeline(request, observer)
    if outcome is None:  # process 0 writes
        return True
    result, verification = outcome
    console.print(convert_report(result, verification))
    _finish(request.out, console)
    return verification.exact


def _convert_onnx(request: "OnnxRequest", console: Console) -> bool:
    from structconv_cli.onnx_conversion import convert_onnx
    from structconv_cli.report.conversion import convert_report
    from structconv_cli.terminal import observer_for

    result, verification = convert_onnx(request, observer_for(Console(stderr=True)))
    console.print(convert_report(result, verification))
    _finish(request.out, console)
    return verification.exact


def _finish(out: Path, console: Console) -> None:
    from structconv_cli.html.page import write_report

    write_report(out)
    console.print(
        f"Wrote [bold]{out}[/] with structured.onnx and report.html. How much faster it is here: "
        "`structconv benchmark" + ("`." if out == Path("structconv-run") else f" {out}`."),
        highlight=False,
    )


def _kept(out: Path) -> str:
    """What is kept of an interrupted fine-tuning, and how to go on."""
    from structconv_cli.run_folder import partial_folder

    partial = partial_folder(out)
    if not (partial / "training.pt").is_file():
        return ""
    return (
        f"What was tuned so far is kept in {partial}: the same command with --resume goes on from "
        "there."
    )
