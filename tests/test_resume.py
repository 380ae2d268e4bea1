"""Conversions killed at any moment: what is kept, and that going on from it changes nothing."""

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import Command, forked
from test_cli import run, tiny_words
from torch import nn

from structconv_cli.data.dataset import Dataset
from structconv_cli.data.split import Split
from structconv_cli.errors import TrainingError
from structconv_cli.rewrite import project_weights
from structconv_cli.structure import Structure
from structconv_cli.tasks.classification import Classification
from structconv_cli.training.finetune import finetune
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import FineTuneResult
from structconv_cli.unfinished import Unfinished

RECIPE = Recipe(12, 4.5, aim="least squares", batch_size=16, averaging=0.9, augment=("crop",))
STRUCTURES = {"0": Structure((1, 3, 3), (1, 2, 2)), "3": Structure((16, 3, 3), (16, 2, 2))}


def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (160, 1, 12, 12), dtype=torch.uint8, generator=generator)
    split = Split(images, (images.float().mean((1, 2, 3)) > 127).long())
    return Dataset(split, split, ("dark", "light"), (0.5,), (0.25,))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def train(
    keeper: Unfinished | None = None, recipe: Recipe = RECIPE
) -> tuple[nn.Module, FineTuneResult]:
    task = Classification(dataset(), recipe.batch_size, recipe.augment, recipe.seed)
    # Fitting takes minutes: what it found is kept, and not found again.
    fit = fitted if keeper is None or keeper.load() is None else pytest.fail
    return finetune(network(), STRUCTURES, task, recipe, keeper=keeper, fit=fit)


def fitted() -> dict[str, torch.Tensor]:
    """What the regularised phase leads to."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    project_weights(model, STRUCTURES)
    return dict(model.named_parameters())


def unfinished(folder: Path) -> Unfinished:
    folder.mkdir(exist_ok=True)
    return Unfinished(folder, {})


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[nn.Module, FineTuneResult]:
    return train()


def assert_same(first: nn.Module, second: nn.Module) -> None:
    mine, theirs = first.state_dict(), second.state_dict()
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def told(result: FineTuneResult) -> list[object]:
    """The record without its times."""
    return [*(replace(stage, seconds=0.0) for stage in result.stages), *result.epochs]


class InterruptionError(Exception):
    pass


class StopsAfter(Unfinished):
    """Is interrupted right after an epoch was kept."""

    epochs = 0

    def save(self, state: dict[str, object]) -> None:
        super().save(state)
        if state["epoch"] == self.epochs:
            raise InterruptionError


@pytest.mark.parametrize("epochs", [1, 4, 5, 11, 12])
def test_going_on_from_any_epoch_changes_nothing(
    epochs: int, uninterrupted: tuple[nn.Module, FineTuneResult], tmp_path: Path
) -> None:
    keeper = StopsAfter(tmp_path, {})
    keeper.epochs = epochs
    with pytest.raises(InterruptionError):
        train(keeper)
    # Another process: nothing is shared but the folder.
    model, result = train(unfinished(tmp_path))
    assert_same(model, uninterrupted[0])
    assert told(result) == told(uninterrupted[1])


def test_going_on_with_adamw_changes_nothing(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=4, regularised=1.5, optimizer="adamw", learning_rate=1e-3)
    keeper = StopsAfter(tmp_path, {})
    keeper.epochs = 2
    with pytest.raises(InterruptionError):
        train(keeper, recipe)
    model, _ = train(unfinished(tmp_path), recipe)
    assert_same(model, train(recipe=recipe)[0])


def test_what_a_gpu_began_goes_on_without_one(
    uninterrupted: tuple[nn.Module, FineTuneResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeper = StopsAfter(tmp_path, {})
    keeper.epochs = 2
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        with pytest.raises(InterruptionError):
            train(keeper)
    model, _ = train(unfinished(tmp_path))
    assert_same(model, uninterrupted[0])


def test_a_kept_state_is_read_without_running_code(tmp_path: Path) -> None:
    keeper = StopsAfter(tmp_path, {})
    keeper.epochs = 1
    with pytest.raises(InterruptionError):
        train(keeper)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["epoch"] == 1


def test_a_state_of_another_attempt_is_not_gone_on_from(tmp_path: Path) -> None:
    keeper = unfinished(tmp_path)
    keeper.save({"epoch": 3})
    assert keeper.load() == {"epoch": 3}
    assert replace(keeper, tried=(None,)).load() is None  # type: ignore[arg-type]


def train_and_save(folder: Path, result: Path, begun: Path) -> None:
    """What a process that may be killed does."""
    begun.touch()
    model, _ = train(unfinished(folder))
    torch.save(model.state_dict(), result)


def test_a_training_killed_ten_times_ends_the_same(
    uninterrupted: tuple[nn.Module, FineTuneResult], tmp_path: Path
) -> None:
    moments, kept, result = random.Random(0), tmp_path / "kept", tmp_path / "result.pt"
    seconds = sum(stage.seconds for stage in uninterrupted[1].stages)
    kills = 0
    while not result.exists():
        begun = tmp_path / f"begun {kills}"
        child = forked(train_and_save, kept, result, begun)
        deadline = time.monotonic() + 60
        while not begun.exists():
            assert time.monotonic() < deadline
            assert child.is_alive()
            time.sleep(0.002)
        if kills < 10:
            # Anywhere in the training: it goes on from later each time.
            time.sleep(moments.uniform(0, 0.3 * seconds))
            child.kill()
            kills += 1
        child.join(60)
        assert child.exitcode is not None
        # An epoch is kept whole or not at all.
        assert not (kept / "training.pt").exists() or unfinished(kept).load()
    model = network()
    model.load_state_dict(torch.load(result, weights_only=True))
    assert_same(model, uninterrupted[0])


# --- through the command line


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "structured_dense.pt", weights_only=True))


def killed(words: list[str], partial: Path) -> None:
    """Start a conversion and kill it once it has kept an epoch."""
    with Command(*words, cwd=partial.parent) as command:
        deadline = time.monotonic() + 120
        while not (partial / "training.pt").exists() and command.running:
            assert time.monotonic() < deadline
            time.sleep(0.002)


LONG = ("--epochs=40", "--sr-epochs=4.5", "--seed=3")


@pytest.fixture(scope="module")
def partial(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished conversion, and beside it what it would have become."""
    folder = tmp_path_factory.mktemp("partial")
    whole = run(*tiny_words(tiny, out=str(folder / "whole")), *LONG)
    assert whole.exit_code == 0, whole.output
    killed([*tiny_words(tiny, out=str(folder / "run")), *LONG], folder / "run.partial")
    assert (folder / "run.partial/training.pt").exists()
    assert not (folder / "run").exists()
    shutil.copytree(folder / "run.partial", folder / "again.partial")
    return folder


def test_a_conversion_goes_on_to_the_same_weights(partial: Path, tiny: Path) -> None:
    words = [*tiny_words(tiny, out=str(partial / "run")), *LONG]

    refused = run(*words)
    assert refused.exit_code == 1
    assert "--resume" in refused.output
    other = run(*words, "--resume", "--batch-size=32")
    assert other.exit_code == 1
    assert "recipe.batch_size was" in " ".join(other.output.split())
    assert (partial / "run.partial/training.pt").exists()

    before = torch.load(partial / "run.partial/training.pt", weights_only=True)["epoch"]
    done = run(*words, "--resume")
    assert done.exit_code == 0, done.output
    assert before >= 1
    first, second = weights(partial / "whole"), weights(partial / "run")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not (partial / "run.partial").exists()
    ours, theirs = (
        json.loads((partial / name / "convert.json").read_text())["finetune"]["epochs"]
        for name in ("run", "whole")
    )
    assert ours == theirs


def again(partial: Path, tiny: Path, folder: Path) -> list[str]:
    """The unfinished conversion once more, in another folder, and its command."""
    shutil.copytree(partial / "again.partial", folder / "run.partial")
    return [*tiny_words(tiny, out=str(folder / "run")), *LONG]


def test_force_begins_anew(partial: Path, tiny: Path, tmp_path: Path) -> None:
    words = again(partial, tiny, tmp_path)
    done = run(*words, "--epochs=2", "--sr-epochs=1", "--force")
    assert done.exit_code == 0, done.output
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}


def test_a_damaged_state_is_said(partial: Path, tiny: Path, tmp_path: Path) -> None:
    words = again(partial, tiny, tmp_path)
    state = tmp_path / "run.partial/training.pt"
    state.write_bytes(state.read_bytes()[:1000])
    result = run(*words, "--resume")
    assert result.exit_code == 1
    assert "damaged" in result.output
    assert "--force" in result.output


def test_it_goes_on_at_another_learning_rate(partial: Path, tiny: Path, tmp_path: Path) -> None:
    done = run(*again(partial, tiny, tmp_path), "--resume", "--lr=0.001")
    assert done.exit_code == 0, done.output
    ours, theirs = weights(tmp_path / "run"), weights(partial / "whole")
    assert not all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_something_else_in_the_way_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial/mine").write_text("x")
    for more in ("--force", "--resume", "--seed=1"):
        result = run(*tiny_words(tiny, out=str(tmp_path / "run")), more)
        assert result.exit_code == 1
        assert "in the way" in " ".join(result.output.split())
    assert (tmp_path / "run.partial/mine").read_text() == "x"


def test_a_loss_that_diverges_keeps_the_last_good_state(tmp_path: Path) -> None:
    class Poisoned(Classification):
        def loss(
            self, outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]
        ) -> torch.Tensor:
            found = super().loss(outputs, batch)
            return found * float("nan") if (tmp_path / "training.pt").exists() else found

    task = Poisoned(dataset(), 16, ("crop",))
    with pytest.raises(TrainingError, match=r"nan in epoch 2.*--lr"):
        finetune(network(), STRUCTURES, task, RECIPE, keeper=unfinished(tmp_path))
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


class Steep(Classification):
    """Its loss is finite to the end of the second epoch, and its gradient there is not to be borne:
    no later loss of the epoch tells."""

    steps_taken = 0

    def loss(self, outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        found = super().loss(outputs, batch)
        if not torch.is_grad_enabled():
            return found
        Steep.steps_taken += 1
        if Steep.steps_taken != 2 * self.steps:
            return found
        push = 1e38 * outputs[:, 0].sum()
        return found + push - push.detach()


def test_a_state_that_the_last_step_of_an_epoch_destroyed_is_not_kept(tmp_path: Path) -> None:
    Steep.steps_taken = 0
    task = Steep(dataset(), 16, ("crop",))
    with pytest.raises(TrainingError, match=r"behind step 20, in epoch 2.*--lr"):
        finetune(network(), STRUCTURES, task, RECIPE, keeper=unfinished(tmp_path), fit=fitted)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["epoch"] == 1
    # And so it goes on from there, at another rate.
    train(unfinished(tmp_path), replace(RECIPE, learning_rate=0.001))


@pytest.mark.parametrize("files", [[], ["training.pt"], ["training.part", "progress.json.1.part"]])
def test_what_a_kill_left_without_a_record_is_begun_anew(
    files: list[str], tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.partial").mkdir()
    for name in files:
        (tmp_path / "run.partial" / name).write_text("torn")
    done = run(*tiny_words(tiny, out=str(tmp_path / "run")), "--resume")
    assert done.exit_code == 0, done.output
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}


def test_stopping_early(tmp_path: Path) -> None:
    task = Classification(dataset(), RECIPE.batch_size, RECIPE.augment)
    _, result = finetune(network(), STRUCTURES, task, RECIPE, enough=lambda drop: drop <= 100)
    # The first epoch inside the structure is the fifth: it crossed in the middle of it.
    assert len(result.epochs) == 5
    assert result.stages[-1].stage == "fine-tuned"
    assert result.stages[-1].max_residual < 1e-6
