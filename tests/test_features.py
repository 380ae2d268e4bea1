"""Following the original inside: what is compared, by its definition, and what is left behind."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from structconv_cli.data.dataset import Dataset
from structconv_cli.data.split import Split
from structconv_cli.structure import Structure
from structconv_cli.tasks.classification import Classification
from structconv_cli.training.features import Features
from structconv_cli.training.finetune import finetune
from structconv_cli.training.recipe import Recipe


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x).relu())


class Net(nn.Module):
    """A layer of its own, a block, and layers in a list, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block(4)
        self.listed = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.stem(x)).relu()
        for layer in self.listed:
            x = layer(x)
        return self.head(x.mean((2, 3)))


LAYERS = ("stem", "block.first", "block.second", "listed.0", "listed.1")


def nets() -> tuple[Net, Net]:
    torch.manual_seed(0)
    ours, theirs = Net().double(), Net().double()
    return ours, theirs


def by_hand(net: Net, x: torch.Tensor) -> list[torch.Tensor]:
    stem = net.stem(x)
    block = net.block(stem)
    first = net.listed[0](block.relu())
    return [stem, block, first, net.listed[1](first)]


def test_the_distance_by_its_definition() -> None:
    ours, theirs = nets()
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    features = Features(ours, theirs, LAYERS)
    with features.watched():
        ours(x)
        with torch.no_grad():
            theirs(x)
        found = features.distance()
    with torch.no_grad():
        expected = [
            float((a - b).square().sum() / b.square().sum())
            for a, b in zip(by_hand(ours, x), by_hand(theirs, x), strict=True)
        ]
    assert found.item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    found.backward()
    assert all(p.grad is not None for name, p in ours.named_parameters() if "head" not in name)
    assert all(p.grad is None for p in theirs.parameters())


def test_nothing_is_far_from_itself_and_nothing_is_kept() -> None:
    ours, _ = nets()
    same = copy.deepcopy(ours)
    features = Features(ours, same, LAYERS)
    for size in (6, 8):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        with features.watched():
            ours(x), same(x)
            assert float(features.distance()) == 0
    ours(torch.randn(2, 3, 6, 6, dtype=torch.float64))
    with features.watched():
        assert float(features.distance()) == 0  # what ran outside does not count
    features.close()
    for net in (ours, same):
        assert not any(module._forward_hooks for module in net.modules())


def test_other_shapes_are_left_out() -> None:
    ours, theirs = nets()
    features = Features(ours, theirs, LAYERS)
    with features.watched():
        ours(torch.randn(2, 3, 6, 6, dtype=torch.float64))
        theirs(torch.randn(2, 3, 7, 7, dtype=torch.float64))
        assert float(features.distance()) == 0


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_hints_bring_features_nearer(distillation: float) -> None:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(64) % 3)
    data = Dataset(split, split, ("a", "b", "c"), mean=(0.5,) * 3, std=(0.3,) * 3)
    original = Net().eval()
    structures = {name: Structure((4, 3, 3), (4, 2, 2)) for name in LAYERS[1:]}
    recipe = Recipe(4, 0.5, batch_size=16, learning_rate=0.01, distillation=distillation)
    task = Classification(data, recipe.batch_size, recipe.augment, recipe.seed)
    distances = []
    for hints in (0.0, 1.0):
        tuned, _ = finetune(original, structures, task, replace(recipe, hints=hints))
        assert not any(module._forward_hooks for module in tuned.modules())
        features = Features(tuned, original, list(structures))
        x = (images.float() / 255 - 0.5) / 0.3
        with features.watched(), torch.no_grad():
            tuned(x), original(x)
            distances.append(float(features.distance()))
        features.close()
    assert distances[1] < 0.85 * distances[0]
