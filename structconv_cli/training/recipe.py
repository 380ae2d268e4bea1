"""How a model is fine-tuned into its structure: what can be chosen, and the named choices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Residual = Literal["falling", "proximal", "free"]
Strength = Literal["fixed", "rising"]
Aim = Literal["least squares", "projection"]
Optimizer = Literal["sgd", "adamw"]
Annealing = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune.

    A *regularised* phase draws weights into their subspaces with the structural loss; then they are
    projected, and tuned inside them.

    Attributes:
        epochs: in all; 0 only projects and re-estimates batch norm.
        regularised: epochs of these in the regularised phase; need not be whole.
        residual: what else the regularised phase does with the residual. "falling": it is held
            under a limit that falls from what it was to zero. "proximal": the structural loss acts
            by its proximal step in place of its gradient. "free": nothing.
        aim: what the weights are led to under the falling limit, but for what they learn on the
            way: their projections, or the weights inside the subspaces whose outputs are nearest to
            the original's, where these are known (`finetune`).
        strength: whether lambda is the same throughout, or rises from 0.
        sr_lambda: weight of the structural loss (the paper's lambda), at its largest.
        batch_size: examples per step and process.
        accumulate: steps whose gradients are added up before the weights change.
        optimizer: "sgd" with Nesterov momentum 0.9, or "adamw".
        learning_rate: its peak, after a short warm-up.
        annealing: how the learning rate falls to zero.
        weight_decay: on all parameters.
        distillation: share of the loss that follows the original model's outputs, 0 to 1; the rest
            is the task's own. None for the task's own share (`Task.following`).
        hints: weight of the distance between what blocks put out and what the original's do
            (`training.features`), added to the loss.
        averaging: decay of the moving average of the weights that is the result; 0 for none.
        augment: random changes to training images (see `training.augmentation_choice`).
        seed: of all that is random.
    """

    epochs: int
    regularised: float
    residual: Residual = "falling"
    aim: Aim = "projection"
    strength: Strength = "fixed"
    sr_lambda: float = 0.1
    batch_size: int = 64
    accumulate: int = 1
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.02
    annealing: Annealing = "cosine"
    weight_decay: float = 5e-4
    distillation: float | None = None
    hints: float = 0.0
    averaging: float = 0.0
    augment: tuple[str, ...] = ()
    seed: int = 0


RECIPES: Mapping[str, Mapping[str, Any]] = {
    "default": {"aim": "least squares"},
    "paper": {"residual": "free", "aim": "projection", "distillation": 0.0},
}
"""What the named recipes have of their own; `benchmarks/README.md` compares them."""
_SHARES = {"default": 0.1, "paper": 1.0}
"""Of the epochs, in the regularised phase."""

OPTIMIZERS: Mapping[Optimizer, Mapping[str, float]] = {
    "sgd": {},
    "adamw": {"learning_rate": 1e-3, "weight_decay": 1e-2},
}
"""What a recipe has by default with each optimizer, where that is not `Recipe`'s own."""


def named_recipe(name: str, epochs: int, **changes: Any) -> Recipe:
    """One of `RECIPES`, with changes; those that are None are none."""
    given = {key: value for key, value in changes.items() if value is not None}
    regularised = given.pop("regularised", epochs * _SHARES[name])
    usual = OPTIMIZERS[given.get("optimizer", "sgd")]
    return Recipe(epochs, regularised, **{**RECIPES[name], **usual, **given})
