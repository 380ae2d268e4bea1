"""A conversion's plan, fine-tuned; backed off while it loses too much."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import Tensor, nn

from structconv_cli.conversion import ConvertRequest
from structconv_cli.errors import PlanError
from structconv_cli.plan import Plan
from structconv_cli.plan_choice import PlanChoice, Tried
from structconv_cli.planning.prediction import Prediction
from structconv_cli.planning.proposal import Planner
from structconv_cli.preparation import Prepared
from structconv_cli.progress import Observer
from structconv_cli.reconstruction.result import ReconstructionRecord
from structconv_cli.training.finetune import finetune
from structconv_cli.training.record import FineTuneResult
from structconv_cli.unfinished import Unfinished
from structconv_cli.without_training import fitted_model, reconstruct_model
from structconv_cli.world import World


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
    choice = PlanChoice(
        ready.given,
        request.targets,
        ready.inventory,
        lambda: make_planner(request, ready, observer),
    )

    def following(tried: tuple[Tried, ...]) -> Tried | None:
        return world.same(choice.next(tried) if world.first else None)

    kept = world.same(unfinished.tried if world.first else ())
    tried = tuple(entry for entry in kept if entry.drop is not None)
    # The last of those kept was interrupted.
    entry = kept[len(tried)] if len(tried) < len(kept) else following(tried)
    while entry is not None:
        if world.first and ready.recipe.epochs:
            unfinished.keep((*tried, entry))
        with unfinished.working() if world.first else nullcontext():
            found = _tuned(request, ready, entry, unfinished, world, observer)
        if choice.holds(found.tuning.drop):
            return replace(found, notes=(*choice.given_up(tried), *found.notes))
        tried = (*tried, replace(entry, drop=found.tuning.drop))
        entry = following(tried)
    if world.first:
        unfinished.discard()
    raise choice.exhausted(
        tried,
        "after fine-tuning",
        "Tune longer (--epochs), allow a larger --max-drop, or ask for less.",
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
    if not ready.recipe.epochs:
        return Attempt(
            plan,
            entry.prediction,
            *reconstruct_model(ready, plan.structures, ready.recipe, request.images, observer),
        )
    assert ready.task is not None
    notes: list[str] = []

    def fit() -> Mapping[str, Tensor]:
        seed, images = ready.recipe.seed, request.images
        with observer.stage("least squares"):
            try:
                fitted, _ = fitted_model(ready, plan.structures, seed, images, observer)
            except PlanError as error:
                notes.append(f"Tuned from projected weights, not from least squares: {error}")
                return {}
        return dict(fitted.named_parameters())

    model, tuning = finetune(
        ready.model,
        plan.structures,
        ready.task,
        ready.recipe,
        hardware=request.hardware,
        world=world,
        keeper=unfinished,
        enough=lambda drop: request.enough is not None and drop <= request.enough,
        observer=observer,
        fit=fit,
    )
    return Attempt(plan, entry.prediction, model, tuning, notes=tuple(notes))
