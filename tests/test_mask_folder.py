import shutil
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


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "validation")])
def test_parts_may_lie_inside_images_and_masks(tmp_path: Path, train: str, val: str):
    for part, count in ((train, 5), (val, 2)):
        write_pairs(tmp_path / part, count)
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / part / kind).rename(tmp_path / kind / part)
        (tmp_path / part).rmdir()
    data = load_dataset(DataSpec(str(tmp_path)), channels=3)
    assert (len(data.train), len(data.val)) == (5, 2)
    assert "leave it out" in message_of(tmp_path, val_split=0.5)
    shutil.rmtree(tmp_path / "masks" / val)
    assert f"masks/{val}" in message_of(tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_cannot_be_read_does_not_decide_where_others_go(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An image whose header is sound is left out if it is held in memory, and else found late."""
    monkeypatch.setattr("structconv_cli.data.reading.fits_memory", lambda need: in_memory)
    write_pairs(tmp_path, 120)
    spec, torn = DataSpec(str(tmp_path), val_split=0.2), tmp_path / "images/0.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    Image.fromarray(noise).save(torn)
    whole = load_dataset(spec, channels=3)
    torn.write_bytes(torn.read_bytes()[:-20])
    data = load_dataset(spec, channels=3)
    assert len(data.train) + len(data.val) == (119 if in_memory else 120)
    for part, other in ((data.train, whole.train), (data.val, whole.val)):
        kept = other.part(torch.arange(len(other) - len(part), len(other)))
        last = torch.arange(1, len(part))
        assert torch.equal(part.fetch(last)[0], kept.fetch(last)[0])


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
    deep[:, 6:] = 998
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


def add_jpeg(root: Path) -> None:
    (root / "masks" / "1.png").unlink()
    Image.new("L", (12, 8)).save(root / "masks" / "1.jpg")


def add_size(root: Path) -> None:
    Image.new("L", (12, 9)).save(root / "masks" / "1.png")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: (root / "masks" / "2.png").unlink(), ["1 of 4", "images/2.jpg", "masks"]),
        (lambda root: (root / "images" / "3.jpg").unlink(), ["masks/3.png", "images"]),
        (add_color, ["masks/1.png", "colours", "class indices"]),
        (add_jpeg, ["masks/1.jpg", "JPEG", "save masks as PNG"]),
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


@pytest.mark.parametrize(
    ("values", "kind", "told"),
    [
        ((0, 255), np.uint8, "hold the class 0 alone, and the ignored label 255"),
        ((255, 255), np.uint8, "hold nothing else, and the ignored label 255"),
        ((-1, 1), np.int32, "smallest label in the data is -1"),
    ],
)
def test_masks_that_cannot_be_learned_from(
    values: tuple[int, int], kind: type[np.generic], told: str, tmp_path: Path
):
    write_pairs(tmp_path)
    for index in range(4):
        labels = np.full((8, 12), values[0], kind)
        labels[:, 6:] = values[1]
        (tmp_path / "masks" / f"{index}.png").unlink()
        Image.fromarray(labels).save(tmp_path / "masks" / f"{index}.tif")
    data = load_dataset(DataSpec(str(tmp_path), val_split=0.3), channels=3)
    with pytest.raises(DataError, match=told):
        check_labels(data, 2)


def test_damaged_masks_are_left_out_with_their_images(tmp_path: Path):
    write_pairs(tmp_path, 120)
    (tmp_path / "masks" / "7.png").write_bytes(b"nothing")
    data = load_dataset(DataSpec(str(tmp_path), val_split=0.1), channels=3)
    assert len(data.train) + len(data.val) == 119
    assert data.notes == ("1 unreadable image skipped: images/7.jpg",)
