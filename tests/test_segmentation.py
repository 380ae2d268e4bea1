"""Segmentation: mIoU against counting by hand, ignored pixels, and a model all the way."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from structconv_cli.cli import app
from structconv_cli.data.dataset import Dataset
from structconv_cli.data.split import Split
from structconv_cli.errors import DataError, TaskError
from structconv_cli.tasks.choice import task_for
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.confusion import confusion, mean_iou, pixel_accuracy
from structconv_cli.tasks.segmentation import Segmentation
from structconv_cli.training.recipe import Recipe
from structconv_cli.world import World

IGNORED = 255
MODEL = """
import torch
from torch import nn

class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 1)
        self.extra = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        low = torch.relu(self.norm(self.stem(x)))
        return {"out": self.head(torch.relu(self.body(low))), "aux": self.extra(low)}

def build():
    torch.manual_seed(0)
    return Segmenter()
"""


def model() -> nn.Module:
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    return namespace["build"]().eval()  # type: ignore[operator,no-any-return]


def arrays(count: int = 40, size: int = 12) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Images whose colour is their class, and masks with an ignored column."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (count, size // 4, size // 4)).repeat(4, 1).repeat(4, 2)
    images = np.eye(3)[masks].transpose(0, 3, 1, 2) * 150 + rng.integers(
        0, 80, (count, 3, size, size)
    )
    masks[:, :, 0] = IGNORED
    return images.astype(np.uint8), masks.astype(np.uint8)


def dataset(masks: torch.Tensor | None = None, count: int = 40) -> Dataset:
    x, y = (torch.from_numpy(array) for array in arrays(count))
    split = Split(x, y if masks is None else masks)
    return Dataset(split, split, (), (0.0,) * 3, (1.0,) * 3)


def by_hand(predicted: np.ndarray, masks: np.ndarray, classes: int) -> tuple[float, float]:  # type: ignore[type-arg]
    """mIoU and pixel accuracy, pixel by pixel."""
    ratios = []
    pixels = [(p, t) for p, t in zip(predicted.flat, masks.flat, strict=True) if t != IGNORED]
    for label in range(classes):
        both = sum(1 for p, t in pixels if p == label == t)
        either = sum(1 for p, t in pixels if label in (p, t))
        if either:
            ratios.append(both / either)
    right = sum(1 for p, t in pixels if p == t)
    return 100 * sum(ratios) / len(ratios), 100 * right / len(pixels)


@given(seed=st.integers(0, 10**6), classes=st.integers(1, 6), used=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_the_metric_is_what_counting_pixel_by_pixel_finds(
    seed: int, classes: int, used: int
) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, min(used, classes), (2, 3, 4))
    masks[rng.random(masks.shape) < 0.3] = IGNORED
    masks[0, 0, 0] = 0
    predicted = rng.integers(0, classes, masks.shape)
    counts = confusion(torch.from_numpy(predicted), torch.from_numpy(masks), classes, IGNORED)
    miou, accuracy = by_hand(predicted, masks, classes)
    assert mean_iou(counts) == pytest.approx(miou)
    assert pixel_accuracy(counts) == pytest.approx(accuracy)


def test_a_model_is_judged_by_all_its_pixels_at_the_masks_resolution() -> None:
    task, net = Segmentation(dataset()), model()
    found = task.evaluate(lambda batch: task.forward(net, batch))
    x, y = arrays()
    with torch.no_grad():
        scores = net(torch.from_numpy(x).float() / 255)["out"]
    scores = nn.functional.interpolate(scores, (12, 12), mode="bilinear")
    miou, accuracy = by_hand(scores.argmax(1).numpy(), y, 3)
    assert (found.score, found.examples) == (pytest.approx(miou), 40)
    assert found.others == {"pixel accuracy": pytest.approx(accuracy)}
    log = scores.log_softmax(1).gather(1, torch.from_numpy(y).long().clamp(max=2)[:, None])[:, 0]
    assert found.loss == pytest.approx(-float(log[torch.from_numpy(y) != IGNORED].mean()), rel=1e-5)


def test_ignored_pixels_change_neither_loss_nor_metric() -> None:
    task = Segmentation(dataset())
    masks = torch.from_numpy(arrays()[1]).long()[:4]
    scores = torch.randn(4, 3, 12, 12, requires_grad=True)
    task.loss(scores, (None, masks)).backward()
    assert scores.grad is not None
    gradient = scores.grad.abs().sum(1)
    assert (gradient[masks == IGNORED] == 0).all()
    assert (gradient[masks != IGNORED] > 0).all()


def test_a_batch_of_ignored_pixels_alone_has_no_loss() -> None:
    task = Segmentation(dataset())
    scores = torch.randn(2, 3, 6, 6, requires_grad=True)
    loss = task.loss(scores, (None, torch.full((2, 12, 12), IGNORED)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert scores.grad is not None
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("count", [1, 5, 40])
def test_processes_together_count_what_one_does(count: int) -> None:
    """Their sums are added here, as `all_reduce` would."""
    net = model()
    sent: list[list[torch.Tensor]] = []

    class Recording(World):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            sent[-1].append(values.clone())
            return sent[0][0] if len(sent[-1]) == 1 else values

    def evaluate(world: World) -> object:
        task = Segmentation(dataset(count=count), world=world)
        return task.evaluate(lambda batch: task.forward(net, batch))

    whole = evaluate(World())
    for rank in range(2):
        sent.append([])
        try:
            evaluate(Recording(rank, 2))
        except (DataError, ZeroDivisionError):
            assert count == 1  # the second process has no image of its own
    assert sum(int(part[0]) for part in sent) == 9
    counts = sum(part[1] for part in sent)
    assert isinstance(counts, torch.Tensor)
    assert mean_iou(counts.view(3, 3)) == pytest.approx(whole.score)  # type: ignore[attr-defined]


def test_a_class_that_the_model_does_not_have_is_told() -> None:
    masks = torch.from_numpy(arrays()[1])
    masks[0, 3, 3] = 7
    task = Segmentation(dataset(masks))
    with pytest.raises(DataError, match="largest label is 7, but the model has 3 outputs"):
        task.check(model())
    with pytest.raises(DataError, match="class 7"):
        task.evaluate(lambda batch: task.forward(model(), batch))


def test_masks_that_are_ignored_altogether_are_told() -> None:
    task = Segmentation(dataset(torch.full((40, 12, 12), IGNORED, dtype=torch.uint8)))
    with pytest.raises(DataError, match="ignored label 255"):
        task.evaluate(lambda batch: task.forward(model(), batch))


def test_a_single_score_for_each_pixel_is_told() -> None:
    with pytest.raises(TaskError, match=r"one score per pixel.*--task"):
        Segmentation(dataset()).check(nn.Conv2d(3, 1, 1))


def test_large_images_are_judged_few_at_a_time() -> None:
    def batch(size: int) -> int:
        images = torch.zeros(1, 3, size, size, dtype=torch.uint8).expand(400, -1, -1, -1)
        split = Split(images, torch.zeros(400, dtype=torch.int64))
        return Classification(Dataset(split, split, (), (0.0,) * 3, (1.0,) * 3)).at_once

    assert [batch(size) for size in (32, 224, 448, 4096)] == [256, 256, 64, 2]


def test_data_says_the_task_and_the_model_must_fit_it() -> None:
    recipe = Recipe(epochs=1, regularised=1)
    classifier = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    segmentation = task_for(dataset(), recipe)
    assert isinstance(segmentation, Segmentation)
    with pytest.raises(TaskError, match="the data has masks"):
        segmentation.check(classifier)
    classification = task_for(dataset(torch.arange(40) % 3), recipe)
    assert isinstance(classification, Classification)
    with pytest.raises(TaskError, match="one label for each"):
        classification.check(model())


def archive(folder: Path) -> list[object]:
    x, y = arrays()
    np.savez(folder / "data.npz", x=x, y=y)
    return [folder / "data.npz", "--val-split", 0.25]


def folders(folder: Path) -> list[object]:
    x, y = arrays()
    for index, (image, mask) in enumerate(zip(x, y, strict=True)):
        root = folder / "data" / ("train" if index < 30 else "val")
        for kind, pixels in (("images", image.transpose(1, 2, 0)), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / kind / f"{index}.png")
    return [folder / "data"]


@pytest.mark.parametrize("data", [archive, folders])
def test_a_model_with_a_dict_of_outputs_goes_the_whole_way(
    data: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    torch.save(model().state_dict(), tmp_path / "net.pt")

    def run(*words: object) -> str:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    out = tmp_path / "run"
    told = run(
        *("convert", tmp_path / "net.pt", "--arch", f"{tmp_path}/net.py:build", "--out", out),
        *("--data", *data(tmp_path), "--epochs", 3),
        *("--batch-size", 6, "--forms", "split", "--lr", 0.05, "--augment", "none"),
    )
    assert "mIoU (%) by stage, 10 examples" in told
    assert "accuracy" not in told
    checked = run("verify", out)
    assert "The rewrite is exact" in checked
    assert "mIoU" in checked
    result = json.loads((out / "verify.json").read_bytes())
    assert {check["what"] for check in result["model"]} == {"output out", "output aux"}
    stages = json.loads((out / "convert.json").read_bytes())["finetune"]["stages"]
    approximation = result["approximation"]
    scores = [stage["evaluation"]["score"] for stage in stages]
    assert approximation["original"] == pytest.approx(scores[0], abs=0.2)
    assert approximation["structured"] == pytest.approx(scores[-1], abs=0.2)
    assert scores[-1] > scores[0] + 10  # it was trained, from nothing
    assert json.loads((out / "run.json").read_bytes())["task"] == "segmentation"
