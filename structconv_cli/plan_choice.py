"""The plans that a conversion carries out, one after another while too much is lost.

What a plan loses is only known once it is carried out. So `--max-drop` is a loop: plan for the loss
that the drop is predicted to stand for, carry it out, measure, and if more was lost, plan for
proportionally less.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from structconv_cli.errors import PlanError
from structconv_cli.model.inventory import Inventory
from structconv_cli.plan import Plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.prediction import Prediction
from structconv_cli.planning.proposal import Planner
from structconv_cli.planning.targets import Targets

MOST_TRIED = 4
_BACK_OFF = 0.8
"""Aim below the loss that would do in proportion: small losses are recovered less completely."""


@dataclass(frozen=True)
class Tried:
    """A plan that was, or is being, carried out.

    Attributes:
        plan: the plan.
        prediction: what it is predicted to do; None for a plan from a file or a rule.
        most_loss: the loss that it was made for; None without `--max-drop`.
        drop: how much was lost, in the metric's unit; None until it is carried out.
    """

    plan: Plan
    prediction: Prediction | None = None
    most_loss: float | None = None
    drop: float | None = None


class PlanChoice:
    """The next plan to try, made when it is needed: measuring takes minutes.

    Args:
        given: the plan of a file or of the rule; None to make plans for the targets.
        targets: what plans are made for.
        inventory: the model's layers.
        planner: measures and predicts what there is to choose from.
    """

    def __init__(
        self,
        given: Plan | None,
        targets: Targets,
        inventory: Inventory,
        planner: Callable[[], Planner],
    ) -> None:
        self._given, self._targets, self._inventory = given, targets, inventory
        self._make_planner = planner

    @cached_property
    def _planner(self) -> Planner:
        return self._make_planner()

    def holds(self, drop: float) -> bool:
        """Whether a drop, in the metric's unit, is within what was asked for."""
        return self._targets.max_drop is None or drop <= self._targets.max_drop

    def next(self, tried: tuple[Tried, ...]) -> Tried | None:
        """The plan to try after those that were; None if nothing is left to back off to.

        Raises:
            PlanError: no plan meets the targets, or the best keeps every layer.
        """
        if self._given is not None:
            return None if tried else Tried(self._given)
        if len(tried) == MOST_TRIED:
            return None
        most_loss = self._most_loss(tried)
        try:
            proposal = self._planner.propose(self._targets, most_loss)
        except PlanError:
            if not tried:
                raise
            return None
        structures = proposal.plan.structures
        if not structures and not tried:
            raise PlanError(_nothing_structured(proposal.plan))
        if structures in ({}, *(entry.plan.structures for entry in tried)):
            return None
        plan = check_plan(proposal.plan, self._inventory.axes, self._inventory.refused)
        return Tried(plan, proposal.prediction, most_loss)

    def given_up(self, tried: tuple[Tried, ...]) -> tuple[str, ...]:
        """A sentence on each plan that lost too much."""
        return tuple(
            f"A plan {entry.prediction.speedup:.2f} times as fast lost {entry.drop:.2f} points, "
            f"more than --max-drop {self._targets.max_drop:g}, and was given up."
            for entry in tried
            if entry.prediction is not None and entry.drop is not None
        )

    def exhausted(self, tried: tuple[Tried, ...], when: str, remedy: str) -> PlanError:
        """The error where none of the plans tried holds the drop.

        Args:
            tried: all of them.
            when: how they were carried out: "after fine-tuning".
            remedy: what the user can do, one sentence.
        """
        return PlanError(
            f"no plan tried loses at most {self._targets.max_drop:g} points {when}: "
            f"{' '.join(self.given_up(tried))} {remedy}"
        )

    def _most_loss(self, tried: tuple[Tried, ...]) -> float | None:
        most = self._targets.max_drop
        if most is None:
            return None
        if not tried:
            return self._planner.most_loss(most)
        last = tried[-1]
        assert last.most_loss is not None
        assert last.prediction is not None
        assert last.drop is not None
        return _BACK_OFF * min(last.most_loss, last.prediction.loss) * most / last.drop


def _nothing_structured(plan: Plan) -> str:
    reasons = "; ".join(f"{kept.name}: {kept.reason}" for kept in plan.kept[:3])
    return (
        "the best plan for these targets keeps every layer as it is, so there is nothing to "
        f"convert. Why, of its first layers: {reasons}. Allow a larger --max-drop, or ask for more."
    )
