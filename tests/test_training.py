"""Recipes, schedules and hardware: laws of the training loop."""

import math
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import STRUCTURES, data, relative_residual, state, trained, tune
from torch import nn
from torch.optim import SGD, AdamW

from structconv_cli.data.dataset import Dataset
from structconv_cli.errors import TrainingError
from structconv_cli.tasks.classification import Classification
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.optimizer import optimizer_for
from structconv_cli.training.recipe import (
    OPTIMIZERS,
    RECIPES,
    Annealing,
    Optimizer,
    Recipe,
    named_recipe,
)
from structconv_cli.training.schedule import Schedule

__all__ = ["data", "trained"]

BRIEF = Recipe(2, 1.0, batch_size=20, learning_rate=0.02)


# --- schedule


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("annealing", ["cosine", "linear"])
def test_the_learning_rate_rises_and_falls_to_nothing(steps: int, annealing: Annealing) -> None:
    schedule = Schedule(Recipe(3, 1.0, learning_rate=0.1, annealing=annealing), steps)
    rates = [schedule.learning_rate(step) for step in range(schedule.steps + 1)]
    assert schedule.steps == 3 * steps
    assert all(0 < rate <= 0.1 for rate in rates[:-1])
    assert rates[-1] == 0
    top = rates.index(max(rates))
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[top:]))
    assert top <= max(1, 0.06 * 3 * steps)


@pytest.mark.parametrize(("annealing", "rate"), [("cosine", 0.1 * 0.75), ("linear", 0.1 * 2 / 3)])
def test_the_learning_rate_a_third_on(annealing: Annealing, rate: float) -> None:
    schedule = Schedule(Recipe(3, 1.0, learning_rate=0.1, annealing=annealing), 10)
    assert schedule.learning_rate(10) == pytest.approx(rate)


@pytest.mark.parametrize(("regularised", "steps"), [(0.0, 0), (0.25, 2), (0.3, 3), (2.0, 20)])
def test_the_regularised_phase_may_end_within_an_epoch(regularised: float, steps: int) -> None:
    assert Schedule(Recipe(2, regularised), 10).regularised == steps


def test_strength() -> None:
    fixed = Schedule(Recipe(2, 1.0, sr_lambda=0.3), 10)
    rising = Schedule(Recipe(2, 1.0, sr_lambda=0.3, strength="rising"), 10)
    assert {fixed.strength(step) for step in range(10)} == {0.3}
    strengths = [rising.strength(step) for step in range(10)]
    assert strengths == pytest.approx([0.03 * (step + 1) for step in range(10)])


# --- recipes


def test_named_recipes() -> None:
    default, paper = (named_recipe(name, 10) for name in ("default", "paper"))
    assert default.regularised == 1
    assert default.residual == "falling"
    assert default.distillation is None
    assert (paper.regularised, paper.residual, paper.distillation) == (10, "free", 0)
    assert paper.strength == "fixed"
    assert set(RECIPES) == {"default", "paper"}


@pytest.mark.parametrize("share", [None, 0.25, 0.0])
def test_what_no_recipe_says_of_distillation_is_the_tasks(
    share: float | None, trained: nn.Module, data: Dataset
) -> None:
    _, found = tune(trained, data, replace(BRIEF, distillation=share))
    due = Classification.following if share is None else share
    assert found.recipe == replace(BRIEF, distillation=due)
    alike, _ = tune(trained, data, replace(BRIEF, distillation=due))
    tuned, _ = tune(trained, data, replace(BRIEF, distillation=share))
    for name, value in state(tuned).items():
        assert torch.equal(value, state(alike)[name])


def test_changes_that_are_none_are_none() -> None:
    changed = named_recipe("paper", 4, distillation=0.25, learning_rate=None, regularised=None)
    assert changed == replace(named_recipe("paper", 4), distillation=0.25)


def test_each_optimizer_has_a_rate_and_a_decay_of_its_own() -> None:
    sgd, adamw = (named_recipe("default", 4, optimizer=name) for name in OPTIMIZERS)
    assert sgd == named_recipe("default", 4)
    assert adamw == replace(sgd, optimizer="adamw", learning_rate=1e-3, weight_decay=1e-2)
    assert named_recipe("default", 4, optimizer="adamw", learning_rate=0.5).learning_rate == 0.5


def test_the_papers_recipe_leaves_a_residual_to_project(trained: nn.Module, data: Dataset) -> None:
    _, result = tune(trained, data, named_recipe("paper", 2, batch_size=20))
    by_name = {stage.stage: stage.max_residual for stage in result.stages}
    assert 0.01 < by_name["regularised"] < by_name["original"]
    assert by_name["projected"] < 1e-6


def test_a_strong_proximal_step_empties_the_residual(trained: nn.Module, data: Dataset) -> None:
    residuals = []
    for strength in (0.0, 1e4):
        recipe = replace(BRIEF, residual="proximal", sr_lambda=strength, regularised=2.0)
        _, result = tune(trained, data, recipe)
        residuals.append({s.stage: s.max_residual for s in result.stages}["regularised"])
    assert residuals[0] > 0.1
    assert residuals[1] < 1e-6


def test_a_rising_strength_draws_less_than_a_fixed_one(trained: nn.Module, data: Dataset) -> None:
    residuals = []
    for strength in ("rising", "fixed"):
        recipe = replace(BRIEF, residual="free", strength=strength, sr_lambda=1.0, regularised=2.0)
        _, result = tune(trained, data, recipe)
        residuals.append({s.stage: s.max_residual for s in result.stages}["regularised"])
    assert residuals[1] < residuals[0]


# --- optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_ends_inside(
    name: Optimizer, trained: nn.Module, data: Dataset
) -> None:
    recipe = named_recipe("default", 4, batch_size=20, optimizer=name)
    tuned, result = tune(trained, data, recipe)
    for layer, structure in STRUCTURES.items():
        assert relative_residual(tuned.get_submodule(layer).weight, structure) < 1e-6
    losses = {stage.stage: stage.evaluation.loss for stage in result.stages}
    assert losses["fine-tuned"] < losses["batch norm re-estimated"]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", lambda w: SGD(w, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.2)),
        ("adamw", lambda w: AdamW(w, lr=0.1, weight_decay=0.2)),
    ],
)
def test_the_recipes_optimizer_is_torchs(name: Optimizer, reference: Any) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    recipe = Recipe(1, 0.0, optimizer=name, learning_rate=0.1, weight_decay=0.2)
    for each, optimizer in (
        (model, optimizer_for(model, recipe)),
        (other, reference(other.parameters())),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            each(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.weight, other.weight)


# --- judging


def test_epochs_that_are_not_judged_train_the_same(trained: nn.Module, data: Dataset) -> None:
    judged, one = tune(trained, data, BRIEF)
    unjudged, other = tune(trained, data, BRIEF, judge_epochs=False)
    assert one.epochs[0].evaluation is not None
    assert all(epoch.evaluation is None for epoch in other.epochs)
    assert other.stages[-1].evaluation == one.stages[-1].evaluation
    assert torch.equal(judged[0].weight, unjudged[0].weight)


# --- averaging


def test_the_average_of_what_stays_is_itself(trained: nn.Module, data: Dataset) -> None:
    still = replace(BRIEF, learning_rate=0.0, regularised=0.0)
    plain, _ = tune(trained, data, still)
    averaged, _ = tune(trained, data, replace(still, averaging=0.5))
    for name, value in plain.state_dict().items():
        assert torch.allclose(averaged.state_dict()[name], value, atol=1e-6), name


def test_averaged_weights_lie_inside_and_differ(trained: nn.Module, data: Dataset) -> None:
    plain, _ = tune(trained, data, BRIEF)
    averaged, result = tune(trained, data, replace(BRIEF, averaging=0.9))
    assert result.stages[-1].max_residual < 1e-6
    assert not torch.equal(plain[0].weight, averaged[0].weight)


# --- accumulation


def without_norms() -> nn.Module:
    """Nothing that looks across a batch, nothing random."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def test_accumulated_small_batches_are_a_large_one(data: Dataset) -> None:
    structures = {"1": STRUCTURES["1"]}
    large = Recipe(2, 0.5, batch_size=20, learning_rate=0.05)
    small = replace(large, batch_size=5, accumulate=4)
    first, _ = tune(without_norms(), data, large, structures=structures)
    second, _ = tune(without_norms(), data, small, structures=structures)
    for name, value in first.state_dict().items():
        other = second.state_dict()[name]
        assert float((value - other).norm()) < 1e-4 * float(value.norm()), name


def test_batches_that_make_no_whole_step_are_left_out(data: Dataset) -> None:
    # 100 images make five batches of 20: two steps of two, and one is left.
    structures = {"1": STRUCTURES["1"]}
    recipe = Recipe(1, 0.0, batch_size=20, accumulate=2)
    _, result = tune(without_norms(), data, recipe, structures=structures)
    assert result.epochs[0].loss > 0


def test_steps_of_more_batches_than_there_are_are_refused(data: Dataset) -> None:
    recipe = Recipe(1, 0.0, batch_size=20, accumulate=6)
    with pytest.raises(TrainingError, match=r"--accumulate 6 .*than an epoch has \(5\)"):
        tune(without_norms(), data, recipe, structures={})


class Scaled(nn.Sequential):
    """Has a frozen parameter of its own beside trained layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_parameter_freezes_no_batch_norm_but_a_frozen_part_does(
    frozen: bool, data: Dataset
) -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    model = nn.Sequential(
        Scaled(nn.Conv2d(1, 4, 3), norm, nn.Dropout()), nn.Flatten(), nn.LazyLinear(4)
    )
    model(data.prepare(data.train.images[:2]))
    model[0].requires_grad_(not frozen)
    model[0].scale.requires_grad_(False)
    trained: dict[str, bool] = {}
    for name in ("0", "0.1", "0.2"):
        model.get_submodule(name).register_forward_hook(
            lambda module, *_, name=name: (
                trained.update({name: module.training}) if torch.is_grad_enabled() else None
            )
        )
    before = norm.running_mean.clone()
    found, _ = tune(model, data, Recipe(1, 0.0, batch_size=20, distillation=0.0), structures={})
    assert trained == dict.fromkeys(("0", "0.1", "0.2"), not frozen)
    assert torch.equal(found[0][1].running_mean, before) == frozen


# --- hardware


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"channels_last": True}, id="channels last"),
        pytest.param({"device": "cuda"}, id="GPU", marks=ON_A_GPU),
        pytest.param(
            {"device": "cuda", "precision": "bf16", "channels_last": True},
            id="GPU, bf16, channels last",
            marks=ON_A_GPU,
        ),
    ],
)
def test_other_ways_to_compute_give_a_like_result(
    changes: dict[str, Any], trained: nn.Module, data: Dataset
) -> None:
    plain, one = tune(trained, data, BRIEF)
    found, other = tune(trained, data, BRIEF, hardware=Hardware(**changes))
    assert other.stages[-1].max_residual < 1e-6
    for name, structure in STRUCTURES.items():
        assert relative_residual(found.get_submodule(name).weight, structure) < 1e-6
    assert all(value.is_contiguous() for value in found.state_dict().values())
    assert all(value.dtype == state(plain)[name].dtype for name, value in state(found).items())
    task = Classification(data, BRIEF.batch_size, (), BRIEF.seed)
    judged = task.evaluate(lambda batch: found(batch[0]))
    # A GPU's float32 convolutions may round as TF32 does, to 11 bits.
    rounding = 1e-5 if "device" not in changes else 1e-2
    assert other.stages[-1].evaluation.loss == pytest.approx(judged.loss, rel=rounding)
    difference = one.stages[-1].evaluation.loss - other.stages[-1].evaluation.loss
    assert abs(difference) < 0.1 * one.stages[-1].evaluation.loss + 0.05


def test_bfloat16_that_the_processor_does_not_have_is_told() -> None:
    assert Hardware().note() is None
    listed = Path("/proc/cpuinfo")
    text = listed.read_text() if listed.exists() else ""
    flags = set(" ".join(re.findall(r"^flags\s*:(.*)$", text, re.MULTILINE)).split())
    if not flags:
        pytest.skip("this processor does not list what it has")
    note = Hardware(precision="bf16").note()
    if flags & {"avx512_bf16", "amx_bf16"}:
        assert note is None
    elif "avx512f" not in flags:
        assert note is not None
        assert "--precision bf16" in note


class Viewed(nn.Sequential):
    """Flattens by view, which asks for the plain layout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *features, linear = self
        for module in features:
            x = module(x)
        scores: torch.Tensor = linear(x.view(x.shape[0], -1))
        return scores


def test_a_model_that_cannot_be_channels_last_is_told(data: Dataset) -> None:
    pixels = math.prod(data.train.image_shape[1:])
    model = Viewed(nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * pixels, 4))
    tune(model, data, BRIEF, structures={})
    with pytest.raises(TrainingError, match=r"view\(\).*Leave out --channels-last"):
        tune(model, data, BRIEF, structures={}, hardware=Hardware(channels_last=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled(trained: nn.Module, data: Dataset) -> None:
    _, one = tune(trained, data, BRIEF)
    _, other = tune(trained, data, BRIEF, hardware=Hardware(compiled=True))
    difference = one.stages[-1].evaluation.loss - other.stages[-1].evaluation.loss
    assert abs(difference) < 0.05


@pytest.mark.slow
def test_no_compiler_is_said(
    trained: nn.Module, data: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nonexistent"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with pytest.raises(TrainingError, match=r"leave out --compile"):
        tune(trained, data, BRIEF, hardware=Hardware(compiled=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_gpu_is_said() -> None:
    with pytest.raises(TrainingError, match=r"--train-device cpu"):
        Hardware(device="cuda").check()
    Hardware().check()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"WORLD_SIZE": "8", "MASTER_ADDR": "x", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=r"--nproc-per-node 2"):
        Hardware(device="cuda").check()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    Hardware(device="cuda").check()
