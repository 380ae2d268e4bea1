"""Fine-tuning, and what it is made of: evaluation and batch-norm statistics."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from structconv_cli.calibrate import reestimate_batch_norm
from structconv_cli.data.dataset import Dataset, Split
from structconv_cli.data.order import Shuffle
from structconv_cli.errors import PlanError, TrainingError
from structconv_cli.finetune import FineTuneResult, FineTuneSettings, finetune
from structconv_cli.progress import Observer
from structconv_cli.structure import Structure
from structconv_cli.task import distillation_loss, evaluate, task_loss

# --- evaluation


def logits_of(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows)


def test_evaluation_by_hand() -> None:
    # The model passes its input on, so the batches hold the logits themselves; the last is smaller.
    batches = [
        (logits_of([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 0, 0])),
        (logits_of([[0.0, 5.0]]), torch.tensor([1])),
    ]
    losses = [
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(1)),
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(-5)),
    ]
    found = evaluate(nn.Identity(), batches)
    assert found.accuracy == 75
    assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert found.images == 4
    # However the images are cut into batches.
    whole = [tuple(torch.cat(part) for part in zip(*batches, strict=True))]
    assert evaluate(nn.Identity(), whole).loss == pytest.approx(found.loss, rel=1e-6)


def test_task_loss_by_hand() -> None:
    logits, labels = logits_of([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert float(task_loss(logits, labels)) == pytest.approx(expected, rel=1e-6)


def test_distillation_loss_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(student / 2, 1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    assert float(distillation_loss(student, teacher)) == pytest.approx(float(expected), rel=1e-12)
    # A constant added to an image's scores changes no probability.
    assert float(distillation_loss(teacher + 7, teacher)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_runs_in_eval_mode_and_restores_the_mode(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 2)).train(training)
    x, labels = torch.randn(50, 4), torch.zeros(50, dtype=torch.long)
    found = evaluate(model, [(x, labels)])
    assert found.loss == pytest.approx(float(task_loss(model[1](x), labels).detach()), rel=1e-5)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- batch-norm statistics


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("training", [False, True])
def test_one_batch_gives_its_own_statistics(momentum: float | None, training: bool) -> None:
    norm = nn.BatchNorm2d(3, momentum=momentum).train(training)
    with torch.no_grad():  # what was there before leaves no trace
        norm.running_mean.fill_(50)
        norm.running_var.fill_(70)
        norm.num_batches_tracked.fill_(9)
    x = 3 + 2 * torch.randn(8, 3, 5, 5)
    assert reestimate_batch_norm(norm, [x]) == 1
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(norm.running_var, x.var((0, 2, 3)), rtol=1e-5)
    assert norm.momentum == momentum
    assert norm.training is training


def test_equal_batches_weigh_equally() -> None:
    norm = nn.BatchNorm1d(2)
    batches = list((torch.randn(60, 2) * torch.tensor([1.0, 4.0]) + 1).split(20))
    reestimate_batch_norm(norm, iter(batches))
    mean = torch.cat(batches).mean(0)
    variance = torch.stack([batch.var(0) for batch in batches]).mean(0)
    assert torch.allclose(norm.running_mean, mean, rtol=1e-5)
    assert torch.allclose(norm.running_var, variance, rtol=1e-5)


def test_a_second_norm_sees_what_the_first_puts_out() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2))
    x = torch.randn(16, 2, 4, 4) * 7 - 3
    assert reestimate_batch_norm(model, [x]) == 2
    between = ((x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)).relu()
    assert torch.allclose(model[2].running_mean, between.mean((0, 2, 3)), rtol=1e-2)


def test_dropout_stays_off_and_parameters_stay() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=0.3)).train()
    before = [parameter.clone() for parameter in model.parameters()]
    x = torch.randn(40, 3)
    reestimate_batch_norm(model, [x])
    assert torch.allclose(model[1].running_mean, x.mean(0), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model[1].momentum == 0.3
    assert all(module.training for module in model.modules())


def test_momentum_and_mode_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3)).eval()
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        reestimate_batch_norm(model, [torch.zeros(2, 3, 4, 4)])
    assert model[0].momentum == 0.3
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.GroupNorm(1, 3)]
)
def test_nothing_to_estimate(model: nn.Module) -> None:
    assert reestimate_batch_norm(model, [torch.zeros(2, 3)]) == 0


# --- fine-tuning

STRUCTURES = {"1": Structure((6, 3, 3), (6, 2, 2)), "4": Structure((8, 3, 3), (5, 2, 2))}
FAST = FineTuneSettings(epochs=2, regularised_epochs=1, batch_size=16, learning_rate=0.05)


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
            task_loss(model(images), labels).backward()
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
    settings = FineTuneSettings(epochs, regularised, batch_size=16, learning_rate=0.02)
    tuned, result = finetune(trained, STRUCTURES, data, settings)
    assert result.settings == settings
    middle = ["projected", "batch norm re-estimated"]
    assert stage_names(result) == [
        "original",
        *[name for name in stages if name == "regularised"],
        *middle,
        *[name for name in stages if name == "fine-tuned"],
    ]
    phases = [(epoch.phase, epoch.epoch) for epoch in result.epochs]
    assert phases == [("regularised", i + 1) for i in range(regularised)] + [
        ("fine-tuned", i + 1) for i in range(epochs - regularised)
    ]
    assert all(0 < epoch.loss < 10 for epoch in result.epochs)
    assert all(stage.seconds >= 0 for stage in result.stages)
    assert all(stage.evaluation.images == 60 for stage in result.stages)
    # The record's ends are the model that came in and the one that goes out.
    assert result.stages[0].evaluation == evaluate(trained, data.batches(data.val, 256))
    assert result.stages[-1].evaluation == evaluate(tuned, data.batches(data.val, 256))
    assert not any(module.training for module in tuned.modules())
    for name, structure in STRUCTURES.items():
        assert relative_residual(tuned.get_submodule(name).weight, structure) < 1e-6
        assert relative_residual(trained.get_submodule(name).weight, structure) > 0.1


@pytest.mark.parametrize("sr_lambda", [0.0, 0.1, 1.0])
def test_the_regularised_phase_ends_inside_whatever_lambda_is(
    trained: nn.Module, data: Dataset, sr_lambda: float
) -> None:
    settings = FineTuneSettings(2, 2, batch_size=16, learning_rate=0.02, sr_lambda=sr_lambda)
    _, result = finetune(trained, STRUCTURES, data, settings)
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
    settings = FineTuneSettings(3, 1, batch_size=16, learning_rate=0.05)
    tuned, result = finetune(trained, STRUCTURES, data, settings)
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
    tuned, result = finetune(trained, STRUCTURES, data, FineTuneSettings(0, 0))
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
    settings = FineTuneSettings(2, 1, batch_size=16, learning_rate=0.0)
    tuned, _ = finetune(trained, STRUCTURES, data, settings)
    for name, value in trained.named_parameters():
        found = tuned.get_parameter(name)
        if name in {"1.weight", "4.weight"}:
            expected = STRUCTURES[name[0]].project(value.double())
            assert float((found - expected).detach().norm() / expected.norm()) < 1e-6
        else:
            assert torch.equal(found, value), name


def test_tuning_pays_back_what_projection_costs(trained: nn.Module, data: Dataset) -> None:
    settings = FineTuneSettings(5, 2, batch_size=16, learning_rate=0.05)
    _, result = finetune(trained, STRUCTURES, data, settings)
    _, projected = finetune(trained, STRUCTURES, data, FineTuneSettings(0, 0))
    cost = {stage.stage: stage.evaluation.loss for stage in projected.stages}
    assert cost["projected"] > cost["original"]
    assert result.stages[-1].evaluation.loss < 0.5 * cost["projected"]
    assert result.stages[-1].evaluation.loss < 0.5 * cost["batch norm re-estimated"]
    assert result.stages[-1].evaluation.accuracy > 60


@pytest.mark.parametrize("augment", [(), ("crop", "flip")])
def test_a_seed_decides_everything(
    trained: nn.Module, data: Dataset, augment: tuple[str, ...]
) -> None:
    outcomes = []
    for global_seed, seed in [(1, 0), (2, 0), (1, 1)]:
        torch.manual_seed(global_seed)
        settings = FineTuneSettings(2, 1, batch_size=16, augment=augment, seed=seed)
        tuned, result = finetune(trained, STRUCTURES, data, settings)
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
    tuned, _ = finetune(model, STRUCTURES, data, FAST)
    assert same(state(model), before)
    assert not same(state(tuned), before)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_frozen_parameters_stay(trained: nn.Module, data: Dataset) -> None:
    model = copy.deepcopy(trained)
    model[9].requires_grad_(False)
    tuned, _ = finetune(model, STRUCTURES, data, FAST)
    assert torch.equal(tuned[9].weight, model[9].weight)
    assert not torch.equal(tuned[0].weight, model[0].weight)


def test_a_model_frozen_altogether_can_still_be_projected(
    trained: nn.Module, data: Dataset
) -> None:
    model = copy.deepcopy(trained).requires_grad_(False)
    tuned, _ = finetune(model, STRUCTURES, data, FineTuneSettings(0, 0))
    assert relative_residual(tuned[1].weight, STRUCTURES["1"]) < 1e-6


@pytest.mark.parametrize(
    ("distillation", "follows_labels"), [(0.0, True), (0.5, True), (1.0, False)]
)
def test_distillation_alone_does_not_read_the_labels(
    distillation: float, follows_labels: bool, trained: nn.Module, data: Dataset
) -> None:
    settings = replace(FAST, distillation=distillation)
    other = replace(data, train=Split(data.train.images, 1 - data.train.labels.clamp_max(1)))
    first, _ = finetune(trained, STRUCTURES, data, settings)
    second, _ = finetune(trained, STRUCTURES, other, settings)
    assert same(state(first), state(second)) is not follows_labels


def test_a_last_smaller_batch_is_left_out(trained: nn.Module, data: Dataset) -> None:
    steps: list[tuple[int, int]] = []

    class Counting(Observer):
        def steps(self, done: int, total: int) -> None:
            steps.append((done, total))

    finetune(trained, STRUCTURES, data, FAST, Counting())
    # 100 images, 16 at a time: six steps in each of the two phases.
    assert steps == [(i + 1, 6) for i in range(6)] * 2


def test_fewer_images_than_a_batch_make_one_step(trained: nn.Module, data: Dataset) -> None:
    settings = FineTuneSettings(3, 1, batch_size=1000, learning_rate=0.01)
    tuned, result = finetune(trained, STRUCTURES, data, settings)
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

    _, result = finetune(trained, STRUCTURES, data, FAST, Watching())
    assert events == [sign + name for name in stage_names(result) for sign in "+-"]


# --- failures


def diverge(**changes: object) -> Callable[[], FineTuneSettings]:
    return lambda: FineTuneSettings(**({"learning_rate": 1e30, "batch_size": 16} | changes))


@pytest.mark.parametrize(
    ("epochs", "regularised", "phase"),
    [(2, 1, "regularised"), (1, 1, "regularised"), (1, 0, "fine-tuned")],
)
def test_a_loss_that_is_not_finite_stops_training(
    trained: nn.Module, data: Dataset, epochs: int, regularised: int, phase: str
) -> None:
    before, random_state = state(trained), torch.get_rng_state()
    settings = diverge(epochs=epochs, regularised_epochs=regularised)()
    with pytest.raises(TrainingError) as error:
        finetune(trained, STRUCTURES, data, settings)
    message = str(error.value)
    assert "epoch 1" in message
    assert f"{phase} phase" in message
    assert "--lr" in message
    assert "1e+30" in message
    assert same(state(trained), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_last_step_that_destroys_the_model_is_noticed(trained: nn.Module, data: Dataset) -> None:
    # One step only: its own loss is still finite, and no later one tells.
    settings = diverge(epochs=1, regularised_epochs=0, batch_size=100)()
    with pytest.raises(TrainingError):
        finetune(trained, STRUCTURES, data, settings)


def test_an_unknown_layer_is_named(trained: nn.Module, data: Dataset) -> None:
    with pytest.raises(PlanError, match="no layer stem"):
        finetune(trained, {"stem": STRUCTURES["1"]}, data, FAST)
