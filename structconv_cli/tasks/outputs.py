"""The scores among what a model returns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from structconv_cli.errors import TaskError

_NAMES = ("out", "logits", "scores")
"""What models that return dicts call them: torchvision's segmentation, transformers."""


def class_scores(outputs: Any) -> torch.Tensor:
    """The scores of a model that returns a tensor, a tuple that starts with them, or a dict.

    Raises:
        TaskError: there is no such tensor.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        for name in _NAMES:
            if isinstance(found := outputs.get(name), torch.Tensor):
                return found
        if len(outputs) == 1:
            return class_scores(next(iter(outputs.values())))
        raise TaskError(
            f"the model returns a dict of {', '.join(map(repr, outputs))}; expected its scores "
            f"under one of {', '.join(_NAMES)}. Describe the task with --task FILE.py."
        )
    if isinstance(outputs, tuple | list) and outputs:
        return class_scores(outputs[0])
    raise TaskError(
        f"the model returns {type(outputs).__name__}; expected a tensor of scores, or a tuple or "
        "dict with one. Describe the task with --task FILE.py."
    )


def scores_index(names: Sequence[str]) -> int:
    """Which of a graph's outputs holds what `class_scores` finds, by their names."""
    return next((names.index(name) for name in _NAMES if name in names), 0)
