import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from structconv_cli.data import digits_sample
from structconv_cli.data.augmentation import augment_batch
from structconv_cli.data.dataset import Dataset, check_labels, load_dataset
from structconv_cli.data.order import Shuffle
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import Split, split_stratified
from structconv_cli.errors import DataError

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "sample_models" / "digits.npz"
CIFAR = ROOT.parent / "shared" / "data" / "cifar10_jpeg.zip"


def write_image(path: Path, size: tuple[int, int] = (6, 4), color: Any = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "RGB" if isinstance(color, tuple) else "L"
    Image.new(mode, size, color).save(path)


def write_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (6, 4)) -> Path:
    """Writes PNG images whose red value is their running number."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write_image(root / name / f"{index:03}.png", size, (index, 100, 200))
    return root


def write_parts(root: Path, val: str = "val") -> Path:
    write_folder(root / "train", {"cat": 3, "dog": 2})
    write_folder(root / val, {"cat": 1, "dog": 2})
    return root


def write_npz(path: Path, **arrays: Any) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def message_of(spec: DataSpec, channels: int = 3) -> str:
    with pytest.raises(DataError) as raised:
        load_dataset(spec, channels=channels)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- the specification


def test_specs_survive_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    spec = DataSpec("images", 32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 0.1, 7)
    assert spec.source == str(tmp_path / "images")
    assert DataSpec(**json.loads(json.dumps(asdict(spec)))) == spec
    assert DataSpec("digits").source == "digits"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": -3}, "size is -3"),
        ({"mean": (0.5,)}, "mean has 1 values"),
        ({"std": (0.5, 0.5)}, "std has 2 values"),
        ({"std": (0.5, 0.5, 0.0)}, "above zero"),
        ({"std": (0.5, 0.5, -1.0)}, "above zero"),
        ({"std": (0.5, 0.5, float("nan"))}, "finite"),
        ({"mean": (0.5, 0.5, float("inf"))}, "finite"),
        ({"val_split": 0.0}, "split is 0.0"),
        ({"val_split": 1.0}, "split is 1.0"),
    ],
)
def test_specs_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], told: str):
    assert told in message_of(DataSpec(str(tmp_path), **changes))


# --- the bundled sample


@pytest.mark.skipif(not DIGITS.is_file(), reason=f"{DIGITS} is not there")
def test_digits():
    data = load_dataset(DataSpec("digits"), channels=1)
    with np.load(DIGITS) as arrays:
        x, y, held_out = arrays["x"], arrays["y"], arrays["is_test"]
    expected = F.interpolate(
        torch.from_numpy(x[held_out])[:, None].float() / 16,
        size=(32, 32),
        mode="bilinear",
        align_corners=False,
    )
    assert torch.equal(data.val.images, expected)
    assert torch.equal(data.val.labels, torch.from_numpy(y[held_out]).long())
    assert len(data.train) + len(data.val) == 1797
    assert data.classes == tuple("0123456789")
    assert torch.equal(data.prepare(data.val.images), expected)
    check_labels(data, 10)


def test_digits_are_found_in_the_working_directory(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(digits_sample, "__file__", str(tmp_path / "site" / "p" / "x.py"))
    monkeypatch.chdir(tmp_path)
    assert "digits.npz" in message_of(DataSpec("digits"), channels=1)
    (tmp_path / "sample_models").mkdir()
    x = np.full((4, 8, 8), 16, dtype=np.uint8)
    y = np.array([0, 1, 0, 1])
    write_npz(tmp_path / "sample_models" / "digits.npz", x=x, y=y, is_test=np.arange(4) > 1)
    data = load_dataset(DataSpec("digits", size=10), channels=1)
    assert torch.equal(data.train.images, torch.ones(2, 1, 10, 10))
    assert data.train.labels.tolist() == data.val.labels.tolist() == [0, 1]
    write_npz(tmp_path / "sample_models" / "digits.npz", x=x, y=y)
    assert "['is_test']" in message_of(DataSpec("digits"), channels=1)


def test_digits_do_not_fit_everything():
    assert "takes 3" in message_of(DataSpec("digits"), channels=3)
    assert "--val-split 0.1" in message_of(DataSpec("digits", val_split=0.1), channels=1)


# --- folders


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_folder_with_parts(tmp_path: Path, val: str):
    seen: list[tuple[int, int]] = []
    data = load_dataset(
        DataSpec(str(write_parts(tmp_path, val))),
        channels=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert data.train.images.shape == (5, 3, 4, 6)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images[:, :, 0, 0].tolist() == [[i, 100, 200] for i in (0, 1, 2, 0, 1)]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.val.labels.tolist() == [0, 1, 1]
    assert data.val.images[:, 0, 0, 0].tolist() == [0, 0, 1]
    assert data.classes == ("cat", "dog")
    assert data.notes == ()
    assert seen == [(done, 8) for done in range(1, 9)]


def test_large_images_are_decoded_by_threads_in_order(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (8, 60, 80, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        path = tmp_path / ("train" if index < 6 else "val") / f"c{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    data = load_dataset(DataSpec(str(tmp_path)), channels=3)
    expected = torch.from_numpy(noise[[0, 2, 4, 1, 3, 5, 6, 7]]).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat([data.train.images, data.val.images]), expected)


def test_folder_with_a_split(tmp_path: Path):
    write_folder(tmp_path, {"b": 10, "a": 20, "c": 1, ".cache": 3})
    spec = DataSpec(str(tmp_path), val_split=0.2)
    data = load_dataset(spec, channels=1)
    assert data.classes == ("a", "b", "c")
    assert torch.bincount(data.val.labels).tolist() == [4, 2]
    assert torch.bincount(data.train.labels).tolist() == [16, 8, 1]
    again = load_dataset(spec, channels=1)
    assert torch.equal(data.val.images, again.val.images)


def test_folder_with_train_alone_is_split(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    data = load_dataset(DataSpec(str(tmp_path), val_split=0.25), channels=3)
    assert (len(data.train), len(data.val)) == (6, 2)
    assert "train/ alone" in message_of(DataSpec(str(tmp_path)))


def test_a_class_may_be_called_train(tmp_path: Path):
    write_folder(tmp_path, {"train": 2, "plane": 2})
    data = load_dataset(DataSpec(str(tmp_path), val_split=0.5), channels=3)
    assert data.classes == ("plane", "train")


def test_parts_without_one_to_train_on_are_no_classes(tmp_path: Path):
    write_folder(tmp_path / "val", {"a": 4, "b": 4})
    write_folder(tmp_path / "test", {"a": 4, "b": 4})
    message = message_of(DataSpec(str(tmp_path), val_split=0.5))
    assert "test/, val/ and no class folders" in message
    assert "train/ and val/" in message


def test_links_are_followed_once(tmp_path: Path):
    write_folder(tmp_path / "elsewhere", {"more": 3})
    write_folder(tmp_path / "data", {"a": 2, "b": 2})
    (tmp_path / "data/a/more").symlink_to(tmp_path / "elsewhere/more")
    (tmp_path / "elsewhere/more/round").symlink_to(tmp_path / "data/a")
    data = load_dataset(DataSpec(str(tmp_path / "data"), val_split=0.5), channels=3)
    labels = torch.cat([data.train.labels, data.val.labels])
    assert torch.bincount(labels).tolist() == [5, 2]


def test_one_class_will_do_where_labels_are_not_needed(tmp_path: Path):
    x = np.zeros((8, 3, 4, 4), np.uint8)
    file = write_npz(tmp_path / "x.npz", x=x, y=np.zeros(8, int))
    spec = DataSpec(str(file), val_split=0.5)
    assert "one class only ('0')" in message_of(spec)
    assert len(load_dataset(spec, channels=3, need_labels=False).train) == 4


def test_hidden_foreign_and_nested_files(tmp_path: Path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    write_image(tmp_path / "a" / "more" / "deep.JPEG")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "a" / "labels.txt").write_text("no image")
    write_image(tmp_path / "a" / ".thumbs" / "x.png")
    data = load_dataset(DataSpec(str(tmp_path), val_split=0.5), channels=3)
    assert len(data.train) + len(data.val) == 5


def test_validation_may_lack_a_class(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    write_folder(tmp_path / "val", {"c": 1, "a": 0})
    data = load_dataset(DataSpec(str(tmp_path)), channels=3)
    assert data.val.labels.tolist() == [2]


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tif", "ppm"])
def test_kinds_of_images(tmp_path: Path, suffix: str):
    for name in ("a", "b"):
        for index in range(2):
            write_image(tmp_path / name / f"{index}.{suffix}", (8, 8), (250, 0, 0))
    color = load_dataset(DataSpec(str(tmp_path), val_split=0.5), channels=3).val.images
    assert (color.float().mean((0, 2, 3)) - torch.tensor([250.0, 0, 0])).abs().max() < 4
    grey = load_dataset(DataSpec(str(tmp_path), val_split=0.5), channels=1).val.images
    assert abs(grey.float().mean() - 250 * 0.299) < 4


def test_sizes_are_cropped_and_scaled(tmp_path: Path):
    for name in ("a", "b"):
        for index, size in enumerate([(30, 10), (10, 10), (5, 20)]):
            write_image(tmp_path / name / f"{index}.png", size, 77)
    wide = Image.new("L", (30, 10), 0)
    wide.paste(255, (10, 0, 20, 10))
    wide.save(tmp_path / "a" / "0.png")
    data = load_dataset(DataSpec(str(tmp_path), size=10, val_split=0.3), channels=1)
    everything = torch.cat([data.train.images, data.val.images])
    assert everything.shape == (6, 1, 10, 10)
    # The central third of the wide image is white, and it is all that is kept.
    assert everything.flatten(1).float().mean(1).sort().values.tolist() == [77] * 5 + [255]


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def test_a_few_unreadable_images_are_skipped_and_named(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 100, "b": 99})
    write_folder(tmp_path / "val", {"a": 1, "b": 100})
    damage(tmp_path / "train" / "a" / "000.png")
    (tmp_path / "val" / "b" / "099.png").unlink()
    (tmp_path / "val" / "b" / "099.png").symlink_to("nowhere.png")
    data = load_dataset(DataSpec(str(tmp_path)), channels=3)
    assert data.notes == ("2 unreadable images skipped: train/a/000.png, val/b/099.png",)
    assert (len(data.train), len(data.val)) == (198, 100)
    expected = [*range(1, 100), *range(99)]
    assert data.train.images[:, 0, 0, 0].tolist() == expected
    assert torch.bincount(data.train.labels).tolist() == [99, 99]
    assert data.val.images[:, 0, 0, 0].tolist() == [0, *range(99)]


def test_many_unreadable_images_are_an_error(tmp_path: Path):
    write_folder(tmp_path, {"a": 50, "b": 50})
    for index in range(7):
        damage(tmp_path / "a" / f"00{index}.png")
    message = message_of(DataSpec(str(tmp_path), val_split=0.1))
    assert "7 of 100 images" in message
    assert len(re.findall(r"a/00\d\.png", message)) == 5


@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path, {"a": 2, "b": 2}, size=(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    assert "4 of 4 images" in message_of(DataSpec(str(tmp_path), size=8, val_split=0.5))


def test_archives_that_unpack_to_too_much_are_refused(tmp_path: Path, monkeypatch: Any):
    path = write_npz(tmp_path / "data.npz", x=np.zeros((4, 8, 8)), y=np.arange(4))
    memory = psutil.virtual_memory()._replace(available=3000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert "smaller archive" in message_of(DataSpec(str(path), val_split=0.5), channels=1)


def add_deep_image(root: Path) -> None:
    pixels = np.full((4, 6), 40_000, dtype=np.uint16)
    Image.fromarray(pixels).save(root / "train" / "cat" / "deep.png")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], DataSpec, int, list[str]]] = {
    "empty": (lambda root: None, DataSpec(".", val_split=0.1), 3, ["no class sub-folders"]),
    "flat": (
        lambda root: write_image(root / "x.png"),
        DataSpec(".", val_split=0.1),
        3,
        ["no class sub-folders"],
    ),
    "one class": (
        lambda root: write_folder(root, {"cat": 2}),
        DataSpec(".", val_split=0.1),
        3,
        ["one class sub-folder, cat"],
    ),
    "no split": (
        lambda root: write_folder(root, {"cat": 2, "dog": 2}),
        DataSpec("."),
        3,
        ["--val-split 0.1"],
    ),
    "split twice": (
        write_parts,
        DataSpec(".", val_split=0.2),
        3,
        ["val/", "--val-split 0.2", "leave it out"],
    ),
    "empty class": (
        lambda root: write_folder(root, {"cat": 2, "dog": 2, "eel": 0}),
        DataSpec(".", val_split=0.1),
        3,
        ["eel", "no images"],
    ),
    "flat parts": (
        lambda root: [write_image(root / part / "x.png") for part in ("train", "val")],
        DataSpec("."),
        3,
        ["train", "no class sub-folders"],
    ),
    "extra class": (
        lambda root: write_folder(write_parts(root) / "val", {"eel": 1}),
        DataSpec("."),
        3,
        ["val", "eel", "lacks"],
    ),
    "empty validation": (
        lambda root: write_folder(
            write_folder(root / "train", {"cat": 2, "dog": 2}).parent / "val", {"cat": 0}
        ),
        DataSpec("."),
        3,
        ["empty validation part"],
    ),
    "nothing left to validate on": (
        lambda root: write_folder(root, {"cat": 1, "dog": 1}),
        DataSpec(".", val_split=0.1),
        3,
        ["empty validation part"],
    ),
    "sizes differ": (
        lambda root: write_image(write_parts(root) / "train" / "dog" / "000.png", (9, 7)),
        DataSpec("."),
        3,
        ["000.png", "9x7", "6x4", "--size"],
    ),
    "deep": (
        lambda root: add_deep_image(write_parts(root)),
        DataSpec("."),
        3,
        ["deep.png", "8 bits"],
    ),
    "none readable": (
        lambda root: [(root / n).mkdir() or (root / n / "x.png").touch() for n in ("a", "b")],
        DataSpec(".", val_split=0.1),
        3,
        ["none of them"],
    ),
    "channels": (write_parts, DataSpec("."), 4, ["4 channels", ".npz"]),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(tmp_path: Path, name: str):
    write, spec, channels, told = BAD_FOLDERS[name]
    write(tmp_path)
    message = message_of(DataSpec(**{**asdict(spec), "source": str(tmp_path)}), channels)
    assert all(text in message for text in [str(tmp_path), *told]), message


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.is_file(), reason=f"{CIFAR} is not there")
def test_cifar(tmp_path: Path):
    with zipfile.ZipFile(CIFAR) as archive:
        archive.extractall(tmp_path)
    root = next(tmp_path.rglob("train")).parent
    data = load_dataset(DataSpec(str(root)), channels=3)
    assert data.train.images.shape == (50_000, 3, 32, 32)
    assert data.val.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(data.val.labels).tolist() == [1000] * 10


# --- .npz archives

X = np.arange(8 * 3 * 4 * 5).reshape(8, 3, 4, 5)
Y = np.array([0, 1, 2, 2] * 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_layouts_and_dtypes_agree(tmp_path: Path, dtype: Any):
    x = (X % 256).astype(dtype)
    path = write_npz(tmp_path / "a.npz", x_train=x, y_train=Y, x_val=x[:4], y_val=Y[:4])
    first = load_dataset(DataSpec(str(path)), channels=3)
    swapped = x.transpose(0, 2, 3, 1)
    path = write_npz(tmp_path / "b", x_train=swapped, y_train=Y, x_val=swapped[:4], y_val=Y[:4])
    second = load_dataset(DataSpec(str(path)), channels=3)
    assert first.train.images.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert torch.equal(first.train.images, torch.from_numpy(x).to(first.train.images.dtype))
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.val.images, second.val.images)
    assert first.val.labels.tolist() == [0, 1, 2, 2]
    assert first.classes == ("0", "1", "2")


def test_ambiguous_layouts_are_taken_as_nchw(tmp_path: Path):
    x = np.random.default_rng(0).random((4, 3, 5, 3), dtype=np.float32)
    path = write_npz(tmp_path / "a.npz", x_train=x, y_train=Y[:4], x_val=x, y_val=Y[:4])
    data = load_dataset(DataSpec(str(path)), channels=3)
    assert torch.equal(data.train.images, torch.from_numpy(x))


def test_grey_images_need_no_channel_axis(tmp_path: Path):
    path = write_npz(tmp_path / "a.npz", x=X[:, 0].astype(np.uint8), y=Y.astype(np.uint16))
    data = load_dataset(DataSpec(str(path), val_split=0.5), channels=1)
    assert data.train.images.shape == (4, 1, 4, 5)
    assert sorted([*data.train.labels.tolist(), *data.val.labels.tolist()]) == sorted(Y)


def test_arrays_are_resized(tmp_path: Path):
    for dtype in (np.uint8, np.float32):
        x = np.full((8, 3, 9, 20), 50, dtype=dtype)
        x[:, :, :, [0, -1]] = 200
        path = write_npz(tmp_path / "a.npz", x=x, y=Y)
        for size in (4, 9, 16):
            data = load_dataset(DataSpec(str(path), size=size, val_split=0.5), channels=3)
            assert data.train.images.shape[1:] == (3, size, size)
            assert torch.allclose(data.train.images.float(), torch.tensor(50.0))


def with_nan(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    x = x.astype(np.float32)
    x[1, 0, 0, 0] = np.nan
    return x


BYTES = X.astype(np.uint8)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"a": BYTES}, ["lacks x, y", "it has a"]),
        ({"x": BYTES}, ["lacks y"]),
        ({"x_train": BYTES, "y_train": Y}, ["lacks x_val, y_val"]),
        ({"x": BYTES, "y": Y[:5]}, ["5 labels"]),
        ({"x": BYTES, "y": Y[:, None]}, ["(8, 1)"]),
        ({"x": BYTES, "y": Y.astype(float)}, ["float64"]),
        ({"x": BYTES, "y": Y > 0}, ["bool"]),
        ({"x": BYTES, "y": Y - 1}, ["from -1 to 1"]),
        ({"x": BYTES, "y": Y + 10**12}, ["1000000000000"]),
        ({"x": BYTES, "y": Y * 0}, ["one class only", "'0'"]),
        ({"x": BYTES, "y": np.array(list("abababab"), dtype=object)}, ["Python objects"]),
        ({"x": X, "y": Y}, ["x in", "int64", "uint8"]),
        ({"x": X + 0j, "y": Y}, ["complex128"]),
        ({"x": with_nan(X), "y": Y}, ["x in", "NaN", "1 of 8"]),
        ({"x": X.astype(float) + 1e300, "y": Y}, ["infinity in 8 of 8"]),
        ({"x": BYTES[:, :2], "y": Y}, ["(8, 2, 4, 5)", "3 channels"]),
        ({"x": BYTES[:, 0], "y": Y}, ["(8, 4, 5)", "3 channels"]),
        ({"x": BYTES[:, 0, 0], "y": Y}, ["(8, 5)"]),
        ({"x": np.uint8(3), "y": Y}, ["shape ()"]),
        ({"x": BYTES[:, :, :0], "y": Y}, ["no pixels"]),
        ({"x": BYTES[:0], "y": Y[:0]}, ["empty training part"]),
        (
            {"x_train": BYTES, "y_train": Y, "x_val": BYTES[:0], "y_val": Y[:0]},
            ["empty validation part"],
        ),
        (
            {"x_train": BYTES, "y_train": Y, "x_val": BYTES[:, :, :3], "y_val": Y},
            ["(3, 4, 5)", "(3, 3, 5)"],
        ),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, Any], told: list[str]):
    path = write_npz(tmp_path / "data.npz", **arrays)
    message = message_of(DataSpec(str(path), val_split=0.5 if "x" in arrays else None))
    assert all(text in message for text in [str(path), *told]), message


def test_archives_with_parts_are_not_split(tmp_path: Path):
    path = write_npz(tmp_path / "data.npz", x_train=BYTES, y_train=Y, x_val=BYTES, y_val=Y)
    assert "leave it out" in message_of(DataSpec(str(path), val_split=0.5))


def test_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    write_parts(tmp_path)
    monkeypatch.setattr(Path, "iterdir", refuse)
    message = message_of(DataSpec(str(tmp_path)))
    assert "Permission denied" in message
    assert str(tmp_path) in message


def test_archives_need_a_split(tmp_path: Path):
    path = write_npz(tmp_path / "data.npz", x=BYTES, y=Y)
    assert "--val-split 0.1" in message_of(DataSpec(str(path)))


def write_other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", b"no image")


def write_damaged(path: Path) -> None:
    write_npz(path, x=BYTES, y=Y)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"NUMPY", b"XXXXX"))


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.touch(), "not an .npz archive"),
        (lambda path: path.write_text("hello"), "not an .npz archive"),
        (lambda path: np.save(path.open("wb"), X), "not an .npz archive"),
        (write_other_zip, "unpack it"),
        (write_damaged, "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, write: Callable[[Path], object], told: str):
    path = tmp_path / "data.npz"
    write(path)
    message = message_of(DataSpec(str(path)))
    assert told in message
    assert str(path) in message


# --- splitting, batching and augmenting


@given(
    st.lists(st.integers(0, 5), max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32),
)
def test_splits_partition_each_class(labels: list[int], fraction: float, seed: int):
    array = np.array(labels, dtype=np.int64)
    train, val = split_stratified(array, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert list(train) == sorted(train)
    assert list(val) == sorted(val)
    for label in set(labels):
        total, held = labels.count(label), int((array[val] == label).sum())
        assert held < total
        assert (held >= 1) == (total >= 2)
        assert abs(held - fraction * total) <= 1
    again = split_stratified(array, fraction, seed)
    assert all(
        np.array_equal(first, second) for first, second in zip((train, val), again, strict=True)
    )


def make_dataset(images: torch.Tensor, mean: Any = (), std: Any = ()) -> Dataset:
    split = Split(images, torch.arange(len(images)) % 3)
    channels = images.shape[1]
    return Dataset(
        split, split, ("a", "b", "c"), mean or (0.0,) * channels, std or (1.0,) * channels
    )


def test_prepare():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    data = make_dataset(images, (0.0, 0.1, 0.5), (1.0, 0.5, 0.25))
    expected = torch.tensor([0, 0.2, 2]).view(1, 3, 1, 1)
    assert torch.allclose(data.prepare(images), expected)
    floats = images.float() / 255
    before = floats.clone()
    assert torch.allclose(data.prepare(floats), expected)
    assert torch.equal(floats, before)


@given(st.integers(1, 40), st.integers(1, 50), st.booleans())
@settings(deadline=None)
def test_batches_go_through_every_example_once(count: int, batch_size: int, shuffle: bool):
    data = make_dataset(torch.arange(count, dtype=torch.float32).view(count, 1, 1, 1))
    order = Shuffle(0, 0) if shuffle else None
    batches = list(data.batches(data.train, batch_size, shuffle=order))
    images = torch.cat([x for x, _ in batches]).flatten()
    labels = torch.cat([y for _, y in batches])
    assert [len(y) for _, y in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert images.sort().values.tolist() == list(range(count))
    assert torch.equal(labels, images.long() % 3)
    if not shuffle:
        assert images.tolist() == list(range(count))


def test_batches_repeat_with_the_seed():
    data = make_dataset(torch.randint(0, 255, (20, 3, 16, 16), dtype=torch.uint8))
    first, second, other = (
        torch.cat(
            [
                x
                for x, _ in data.batches(
                    data.train, 8, shuffle=Shuffle(n, 0), augment=("crop", "flip")
                )
            ]
        )
        for n in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_batches_refuse_nonsense():
    data = make_dataset(torch.zeros(4, 1, 8, 8))
    with pytest.raises(ValueError, match="batch_size"):
        next(data.batches(data.train, 0))
    with pytest.raises(ValueError, match="shuffle"):
        next(data.batches(data.train, 2, augment=("flip",)))
    with pytest.raises(ValueError, match="twist"):
        augment_batch(data.train.images, {"twist"}, 0)


kinds = st.sets(st.sampled_from(["crop", "flip"]))
sides = st.integers(1, 24)


@given(st.integers(0, 5), st.integers(1, 3), sides, sides, kinds, st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_augmentation_keeps_shape_dtype_and_values(
    count: int, channels: int, height: int, width: int, kinds: set[str], floats: bool, seed: int
):
    shape = (count, channels, height, width)
    images = torch.randint(1, 255, shape, dtype=torch.uint8)
    images = images.float() if floats else images
    before = images.clone()
    out, _ = augment_batch(images, kinds, seed)
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    assert torch.equal(images, before)
    if not kinds:
        assert torch.equal(out, images)
    # Each result is the image, mirrored or not, seen through a window that moved a little.
    dy, dx = height // 8, width // 8
    for image, changed in zip(images, out, strict=True):
        candidates = [
            F.pad(view, (dx, dx, dy, dy))[:, y : y + height, x : x + width]
            for view in (image, image.flip(-1))
            for y in range(2 * dy + 1)
            for x in range(2 * dx + 1)
        ]
        assert any(torch.equal(changed, candidate) for candidate in candidates)


def test_crops_of_a_constant_keep_their_interior():
    out, _ = augment_batch(torch.ones(64, 1, 32, 32), {"crop"}, 0)
    assert bool((out[:, :, 4:-4, 4:-4] == 1).all())
    moved = (out == 0).flatten(1).any(1)
    assert moved.sum() > 50
    assert len(out.flatten(1).unique(dim=0)) > 20


def test_flips_undo_themselves_and_hit_about_half():
    images = torch.rand(400, 1, 1, 5)
    once, _ = augment_batch(images, {"flip"}, 3)
    assert torch.equal(augment_batch(once, {"flip"}, 3)[0], images)
    flipped = (once != images).flatten(1).any(1).sum()
    assert 140 < flipped < 260


def test_labels_beyond_the_outputs():
    data = make_dataset(torch.zeros(6, 1, 2, 2))
    check_labels(data, 3)
    with pytest.raises(DataError, match=r"largest label is 2 \(class 'c' of 3\).* 2 outputs"):
        check_labels(data, 2)


# --- masks, and images without labels


def test_masks_in_archives(tmp_path: Path):
    masks = np.arange(8 * 4 * 5).reshape(8, 4, 5) % 7
    path = write_npz(tmp_path / "a.npz", x_train=BYTES, y_train=masks, x_val=BYTES, y_val=masks)
    data = load_dataset(DataSpec(str(path)), channels=3)
    assert data.train.labels is None
    _, found = data.train.fetch(torch.tensor([3, 1]))
    assert torch.equal(found, torch.from_numpy(masks[[3, 1]]))
    check_labels(data, 7)
    with pytest.raises(DataError, match="largest label is 6"):
        check_labels(data, 6)
    small = load_dataset(DataSpec(str(path), size=2), channels=3)
    assert small.train.targets.shape == (8, 2, 2)
    assert set(small.train.targets.unique().tolist()) <= set(range(7))


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x_train": BYTES, "y_train": Y, "x_val": BYTES, "y_val": BYTES[:, 0]}, "masks"),
        ({"x": BYTES, "y": np.zeros((8, 4, 6), int)}, "masks of 4x6"),
        ({"x": BYTES, "y": np.full((8, 4, 5), -1)}, "labels from -1"),
    ],
)
def test_masks_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], told: str):
    path = write_npz(tmp_path / "a.npz", **arrays)
    split = None if "x_val" in arrays else 0.5
    assert told in message_of(DataSpec(str(path), val_split=split))


def test_images_without_labels_where_they_will_do(tmp_path: Path):
    path = write_npz(tmp_path / "a.npz", x=BYTES)
    assert "lacks y" in message_of(DataSpec(str(path), val_split=0.5))
    for index in range(6):
        write_image(tmp_path / "flat" / f"{index}.png")
        write_image(tmp_path / "parts" / ("train" if index < 4 else "val") / f"{index}.png")
    assert "no class sub-folders" in message_of(DataSpec(str(tmp_path / "flat"), val_split=0.5))
    for place, split, counts in (
        (path, 0.5, (4, 4)),
        ("flat", 0.5, (3, 3)),
        ("parts", None, (4, 2)),
    ):
        spec = DataSpec(str(tmp_path / place), val_split=split)
        data = load_dataset(spec, channels=3, need_labels=False)
        assert (len(data.train), len(data.val)) == counts
        assert (data.train.labels, data.classes) == (None, ())
        assert [targets for _, targets in data.batches(data.val, 64)] == [None]
        check_labels(data, 1)


def test_labels_are_kept_where_they_are_not_needed(tmp_path: Path):
    spec = DataSpec(str(write_parts(tmp_path)))
    data = load_dataset(spec, channels=3, need_labels=False)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
