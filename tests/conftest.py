"""Shared fixtures: a small model and dataset that the whole pipeline runs on in seconds."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and for the processes that tests start: small tensors on a shared
# machine, where worker threads mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from torch.onnx._internal.exporter._registration import ONNXRegistry

import structconv_cli.benchmarking.run  # noqa: F401 - for the class that `short_rounds` hides
from structconv_cli.benchmarking import protocol
from structconv_cli.benchmarking.protocol import Protocol
from structconv_cli.onnx import measure
from structconv_cli.timing.settings import BenchmarkSettings

TINY = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))

def tiny(channels=1, classes=3):
    return Tiny(channels, classes)

def linear_only():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def pointwise():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )
"""


LONGEST = ("cli", "readme", "verify", "plan_command", "onnx_lower", "world", "resume", "onnx_split")
"""Files that two workers begin with: one of them at the end would keep the other waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Timings neither come from the user's cache nor go there, in this process and its children."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> Iterator[None]:
    """The exporter makes the same table anew for every export, which takes most of a small one."""
    with pytest.MonkeyPatch.context() as patch:
        made_once = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", made_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_farewell() -> Iterator[None]:
    """Workers whose loader was abandoned are waited for half a second, in place of torch's five."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
        yield


def shorten_rounds(patch: pytest.MonkeyPatch) -> None:
    """Models are timed in rounds of 10 ms, where no small difference matters."""
    for module, settings in ((measure, BenchmarkSettings), (protocol, Protocol)):
        short = functools.partial(settings, round_ms=10, warmup_ms=30)
        patch.setattr(module, settings.__name__, short)


@pytest.fixture(scope="module")
def short_rounds() -> Iterator[None]:
    """Models of microseconds are timed in short rounds."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_rounds(patch)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.py, tiny.pt (untrained weights) and data.npz (3 classes, 8x8, gray)."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.py").write_text(TINY)
    namespace: dict[str, object] = {}
    exec(TINY, namespace)
    torch.manual_seed(0)
    torch.save(namespace["tiny"]().state_dict(), folder / "tiny.pt")  # type: ignore[operator]
    rng = np.random.default_rng(0)
    y = np.arange(240) % 3
    x = rng.integers(0, 80, (240, 8, 8)) + 60 * y[:, None, None]
    np.savez(folder / "data.npz", x=x.astype(np.uint8), y=y)
    return folder


@pytest.fixture(scope="session")
def readers_files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.py, model.pt and images/ of the README's and the guide's readers; to be copied."""
    folder = tmp_path_factory.mktemp("reader")
    source = (tiny / "tiny.py").read_text()
    (folder / "model.py").write_text(
        source + "\ndef build(classes):\n    return Tiny(3, classes)\n"
    )
    namespace: dict[str, object] = {}
    exec(source, namespace)
    torch.save(namespace["tiny"](3, 3).state_dict(), folder / "model.pt")  # type: ignore[operator]
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for label in range(3):
            images = folder / "images" / part / f"class{label}"
            images.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (40, 32, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(images / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def quick() -> dict[str, dict[str, int]]:
    """Other defaults, for commands that are run as they stand in the README or the guide."""
    return {"benchmark": {"blocks": 1, "rounds": 6}, "plan": {"images": 48, "seconds": 2}}
