"""A task that the user describes in a Python file, named with `--task FILE.py`.

A *batch* is whatever the loaders yield; *outputs* whatever the model returns. The file defines

- `train_loader(batch_size, seed, rank, world)` and `val_loader(batch_size)`: iterables of batches
  that can be gone through more than once, such as a torch DataLoader. That for training must have a
  length, the same in each of `world` processes, of which process `rank` takes its share;
- `loss(outputs, batch)`: a scalar tensor to minimise;
- `metric(results)`: a number, from an iterable of (outputs, batch) over the validation part, on the
  CPU and without gradients, to be gone through once.

and may define

- `metric_name`, `metric_unit` (texts) and `higher_is_better` (True if not given);
- `inputs(batch)`: the model's inputs, a tensor or a tuple of them, each with one row per example.
  By default the batch if it is a tensor, or its first entry. The model is exported for them;
- `forward(model, batch)`: by default `model(*inputs(batch))`. It calls the model and reads none of
  its attributes: among several processes, and compiled, the model is wrapped;
- `distillation(outputs, taught, batch)`: how far outputs are from the original model's, a scalar
  tensor. By default their mean squared difference over the mean square of the original's, averaged
  over the floating-point outputs.

The model must return in training what it returns in eval mode. Every process judges all of the
validation part, for a metric need not be a mean of its shares.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from structconv_cli.errors import StructconvError, TaskError
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.tasks.hooks import Hooks, kind_of, load_hooks
from structconv_cli.tasks.task import Batch, Evaluation, Metric, Outputs
from structconv_cli.tasks.user_batches import UserBatches
from structconv_cli.user_code import line_in, what_failed
from structconv_cli.world import ALONE, World


@dataclass(frozen=True, eq=False)
class UserTask:
    """A task file and what it says.

    Attributes:
        path: the file. It is run.
        batch_size: examples per step in this process.
        seed: of all that is random.
        world: the processes that train together.

    Raises:
        TaskError: the file cannot be used (see `hooks.load_hooks`).
    """

    path: Path
    batch_size: int = 64
    seed: int = 0
    world: World = ALONE
    hooks: Hooks = field(init=False)
    batches: UserBatches = field(init=False)

    def __post_init__(self) -> None:
        hooks = load_hooks(self.path)
        object.__setattr__(self, "hooks", hooks)
        batches = UserBatches(hooks, self.batch_size, self.seed, self.world)
        object.__setattr__(self, "batches", batches)

    following = 0.5

    @property
    def metric(self) -> Metric:
        """As the file calls it."""
        return self.hooks.metric

    @property
    def steps(self) -> int:
        """See `UserBatches`, as for those that follow."""
        return self.batches.steps

    def training(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        return self.batches.training(epoch)

    def calibration(self) -> Iterator[Batch]:
        """About two thousand training examples."""
        return self.batches.calibration()

    def examples(self, count: int) -> tuple[torch.Tensor, ...]:
        """The model's inputs in the first validation batch."""
        return self.batches.examples(count)

    def samples(self, count: int) -> tuple[tuple[torch.Tensor, ...], None]:
        """The model's inputs in training batches."""
        return self.batches.samples(count)

    def check(self, model: nn.Module) -> None:
        """Go through a training batch and a validation batch with all hooks.

        Raises:
            TaskError: one fails, or gives what it should not.
        """
        _ = self.steps  # tells of a loader without a length
        batch = self.batches.first()
        trained = any(parameter.requires_grad for parameter in model.parameters())
        with eval_mode(model):
            with torch.set_grad_enabled(trained):
                outputs = self.forward(model, batch)
                self.loss(outputs, batch)
                self.distillation(outputs, pytree.tree_map(_detached, outputs), batch)
            with torch.no_grad():
                self._judge(lambda batch: self.forward(model, batch), most=1)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model on a batch."""
        if "forward" in self.hooks:
            return self.hooks.call("forward", model, batch)
        inputs = self.batches.inputs(batch)
        try:
            return model(*inputs)
        except Exception as error:
            if isinstance(error, StructconvError):
                raise
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise TaskError(
                f"the model does not run on inputs of shape {shapes}, as the task file {self.path} "
                f"gives them: it failed{line_in(self.path, error)} with {what_failed(error)}. "
                "Correct the loaders, or define inputs(batch) or forward(model, batch)."
            ) from error

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """The loss hook's."""
        return self._scalar("loss", self.hooks.call("loss", outputs, batch))

    def distillation(self, outputs: Outputs, taught: Outputs, batch: Batch) -> torch.Tensor:
        """The hook's, or the squared difference relative to the original's outputs."""
        if "distillation" in self.hooks:
            found = self.hooks.call("distillation", outputs, taught, batch)
            return self._scalar("distillation", found)
        ours, theirs = pytree.tree_leaves(outputs), pytree.tree_leaves(taught)
        if [kind_of(leaf) for leaf in ours] != [kind_of(leaf) for leaf in theirs]:
            raise TaskError(
                "the model's outputs in training are not those of the original in eval mode: "
                f"{', '.join(map(kind_of, ours))}, and {', '.join(map(kind_of, theirs))}. Define "
                f"distillation(outputs, taught, batch) in {self.path}, or give --distill 0."
            )
        each = [
            (one.float() - other.float()).square().mean()
            / other.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
            for one, other in zip(ours, theirs, strict=True)
            if isinstance(one, torch.Tensor) and one.is_floating_point()
        ]
        if not each:
            raise TaskError(
                "the model has no floating-point output to follow the original's by. Define "
                f"distillation(outputs, taught, batch) in {self.path}, or give --distill 0."
            )
        return torch.stack(each).mean()

    @torch.no_grad()
    def evaluate(self, forward: Callable[[Batch], Outputs]) -> Evaluation:
        """The metric, and the mean loss, over all that the validation loader gives."""
        return self._judge(forward)

    def _judge(self, forward: Callable[[Batch], Outputs], most: int | None = None) -> Evaluation:
        examples, loss = 0, 0.0

        def results() -> Iterator[tuple[Outputs, Batch]]:
            nonlocal examples, loss
            for batch in islice(self.batches.validation(), most):
                outputs = pytree.tree_map(_on_cpu, forward(batch))
                rows = len(self.batches.inputs(batch, "val_loader")[0])
                examples += rows
                loss += rows * float(self.loss(outputs, batch))
                yield outputs, batch

        found = self.hooks.call("metric", results())
        try:
            if isinstance(found, bool):
                raise TypeError
            score = float(found)
        except (TypeError, ValueError, RuntimeError):
            raise self.hooks.wrong("metric", f"gives {kind_of(found)}", "a number") from None
        if not examples:
            raise self.hooks.wrong("metric", "reads none of its results", "all to be judged")
        if not math.isfinite(score):
            raise self.hooks.wrong("metric", f"gives {score}", "a finite number")
        if not math.isfinite(loss):
            raise self.hooks.wrong("loss", f"gives {loss} on validation batches", "finite numbers")
        return Evaluation(score, loss / examples, examples)

    def _scalar(self, name: str, found: object) -> torch.Tensor:
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            raise self.hooks.wrong(name, f"gives {kind_of(found)}", "a tensor with a single number")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise self.hooks.wrong(
                name,
                "gives a number that does not depend on the model's outputs (requires_grad is "
                "False)",
                "a differentiable one: no .item(), .detach() or argmax on the way",
            )
        return found.reshape(())


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _on_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf.detach().cpu()
    return leaf.float() if leaf.is_floating_point() else leaf
