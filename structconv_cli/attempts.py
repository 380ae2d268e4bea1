"""The plan that a conversion carries out, fine-tuned; backed off while it loses too much.

What a plan loses after fine-tuning is only known after fine-tuning. So `--max-drop` is a loop: plan
for the loss that the drop is predicted to stand for, fine-tune, measure, and if more was lost, plan
for proportionally less.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from structconv_cli.conversion import ConvertRequest
from structconv_cli.errors import PlanError
from structconv_cli.plan import Plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.prediction import Prediction
from structconv_cli.planning.proposal import Planner
from structconv_cli.preparation import Prepared
from structconv_cli.progress import Observer
from structconv_cli.reconstruction.result import ReconstructionRecord
from structconv_cli.training.finetune import finetune
from structconv_cli.training.record import FineTuneResult
from structconv_cli.unfinished import Tried, Unfinished
from structconv_cli.without_training import reconstruct_model
from structconv_cli.world import World

MOST_ATTEMPTS = 4
_BACK_OFF = 0.8
"""Aim below the loss that would do in proportion: small losses are recovered less completely."""


@dataclass(frozen=True, eq=False)
class Attempt:
    """A plan, fine-tuned.

    Attributes:
        plan: what was carried out.
        prediction: what it was predicted to do; None for a plan from a file or a rule.
        model: the tuned model, its planned weights inside their subspaces.
        tuning: how it was tuned.
        reconstruction: how weights were fitted in place of tuning; None if it was tuned.
        notes: what the user should know, one sentence each.
    """

    plan: Plan
    prediction: Prediction | None
    model: nn.Module
    tuning: FineTuneResult
    reconstruction: ReconstructionRecord | None = None
    notes: tuple[str, ...] = ()


def backed_off(most_loss: float, predicted: float, most: float, lost: float) -> float:
    """The loss to plan for next, where a plan lost more points than it may.

    Args:
        most_loss: what that plan was made for.
        predicted: what it was predicted to lose, in the same unit.
        most: points that may be lost.
        lost: points that were.
    """
    return _BACK_OFF * min(most_loss, predicted) * most / lost


def make_planner(request: ConvertRequest, ready: Prepared, observer: Observer) -> Planner:
    """Measure and predict what there is to choose from."""
    settings = request.proposal
    feeds, samples = ready.feeds(settings.target.batch_size), ready.samples(request.images)
    return Planner(ready.original, feeds, samples, settings, ready.inventory.refused, observer)


def attempt(
    request: ConvertRequest,
    ready: Prepared,
    unfinished: Unfinished,
    world: World,
    observer: Observer,
) -> Attempt:
    """Choose a plan as the request says, and fine-tune the model into it.

    Process 0 chooses; all tune.

    Raises:
        PlanError: no plan meets the targets, or holds the drop after fine-tuning.
        TrainingError: fine-tuning fails; what was tuned so far is kept.
    """
    planning = _Planning(request, ready, observer)
    tried = unfinished.tried if world.first else ()
    notes: list[str] = []
    for number in range(MOST_ATTEMPTS):
        if world.first and number == len(tried):
            chosen = planning.next(tried)
            tried = (*tried, chosen) if chosen is not None else tried
        entry = world.same(tried[number] if number < len(tried) else None)
        if entry is None:
            break
        found = None
        if entry.drop is None:
            if world.first and request.recipe.epochs:
                unfinished.keep(tried)
            with unfinished.working() if world.first else nullcontext():
                found = _tuned(request, ready, entry, unfinished, world, observer)
            entry = replace(entry, drop=found.tuning.drop)
            if planning.holds(found.tuning.drop):
                return replace(found, notes=tuple(notes))
        assert entry.drop is not None
        assert entry.prediction is not None
        notes.append(
            f"a plan {entry.prediction.speedup:.2f} times as fast lost {entry.drop:.2f} points, "
            f"more than --max-drop {request.targets.max_drop:g}, and was given up."
        )
        if world.first:
            tried = (*tried[:number], entry, *tried[number + 1 :])
    if world.first:
        unfinished.discard()
    raise PlanError(
        f"no plan tried loses at most {request.targets.max_drop:g} points after fine-tuning: "
        f"{' '.join(notes)} Tune longer (--epochs), allow a larger --max-drop, or ask for less."
    )


def _tuned(
    request: ConvertRequest,
    ready: Prepared,
    entry: Tried,
    unfinished: Unfinished,
    world: World,
    observer: Observer,
) -> Attempt:
    plan = entry.plan
    observer.note(f"{len(plan.structures)} of {len(plan.layers)} layers structured")
    if not request.recipe.epochs:
        return Attempt(
            plan,
            entry.prediction,
            *reconstruct_model(ready, plan.structures, request.recipe, request.images, observer),
        )
    assert ready.task is not None
    model, tuning = finetune(
        ready.model,
        plan.structures,
        ready.task,
        request.recipe,
        hardware=request.hardware,
        world=world,
        keeper=unfinished,
        enough=lambda drop: request.enough is not None and drop <= request.enough,
        observer=observer,
    )
    return Attempt(plan, entry.prediction, model, tuning)


class _Planning:
    """The next plan to try, made when it is needed: measuring takes minutes."""

    def __init__(self, request: ConvertRequest, ready: Prepared, observer: Observer) -> None:
        self._request, self._ready, self._observer = request, ready, observer

    @cached_property
    def _planner(self) -> Planner:
        return make_planner(self._request, self._ready, self._observer)

    def holds(self, drop: float) -> bool:
        """Whether a drop after fine-tuning is within what was asked for."""
        most = self._request.targets.max_drop
        return most is None or drop <= most

    def next(self, tried: tuple[Tried, ...]) -> Tried | None:
        """The plan to try after those that were; None if nothing is left to back off to.

        Raises:
            PlanError: no plan meets the targets, or the best keeps every layer.
        """
        given, inventory = self._ready.given, self._ready.inventory
        if given is not None:
            return None if tried else Tried(given)
        most_loss = self._most_loss(tried)
        try:
            proposal = self._planner.propose(self._request.targets, most_loss)
        except PlanError:
            if not tried:
                raise
            return None
        structures = proposal.plan.structures
        if not structures and not tried:
            raise PlanError(_nothing_structured(proposal.plan))
        if structures in ({}, *(entry.plan.structures for entry in tried)):
            return None
        plan = check_plan(proposal.plan, inventory.axes, inventory.refused)
        return Tried(plan, proposal.prediction, most_loss)

    def _most_loss(self, tried: tuple[Tried, ...]) -> float | None:
        drop = self._request.targets.max_drop
        if drop is None:
            return None
        if not tried:
            return self._planner.most_loss(drop)
        last = tried[-1]
        assert last.most_loss is not None
        assert last.prediction is not None
        assert last.drop is not None
        return backed_off(last.most_loss, last.prediction.loss, drop, last.drop)


def _nothing_structured(plan: Plan) -> str:
    reasons = "; ".join(f"{kept.name}: {kept.reason}" for kept in plan.kept[:3])
    return (
        "the best plan for these targets keeps every layer as it is, so there is nothing to "
        f"convert. Why, of its first layers: {reasons}. Allow a larger --max-drop, or ask for more."
    )
