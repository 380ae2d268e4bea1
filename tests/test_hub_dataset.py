import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Picture
from typer.testing import CliRunner

from structconv_cli.cli import app
from structconv_cli.data.dataset import load_dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import DataError

datasets = pytest.importorskip("datasets")

IMAGES = [Picture.new("RGB", (6, 4), (i, 1, 2)) for i in range(10)]
LABELS = [i % 2 for i in range(10)]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def make(**columns: tuple[list[Any], Any]) -> Any:
    features = datasets.Features({name: kind for name, (_, kind) in columns.items()})
    return datasets.Dataset.from_dict({k: v for k, (v, _) in columns.items()}, features=features)


def labelled() -> Any:
    label = datasets.ClassLabel(names=["cat", "dog"])
    return make(picture=(IMAGES, datasets.Image()), kind=(LABELS, label))


def message_of(path: Path | str, **options: float) -> str:
    with pytest.raises(DataError) as raised:
        load_dataset(DataSpec(f"hf:{path}", **options), channels=3)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_saved_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled().save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    spec = DataSpec("hf:saved", val_split=0.2)
    assert spec.source == f"hf:{tmp_path / 'saved'}"
    data = load_dataset(spec, channels=3)
    assert (len(data.train), len(data.val)) == (8, 2)
    assert data.classes == ("cat", "dog")
    assert data.train.labels is not None
    images = torch.cat([data.train.first(8), data.val.first(2)])
    assert images.shape == (10, 3, 4, 6)
    assert sorted(images[:, 0, 0, 0].tolist()) == list(range(10))
    # An image's red value is its row, which tells its class.
    assert torch.equal(data.train.first(8)[:, 0, 0, 0].long() % 2, data.train.labels)
    assert "--val-split" in message_of(tmp_path / "saved")


def test_parts_of_a_saved_dataset(tmp_path: Path):
    whole = labelled()
    parts = {"train": whole, "test": whole.select([0]), "validation": whole.select([1, 3])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = load_dataset(DataSpec(f"hf:{tmp_path / 'saved'}"), channels=3)
    assert data.val.labels is not None
    assert data.val.labels.tolist() == [1, 1]
    assert "validation" in message_of(tmp_path / "saved", val_split=0.1)


def test_parquet_files(tmp_path: Path):
    for part in ("train", "test"):
        labelled().to_parquet(tmp_path / "files" / f"{part}.parquet")
    data = load_dataset(DataSpec(f"hf:{tmp_path / 'files'}"), channels=1)
    assert (len(data.train), len(data.val)) == (10, 10)


def test_masks(tmp_path: Path):
    masks = [Picture.new("L", (6, 4), i % 3) for i in range(10)]
    image = datasets.Image()
    make(image=(IMAGES, image), annotation=(masks, image)).save_to_disk(tmp_path / "saved")
    data = load_dataset(DataSpec(f"hf:{tmp_path / 'saved'}", val_split=0.2), channels=3)
    assert data.train.labels is None
    images, found = data.train.fetch(torch.arange(8))
    assert found is not None
    assert torch.equal(found, (images[:, 0].long() % 3))


def test_streamed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled().save_to_disk(tmp_path / "saved")
    spec = DataSpec(f"hf:{tmp_path / 'saved'}", val_split=0.2, workers=1)
    held = load_dataset(spec, channels=3)
    monkeypatch.setattr("structconv_cli.data.reading.fits_memory", lambda need: False)
    streamed = load_dataset(spec, channels=3)
    assert not streamed.train.in_memory
    pairs = zip(streamed.batches(streamed.train, 3), held.batches(held.train, 3), strict=True)
    for (x, y), (u, v) in pairs:
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_columns_that_tell_too_little_or_too_much(tmp_path: Path):
    image, number = datasets.Image(), datasets.Value("int64")
    names = datasets.ClassLabel(names=["a", "b"])
    for columns, told in (
        ({"a": (LABELS, number)}, "a (Value)"),
        ({"x": (IMAGES, image), "z": (IMAGES, image)}, "x (Image), z (Image)"),
        ({"x": (IMAGES, image), "n": (LABELS, number)}, "none of class labels"),
        ({"x": (IMAGES, image), "a": (LABELS, names), "b": (LABELS, names)}, "b (ClassLabel)"),
        ({"x": (IMAGES, image), "label": ([-1] * 10, number)}, "10 of 10 rows"),
    ):
        make(**columns).save_to_disk(tmp_path / told)
        assert told in message_of(tmp_path / told, val_split=0.2)


def test_unlabelled_images_where_they_will_do(tmp_path: Path):
    make(x=(IMAGES, datasets.Image())).save_to_disk(tmp_path / "saved")
    spec = DataSpec(f"hf:{tmp_path / 'saved'}", val_split=0.2)
    data = load_dataset(spec, channels=3, need_labels=False)
    assert data.train.targets is None


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "that the hub can be reached" in message_of("someone/something:config")


def test_a_folder_of_nothing(tmp_path: Path):
    assert "check the files in it" in message_of(tmp_path)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'structconv[hf]'" in message_of(tmp_path)


def test_a_part_without_the_columns_of_the_other(tmp_path: Path):
    bare = make(picture=(IMAGES[:3], datasets.Image()))
    datasets.DatasetDict({"train": labelled(), "test": bare}).save_to_disk(tmp_path / "saved")
    assert "test" in message_of(tmp_path / "saved")
    assert "lacks the column 'kind'" in message_of(tmp_path / "saved")


def test_numbers_for_labels_need_no_names(tmp_path: Path):
    """Converted as far as the end, which says how near chance the original is."""
    number = datasets.Value("int64")
    make(image=(IMAGES, datasets.Image()), label=(LABELS, number)).save_to_disk(tmp_path / "saved")
    source = "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 8, 3, "
    source += "padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(192, 2))\n"
    (tmp_path / "model.py").write_text(source)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    torch.save(namespace["build"]().state_dict(), tmp_path / "model.pt")
    words = ["--no-finetune", "--forms=split", f"--data=hf:{tmp_path}/saved", "--val-split=0.2"]
    done = CliRunner().invoke(
        app,
        [
            *("convert", f"{tmp_path}/model.pt", f"--arch={tmp_path}/model.py:build", *words),
            f"--out={tmp_path}/run",
        ],
    )
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "run/convert.json").read_text())
    assert told["finetune"]["stages"][0]["evaluation"]["others"] == {}
