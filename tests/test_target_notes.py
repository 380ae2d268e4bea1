"""What is said where lowering left dense what a target counts on, and of models near chance."""

import pytest
import torch

from structconv_cli.cost import Cost
from structconv_cli.data.dataset import Dataset
from structconv_cli.data.split import Split
from structconv_cli.finishing import chance_warning, target_notes
from structconv_cli.planning.targets import Targets
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.task import Evaluation
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import FineTuneResult, StageResult

BEFORE = Cost(1000, 900, 100)


@pytest.mark.parametrize(
    ("targets", "after", "told"),
    [
        (Targets(macs=0.5), Cost(500, 450, 90), []),
        (Targets(macs=0.5), Cost(520, 450, 90), ["0.520 of the MACs"]),
        (Targets(parameters=0.5), Cost(1000, 900, 60), ["0.600 of the parameters"]),
        (Targets(macs=0.9, parameters=0.5), Cost(950, 900, 60), ["0.950", "0.600"]),
        (Targets(speedup=2.0), BEFORE, []),
    ],
)
def test_a_target_of_operations_that_was_missed_is_said(
    targets: Targets, after: Cost, told: list[str]
) -> None:
    notes = target_notes(targets, BEFORE, after)
    assert len(notes) == len(told)
    assert all(text in note for text, note in zip(told, notes, strict=True))


@pytest.mark.parametrize(
    ("classes", "accuracy", "told"),
    [
        *((2, 95, False), (2, 52, True), (3, 60, False), (10, 25, False), (10, 12, True)),
        *((1000, 1, False), (1000, 0.15, True)),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_model_near_chance_is_said(
    classes: int, accuracy: float, told: bool, named: bool
) -> None:
    split = Split(torch.zeros(classes, 1, 2, 2), torch.arange(classes))
    names = tuple(map(str, range(classes))) if named else ()
    task = Classification(Dataset(split, split, names, (0.0,), (1.0,)))
    stage = StageResult("original", Evaluation(accuracy, 1.0, 100), 0.0, 0.0)
    notes = chance_warning(task, FineTuneResult(Recipe(0, 0.0), task.metric, (stage,), ()))
    assert [f"near chance for {classes} classes" in note for note in notes] == [True] * told
