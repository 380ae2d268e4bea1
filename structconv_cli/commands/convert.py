"""`structconv convert`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from structconv_cli import options
from structconv_cli.commands.failures import CHECK_FAILED, failures
from structconv_cli.commands.parsed import parse_data, parse_targets

if TYPE_CHECKING:
    from structconv_cli.conversion import ConvertRequest


def convert(
    checkpoint: options.Checkpoint,
    arch: options.Arch,
    data: options.Data = None,
    task: options.Task = None,
    arch_arg: options.ArchArg = None,
    out: options.Out = Path("structconv-run"),
    force: options.Force = False,
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
    with failures(written=f"nothing was written to {out}"):
        from structconv_cli.conversion import ConvertRequest
        from structconv_cli.model.architecture import Architecture, parse_arguments
        from structconv_cli.onnx.lower import LoweringSettings
        from structconv_cli.onnx.target import Target
        from structconv_cli.onnx.timing_cache import default_path
        from structconv_cli.planning.proposal import REMAINS, ProposalSettings
        from structconv_cli.planning.sensitivity import SensitivitySettings
        from structconv_cli.training.recipe import Recipe

        targets = parse_targets(
            target_speedup, target_latency, target_macs, target_params, max_drop
        )
        if (data is None) == (task is None):
            raise typer.BadParameter(
                "give either --data or --task: the images, or what loads them."
            )
        if task is not None and (size or mean or std or val_split):
            raise typer.BadParameter(
                "--size, --mean, --std and --val-split are for --data; the task file prepares its "
                "own."
            )
        if plan is not None and not targets.is_empty:
            raise typer.BadParameter("--plan is obeyed as it is; give it without a target.")
        target, timings = Target(threads=threads, batch_size=run_batch), timings or default_path()
        request = ConvertRequest(
            checkpoint=checkpoint,
            architecture=Architecture(arch, parse_arguments(arch_arg or [])),
            data=None if data is None else parse_data(data, size, mean, std, val_split, seed),
            task=task,
            recipe=Recipe(
                epochs=epochs,
                regularised=_regularised_epochs(epochs, sr_epochs),
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
            lowering=LoweringSettings(forms, target, timings),
            targets=targets,
            proposal=ProposalSettings(
                target,
                timings,
                SensitivitySettings(threads=os.cpu_count() or 1, seed=seed),
                timings.parent / "losses",
                REMAINS if epochs else 1.0,
            ),
            command=tuple(sys.argv),
        )
        exact = _dry_run(request, console) if dry_run else _convert(request, console)
    if not exact:
        raise typer.Exit(CHECK_FAILED)


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
    from structconv_cli.report.conversion import convert_report
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
