"""Data that is decoded while it is used: the same as data in memory, and what can go wrong."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from structconv_cli.data.dataset import Dataset, check_labels, load_dataset
from structconv_cli.data.loader import worker_count
from structconv_cli.data.order import Shuffle
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import DataError

AUGMENT = ("crop", "flip", "rotate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with masks of the classes 0 to 3 and 255; also as classes, in `classes`."""
    root = tmp_path_factory.mktemp("streamed")
    rng = np.random.default_rng(0)
    for index in range(30):
        pixels = Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8))
        mask = Image.fromarray(rng.choice(np.uint8([0, 1, 2, 3, 255]), (10, 12)))
        for place, image in (
            (f"masks/images/{index:02}", pixels),
            (f"masks/masks/{index:02}", mask),
            (f"classes/{'abc'[index % 3]}/{index:02}", pixels),
        ):
            path = root / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def load(path: Path, size: int | None = None) -> Dataset:
    return load_dataset(DataSpec(str(path), size=size, val_split=0.2), channels=3)


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("kind", ["masks", "classes"])
def test_streamed_batches_are_those_in_memory(
    folder: Path, kind: str, size: int | None, request: pytest.FixtureRequest
):
    held = load(folder / kind, size)
    request.getfixturevalue("little_memory")
    streamed = load(folder / kind, size)
    assert held.train.in_memory
    assert not streamed.train.in_memory
    assert streamed.train.image_shape == held.train.image_shape
    shuffle, state = Shuffle(1, 2), torch.get_rng_state()
    for workers in (0, 2):
        data = replace(streamed, workers=workers)
        assert data.train.labels is None or torch.equal(data.train.labels, held.train.labels)
        for mine, theirs in (
            (data.batches(data.val, 4), held.batches(held.val, 4)),
            (
                data.batches(data.train, 7, shuffle=shuffle, augment=AUGMENT, rank=1, world=2),
                held.batches(held.train, 7, shuffle=shuffle, augment=AUGMENT, rank=1, world=2),
            ),
        ):
            for (x, y), (u, v) in zip(mine, theirs, strict=True):
                assert torch.equal(x, u)
                assert torch.equal(y, v)
    assert torch.equal(torch.get_rng_state(), state)


def test_streamed_masks_are_checked_against_the_outputs(folder: Path, little_memory: None):
    data = load(folder / "masks")
    check_labels(data, 4)
    with pytest.raises(DataError, match="largest label is 3, but the model has 3 outputs"):
        check_labels(data, 3)
    with pytest.raises(DataError, match=r"largest label is 255.*--ignore-label"):
        check_labels(replace(data, ignore_label=3), 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_fails_late_is_named(tmp_path: Path, little_memory: None, workers: int):
    rng = np.random.default_rng(0)
    for index in range(6):
        path = tmp_path / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    data = replace(load(tmp_path), workers=workers)
    broken = tmp_path / "a" / "2.png"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(DataError, match=r"2\.png cannot be decoded") as raised:
        [list(data.batches(split, 2)) for split in (data.train, data.val)]
    assert "Traceback" not in str(raised.value)


def test_headers_tell_of_sizes_and_damage(tmp_path: Path, little_memory: None):
    for index in range(220):
        path = tmp_path / "ab"[index % 2] / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4)).save(path)
    (tmp_path / "a" / "000.png").write_bytes(b"nothing")
    data = load(tmp_path)
    assert data.notes == ("1 unreadable image skipped: a/000.png",)
    assert len(data.train) + len(data.val) == 219
    Image.new("RGB", (9, 7)).save(tmp_path / "b" / "001.png")
    with pytest.raises(DataError, match=r"b/001\.png is 9x7 pixels, while .*png is 5x4"):
        load(tmp_path)


class Deadly:
    """Images whose decoding ends the process."""

    shape = (8, 3, 4, 4)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(indices), 3, 4, 4)


def test_a_worker_that_dies_is_an_error(folder: Path):
    data = load(folder / "classes")
    split = replace(data.train, images=Deadly())
    on_death = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError, match=r"worker process.*--workers 0"):
        list(replace(data, workers=1).batches(split, 2))
    assert signal.getsignal(signal.SIGCHLD) == on_death


INTERRUPTED = """
import sys, time
from structconv_cli.data.dataset import load_dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.data import reading

reading.fits_memory = lambda need: False
data = load_dataset(DataSpec(sys.argv[1], val_split=0.2, workers=2), channels=3)
try:
    for _ in data.batches(data.train, 1):
        print("batch", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_interrupts_end_the_workers_too(folder: Path):
    process = subprocess.Popen(
        # torch warns where there are fewer cores than workers.
        [
            sys.executable,
            "-W",
            "ignore:This DataLoader",
            "-c",
            INTERRUPTED,
            str(folder / "classes"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "batch\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == ""
    deadline = time.monotonic() + 30
    while any(worker.is_running() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.is_running() for worker in workers)


def test_workers_leave_cores_to_the_training(monkeypatch: pytest.MonkeyPatch):
    assert worker_count(0, 1) == 0
    assert worker_count(5, 2) == 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert [worker_count(None, processes) for processes in (1, 2, 4, 16)] == [8, 4, 2, 1]
