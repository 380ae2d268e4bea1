"""What changes the weights at each step."""

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from structconv_cli.errors import TrainingError
from structconv_cli.training.recipe import Recipe


def optimizer_for(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer of all that is not frozen.

    Raises:
        TrainingError: all is.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError(
            "the model has no parameter to train: all are frozen (requires_grad=False). "
            "Unfreeze some in the factory, or use --epochs 0."
        )
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return AdamW(trained, lr=rate, weight_decay=decay)
    return SGD(trained, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
