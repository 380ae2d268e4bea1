"""Semantic segmentation: a small HRNet-style network on CamVid, trained here, then converted.

    python benchmarks/segmentation.py --data camvid --work camvid-work --epochs 60
    structconv convert camvid-work/dense.pt --arch benchmarks/segmentation.py:network \\
        --data camvid --size 192 --mean 0.41,0.43,0.43 --std 0.3,0.3,0.3 \\
        --ignore-label 11 --augment flip,resized-crop --epochs 20 --batch-size 16 --lr 0.05 \\
        --precision bf16 --target-macs 0.5 --out camvid-work/run
    python benchmarks/segmentation.py --data camvid --work camvid-work --longer 20

The last is what the converted model is compared with: the dense one, tuned by the same recipe.
Three resolutions in parallel, exchanged once: Wang et al., Deep High-Resolution Representation
Learning for Visual Recognition, 2019. 192 x 192 pixels, 11 classes.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

CLASSES = 11
WIDTHS = (24, 48, 96)
MEAN, STD = (0.41, 0.43, 0.43), (0.3, 0.3, 0.3)
AUGMENT = ("flip", "resized-crop")


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = conv(channels, channels), conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(x + y)


class Exchange(nn.Module):
    """Every resolution gets what the others have, resized."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(
            nn.ModuleList(
                nn.Identity() if i == j else conv(WIDTHS[j], WIDTHS[i], 1) for j in range(3)
            )
            for i in range(3)
        )

    def forward(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        mixed = []
        for i, row in enumerate(self.mix):
            assert isinstance(row, nn.ModuleList)
            total = xs[i]
            for j, layer in enumerate(row):
                if j != i:
                    y = layer(xs[j])
                    y = functional.interpolate(y, scale_factor=2.0 ** (j - i), mode="nearest")
                    total = total + y
            mixed.append(torch.relu(total))
        return mixed


class HighResolution(nn.Module):
    """Scores (B, 11, H / 4, W / 4) of images (B, 3, H, W), H and W multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 32, 3, 2), nn.ReLU(), conv(32, WIDTHS[0], 3, 2))
        self.down = nn.ModuleList(conv(WIDTHS[i], WIDTHS[i + 1], 3, 2) for i in range(2))
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Sequential(Block(width), Block(width)) for width in WIDTHS)
            for _ in range(2)
        )
        self.exchange = Exchange()
        self.head = nn.Sequential(conv(sum(WIDTHS), 64, 1), nn.ReLU(), nn.Conv2d(64, CLASSES, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        xs = [torch.relu(self.stem(x))]
        for down in self.down:
            xs.append(torch.relu(down(xs[-1])))
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, nn.ModuleList)
            xs = [branch(x) for branch, x in zip(stage, xs, strict=True)]
            if i == 0:
                xs = self.exchange(xs)
        up = [functional.interpolate(y, scale_factor=2.0**i) for i, y in enumerate(xs)]
        return self.head(torch.cat(up, 1))


def network() -> nn.Module:
    """For `--arch`."""
    return HighResolution()


def main() -> None:
    from planning import Log

    from structconv_cli.data.dataset import load_dataset
    from structconv_cli.data.spec import DataSpec
    from structconv_cli.model.checkpoint import load_checkpoint, load_into
    from structconv_cli.tasks.segmentation import Segmentation
    from structconv_cli.training.finetune import finetune
    from structconv_cli.training.hardware import Hardware
    from structconv_cli.training.recipe import Recipe, named_recipe

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("camvid-work"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--longer", type=int, default=0, help="epochs to tune dense.pt for")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--distill", type=float, help="with --longer: `convert`'s option")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    torch.manual_seed(0)
    data = load_dataset(DataSpec(str(options.data), 192, MEAN, STD, ignore_label=11), channels=3)
    model, to = network(), options.work / "dense.pt"
    recipe = Recipe(
        options.epochs, 0, batch_size=16, learning_rate=0.1, distillation=0.0, augment=AUGMENT
    )
    if options.longer:
        recipe = named_recipe(
            "default",
            options.longer,
            batch_size=16,
            learning_rate=0.05,
            augment=AUGMENT,
            distillation=options.distill,
        )
        load_into(model, load_checkpoint(to))
        to = options.work / f"dense-{options.longer}.pt"
    task = Segmentation(data, recipe.batch_size, recipe.augment)
    hardware = Hardware(precision=options.precision)
    tuned, result = finetune(model, {}, task, recipe, hardware=hardware, observer=Log())
    torch.save(tuned.state_dict(), to)
    print(result.metric.text(result.stages[-1].evaluation.score))


if __name__ == "__main__":
    main()
