from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from structconv_cli.data.dataset import check_labels, load_dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import DataError


def write_pairs(root: Path, count: int = 4, masks: str = "masks", mode: str = "L") -> Path:
    """Image i is of the grey value 10 i; its mask is i mod 3 on the left, 255 on the right."""
    for folder in ("images", masks):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (12, 8), (10 * index,) * 3).save(root / "images" / f"{index}.jpg")
        labels = np.full((8, 12), index % 3, np.uint16 if mode == "I;16" else np.uint8)
        labels[:, 6:] = 255
        mask = Image.fromarray(labels)
        if mode == "P":
            mask.putpalette([value % 251 for value in range(768)])
        assert mask.mode == mode
        mask.save(root / masks / f"{index}.png")
    return root


def message_of(root: Path, **options: float) -> str:
    with pytest.raises(DataError) as raised:
        load_dataset(DataSpec(str(root), **options), channels=3)
    assert str(root) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("masks", ["masks", "annotations", "labels"])
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_images_and_masks_are_paired(tmp_path: Path, masks: str, mode: str):
    write_pairs(tmp_path / "train", 5, masks, mode)
    write_pairs(tmp_path / "val", 2, masks, mode)
    write_pairs(tmp_path / "test", 3, masks, mode)
    data = load_dataset(DataSpec(str(tmp_path)), channels=3)
    assert (len(data.train), len(data.val)) == (5, 2)
    assert data.train.labels is None
    images, found = data.train.fetch(torch.tensor([4, 1]))
    assert images.shape == (2, 3, 8, 12)
    assert (images.float().mean((1, 2, 3)) - torch.tensor([40.0, 10.0])).abs().max() < 2
    assert found is not None
    assert found.dtype == torch.int64
    assert found[:, :, :6].flatten(1).unique(dim=1).tolist() == [[1], [1]]
    assert found[:, :, 6:].unique().tolist() == [255]


def test_without_parts_a_fraction_is_split_off(tmp_path: Path):
    write_pairs(tmp_path, 10)
    data = load_dataset(DataSpec(str(tmp_path), val_split=0.2), channels=3)
    assert (len(data.train), len(data.val)) == (8, 2)
    assert "--val-split 0.1" in message_of(tmp_path)


def test_masks_are_scaled_by_the_nearest_label(tmp_path: Path):
    write_pairs(tmp_path, 6)
    data = load_dataset(DataSpec(str(tmp_path), size=4, val_split=0.2), channels=3)
    _, masks = data.train.fetch(torch.arange(5))
    assert masks is not None
    assert masks.shape == (5, 4, 4)
    assert set(masks[:, :, :2].unique().tolist()) <= {0, 1, 2}
    assert masks[:, :, 2:].unique().tolist() == [255]


def test_sixteen_bits_are_kept(tmp_path: Path):
    write_pairs(tmp_path, 4)
    deep = np.full((8, 12), 999, np.uint16)
    for index in range(4):
        Image.fromarray(deep).save(tmp_path / "masks" / f"{index}.png")
    data = load_dataset(DataSpec(str(tmp_path), val_split=0.3), channels=3)
    with pytest.raises(DataError, match="largest label is 999"):
        check_labels(data, 999)
    check_labels(data, 1000)


def test_labels_beyond_the_outputs(tmp_path: Path):
    data = load_dataset(DataSpec(str(write_pairs(tmp_path)), val_split=0.3), channels=3)
    check_labels(data, 3)
    with pytest.raises(DataError, match="largest label is 2, but the model has 2 outputs"):
        check_labels(data, 2)


def add_color(root: Path) -> None:
    Image.new("RGB", (12, 8)).save(root / "masks" / "1.png")


def add_size(root: Path) -> None:
    Image.new("L", (12, 9)).save(root / "masks" / "1.png")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: (root / "masks" / "2.png").unlink(), ["1 of 4", "images/2.jpg", "masks"]),
        (lambda root: (root / "images" / "3.jpg").unlink(), ["masks/3.png", "images"]),
        (add_color, ["masks/1.png", "colours", "class indices"]),
        (add_size, ["masks/1.png is 12x9", "images/1.jpg is 12x8"]),
        (
            lambda root: Image.new("L", (3, 3)).save(root / "masks" / "1.tif"),
            ["1.png", "1.tif", "rename"],
        ),
        (
            lambda root: [p.unlink() for p in root.rglob("*.*")],
            ["images", "no images"],
        ),
    ],
)
@pytest.mark.parametrize("size", [None, 4])
def test_bad_pairs(
    tmp_path: Path, spoil: Callable[[Path], object], told: list[str], size: int | None
):
    spoil(write_pairs(tmp_path))
    message = message_of(tmp_path, size=size, val_split=0.3)
    assert all(text in message for text in told), message


def test_a_part_without_masks(tmp_path: Path):
    write_pairs(tmp_path / "train")
    (tmp_path / "val" / "images").mkdir(parents=True)
    assert "no images/ beside masks/" in message_of(tmp_path)


def test_damaged_masks_are_left_out_with_their_images(tmp_path: Path):
    write_pairs(tmp_path, 120)
    (tmp_path / "masks" / "7.png").write_bytes(b"nothing")
    data = load_dataset(DataSpec(str(tmp_path), val_split=0.1), channels=3)
    assert len(data.train) + len(data.val) == 119
    assert data.notes == ("1 unreadable image skipped: images/7.jpg",)
