"""Whether training images are mirrored: as the original tells."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from structconv_cli.cli import app
from structconv_cli.data.dataset import Dataset
from structconv_cli.data.split import Split
from structconv_cli.tasks.classification import Classification
from structconv_cli.tasks.segmentation import Segmentation
from structconv_cli.training.augmentation_choice import accuracies, choose_augmentation

SIZE = 8


class Brightness(nn.Module):
    """Scores of two classes: how dark and how bright the left of an image is, or all of it."""

    def __init__(self, width: int, sign: float = 1.0) -> None:
        super().__init__()
        self.width, self.sign = width, sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.sign * (x[..., : self.width].mean((1, 2, 3)) - 0.5)
        return torch.stack([-found, found], 1)


class Pixels(nn.Module):
    """Of every pixel: how dark and how bright; on the left alone if `handed`. At half the size."""

    def __init__(self, handed: bool) -> None:
        super().__init__()
        self.handed = handed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x[:, :, ::2, ::2] - 0.5
        if self.handed:
            found[..., SIZE // 4 :] = -0.5
        return torch.cat([-found, found], 1)


def images(count: int = 60) -> torch.Tensor:
    """Halves of one brightness each, all four kinds."""
    halves = torch.arange(count)[:, None] // torch.tensor([1, 2]) % 2 * 255
    return halves.repeat_interleave(SIZE // 2, 1)[:, None, None].expand(-1, 1, SIZE, -1).byte()


def classification(labels: torch.Tensor) -> Classification:
    split = Split(images(), labels)
    return Classification(Dataset(split, split, ("dark", "bright"), (0.0,), (1.0,)))


def test_classes_that_mirroring_changes() -> None:
    task = classification((images()[:, 0, 0, 0] > 0).long())
    assert accuracies(task, Brightness(SIZE // 2)) == (100, 50)
    assert choose_augmentation(task, Brightness(SIZE // 2)) == (("crop",), "")


def test_classes_that_it_does_not_change() -> None:
    task = classification((images().float().mean((1, 2, 3)) > 200).long())

    class Whole(Brightness):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - 0.25)

    model = Whole(SIZE).train()
    chosen, note = choose_augmentation(task, model)
    assert chosen == ("crop", "flip")
    assert "100.0 % of mirror images, on 100.0 %" in note
    assert model.training


def test_a_model_that_knows_nothing_does_not_tell() -> None:
    task = classification((images()[:, 0, 0, 0] > 0).long())
    assert accuracies(task, Brightness(SIZE, sign=-1))[0] < 50
    assert choose_augmentation(task, Brightness(SIZE, sign=-1)) == (("crop",), "")


@pytest.mark.parametrize("handed", [False, True])
def test_masks_are_mirrored_with_their_images(handed: bool) -> None:
    masks = (images()[:, 0] > 0).long()
    if handed:
        masks[:, :, SIZE // 2 :] = 0
    masks[:, 0] = 255
    split = Split(images(), masks)
    task = Segmentation(Dataset(split, split, (), (0.0,), (1.0,)))
    assert accuracies(task, Pixels(handed)) == (100, pytest.approx(50) if handed else 100)
    assert choose_augmentation(task, Pixels(handed))[0] == (
        ("crop",) if handed else ("crop", "flip")
    )


SOURCE = """
from torch import nn

def shades():
    conv = nn.Conv2d(1, 8, 3, padding=1)
    return nn.Sequential(conv, nn.Conv2d(8, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["crop", "flip"]),
        (["--augment=crop"], ["crop"]),
        (["--augment=none"], []),
        (["--no-finetune"], []),
    ],
)
def test_what_was_chosen_is_told_and_recorded(
    words: list[str], expected: list[str], tmp_path: Path
) -> None:
    x = images(64).numpy()
    np.savez(tmp_path / "x.npz", x=x, y=(x.mean((1, 2, 3)) > 200).astype(int))
    (tmp_path / "model.py").write_text(SOURCE)
    namespace: dict[str, object] = {}
    exec(SOURCE, namespace)
    model = namespace["shades"]()  # type: ignore[operator]
    with torch.no_grad():
        for layer, out in ((model[0], [1.0] * 8), (model[1], [-1.0, 1.0])):
            layer.weight.zero_()
            layer.weight[:, :, 1, 1] = torch.tensor(out)[:, None] / layer.in_channels
            layer.bias.zero_()
        model[1].bias.copy_(torch.tensor([0.75, -0.75]))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    command = ["convert", f"{tmp_path}/model.pt", f"--arch={tmp_path}/model.py:shades"]
    data = [f"--data={tmp_path}/x.npz", "--val-split=0.25", "--epochs=1", "--forms=split"]
    if "--no-finetune" in words:
        data.remove("--epochs=1")
    done = CliRunner().invoke(app, [*command, *data, f"--out={tmp_path}/run", *words])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "run/convert.json").read_text())
    assert said["finetune"]["recipe"]["augment"] == expected
    assert any("mirrored at random" in note for note in said["notes"]) == (not words)
