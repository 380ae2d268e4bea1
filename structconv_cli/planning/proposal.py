"""A plan for a dense graph: candidates timed and predicted, the best choice, what it would do."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx
import onnxruntime

from structconv_cli.cost import Cost
from structconv_cli.errors import PlanError
from structconv_cli.onnx.probe import why_not_loaded
from structconv_cli.onnx.timing_cache import TimingCache
from structconv_cli.plan import Plan
from structconv_cli.planning.choice import Choice
from structconv_cli.planning.clock import DENSE, Stopwatch
from structconv_cli.planning.explanation import as_plan, predicted_layers
from structconv_cli.planning.goal import SPARING, best_measured, curve, fastest, solve, sparing
from structconv_cli.planning.latency import measure_latency
from structconv_cli.planning.loss_cache import cached_losses
from structconv_cli.planning.network import Feeds, Network
from structconv_cli.planning.options import ModelOptions, model_options
from structconv_cli.planning.prediction import CurvePoint, PredictedLayer, Prediction
from structconv_cli.planning.sensitivity import Predictions, predict_losses
from structconv_cli.planning.settings import ProposalSettings
from structconv_cli.planning.structures import choose_channels, situations
from structconv_cli.planning.targets import Targets
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reconstruction.samples import Samples, check_samples
from structconv_cli.timing.execution_provider import require_provider

_SPARED = (
    "Planned for fine-tuning: it keeps more parameters, at up to "
    f"{SPARING:g} times the least predicted loss, and has no windows over channels. "
    "--no-finetune plans for the least."
)

_MISSED, _OVERDONE = 1.02, 0.95
"""How far measured times may lie from the target before the plan is made anew."""
_CORRECTIONS = 4


@dataclass(frozen=True, eq=False)
class Proposal:
    """A plan, and what it is predicted to do."""

    plan: Plan
    prediction: Prediction


class Planner:
    """Plans for one graph: what is measured and predicted once serves any number of targets.

    Args:
        model: the dense graph, batch norms folded.
        feeds: an input of the real shapes, by name; its images are the target's batch.
        samples: data to predict losses from; None to estimate them from the weights.
        settings: how.
        refused: layers that must be kept, each with the reason.
        observer: is told of the stages.

    Raises:
        PlanError: nothing in the graph can be structured, or the samples do not fit it.
        OnnxError: ONNX Runtime cannot run the graph.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        feeds: Feeds,
        samples: Samples | None,
        settings: ProposalSettings,
        refused: Mapping[str, str] | None = None,
        observer: Observer = SILENT,
    ) -> None:
        self.feeds, self.samples, self.settings, self.observer = feeds, samples, settings, observer
        require_provider(settings.target.device, onnxruntime.get_available_providers())
        problem = why_not_loaded(model)
        if problem:
            raise PlanError(f"the model cannot be timed, so nothing can be planned: {problem}")
        if samples is not None:
            check_samples(model, samples)
        # What windows over channels lose is tuned away less completely than what others do.
        self.network = network = Network(model, feeds, refused, windows=not settings.tuned)
        if not network.layers:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(network.kept.items())[:3])
            raise PlanError(
                "no layer of this model can be structured: "
                f"{reasons or 'it has no convolution or linear layer'}."
            )
        self.cache = TimingCache(settings.timings, settings.target.environment)
        with observer.stage("timing of candidates"):
            self.latency = measure_latency(network, settings.target, feeds, self.cache, observer)
            self.cache.save()
        channels = choose_channels(network, samples, settings.sensitivity.threads)
        self.structures = situations(
            network,
            self.latency,
            channels,
            without_first=samples is None,
        )
        candidates = {
            name: tuple(dict.fromkeys(meaning.values()))
            for name, meaning in self.structures.items()
        }
        self.losses: Predictions = cached_losses(
            settings.losses,
            (model, candidates, samples, settings.sensitivity),
            lambda: predict_losses(model, candidates, samples, settings.sensitivity, observer),
        )
        self.options: ModelOptions = model_options(
            network, self.latency, self.structures, self.losses
        )
        with observer.stage("the fastest plan"):
            self.fastest = fastest(self.options)
            self.stopwatch = Stopwatch(network, settings.target, feeds, self.cache)
            self.dense_ms, self.clock = self.stopwatch.clock(self.options, self.fastest)

    @property
    def points_per_loss(self) -> float | None:
        """Points of accuracy that go with a loss of 1; None without labelled data."""
        every = [found for each in self.losses.values() for found in each.values()]
        measured = [(p.loss, p.points) for p in every if p.how == "measured"]
        pairs = [(loss, points) for loss, points in measured if points is not None]
        total = sum(loss for loss, _ in pairs)
        return sum(points for _, points in pairs) / total if total > 0 else None

    def most_loss(self, drop: float) -> float:
        """The predicted loss that is expected to leave this drop (points) after fine-tuning.

        Raises:
            PlanError: there were no labelled samples.
        """
        per_loss = self.points_per_loss
        if per_loss is None:
            raise PlanError(
                "--max-drop is about accuracy, which takes labelled images to predict: give "
                "--data, or another target."
            )
        return drop / (max(per_loss, 1e-9) * self.settings.remains)

    def propose(self, targets: Targets, most_loss: float | None = None) -> Proposal:
        """The best plan for some targets; without any, the one at the bend of the curve.

        Args:
            targets: what is to be reached.
            most_loss: the loss that stands for `targets.max_drop`, where experience has shown a
                better one than is predicted.

        Raises:
            PlanError: no plan meets them.
        """
        if most_loss is None and targets.max_drop is not None:
            most_loss = self.most_loss(targets.max_drop)
        with self.observer.stage("choice"):
            if targets.is_empty:
                choice, measured = self._bend(), None
                if any(not option.structure.is_dense for option in choice.options):
                    measured = self._measured(choice)
            else:
                choice, measured = self._checked(targets, most_loss)
            self.cache.save()
        plan = as_plan(self.network, self.options, choice)
        spared = self.settings.tuned and not targets.wants_the_fastest
        prediction = self.predicted(
            layers=predicted_layers(self.network, self.options, self.losses, choice, plan),
            cost=choice.cost,
            ms=self.clock.whole(choice.ms),
            measured_ms=measured,
            loss=choice.loss,
            targets=targets,
            notes=(_SPARED,) if spared and plan.structures else (),
        )
        return Proposal(plan, prediction)

    @cached_property
    def curve(self) -> tuple[Choice, ...]:
        """The best trade-offs between time and loss, slowest first."""
        return curve(self.options, self.fastest)

    def _measured(self, choice: Choice) -> float:
        """A choice's time (ms), scaled to the dense model's first one: machines drift."""
        times = self.stopwatch.whole({"planned": choice})
        if not times[DENSE]:  # not timed: the choice comes to the same graph
            return self.dense_ms
        return self.dense_ms * times["planned"] / times[DENSE]

    def _checked(self, targets: Targets, most_loss: float | None) -> tuple[Choice, float | None]:
        """The choice for some targets; one for time is measured, and chosen anew if it misses."""
        choice = self._solved(targets, most_loss)
        if not any(not option.structure.is_dense for option in choice.options):
            return choice, None
        measured = self._measured(choice)
        wanted = targets.latency_ms
        if targets.speedup is not None:
            wanted = self.dense_ms / targets.speedup
        if wanted is None:
            return choice, measured
        tried, correction = [(choice, measured)], 1.0
        for _ in range(_CORRECTIONS):
            if _OVERDONE * wanted <= measured <= _MISSED * wanted:
                break
            correction *= measured / (self.clock.whole(choice.ms) * correction)
            again = self._solved(targets, most_loss, correction)
            if again == choice:
                break
            choice, measured = again, self._measured(again)
            tried.append((choice, measured))
        return best_measured(tried, _MISSED * wanted)

    def _solved(self, targets: Targets, most_loss: float | None, correction: float = 1.0) -> Choice:
        tuned = self.settings.tuned
        return solve(self.options, targets, self.clock, most_loss, correction, tuned=tuned)

    def _bend(self) -> Choice:
        """Where the curve is farthest from the line between its ends: the best bargain."""
        points = self.curve
        dense, quick = self.options.dense_ms, points[-1].ms
        most = max(points[-1].loss, 1e-12)
        if quick >= dense:
            return points[-1]

        def gain(point: Choice) -> float:
            return (dense - point.ms) / (dense - quick) - point.loss / most

        best = max(points, key=gain)
        return sparing(self.options, best, [("ms", best.ms)]) if self.settings.tuned else best

    def predicted(
        self,
        *,
        layers: tuple[PredictedLayer, ...],
        cost: Cost,
        ms: float,
        measured_ms: float | None,
        loss: float,
        targets: Targets,
        notes: tuple[str, ...] = (),
    ) -> Prediction:
        """A prediction with what is the same for all plans of this graph."""
        per_loss = self.points_per_loss
        dense = self.dense_ms
        return Prediction(
            layers=layers,
            before=self.options.dense_cost,
            after=cost,
            ms_before=dense,
            ms_after=ms,
            measured_ms=measured_ms,
            loss=loss,
            points=None if per_loss is None else per_loss * loss,
            loss_is=self._loss_is(),
            curve=tuple(
                CurvePoint(
                    self.clock.whole(point.ms),
                    dense / self.clock.whole(point.ms),
                    point.loss,
                    point.cost.multiplications,
                    point.cost.parameters,
                )
                for point in self.curve
            ),
            targets=targets,
            environment=self.settings.target.environment,
            images=self.samples.count if self.samples is not None else 0,
            notes=notes,
        )

    def _loss_is(self) -> str:
        if self.samples is None:
            return "an estimate without data: squared residuals of the weights, added up"
        if self.samples.labels is not None:
            return "rise of the cross-entropy (nats)"
        return "divergence of the model's outputs from the original's"
