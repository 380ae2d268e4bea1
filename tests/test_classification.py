"""Classification: its loss, its distillation, and how a model is judged, alone and together."""

import math

import pytest
import torch
from torch import nn

from structconv_cli.data.dataset import Dataset
from structconv_cli.data.split import Split
from structconv_cli.errors import TaskError
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.distillation import divergence
from structconv_cli.tasks.outputs import class_scores
from structconv_cli.world import World


def logits_of(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows)


def task_of(
    scores: torch.Tensor, labels: torch.Tensor, classes: int, **changes: object
) -> Classification:
    """A task whose images hold the scores themselves, for a model that passes them on."""
    split = Split(scores[:, :, None, None], labels)
    names = tuple(map(str, range(classes)))
    channels = scores.shape[1]
    data = Dataset(split, split, names, (0.0,) * channels, (1.0,) * channels)
    return Classification(data, **changes)  # type: ignore[arg-type]


def passed_on(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return batch[0].flatten(1)


def test_evaluation_by_hand() -> None:
    scores = logits_of([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0]])
    losses = [
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(1)),
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(-5)),
    ]
    found = task_of(scores, torch.tensor([0, 0, 0, 1]), 2).evaluate(passed_on)
    assert found.score == 75
    assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert found.examples == 4
    assert found.others == {}


def test_a_single_score_is_told() -> None:
    with pytest.raises(TaskError, match=r"one score per image.*--task"):
        task_of(logits_of([[2.0], [1.0]]), torch.tensor([0, 1]), 2).check(nn.Flatten())


@pytest.mark.parametrize("named", [True, False])
def test_top_five_by_hand(named: bool) -> None:
    scores = torch.arange(11.0).repeat(600, 1)  # more than a batch
    labels = torch.arange(600) % 11
    found = task_of(scores, labels, 11 if named else 0).evaluate(passed_on)
    assert found.score == pytest.approx(100 * float((labels == 10).double().mean()))
    right = float((labels >= 6).double().mean())
    assert found.others == {"top-5 accuracy": pytest.approx(100 * right)}


@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_judge_every_image_once(size: int) -> None:
    """The sums over shares, whoever adds them up, are those of the whole."""
    scores, labels = torch.randn(10, 3), torch.arange(10) % 3
    whole = task_of(scores, labels, 3).evaluate(passed_on)

    class Part(World):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            parts.append(values.clone())
            return values

    parts: list[torch.Tensor] = []
    for rank in range(size):
        task_of(scores, labels, 3, world=Part(rank, size)).evaluate(passed_on)
    total = torch.stack(parts).sum(0)
    assert float(total[3]) == whole.examples
    assert 100 * float(total[0]) / 10 == pytest.approx(whole.score)
    assert float(total[2]) / 10 == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize(("size", "batch"), [(1, 4), (2, 4), (3, 2), (2, 100)])
def test_every_process_takes_as_many_steps(size: int, batch: int) -> None:
    scores, labels = torch.randn(19, 3), torch.arange(19) % 3
    for rank in range(size):
        task = task_of(scores, labels, 3, batch_size=batch, world=World(rank, size))
        found = list(task.training(0))
        assert len(found) == task.steps >= 1
        assert len({len(entry[1]) for entry in found}) == 1
    with_others = task_of(scores, labels, 3, batch_size=batch, world=World(0, size))
    assert with_others.steps == max(1, 19 // size // batch)


def test_loss_by_hand() -> None:
    logits, labels = logits_of([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    task = task_of(logits, labels, 2)
    assert float(task.loss(logits, (logits, labels))) == pytest.approx(expected, rel=1e-6)


def test_distillation_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, generator=generator)
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(student / 2, 1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    assert float(divergence(student, teacher)) == pytest.approx(float(expected), rel=1e-5)
    # A constant added to an image's scores changes no probability.
    assert float(divergence(teacher + 7, teacher)) == pytest.approx(0, abs=1e-6)
    # Per pixel: the mean over them.
    pixels, taught = student.T[None, :, :, None], teacher.T[None, :, :, None]
    assert float(divergence(pixels, taught)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x, x + 1],
        lambda x: {"out": x, "aux": x + 1},
        lambda x: {"aux": x + 1, "logits": x},
        lambda x: {"anything": x},
        lambda x: ({"out": x}, 3),
    ],
)
def test_scores_among_what_models_return(wrapped: object) -> None:
    x = torch.randn(2, 3)
    assert class_scores(wrapped(x)) is x  # type: ignore[operator]


@pytest.mark.parametrize("returned", [None, (), {"boxes": torch.zeros(1), "labels": None}, 3.0])
def test_no_scores_is_said(returned: object) -> None:
    with pytest.raises(TaskError, match=r"--task FILE\.py"):
        class_scores(returned)


def test_forward_takes_the_images() -> None:
    task = task_of(torch.randn(4, 3), torch.arange(4) % 3, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    batch = next(task.training(0))
    assert torch.equal(task.forward(model, batch), model(batch[0]))
