"""What a plan is predicted to do, layer by layer and in all: data only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from structconv_cli.cost import Cost
from structconv_cli.planning.targets import Targets
from structconv_cli.structure import Structure


@dataclass(frozen=True)
class PredictedLayer:
    """One layer of a plan.

    Attributes:
        name: the layer.
        structure: its structure; None if it is kept.
        reason: why it is kept; empty if it is not.
        before, after: cost for one image, and weights.
        ms_before, ms_after: time (ms) inside the whole model; None for a layer that is not timed.
        residual: relative distance of its weight to the subspace, 0 to 1.
        error: relative squared error of its outputs after the best fit, without training.
        loss: predicted rise of the model's loss if it alone were structured.
    """

    name: str
    structure: Structure | None
    reason: str
    before: Cost
    after: Cost
    ms_before: float | None
    ms_after: float | None
    residual: float
    error: float
    loss: float


@dataclass(frozen=True)
class CurvePoint:
    """One of the best trade-offs.

    Attributes:
        ms: predicted time (ms) of the whole model.
        speedup: the dense model's time over it.
        loss: predicted rise of the loss, before any fine-tuning.
        macs: MACs of all layers for one image.
        parameters: weights of all layers.
    """

    ms: float
    speedup: float
    loss: float
    macs: int
    parameters: int


@dataclass(frozen=True)
class Prediction:
    """What a plan does, as far as can be said before training.

    Attributes:
        layers: in the order in which they run.
        before, after: cost of all of them for one image.
        ms_before: measured time (ms) of the whole model as it is.
        ms_after: predicted time of the planned one, from the times of its parts.
        measured_ms: measured time of the planned one, weights untrained; a time does not depend on
            them. None if nothing was planned.
        loss: predicted rise of the loss: that of all layers added up, before any fine-tuning.
        points: what that is in points of accuracy; None without labelled data.
        loss_is: what the loss is, in words.
        curve: the best trade-offs between time and loss, slowest first.
        targets: what was asked for.
        environment: where it was timed.
        images: how many samples the loss was predicted from; 0 for none.
        notes: what the user should know, one sentence each.
        schema: names this format and its version.
    """

    layers: tuple[PredictedLayer, ...]
    before: Cost
    after: Cost
    ms_before: float
    ms_after: float
    measured_ms: float | None
    loss: float
    points: float | None
    loss_is: str
    curve: tuple[CurvePoint, ...]
    targets: Targets
    environment: str
    images: int
    notes: tuple[str, ...] = ()
    schema: Literal["structconv-prediction/1"] = "structconv-prediction/1"

    @property
    def speedup(self) -> float:
        """Predicted."""
        return self.ms_before / self.ms_after

    @property
    def structures(self) -> Mapping[str, Structure]:
        """Of the layers that are not kept."""
        return {x.name: x.structure for x in self.layers if x.structure is not None}
