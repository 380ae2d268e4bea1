"""Fine-tuning a model into its structured subspaces and inside them.

Stages: *regularised* (task loss + lambda * structural loss, the residual held under a limit that
falls to zero), *projected*, *batch norm re-estimated*, *fine-tuned* (weights held in the subspaces
by projecting after every step, then batch norm re-estimated again). The accuracy after each is part
of the result: projection without training costs most of it, and training pays it back.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from structconv_cli.calibrate import reestimate_batch_norm
from structconv_cli.data.dataset import Dataset
from structconv_cli.data.order import Shuffle
from structconv_cli.errors import TrainingError
from structconv_cli.progress import SILENT, Observer
from structconv_cli.regularizer import limit_residual, residual_limit, structural_loss
from structconv_cli.rewrite import project_weights, residuals, structured_parameters
from structconv_cli.structure import Structure
from structconv_cli.task import Evaluation, distillation_loss, evaluate, task_loss

_EVALUATION_BATCH = 256
_CALIBRATION_IMAGES = 2048


@dataclass(frozen=True)
class FineTuneSettings:
    """How to fine-tune.

    Attributes:
        epochs: in all; 0 only projects and re-estimates batch norm.
        regularised_epochs: how many of them empty the residual; the rest tune inside the subspace.
        batch_size: images per step.
        learning_rate: peak of a cosine schedule, for SGD with Nesterov momentum 0.9.
        weight_decay: on all parameters.
        sr_lambda: weight of the structural loss (the paper's lambda).
        distillation: share of the task loss that follows the original model's outputs, 0 to 1; the
            rest follows the labels.
        augment: random changes to training images: any of "crop", "flip".
        seed: of shuffling and augmentation.
    """

    epochs: int
    regularised_epochs: int
    batch_size: int = 64
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    sr_lambda: float = 0.1
    distillation: float = 0.5
    augment: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class StageResult:
    """The model after one stage.

    Attributes:
        stage: original, regularised, projected, batch norm re-estimated, or fine-tuned.
        evaluation: on the validation split.
        max_residual: largest relative distance of a layer's weight to its subspace.
        seconds: time that the stage took, evaluation left out.
    """

    stage: str
    evaluation: Evaluation
    max_residual: float
    seconds: float


@dataclass(frozen=True)
class EpochResult:
    """One epoch: its phase, mean task loss in nats, and the largest residual at its end."""

    phase: str
    epoch: int
    loss: float
    max_residual: float


@dataclass(frozen=True)
class FineTuneResult:
    """What fine-tuning did, stage by stage and epoch by epoch."""

    settings: FineTuneSettings
    stages: tuple[StageResult, ...]
    epochs: tuple[EpochResult, ...]


def finetune(
    model: nn.Module,
    structures: Mapping[str, Structure],
    data: Dataset,
    settings: FineTuneSettings,
    observer: Observer = SILENT,
) -> tuple[nn.Module, FineTuneResult]:
    """Return a tuned copy of the model, its planned weights inside their subspaces, and the record.

    Raises:
        TrainingError: the loss stops being a finite number.
    """
    tuned = copy.deepcopy(model)
    tuning = _Tuning(tuned, structures, data, settings, observer)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        tuning.stage("original", lambda: None)
        if settings.regularised_epochs:
            tuning.stage("regularised", tuning.regularise)
        tuning.stage("projected", lambda: project_weights(tuned, structures))
        tuning.stage("batch norm re-estimated", tuning.reestimate)
        if settings.epochs > settings.regularised_epochs:
            tuning.stage("fine-tuned", tuning.tune_inside)
    tuned.eval()
    return tuned, FineTuneResult(settings, tuple(tuning.stages), tuple(tuning.epochs))


class _Tuning:
    """The state that the stages share: one optimiser and one schedule run through all epochs."""

    def __init__(
        self,
        model: nn.Module,
        structures: Mapping[str, Structure],
        data: Dataset,
        settings: FineTuneSettings,
        observer: Observer,
    ) -> None:
        self.model, self.structures, self.data = model, structures, data
        self.settings, self.observer = settings, observer
        self.weights = list(structured_parameters(model, structures).values())
        self.teacher = copy.deepcopy(model).eval() if settings.distillation else None
        self.passes = 0
        self.steps_per_epoch = max(1, len(data.train) // settings.batch_size)
        self.step = 0
        self.stages: list[StageResult] = []
        self.epochs: list[EpochResult] = []

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made when training begins: a frozen model can still be projected."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise TrainingError(
                "the model has no parameter to train: all are frozen (requires_grad=False). "
                "Unfreeze some in the factory, or use --epochs 0."
            )
        return torch.optim.SGD(
            trained,
            lr=self.settings.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.settings.weight_decay,
        )

    def stage(self, name: str, work: Callable[[], None]) -> None:
        with self.observer.stage(name):
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
            split = self.data.val
            evaluation = evaluate(self.model, self.data.batches(split, _EVALUATION_BATCH))
            if self.step:
                self._require_finite(evaluation.loss, f"after the {name} stage")
            self.stages.append(StageResult(name, evaluation, self._max_residual(), seconds))
            self.observer.note(f"accuracy {evaluation.accuracy:.2f} %")

    def regularise(self) -> None:
        epochs = self.settings.regularised_epochs
        total = epochs * self.steps_per_epoch

        def pull() -> torch.Tensor:
            return self.settings.sr_lambda * structural_loss(self.weights)

        def hold() -> None:
            limit = residual_limit(self.step, total)
            for weight, structure in self.weights:
                limit_residual(weight, structure, limit)

        self._train("regularised", epochs, pull, hold)

    def tune_inside(self) -> None:
        def hold() -> None:
            for weight, structure in self.weights:
                limit_residual(weight, structure, 0.0)

        epochs = self.settings.epochs - self.settings.regularised_epochs
        self._train("fine-tuned", epochs, None, hold)
        project_weights(self.model, self.structures)
        self.reestimate()

    def reestimate(self) -> None:
        def images() -> Iterator[torch.Tensor]:
            # Augmented as in training: statistics of other images do not fit the tuned weights (a
            # ResNet-20 on CIFAR-10 lost five points to statistics of images without crops).
            left = _CALIBRATION_IMAGES
            for batch, _ in self.data.batches(
                self.data.train,
                _EVALUATION_BATCH,
                shuffle=self._shuffle(),
                augment=self.settings.augment,
            ):
                if len(batch) > 1:
                    yield batch
                left -= len(batch)
                if left <= 0:
                    return

        reestimate_batch_norm(self.model, images())

    def _train(
        self,
        phase: str,
        epochs: int,
        pull: Callable[[], torch.Tensor] | None,
        hold: Callable[[], None],
    ) -> None:
        total = epochs * self.steps_per_epoch
        optimizer = self.optimizer
        self.model.train()
        for epoch in range(epochs):
            losses = 0.0
            for done, (images, labels) in enumerate(self._training_batches()):
                self._set_learning_rate(optimizer)
                loss = self._loss(images, labels)
                losses += float(loss.detach())
                self._require_finite(losses, f"in epoch {epoch + 1} of the {phase} phase")
                objective = loss if pull is None else loss + pull()
                optimizer.zero_grad(set_to_none=True)
                objective.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                self.step += 1
                hold()
                self.observer.steps(epoch * self.steps_per_epoch + done + 1, total)
            mean = losses / self.steps_per_epoch
            self.epochs.append(EpochResult(phase, epoch + 1, mean, self._max_residual()))
            self.observer.note(f"epoch {epoch + 1} of {epochs}, loss {mean:.4f}")

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model(images)
        loss = task_loss(logits, labels)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            taught = self.teacher(images)
        share = self.settings.distillation
        return (1 - share) * loss + share * distillation_loss(logits, taught)

    def _training_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # The last, smaller batch is left out: a batch norm over few images is noise.
        return self.data.batches(
            self.data.train,
            self.settings.batch_size,
            shuffle=self._shuffle(),
            augment=self.settings.augment,
            drop_last=True,
        )

    def _shuffle(self) -> Shuffle:
        self.passes += 1
        return Shuffle(self.settings.seed, self.passes - 1)

    def _set_learning_rate(self, optimizer: torch.optim.Optimizer) -> None:
        total = self.settings.epochs * self.steps_per_epoch
        warm_up = max(1, total // 20)
        cosine = (1 + math.cos(math.pi * self.step / total)) / 2
        rate = self.settings.learning_rate * min(1.0, (self.step + 1) / warm_up) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate

    def _require_finite(self, loss: float, when: str) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} {when}. Lower --lr (now {self.settings.learning_rate}), "
                "and check that --mean and --std are those the model was trained with."
            )

    def _max_residual(self) -> float:
        return max(residuals(self.model, self.structures).values(), default=0.0)
