"""Where a model's time goes, layer by layer, before and after lowering."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTimes:
    """One layer in the original and in the lowered model.

    Attributes:
        name: The layer's name.
        form: The ONNX form it was lowered to; empty if it was left dense.
        before_ms, after_ms: Time (ms) of all its nodes in one run, changes of layout included.
        before_macs, after_macs: Multiply-accumulates of its nodes in one run (whole batch).
        before_bound_ms, after_bound_ms: Time (ms) that these would take at the peak rate.
    """

    name: str
    form: str
    before_ms: float
    after_ms: float
    before_macs: int
    after_macs: int
    before_bound_ms: float
    after_bound_ms: float

    @property
    def gained_ms(self) -> float:
        """Time (ms) that the layer gained; negative if it lost."""
        return self.before_ms - self.after_ms


@dataclass(frozen=True)
class LayerComparison:
    """Where the time of a model and of what it was lowered to goes.

    Profiling adds some time to every node, so that the sums exceed the latencies a little.

    Attributes:
        baseline: Name of the original.
        candidate: Name of the lowered model.
        peak_macs_per_s: Peak rate (multiply-accumulates per second), measured by a matrix product
            in ONNX Runtime with the same threads.
        layers: Every convolution and linear layer, in the order in which they run.
        other_before_ms, other_after_ms: Time (ms) of all other nodes (activations, sums, pooling).
    """

    baseline: str
    candidate: str
    peak_macs_per_s: float
    layers: tuple[LayerTimes, ...]
    other_before_ms: float
    other_after_ms: float
