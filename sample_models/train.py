"""Train the sample checkpoint: ResNet-20 on 8x8 handwritten digits, upscaled to 32x32.

``python sample_models/train.py`` reproduces ``resnet20_digits.pt`` from ``digits.npz``;
``python sample_models/train.py --make-data`` reproduces ``digits.npz`` and needs scikit-learn.
The held-out split is only measured, once, after the last epoch: nothing is selected on it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import resnet_cifar
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
DATA = HERE / "digits.npz"
CHECKPOINT = HERE / "resnet20_digits.pt"

IMAGE_SIZE = 32
TEST_IMAGES = 450
SPLIT_SEED = 0
MAX_SHIFT = 3


class Digits(NamedTuple):
    """Images ``(N, 1, 32, 32)`` float32 in [0, 1] and labels ``(N,)`` int64 of both parts."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def make_data(path: Path) -> None:
    """Write scikit-learn's digits and a stratified held-out split to ``path``.

    Arrays: ``x`` uint8 (1797, 8, 8) with values 0 to 16, ``y`` uint8 (1797,), ``is_test`` bool
    (1797,).
    """
    # Imported here because only this step needs scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    _, test_index = train_test_split(
        np.arange(len(digits.target)),
        test_size=TEST_IMAGES,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    is_test = np.zeros(len(digits.target), dtype=bool)
    is_test[test_index] = True
    beside = path.with_name("tmp-" + path.name)
    with beside.open("wb") as file:
        np.savez_compressed(
            file,
            x=digits.images.astype(np.uint8),
            y=digits.target.astype(np.uint8),
            is_test=is_test,
        )
    beside.replace(path)


def load_data(path: Path = DATA) -> Digits:
    """Read ``digits.npz``, scale to [0, 1] and upscale to 32x32; no further normalisation."""
    with np.load(path, allow_pickle=False) as arrays:
        pixels = torch.from_numpy(arrays["x"])
        y = torch.from_numpy(arrays["y"]).long()
        is_test = torch.from_numpy(arrays["is_test"])
    x = F.interpolate(
        pixels.unsqueeze(1).float() / 16,
        size=(IMAGE_SIZE, IMAGE_SIZE),
        mode="bilinear",
        align_corners=False,
    )
    return Digits(x[~is_test], y[~is_test], x[is_test], y[is_test])


def random_shift(x: Tensor) -> Tensor:
    """Move each image of ``(N, C, H, W)`` by up to MAX_SHIFT pixels each way, filling with 0."""
    height, width = x.shape[2:]
    padded = F.pad(x, (MAX_SHIFT,) * 4)
    offsets = torch.randint(2 * MAX_SHIFT + 1, (len(x), 2)).tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, offsets, strict=True)
        ]
    )


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch_size: int, lr: float) -> None:
    """Train ``model`` in place on images ``x`` and labels ``y``, printing a line per epoch."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    batches = -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * batches)
    model.train()
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        total_loss = 0.0
        for index in torch.randperm(len(x)).split(batch_size):
            loss = F.cross_entropy(model(random_shift(x[index])), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item() * len(index)
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch}/{epochs}  loss {total_loss / len(x):.4f}  {seconds:.1f} s", flush=True
        )


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images ``x`` that ``model``, in evaluation mode, gives their label ``y``."""
    model.eval()
    predicted = torch.cat([model(images).argmax(1) for images in x.split(256)])
    return (predicted == y).double().mean().item()


def save_checkpoint(path: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
    """Write weights and ``metadata`` (plain values only), readable with ``weights_only=True``.

    An interrupted run leaves an earlier checkpoint whole: the file is written beside, then renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name("tmp-" + path.name)
    torch.save({"state_dict": model.state_dict(), "metadata": metadata}, beside)
    beside.replace(path)


def load_checkpoint(path: Path = CHECKPOINT) -> tuple[resnet_cifar.ResNet, dict[str, Any]]:
    """Model in evaluation mode, and metadata, of a checkpoint that this script wrote."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    metadata = saved["metadata"]
    factory = getattr(resnet_cifar, metadata["arch"])
    model: resnet_cifar.ResNet = factory(
        num_classes=metadata["num_classes"],
        in_channels=metadata["in_channels"],
        shortcut=metadata["shortcut"],
    )
    model.load_state_dict(saved["state_dict"])
    return model.eval(), metadata


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description="Train ResNet-20 on the digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=DATA, help="digits file")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint to write")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1, help="initial learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--make-data",
        action="store_true",
        help="write the digits file with scikit-learn and stop, without training",
    )
    args = parser.parse_args()
    for name in ("epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main() -> None:
    """Make the data, or train, measure on the held-out split and save."""
    args = parse_args()
    if args.make_data:
        make_data(args.data)
        print(f"wrote {args.data}")
        return

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    data = load_data(args.data)
    arguments: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "shortcut": "A"}
    model = resnet_cifar.resnet20(**arguments)
    start = time.perf_counter()
    train(model, data.train_x, data.train_y, args.epochs, args.batch_size, args.lr)
    seconds = time.perf_counter() - start
    test_accuracy = accuracy(model, data.test_x, data.test_y)
    metadata = {
        "arch": "resnet20",
        **arguments,
        "dataset": "UCI handwritten digits (scikit-learn load_digits), digits.npz",
        "preprocessing": "x / 16, bilinear to 32x32 (align_corners=False), no normalisation",
        "input_shape": [1, IMAGE_SIZE, IMAGE_SIZE],
        "test_accuracy": test_accuracy,
        "test_images": len(data.test_x),
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "torch_version": str(torch.__version__),
    }
    save_checkpoint(args.out, model, metadata)
    print(f"held-out accuracy {test_accuracy:.4f} on {len(data.test_x)} images, {seconds:.0f} s")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
