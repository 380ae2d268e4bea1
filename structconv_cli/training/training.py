"""The training loop: a model, its teacher, its optimiser, and where they stand."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from structconv_cli.calibrate import reestimate_batch_norm
from structconv_cli.errors import TrainingError
from structconv_cli.json_file import from_json, to_json
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.model.frozen import frozen_modules
from structconv_cli.progress import Observer
from structconv_cli.rewrite import project_weights, residuals, structured_parameters
from structconv_cli.structure import Structure
from structconv_cli.tasks.task import Batch, Evaluation, Task
from structconv_cli.training.descent import Descent, moves_to
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.objective import Objective
from structconv_cli.training.optimizer import optimizer_for
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import EpochResult, StageResult
from structconv_cli.training.schedule import Schedule, steps_per_epoch
from structconv_cli.world import World, reached

_EPOCH_SEEDS = 1_000_003


class Training:
    """A model on its way into its structure. All that is random follows the seed and the epoch.

    Args:
        model: trained in place.
        structures: of its layers, by name.
        task: what it is trained for.
        recipe: how.
        hardware: where.
        world: the processes that train together.
        observer: is told of the stages and steps.
        teacher: whose outputs are followed; the model as it is now, if none is given.
        judge_epochs: whether the model is judged after each epoch too.
    """

    def __init__(
        self,
        model: nn.Module,
        structures: Mapping[str, Structure],
        task: Task,
        recipe: Recipe,
        hardware: Hardware,
        world: World,
        observer: Observer,
        teacher: nn.Module | None = None,
        judge_epochs: bool = True,
    ) -> None:
        if recipe.distillation is None:
            recipe = replace(recipe, distillation=task.following)
        self.structures, self.task, self.recipe = structures, task, recipe
        self.hardware, self.world, self.observer = hardware, world, observer
        self.judge_epochs = judge_epochs
        self.model = hardware.place(model)
        self.schedule = Schedule(recipe, steps_per_epoch(task.steps, recipe))
        self.descent = Descent(structured_parameters(model, structures), self.schedule)
        self.epoch = self.step = 0
        self.seconds = 0.0
        """Of training since the last stage."""
        self.crossed = False
        self.stages: list[StageResult] = []
        self.epochs: list[EpochResult] = []
        if recipe.epochs:
            self._optimizer = optimizer_for(model, recipe)
            self._average = None
            if recipe.averaging:
                self._average = AveragedModel(
                    model,
                    multi_avg_fn=get_ema_multi_avg_fn(recipe.averaging),  # type: ignore[no-untyped-call]
                )
            self._runner = hardware.compile(model)
        # Behind all copies of the model, which would take its hooks with them.
        self._objective = Objective(model, structures, task, recipe, hardware, teacher)

    # Stages -----------------------------------------------------------------------------------

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Do something, then judge the model and record it."""
        with self.observer.stage(name):
            start = time.perf_counter()
            work()
            seconds, self.seconds = self.seconds + time.perf_counter() - start, 0.0
            found = self.evaluate()
            if self.step:
                self._require_finite(found.loss, f"after the {name} stage")
            self.stages.append(StageResult(name, found, self._max_residual(), seconds))
            self.observer.note(self.task.metric.text(found.score))

    def evaluate(self) -> Evaluation:
        """The model as it is, on the validation part, in float32: so it will be served."""
        # Of the last step's batch, each process has taken other statistics.
        self.world.same_tensors(self.model)
        with eval_mode(self.model):
            return self.task.evaluate(self._judged)

    def _judged(self, batch: Batch) -> Any:
        with torch.no_grad(), self.hardware.running("fp32"):
            return self.task.forward(self.model, self.hardware.move(batch))

    def project(self) -> None:
        """Bring every structured weight into its subspace, exactly."""
        project_weights(self.model, self.structures)

    def reestimate(self) -> None:
        """Take batch-norm statistics anew."""
        if self.world.first:
            batches = (self.hardware.move(batch) for batch in self.task.calibration())
            reestimate_batch_norm(self.model, batches, self.task.forward)
        self.world.same_tensors(self.model)

    def cross(self) -> None:
        """Leave the regularised phase: into the subspaces, for good."""
        self.crossed = True
        self.stage("projected", self.project)
        self.stage("batch norm re-estimated", self.reestimate)

    def finish(self) -> None:
        """Make the result of what was trained: the averaged weights, exactly in their subspaces."""
        if self._average is not None:
            averaged = zip(self.model.parameters(), self._average.parameters(), strict=True)
            with torch.no_grad():
                for parameter, average in averaged:
                    parameter.copy_(average)
        self.project()
        self.reestimate()

    def lead(self, aims: Mapping[str, torch.Tensor]) -> None:
        """Lead parameters to other values in the regularised phase (`descent.moves_to`)."""
        self.descent.lead(moves_to(aims, self.model, self.structures), self.model)

    def close(self) -> None:
        """Leave nothing of the training on the models."""
        self._objective.close()

    @property
    def phase(self) -> str:
        """Where the training stands: regularised, or fine-tuned (inside the subspaces)."""
        return "fine-tuned" if self.crossed else "regularised"

    # Epochs -----------------------------------------------------------------------------------

    def run_epoch(self) -> None:
        """Train for one epoch."""
        # Dropout and the like: whatever came before, and in every process otherwise.
        torch.manual_seed(
            (self.recipe.seed * _EPOCH_SEEDS + self.epoch) * self.world.size + self.world.rank
        )
        losses, micro = 0.0, self.recipe.accumulate
        whole = self.schedule.steps_per_epoch * micro
        self._set_training()
        start = time.perf_counter()
        for done, batch in zip(range(whole), self.task.training(self.epoch), strict=False):
            if done % micro == 0 and self.step == self.schedule.regularised and not self.crossed:
                self._require_sound(batch)
                self._leave_regularised()
                start = time.perf_counter()
            last = done % micro == micro - 1
            losses += self._backward(batch, last)
            self._require_finite(losses, f"in epoch {self.epoch + 1}, in the {self.phase} phase")
            if last:
                self._change_weights()
            now = time.perf_counter()
            self.seconds, start = self.seconds + now - start, now
            self.observer.steps(self.epoch * whole + done + 1, self.recipe.epochs * whole)
        self._require_sound(batch)
        self.epoch += 1
        if self.step == self.schedule.regularised and not self.crossed:
            self._leave_regularised()
        self._record_epoch(losses / whole)

    def _leave_regularised(self) -> None:
        if self.schedule.regularised:
            self.stage("regularised", lambda: None)
        self.cross()
        self._set_training()

    def _record_epoch(self, loss: float) -> None:
        loss = float(self.world.sum(torch.tensor(loss))) / self.world.size
        judged = self.judge_epochs and self.epoch < self.recipe.epochs
        found = self.evaluate() if judged else None
        if found is not None:
            self._require_finite(found.loss, f"on the validation part, after epoch {self.epoch}")
        self.epochs.append(EpochResult(self.epoch, self.phase, loss, self._max_residual(), found))
        score = f", {self.task.metric.text(found.score)}" if found else ""
        self.observer.note(f"epoch {self.epoch} of {self.recipe.epochs}, loss {loss:.4f}{score}")

    def _set_training(self) -> None:
        self._runner.train()
        for module in frozen_modules(self.model):
            module.training = False  # a batch norm keeps its statistics

    def _backward(self, batch: Batch, last: bool) -> float:
        batch = self.hardware.move(batch)
        if self.world.size > 1 and not isinstance(self._runner, DistributedDataParallel):
            unused = self._has_unused(batch)
            with reached():
                self._runner = DistributedDataParallel(self._runner, find_unused_parameters=unused)
            self._set_training()
        waits = isinstance(self._runner, DistributedDataParallel) and not last
        with reached(), self._runner.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with self.hardware.running(), self._objective.watched():
                outputs = self.task.forward(self._runner, batch)
                loss = self._objective.loss(outputs, batch)
            (loss / self.recipe.accumulate).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _has_unused(self, batch: Batch) -> bool:
        """Whether some parameters have no part in the loss, for which processes must look out."""
        with eval_mode(self.model):
            self.task.loss(self.task.forward(self.model, batch), batch).backward()  # type: ignore[no-untyped-call]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        unused = any(parameter.grad is None for parameter in trained)
        self.model.zero_grad(set_to_none=True)
        return unused

    def _change_weights(self) -> None:
        rate = self.schedule.learning_rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.descent.before_step(self.step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.descent.after_step(self.step)
        self.step += 1
        if self._average is not None and self.crossed:
            self._average.update_parameters(self.model)

    def _require_sound(self, batch: Batch) -> None:
        """Check what the last step made of the model, before it is judged or kept: no later loss of
        the epoch, or of its phase, tells."""
        with torch.no_grad(), eval_mode(self.model):
            loss = float(self.task.loss(self._judged(batch), self.hardware.move(batch)))
        self._require_finite(
            loss, f"behind step {self.step}, in epoch {self.epoch + 1}, in the {self.phase} phase"
        )

    def _require_finite(self, loss: float, when: str) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} {when}. Lower --lr (now {self.recipe.learning_rate:g}), "
                "and check that --mean and --std are those the model was trained with."
            )

    def _max_residual(self) -> float:
        return max(residuals(self.model, self.structures).values(), default=0.0)

    # What is kept -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on, at the end of an epoch: plain tensors,
        numbers and text in dicts and lists."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "crossed": self.crossed,
            "moves": {} if self.crossed else self.descent.moves,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "stages": [to_json(entry).decode() for entry in self.stages],
            "epochs": [to_json(entry).decode() for entry in self.epochs],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.crossed = state["seconds"], state["crossed"]
        self.model.load_state_dict(state["model"])
        place = self.hardware.torch_device
        moves = {name: move.to(place) for name, move in state["moves"].items()}
        self.descent.lead(moves, self.model)
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.stages = [from_json(text, StageResult) for text in state["stages"]]
        self.epochs = [from_json(text, EpochResult) for text in state["epochs"]]
