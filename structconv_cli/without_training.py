"""Bringing a model into its structure without training: least squares on a few hundred examples.

What `--no-finetune` does in place of `training.finetune`, with the same kind of record, and what
fine-tuning aims at.
"""

import copy
import os
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.preparation import Prepared
from structconv_cli.progress import Observer
from structconv_cli.reconstruction.apply import apply_to_module, layers_without_bias
from structconv_cli.reconstruction.result import ReconstructionRecord, ReconstructionSettings
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.reconstruction.sequential import reconstruct
from structconv_cli.rewrite import project_weights, residuals
from structconv_cli.structure import Structure
from structconv_cli.tasks.task import UNMEASURED, Batch, Evaluation, Outputs, Task
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import FineTuneResult, StageResult


def reconstruct_model(
    ready: Prepared,
    structures: Mapping[str, Structure],
    recipe: Recipe,
    images: int,
    observer: Observer,
) -> tuple[nn.Module, FineTuneResult, ReconstructionRecord]:
    """Return a copy of the model with its planned weights inside their subspaces, and the records.

    Stages: the original, its weights projected, and fitted by least squares on `images` training
    examples, whose labels are not read. Without data it ends with the projection, and without
    labels no stage is judged.

    Args:
        ready: the model, its graph and its task.
        structures: of its layers, by name.
        recipe: for the record; its seed draws the examples.
        images: how many.
        observer: is told of the stages.
    """
    stages: list[StageResult] = []
    task = ready.task

    def judge(name: str, model: nn.Module, seconds: float) -> None:
        if task is not None:
            found = _judged(model, task)
            residual = max(residuals(model, structures).values(), default=0.0)
            stages.append(StageResult(name, found, residual, seconds))
            observer.note(task.metric.text(found.score))

    if task is not None:
        with observer.stage("original"):
            judge("original", ready.model, 0.0)
    if ready.source is not None and task is not None:
        with observer.stage("projected"):
            projected = copy.deepcopy(ready.model)
            project_weights(projected, structures)
            judge("projected", projected, 0.0)
    name = "least squares" if ready.source is not None else "projected"
    with observer.stage(name):
        start = time.perf_counter()
        fitted, record = fitted_model(ready, structures, recipe.seed, images, observer)
        judge(name, fitted, time.perf_counter() - start)
    metric = task.metric if task is not None else UNMEASURED
    return fitted, FineTuneResult(recipe, metric, tuple(stages), ()), record


def fitted_model(
    ready: Prepared,
    structures: Mapping[str, Structure],
    seed: int,
    images: int,
    observer: Observer,
) -> tuple[nn.Module, ReconstructionRecord]:
    """A copy of the model, its planned weights fitted by least squares, or without data projected.

    Raises:
        PlanError: a layer's weight in the graph is not the module's, scaled.
    """
    fitted, graph = copy.deepcopy(ready.model), ready.original
    settings = ReconstructionSettings(
        without_bias=layers_without_bias(fitted, graph), threads=os.cpu_count() or 1, seed=seed
    )
    samples = None
    if ready.source is not None:
        tensors, _ = ready.source.samples(images)
        inputs = zip(ready.inventory.inputs, tensors, strict=True)
        samples = Samples({name: tensor.numpy() for name, tensor in inputs})
    found = reconstruct(graph, structures, samples, settings, observer)
    left, record = apply_to_module(fitted, graph, found), found.record
    if left:
        names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        note = (
            f"Outputs of {names} keep a shift of their mean: it could not be told which bias or "
            "batch norm behind takes it up. Fine-tuning, which takes batch-norm statistics anew, "
            "removes it."
        )
        record = replace(record, notes=(*record.notes, note))
    return fitted.eval(), record


def _judged(model: nn.Module, task: Task) -> Evaluation:
    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            return task.forward(model, batch)

    with eval_mode(model):
        return task.evaluate(forward)
