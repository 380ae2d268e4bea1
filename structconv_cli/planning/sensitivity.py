"""What structuring one layer would cost the whole model, predicted before anything is trained.

Each candidate's weight is fitted to data by least squares (`least_squares`), put into the graph
alone, all other layers as they are, and the model's loss measured by running it. The planner adds
these numbers up over the layers. Where time does not suffice for all candidates, some of each layer
are measured, and the others lie on the line through the origin and those: for small changes the
loss grows with the squared error of the layer's outputs, which fitting gives without a run.

Without data the loss is taken to be the squared share of the weight that the structure cannot hold.
The order of plans that it gives agrees better with the accuracy really lost than what the model
makes of noise does (`benchmarks/sensitivity.py`).

The images that are run are not those that weights are fitted to, so that a fit that learnt its few
images by heart is seen as what it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import onnx
import torch

from structconv_cli.onnx.probe import dense_kernel, layer_nodes
from structconv_cli.planning.allotment import allot, interpolate, spread
from structconv_cli.planning.evaluation import OriginalModel, outputs_on
from structconv_cli.planning.replacement import ReplaceableLayer
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reconstruction.activations import (
    MOST_INPUTS,
    Moments,
    second_moments,
)
from structconv_cli.reconstruction.layer_check import check_layers
from structconv_cli.reconstruction.least_squares import DenseLayer, Fit
from structconv_cli.reconstruction.samples import (
    Samples,
    check_labels,
    check_samples,
    images_per_run,
)
from structconv_cli.structure import Structure

How = Literal["measured", "interpolated", "weights"]

_MOMENTS_HELD = 2**27
"""Numbers that the moments of the layers looked at together may hold (512 MiB in float32, so that
few models must be run more than once)."""


@dataclass(frozen=True)
class SensitivitySettings:
    """How much to measure.

    Attributes:
        seconds: about how long the evaluations may take in all. The least that is done (one
            candidate of each layer on 16 images) is done even if it takes longer.
        images: run for each evaluation; up to as many others serve to fit the weights.
        threads: of ONNX Runtime.
        rescale: whether fitted layers get their outputs' variance back, as batch norm would give.
        seed: of all that is random.
    """

    seconds: float = 120.0
    images: int = 256
    threads: int = 1
    rescale: bool = True
    seed: int = 0


@dataclass(frozen=True)
class PredictedLoss:
    """What one structure of one layer costs.

    Attributes:
        loss: rise of the model's loss, at least 0: cross-entropy (nats) with labels, else the
            divergence of its outputs (see `divergence`).
        points: top-1 accuracy lost, in points; None without labels.
        error: relative squared error of the layer's outputs; 0 if nothing is lost.
        residual: relative distance of its weight to the subspace.
        how: measured; interpolated between this layer's measured ones; or from the weights, without
            data.
    """

    loss: float
    points: float | None
    error: float
    residual: float
    how: How


Predictions = dict[str, dict[Structure, PredictedLoss]]


def predict_losses(
    model: onnx.ModelProto,
    candidates: Mapping[str, Sequence[Structure]],
    samples: Samples | None,
    settings: SensitivitySettings = SensitivitySettings(),
    observer: Observer = SILENT,
) -> Predictions:
    """Predict what each candidate structure of each layer costs if it alone is applied.

    Args:
        model: a dense graph, its batch norms folded.
        candidates: structures by layer.
        samples: data; None for an estimate from the weights alone.
        settings: how much to measure.
        observer: told about layers that are done.

    Raises:
        PlanError: the samples do not fit the model, or a layer is not there.
        StructureError: a structure is not of its layer's shape.
        OnnxError: ONNX Runtime cannot run the model.
    """
    check_layers(model, candidates)
    with observer.stage("prediction of losses"):
        if samples is None:
            return _from_weights(model, candidates)
        check_samples(model, samples)
        return _Prediction(model, candidates, samples, settings, observer).all()


class _Prediction:
    """One call of `predict_losses`: samples for fitting, those for evaluating, and the budget."""

    def __init__(
        self,
        model: onnx.ModelProto,
        candidates: Mapping[str, Sequence[Structure]],
        samples: Samples,
        settings: SensitivitySettings,
        observer: Observer,
    ) -> None:
        self.model, self.settings, self.observer = model, settings, observer
        self.candidates = {layer: list(dict.fromkeys(c)) for layer, c in candidates.items()}
        evaluated, self.fitted = self._split(samples)
        original = OriginalModel.of(model, evaluated.inputs, settings.threads)
        if samples.labels is not None:
            check_labels(samples.labels, original.shape)
        counts = [sum(not s.is_dense for s in c) for c in self.candidates.values()]
        self.allotment = allot(
            [count for count in counts if count],
            settings.seconds,
            original.image_seconds,
            original.load_seconds,
            evaluated.count,
        )
        size = images_per_run(model) or 1
        self.evaluated = evaluated.part(slice(max(self.allotment.images // size, 1) * size))
        self.original = original.on(self.evaluated)

    def all(self) -> Predictions:
        """The predictions of all layers."""
        found: Predictions = {}
        for group in self._groups():
            moments = second_moments(
                self.model,
                group,
                self.fitted.inputs,
                threads=self.settings.threads,
                seed=self.settings.seed,
                dtype=torch.float32,
            )
            for layer in group:
                found[layer] = self._layer(layer, moments.pop(layer, None))
                self.observer.steps(len(found), len(self.candidates))
        return {layer: found[layer] for layer in self.candidates}

    def _split(self, samples: Samples) -> tuple[Samples, Samples]:
        """Images to evaluate on, and others to fit to; the same where there are too few."""
        order = np.random.default_rng(self.settings.seed).permutation(samples.count)
        size = images_per_run(self.model) or 1
        count = min(self.settings.images, samples.count // 2) // size * size
        if not count:
            return samples.part(order), samples.part(order)
        # At least one run of each.
        fitted = order[count : count + max(self.settings.images, size)]
        return samples.part(order[:count]), samples.part(fitted)

    def _groups(self) -> Iterator[list[str]]:
        """The layers, so many at a time that their moments fit into memory together."""
        group: list[str] = []
        held = 0
        for layer in self.candidates:
            node = layer_nodes(self.model, [layer])[layer][0]
            weight, _ = dense_kernel(self.model, node)
            size = prod(weight.shape[1:])
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            numbers = groups * size**2 if size <= MOST_INPUTS else 0
            if group and held + numbers > _MOMENTS_HELD:
                yield group
                group, held = [], 0
            group.append(layer)
            held += numbers
        if group:
            yield group

    def _layer(self, layer: str, moments: Moments | None) -> dict[Structure, PredictedLoss]:
        """The predictions of one layer: every candidate is fitted, as many as allotted are run."""
        node = layer_nodes(self.model, [layer])[layer][0]
        weight, bias = (
            torch.from_numpy(array.astype(np.float64)) for array in dense_kernel(self.model, node)
        )
        dense = DenseLayer(weight, bias, moments, rescale=self.settings.rescale)
        nothing = PredictedLoss(
            0.0, None if self.original.labels is None else 0.0, 0, 0, "measured"
        )
        structures = [s for s in self.candidates[layer] if not s.is_dense]
        structures.sort(key=lambda s: s.reduced[1:])
        if not structures:
            return dict.fromkeys(self.candidates[layer], nothing)
        replaceable = ReplaceableLayer.of(self.model, layer, self.settings.threads)

        def rise(fit: Fit) -> tuple[float, float | None]:
            new, shift = fit.weight.numpy(), (fit.bias - bias).numpy()
            return self.original.rise(
                outputs_on(
                    self.model, self.evaluated, lambda feeds: replaceable.run(feeds, new, shift)
                )
            )

        # Weights by dozens would fill the memory: what is run is decided before anything is fitted.
        order = sorted(structures, key=lambda s: s.residual(weight))
        measured = {order[i] for i in spread(len(order), self.allotment.candidates)}
        facts: dict[Structure, tuple[float, float]] = {}
        rises: dict[Structure, tuple[float, float | None]] = {}
        for structure in structures:
            fit = dense.fit(structure)
            facts[structure] = fit.error, fit.residual
            if structure in measured:
                rises[structure] = rise(fit)
        found = self._predicted(facts, rises)
        return {s: found.get(s, nothing) for s in self.candidates[layer]}

    def _predicted(
        self,
        facts: Mapping[Structure, tuple[float, float]],
        rises: Mapping[Structure, tuple[float, float | None]],
    ) -> dict[Structure, PredictedLoss]:
        """Losses of a layer's candidates, from the errors of all and the measured rises of some."""
        errors = np.array([error for error, _ in facts.values()])
        known = np.array([facts[s][0] for s in rises])
        losses = interpolate(errors, known, np.array([loss for loss, _ in rises.values()]))
        lost = np.array([points if points is not None else 0.0 for _, points in rises.values()])
        points = interpolate(errors, known, lost)
        found = {}
        for index, (structure, (error, residual)) in enumerate(facts.items()):
            how: How = "interpolated"
            loss, drop = float(losses[index]), float(points[index])
            if structure in rises:
                measured, exact = rises[structure]
                how, loss = "measured", max(measured, 0.0) if np.isfinite(measured) else np.inf
                drop = drop if exact is None else exact
            told = None if self.original.labels is None else drop
            found[structure] = PredictedLoss(loss, told, error, residual, how)
        return found


def _from_weights(
    model: onnx.ModelProto, candidates: Mapping[str, Sequence[Structure]]
) -> Predictions:
    """The squared residuals as losses."""
    nodes = layer_nodes(model, list(candidates))
    found: Predictions = {}
    for layer, structures in candidates.items():
        array, _ = dense_kernel(model, nodes[layer][0])
        weight = torch.from_numpy(array.astype(np.float64))
        residuals = {structure: structure.residual(weight) for structure in structures}
        found[layer] = {
            structure: PredictedLoss(residual**2, None, residual**2, residual, "weights")
            for structure, residual in residuals.items()
        }
    return found
