"""What is said where lowering left dense what the plan for a target counts on."""

import pytest

from structconv_cli.cost import Cost
from structconv_cli.finishing import target_notes
from structconv_cli.planning.targets import Targets

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
