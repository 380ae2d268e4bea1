"""Which task a conversion has: the user's own, or what the data's labels say."""

from pathlib import Path

from structconv_cli.data.dataset import Dataset
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.segmentation import Segmentation
from structconv_cli.tasks.task import Task
from structconv_cli.tasks.user_task import UserTask
from structconv_cli.training.recipe import Recipe
from structconv_cli.world import ALONE, World

CLASSIFICATION, SEGMENTATION, NO_TASK = "classification", "segmentation", "none"


def task_for(source: Dataset | Path, recipe: Recipe, world: World = ALONE) -> Task:
    """The task of some data or of a user's task file, which is run.

    Raises:
        TaskError: the file cannot be used.
    """
    share = recipe.batch_size // world.size
    if isinstance(source, Path):
        return UserTask(source, share, recipe.seed, world)
    return image_task(source)(source, share, recipe.augment, recipe.seed, world)


def image_task(data: Dataset) -> type[Classification] | type[Segmentation]:
    """Segmentation where the data has masks, else classification."""
    return Classification if data.train.labels is not None else Segmentation


def task_name(task: Task | None) -> str:
    """As a run folder records it."""
    if task is None:
        return NO_TASK
    if isinstance(task, UserTask):
        return str(task.path.absolute())
    return SEGMENTATION if isinstance(task, Segmentation) else CLASSIFICATION
