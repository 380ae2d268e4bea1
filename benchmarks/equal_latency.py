"""Variants of a model that are as fast as a given one, and which of them to fine-tune.

A way of making a model smaller has one number, its ratio. It is searched by bisection, for the
latency measured in turns with the model that is to be met. Ways compete before the fine-tune: by
accuracy on training images after batch norm is re-estimated (EagleEye, Li et al., ECCV 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from structconv_cli.calibrate import reestimate_batch_norm
from structconv_cli.data.dataset import Dataset
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import save_onnx
from structconv_cli.tasks.choice import image_task
from structconv_cli.tasks.task import Evaluation
from structconv_cli.timing.benchmark import BenchmarkSettings, benchmark

TOLERANCE = 0.02
"""How far a variant's latency may be from the target's."""

LARGEST = 0.95
PROBES = 9
CALIBRATION_IMAGES = 2048
SCREENING_IMAGES = 4096

_TARGET, _VARIANT = "target", "variant"


@dataclass(frozen=True, eq=False)
class Met:
    """A ratio at which a way meets a target.

    Attributes:
        ratio: Between 0 and `LARGEST`.
        speed: Latency of the target over that of the variant: 1 meets it.
        model: The variant.
    """

    ratio: float
    speed: float
    model: nn.Module


def meet(
    make: Callable[[float], nn.Module],
    speed: Callable[[nn.Module], float],
    say: Callable[[str], None] = lambda text: None,
) -> Met | None:
    """The ratio at which a way is as fast as the target.

    Rounding makes latency a step function of the ratio: where no step is within the tolerance, it
    is the next faster one. None if the way is slower at any ratio.

    Args:
        make: Makes the variant of a ratio.
        speed: Measures it, see `Met`; variants of the same shapes once only.
        say: Is told of every ratio tried.
    """
    known: dict[tuple[torch.Size, ...], float] = {}

    def probe(ratio: float) -> Met:
        model = make(ratio)
        shapes = tuple(parameter.shape for parameter in model.parameters())
        if shapes not in known:
            known[shapes] = speed(model)
        say(f"{ratio:.3f}: {known[shapes]:.3f}")
        return Met(ratio, known[shapes], model)

    low, best = 0.0, probe(LARGEST)
    if best.speed < 1 - TOLERANCE:
        return None
    for _ in range(PROBES):
        if best.speed <= 1 + TOLERANCE:
            break
        tried = probe((low + best.ratio) / 2)
        if tried.speed < 1 - TOLERANCE:
            low = tried.ratio
        else:
            best = tried
    return best


def speed_over(
    target: Path,
    model: nn.Module,
    example: torch.Tensor,
    scratch: Path,
    settings: BenchmarkSettings,
) -> float:
    """Latency of an ONNX file over that of a model, median of rounds in turns.

    Args:
        target: The file.
        model: In eval mode.
        example: Its input, two images at least.
        scratch: The file that it is exported to.
        settings: How to measure.
    """
    save_onnx(export_onnx(model, example), scratch)
    result = benchmark({_TARGET: target, _VARIANT: scratch}, settings)
    return result.speedups[0].median


def screen(model: nn.Module, data: Dataset) -> float:
    """The metric on training images, after batch norm is re-estimated on others, in place."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    fitted, judged = order[:CALIBRATION_IMAGES], order[CALIBRATION_IMAGES:][:SCREENING_IMAGES]
    if not len(judged):
        fitted, judged = order.tensor_split(2)
    images, _ = data.train.fetch(fitted)
    reestimate_batch_norm(model, [data.prepare(batch) for batch in images.split(256)])
    return judge(model, replace(data, val=data.train.part(judged))).score


def judge(model: nn.Module, data: Dataset) -> Evaluation:
    """A model on the validation part."""
    task = image_task(data)(data)
    with eval_mode(model):
        return task.evaluate(lambda batch: task.forward(model, batch))
