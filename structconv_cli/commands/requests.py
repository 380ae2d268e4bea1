"""What `convert` is asked to do, checked: for a checkpoint, and for an ONNX file."""

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from structconv_cli.conversion import ConvertRequest
from structconv_cli.data.spec import DataSpec
from structconv_cli.graph_preparation import OnnxRequest
from structconv_cli.model.architecture import Architecture
from structconv_cli.onnx.example_inputs import Shapes
from structconv_cli.onnx.lower import LoweringSettings
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import default_path
from structconv_cli.planning.sensitivity import SensitivitySettings
from structconv_cli.planning.settings import ProposalSettings
from structconv_cli.planning.targets import Targets
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.recipe import OPTIMIZERS, RECIPES, Recipe, named_recipe

DEFAULT_EPOCHS = 6


@dataclass(frozen=True)
class Wish:
    """What may be said of a checkpoint and of an ONNX file alike.

    Attributes:
        model: the file.
        data: the data; None for none, or for that of a task file.
        shapes: sizes of inputs.
        out, force: the run folder, and whether one that exists is replaced.
        n, channels: the rule for all layers.
        plan_file: a plan to obey instead.
        targets: what to plan for instead.
        threads, run_batch: what the result is to be fast for.
        forms, timings: how it is lowered, and where timings are kept.
        seed: of what is random.
    """

    model: Path
    data: DataSpec | None
    shapes: Shapes
    out: Path
    force: bool
    n: int
    channels: float
    plan_file: Path | None
    targets: Targets
    threads: int
    run_batch: int
    forms: str
    timings: Path | None
    seed: int

    def __post_init__(self) -> None:
        if self.plan_file is not None and not self.targets.is_empty:
            raise typer.BadParameter("--plan is obeyed as it is; give it without a target.")

    @property
    def _timings(self) -> Path:
        return self.timings or default_path()

    @property
    def _target(self) -> Target:
        return Target(threads=self.threads, batch_size=self.run_batch)

    @property
    def lowering(self) -> LoweringSettings:
        """How the ONNX forms are chosen."""
        return LoweringSettings(self.forms, self._target, self._timings)

    def proposal(self, trained: bool) -> ProposalSettings:
        """How a plan is made, for a model that is fine-tuned afterwards or not."""
        return ProposalSettings(
            self._target,
            self._timings,
            SensitivitySettings(threads=os.cpu_count() or 1, seed=self.seed),
            self._timings.parent / "losses",
            trained,
        )


def onnx_request(wish: Wish, for_checkpoints: Mapping[str, object], dry_run: bool) -> OnnxRequest:
    """The conversion of an ONNX file.

    Args:
        wish: what was said.
        for_checkpoints: options that take a PyTorch model, by name; those given are true.
        dry_run: whether only a plan was asked for.

    Raises:
        typer.BadParameter: an option does not go with an ONNX file.
    """
    given = [name for name, value in for_checkpoints.items() if value]
    if given:
        raise typer.BadParameter(
            f"{wish.model} is an ONNX file, which is converted without training, and {given[0]} is "
            "for checkpoints. Leave it out, or give the checkpoint and --arch FILE.py:FACTORY."
        )
    if dry_run:
        raise typer.BadParameter(
            f"--dry-run is for checkpoints: `structconv plan {wish.model}` plans for an ONNX file "
            "and changes nothing."
        )
    return OnnxRequest(
        model=wish.model,
        shapes=wish.shapes,
        data=wish.data,
        out=wish.out,
        force=wish.force,
        n=wish.n,
        channels=wish.channels,
        plan_file=wish.plan_file,
        targets=wish.targets,
        proposal=wish.proposal(trained=False),
        lowering=wish.lowering,
        seed=wish.seed,
        command=tuple(sys.argv),
    )


def checkpoint_request(
    wish: Wish,
    architecture: Architecture | None,
    task: Path | None,
    recipe: Recipe,
    hardware: Hardware,
    resume: bool,
    stop_at_drop: float | None,
    trust_pickle: bool,
) -> ConvertRequest:
    """The conversion of a checkpoint.

    Raises:
        typer.BadParameter: options are missing or contradict one another.
    """
    _check_data(wish, task, trained=recipe.epochs > 0)
    return ConvertRequest(
        checkpoint=wish.model,
        architecture=architecture,
        data=wish.data,
        task=task,
        shapes=wish.shapes,
        trust_pickle=trust_pickle,
        recipe=recipe,
        n=wish.n,
        channels=wish.channels,
        plan_file=wish.plan_file,
        out=wish.out,
        force=wish.force,
        lowering=wish.lowering,
        targets=wish.targets,
        proposal=wish.proposal(trained=recipe.epochs > 0),
        hardware=hardware,
        resume=resume,
        enough=stop_at_drop,
        command=tuple(sys.argv),
    )


def recipe_of(
    name: str,
    epochs: int | None,
    no_finetune: bool,
    sr_epochs: float | None,
    optimizer: str,
    **changes: Any,
) -> Recipe:
    """How to fine-tune; `changes` are the recipe's other fields, None where nothing was said.

    Raises:
        typer.BadParameter: they do not, or there is no such recipe or optimizer.
    """
    if no_finetune and epochs:
        raise typer.BadParameter(f"--no-finetune and --epochs {epochs} contradict.")
    _require_one_of(RECIPES, "--recipe", name)
    _require_one_of(OPTIMIZERS, "--optimizer", optimizer)
    count = 0 if no_finetune else DEFAULT_EPOCHS if epochs is None else epochs
    if sr_epochs is not None and sr_epochs > count:
        raise typer.BadParameter(f"--sr-epochs {sr_epochs:g} is more than --epochs {count}.")
    return named_recipe(name, count, regularised=sr_epochs, optimizer=optimizer, **changes)


def _require_one_of(known: Collection[str], option: str, found: str) -> None:
    if found not in known:
        raise typer.BadParameter(f"{option} is one of {', '.join(known)}; found {found!r}.")


def _check_data(wish: Wish, task: Path | None, trained: bool) -> None:
    if wish.data is not None and task is not None:
        raise typer.BadParameter(
            "give either --data or --task: the images, or what loads them; not both."
        )
    known = wish.data is not None or task is not None
    if trained and not known:
        raise typer.BadParameter(
            "fine-tuning takes labelled data: give --data FOLDER or --task FILE.py. Without "
            "either, --no-finetune projects the weights; what that costs is then unmeasured."
        )
    if known and wish.shapes:
        raise typer.BadParameter(
            "--input-shape is for ONNX files, and for checkpoints without data; here the model has "
            "the size of its data."
        )
