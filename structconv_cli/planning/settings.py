"""How a plan is made: for what target, with what data and caches, and whether it is to be tuned."""

from dataclasses import dataclass, field
from pathlib import Path

from structconv_cli.onnx.target import Target
from structconv_cli.planning.sensitivity import SensitivitySettings

_REMAINS = 0.1
"""Share of the predicted drop that is expected to be left after fine-tuning, where nothing is known
yet. Only a start: what a conversion really loses is measured, and the plan backed off."""


@dataclass(frozen=True, eq=False)
class ProposalSettings:
    """How to make a plan.

    Attributes:
        target: where the model is to be fast.
        timings: file of known timings; None for none.
        sensitivity: how to predict losses.
        losses: folder of known predictions; None for none.
        tuned: whether the model is fine-tuned afterwards: then what matters is what is left of the
            loss, and of the model's capacity.
    """

    target: Target = field(default_factory=Target)
    timings: Path | None = None
    sensitivity: SensitivitySettings = field(default_factory=SensitivitySettings)
    losses: Path | None = None
    tuned: bool = True

    @property
    def remains(self) -> float:
        """Share of the predicted drop that is expected to be left in the end."""
        return _REMAINS if self.tuned else 1.0
