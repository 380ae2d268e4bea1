"""`structconv plan`."""

import os
from pathlib import Path

import typer
from rich.console import Console

from structconv_cli import options
from structconv_cli.commands.failures import failures
from structconv_cli.commands.output import STANDARD_OUTPUT, check_outputs, put
from structconv_cli.commands.parsed import parse_data, parse_targets


def plan(
    model: options.Model,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    input_shape: options.InputShape = None,
    trust_pickle: options.TrustPickle = False,
    out: options.PlanOut = Path("plan.json"),
    force: options.ForcePlan = False,
    target_speedup: options.TargetSpeedup = None,
    target_latency: options.TargetLatency = None,
    target_macs: options.TargetMacs = None,
    target_params: options.TargetParams = None,
    max_drop: options.MaxDrop = None,
    no_finetune: options.Untuned = False,
    plan_file: options.JudgedPlan = None,
    data: options.OptionalData = None,
    size: options.Size = None,
    mean: options.Mean = "",
    std: options.Std = "",
    val_split: options.ValSplit = None,
    images: options.PlanImages = 512,
    seconds: options.PlanSeconds = 120.0,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    batch_size: options.ImagesPerRun = 1,
    timings: options.Timings = None,
    json: options.Json = None,
) -> None:
    """Choose each layer's structure by measured time and predicted loss; change nothing.

    Without a target, the best bargain between time and loss is planned.
    """
    with failures(written=f"no plan was written to {out}"):
        from structconv_cli.commands.shapes import parse_shapes
        from structconv_cli.json_file import to_json
        from structconv_cli.model.architecture import Architecture, parse_arguments
        from structconv_cli.model.signature import INPUT
        from structconv_cli.model_graph import is_onnx
        from structconv_cli.onnx.target import Target
        from structconv_cli.onnx.timing_cache import default_path
        from structconv_cli.planning.pipeline import PlanFiles, PlanRequest, plan_model
        from structconv_cli.planning.sensitivity import SensitivitySettings
        from structconv_cli.planning.settings import ProposalSettings
        from structconv_cli.report.plan import plan_report
        from structconv_cli.run_folder import model_file
        from structconv_cli.terminal import observer_for

        check_outputs(json=json)
        shapes = parse_shapes(input_shape or [], only=INPUT)
        timings = timings or default_path()
        targets = parse_targets(
            target_speedup, target_latency, target_macs, target_params, max_drop
        )
        if plan_file is not None and not targets.is_empty:
            raise typer.BadParameter("--plan predicts a plan as it is; give it without a target.")
        file = model_file(model)
        request = PlanRequest(
            model=file,
            architecture=Architecture(arch, parse_arguments(arch_arg or [])) if arch else None,
            shapes=shapes,
            data=None if data is None else parse_data(data, size, mean, std, val_split, seed),
            images=images,
            targets=targets,
            settings=ProposalSettings(
                Target(device, threads, batch_size),
                timings,
                SensitivitySettings(
                    seconds=seconds,
                    images=images // 2,
                    threads=os.cpu_count() or 1,
                    seed=seed,
                ),
                timings.parent / "losses",
                # A plan that is given may have any structure.
                tuned=not (no_finetune or plan_file or is_onnx(file)),
            ),
            out=out,
            force=force,
            given=plan_file,
            trust_pickle=trust_pickle,
        )
        proposal, notes = plan_model(request, observer_for(Console(stderr=True)))
        if json is not None:
            put(to_json(proposal.prediction), json)
        if json == STANDARD_OUTPUT:
            return
        console, files = Console(), PlanFiles(out)
        console.print(plan_report(proposal.prediction, notes))
        then = (
            f"Edit the plan if you like, then: `structconv convert ... --plan {files.plan}`."
            if proposal.plan.structures
            else "It structures nothing: there is nothing to convert."
        )
        console.print(
            f"Wrote [bold]{files.plan}[/], {files.prediction} and {files.picture}. {then}",
            highlight=False,
        )
