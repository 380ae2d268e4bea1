"""Fine-tuning into structure: stages, laws of what comes out, failures."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from structconv_cli.data.dataset import Dataset
from structconv_cli.data.order import Shuffle
from structconv_cli.data.split import Split
from structconv_cli.errors import PlanError, TrainingError
from structconv_cli.progress import Observer
from structconv_cli.rewrite import project_weights
from structconv_cli.structure import Structure
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.task import Evaluation
from structconv_cli.training.descent import Descent
from structconv_cli.training.finetune import finetune
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import FineTuneResult
from structconv_cli.training.schedule import Schedule

STRUCTURES = {"1": Structure((6, 3, 3), (6, 2, 2)), "4": Structure((8, 3, 3), (5, 2, 2))}
FAST = Recipe(epochs=2, regularised=1, batch_size=16, learning_rate=0.05)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def tune(
    model: nn.Module, data: Dataset, recipe: Recipe, **rest: Any
) -> tuple[nn.Module, FineTuneResult]:
    task = Classification(data, recipe.batch_size, recipe.augment, recipe.seed)
    return finetune(model, rest.pop("structures", STRUCTURES), task, recipe, **rest)


def judge(model: nn.Module, data: Dataset) -> Evaluation:
    with torch.no_grad():
        return Classification(data).evaluate(lambda batch: model(batch[0]))


@pytest.fixture(scope="module")
def data() -> Dataset:
    """The class is the quadrant that is brighter."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 4
        images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[:, row : row + 4, column : column + 4] += 60
        return Split(images.to(torch.uint8), labels)

    return Dataset(split(100), split(60), tuple("abcd"), mean=(0.3,), std=(0.2,))


@pytest.fixture(scope="module")
def trained(data: Dataset) -> nn.Module:
    """A network that knows the task, so that there is something to lose."""
    model = network().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(12):
        for images, labels in data.batches(data.train, 25, shuffle=Shuffle(0, epoch)):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def relative_residual(weight: torch.Tensor, structure: Structure) -> float:
    """||(I - A A^+) w|| / ||w|| with A written out, a column per placed block of ones."""
    columns = []
    for corner in product(*(range(count) for count in structure.reduced)):
        block = np.zeros(structure.dense)
        ends = zip(corner, structure.windows, strict=True)
        block[tuple(slice(start, start + window) for start, window in ends)] = 1
        columns.append(block.ravel())
    basis = np.stack(columns, axis=1)
    flat = weight.detach().double().flatten(1).numpy()
    outside = flat - flat @ (basis @ np.linalg.pinv(basis)).T
    return float(np.linalg.norm(outside) / np.linalg.norm(flat))


def stage_names(result: FineTuneResult) -> list[str]:
    return [stage.stage for stage in result.stages]


@pytest.mark.parametrize(
    ("epochs", "regularised", "stages"),
    [
        (0, 0, []),
        (1, 1, ["regularised"]),
        (2, 1, ["regularised", "fine-tuned"]),
        (1, 0, ["fine-tuned"]),
    ],
)
def test_stages_and_epochs(
    trained: nn.Module, data: Dataset, epochs: int, regularised: int, stages: list[str]
) -> None:
    recipe = Recipe(epochs, regularised, batch_size=16, learning_rate=0.02)
    tuned, result = tune(trained, data, recipe)
    assert result.recipe == replace(recipe, distillation=Classification.following)
    middle = ["projected", "batch norm re-estimated"]
    assert stage_names(result) == [
        "original",
        *[name for name in stages if name == "regularised"],
        *middle,
        *[name for name in stages if name == "fine-tuned"],
    ]
    # Whoever crosses at the end of an epoch is inside when it is recorded.
    assert [epoch.epoch for epoch in result.epochs] == list(range(1, epochs + 1))
    assert [epoch.evaluation is None for epoch in result.epochs] == [False] * (epochs - 1) + [
        True
    ] * (epochs > 0)
    assert all(0 < epoch.loss < 10 for epoch in result.epochs)
    assert all(stage.seconds >= 0 for stage in result.stages)
    assert all(stage.evaluation.examples == 60 for stage in result.stages)
    # The record's ends are the model that came in and the one that goes out.
    assert result.stages[0].evaluation == judge(trained, data)
    assert result.stages[-1].evaluation == judge(tuned, data)
    assert not any(module.training for module in tuned.modules())
    for name, structure in STRUCTURES.items():
        assert relative_residual(tuned.get_submodule(name).weight, structure) < 1e-6
        assert relative_residual(trained.get_submodule(name).weight, structure) > 0.1


@pytest.mark.parametrize("sr_lambda", [0.0, 0.1, 1.0])
def test_the_regularised_phase_ends_inside_whatever_lambda_is(
    trained: nn.Module, data: Dataset, sr_lambda: float
) -> None:
    recipe = Recipe(2, 2, batch_size=16, learning_rate=0.02, sr_lambda=sr_lambda)
    _, result = tune(trained, data, recipe)
    by_name = {stage.stage: stage for stage in result.stages}
    expected = max(
        relative_residual(trained.get_submodule(name).weight, structure)
        for name, structure in STRUCTURES.items()
    )
    assert by_name["original"].max_residual == pytest.approx(expected, rel=1e-6)
    assert 0 < result.epochs[0].max_residual < expected
    assert result.epochs[1].max_residual < 1e-6
    assert by_name["regularised"].max_residual < 1e-6
    # So projecting changes next to nothing.
    before, after = by_name["regularised"].evaluation, by_name["projected"].evaluation
    assert after.loss == pytest.approx(before.loss, rel=1e-4)


def test_weights_never_leave_the_subspace_while_tuned_inside(
    trained: nn.Module, data: Dataset
) -> None:
    recipe = Recipe(3, 1, batch_size=16, learning_rate=0.05)
    tuned, result = tune(trained, data, recipe)
    assert all(epoch.max_residual < 1e-6 for epoch in result.epochs)
    # In the end they are projected in float64 and rounded once.
    for name, structure in STRUCTURES.items():
        residual = relative_residual(tuned.get_submodule(name).weight, structure)
        assert residual <= torch.finfo(torch.float32).eps / 2
    after = stage_names(result).index("projected")
    assert all(stage.max_residual < 1e-6 for stage in result.stages[after:])


def test_without_epochs_weights_are_projected_and_statistics_re_estimated(
    trained: nn.Module, data: Dataset
) -> None:
    tuned, result = tune(trained, data, Recipe(0, 0))
    assert result.epochs == ()
    after, before = tuned.state_dict(), trained.state_dict()
    for name, value in before.items():
        if name in {"1.weight", "4.weight"}:
            structure = STRUCTURES[name[0]]
            assert torch.equal(after[name], structure.project(value.double()).float())
        elif not name.startswith("2."):
            assert torch.equal(after[name], value), name
    # All 100 training images fit into one batch, so the statistics are theirs.
    seen = tuned[1](tuned[0](data.prepare(data.train.first(100)))).detach()
    assert torch.allclose(after["2.running_mean"], seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(after["2.running_var"], seen.var((0, 2, 3)), rtol=1e-4)


def test_a_learning_rate_of_zero_only_projects(trained: nn.Module, data: Dataset) -> None:
    # The limit shrinks the residual and leaves the projection alone, step by step.
    recipe = Recipe(2, 1, batch_size=16, learning_rate=0.0)
    tuned, _ = tune(trained, data, recipe)
    for name, value in trained.named_parameters():
        found = tuned.get_parameter(name)
        if name in {"1.weight", "4.weight"}:
            expected = STRUCTURES[name[0]].project(value.double())
            assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-6
        else:
            assert torch.equal(found, value), name


@pytest.mark.parametrize("regularised", [0, 0.5, 1, 2])
@pytest.mark.parametrize("aim", ["least squares", "projection"])
def test_without_learning_the_fitted_weights_are_reached(
    regularised: float, aim: str, trained: nn.Module, data: Dataset
) -> None:
    fitted = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in fitted.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    project_weights(fitted, STRUCTURES)
    recipe = replace(FAST, regularised=regularised, learning_rate=0.0, aim=aim)
    tuned, _ = tune(trained, data, recipe, fit=lambda: dict(fitted.named_parameters()))
    expected = fitted
    if aim == "projection":
        expected = copy.deepcopy(trained)
        project_weights(expected, STRUCTURES)
    for name, parameter in tuned.named_parameters():
        torch.testing.assert_close(
            parameter, expected.get_parameter(name), rtol=1e-5, atol=1e-5, msg=name
        )


def test_half_way_half_of_the_way_is_gone(trained: nn.Module) -> None:
    """The residual's limit and the way to the fitted weights go together."""
    structure = STRUCTURES["1"]
    model = copy.deepcopy(trained)
    weight = model.get_parameter("1.weight")
    inside = structure.project(weight.detach())
    move = structure.project(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    descent = Descent({"1": (weight, structure)}, Schedule(Recipe(2, 1.0), 10))
    descent.lead({"1.weight": move}, model)
    for step in range(5):
        descent.after_step(step)
    torch.testing.assert_close(structure.project(weight.detach()), inside + 0.5 * move)
    for step in range(5, 12):
        descent.after_step(step)
    torch.testing.assert_close(weight.detach(), inside + move)


def test_frozen_parameters_are_not_led(trained: nn.Module, data: Dataset) -> None:
    model = copy.deepcopy(trained)
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    recipe = replace(FAST, aim="least squares", learning_rate=0.0)
    aims = {name: parameter + 1 for name, parameter in model.named_parameters()}
    tuned, _ = tune(model, data, recipe, structures={}, fit=lambda: aims)
    assert torch.equal(tuned[0].weight, model[0].weight)  # type: ignore[index]
    torch.testing.assert_close(tuned[0].bias, model[0].bias + 1)  # type: ignore[index, operator]


def test_tuning_pays_back_what_projection_costs(trained: nn.Module, data: Dataset) -> None:
    recipe = Recipe(5, 2, batch_size=16, learning_rate=0.05)
    _, result = tune(trained, data, recipe)
    _, projected = tune(trained, data, Recipe(0, 0))
    cost = {stage.stage: stage.evaluation.loss for stage in projected.stages}
    assert cost["projected"] > cost["original"]
    assert result.stages[-1].evaluation.loss < 0.5 * cost["projected"]
    assert result.stages[-1].evaluation.loss < 0.5 * cost["batch norm re-estimated"]
    assert result.stages[-1].evaluation.score > 60


@pytest.mark.parametrize("augment", [(), ("crop", "flip")])
def test_a_seed_decides_everything(
    trained: nn.Module, data: Dataset, augment: tuple[str, ...]
) -> None:
    outcomes = []
    for global_seed, seed in [(1, 0), (2, 0), (1, 1)]:
        torch.manual_seed(global_seed)
        recipe = Recipe(2, 1, batch_size=16, augment=augment, seed=seed)
        tuned, result = tune(trained, data, recipe)
        outcomes.append((state(tuned), [epoch.loss for epoch in result.epochs]))
    assert same(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]
    assert not same(outcomes[0][0], outcomes[2][0])


@pytest.mark.parametrize("training", [False, True])
def test_the_original_and_the_global_random_state_are_untouched(
    trained: nn.Module, data: Dataset, training: bool
) -> None:
    model = copy.deepcopy(trained).train(training)
    before, random_state = state(model), torch.get_rng_state()
    tuned, _ = tune(model, data, FAST)
    assert same(state(model), before)
    assert not same(state(tuned), before)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_frozen_parameters_stay(trained: nn.Module, data: Dataset) -> None:
    model = copy.deepcopy(trained)
    model[9].requires_grad_(False)
    tuned, _ = tune(model, data, FAST)
    assert torch.equal(tuned[9].weight, model[9].weight)
    assert not torch.equal(tuned[0].weight, model[0].weight)


def test_a_model_frozen_altogether_can_still_be_projected(
    trained: nn.Module, data: Dataset
) -> None:
    model = copy.deepcopy(trained).requires_grad_(False)
    tuned, _ = tune(model, data, Recipe(0, 0))
    assert relative_residual(tuned[1].weight, STRUCTURES["1"]) < 1e-6


@pytest.mark.parametrize(
    ("distillation", "follows_labels"), [(0.0, True), (0.5, True), (1.0, False)]
)
def test_distillation_alone_does_not_read_the_labels(
    distillation: float, follows_labels: bool, trained: nn.Module, data: Dataset
) -> None:
    recipe = replace(FAST, distillation=distillation)
    other = replace(data, train=Split(data.train.images, 1 - data.train.labels.clamp_max(1)))
    first, _ = tune(trained, data, recipe)
    second, _ = tune(trained, other, recipe)
    assert same(state(first), state(second)) is not follows_labels


def test_a_last_smaller_batch_is_left_out(trained: nn.Module, data: Dataset) -> None:
    steps: list[tuple[int, int]] = []

    class Counting(Observer):
        def steps(self, done: int, total: int) -> None:
            steps.append((done, total))

    tune(trained, data, FAST, observer=Counting())
    # 100 images, 16 at a time: six steps in each of two epochs.
    assert steps == [(i + 1, 12) for i in range(12)]


def test_fewer_images_than_a_batch_make_one_step(trained: nn.Module, data: Dataset) -> None:
    recipe = Recipe(3, 1, batch_size=1000, learning_rate=0.01)
    tuned, result = tune(trained, data, recipe)
    assert len(result.epochs) == 3
    assert relative_residual(tuned[1].weight, STRUCTURES["1"]) < 1e-6


def test_the_observer_sees_every_stage_begin_and_end(trained: nn.Module, data: Dataset) -> None:
    events: list[str] = []

    class Watching(Observer):
        @contextmanager
        def stage(self, title: str) -> Iterator[None]:
            events.append(f"+{title}")
            yield
            events.append(f"-{title}")

    _, result = tune(trained, data, FAST, observer=Watching())
    every = [sign + name for name in stage_names(result) for sign in "+-"]
    assert [event for event in events if event[1:] != "training"] == every
    # What happens while it trains lies inside that stage.
    start, end = events.index("+training"), events.index("-training")
    inside = ["regularised", "projected", "batch norm re-estimated"]
    assert events[start + 1 : end] == [sign + name for name in inside for sign in "+-"]


# --- failures


def diverge(**changes: object) -> Callable[[], Recipe]:
    return lambda: Recipe(**({"learning_rate": 1e30, "batch_size": 16} | changes))


@pytest.mark.parametrize(
    ("epochs", "regularised", "phase"),
    [(2, 1, "regularised"), (1, 1, "regularised"), (1, 0, "fine-tuned")],
)
def test_a_loss_that_is_not_finite_stops_training(
    trained: nn.Module, data: Dataset, epochs: int, regularised: int, phase: str
) -> None:
    before, random_state = state(trained), torch.get_rng_state()
    recipe = diverge(epochs=epochs, regularised=regularised)()
    with pytest.raises(TrainingError) as error:
        tune(trained, data, recipe)
    message = str(error.value)
    assert "epoch 1" in message
    assert f"{phase} phase" in message
    assert "--lr" in message
    assert "1e+30" in message
    assert same(state(trained), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_last_step_that_destroys_the_model_is_noticed(trained: nn.Module, data: Dataset) -> None:
    # One step only: its own loss is still finite, and no later one tells.
    recipe = diverge(epochs=1, regularised=0, batch_size=100)()
    with pytest.raises(TrainingError):
        tune(trained, data, recipe)


def test_an_unknown_layer_is_named(trained: nn.Module, data: Dataset) -> None:
    with pytest.raises(PlanError, match="no layer stem"):
        tune(trained, data, FAST, structures={"stem": STRUCTURES["1"]})
