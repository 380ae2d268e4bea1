"""Several processes that train one model: torchrun, and what happens when one of them dies."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import Command
from test_cli import run, tiny_words

from structconv_cli.errors import TrainingError
from structconv_cli.world import ALONE, World, check_batch_size

LAUNCHER = ["torchrun", "--nproc-per-node", "2", "-m", "structconv_cli"]
"""As the README has it."""

LONG = ("--epochs=12", "--sr-epochs=4.5", "--augment=none")


def score(folder: Path) -> float:
    stages = json.loads((folder / "convert.json").read_text())["finetune"]["stages"]
    return float(stages[-1]["evaluation"]["score"])


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    done = run(*tiny_words(tiny, out=str(out)), *LONG)
    assert done.exit_code == 0, done.output
    return out


def by_torchrun(words: list[str], folder: Path) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *LAUNCHER[1:]]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_hand(words: list[str], folder: Path) -> str:
    with both(words, folder) as processes:
        ended = [process.wait(120) for process in processes]
    assert [end.returncode for end in ended] == [0, 0], ended
    return "".join(end.stdout for end in ended)


@contextmanager
def both(words: list[str], folder: Path) -> Iterator[tuple[Command, Command]]:
    """Two processes in the environment that torchrun gives them."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (
        Command(*words, cwd=folder, env=place | {"RANK": "0", "LOCAL_RANK": "0"}) as first,
        Command(*words, cwd=folder, env=place | {"RANK": "1", "LOCAL_RANK": "1"}) as second,
    ):
        yield first, second


@pytest.mark.parametrize("start", [by_hand, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_write_one_run_like_that_of_one(
    start: Callable[[list[str], Path], str], alone: Path, tiny: Path, tmp_path: Path
) -> None:
    words = [*tiny_words(tiny, out=str(tmp_path / "run")), *LONG]
    printed = start(words, tmp_path)
    assert printed.count("The rewrite is exact") == 1
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {
        entry.name for entry in alone.iterdir()
    }
    # Every image is judged once, and training is as good; batch norms see half batches.
    one, two = (
        json.loads((folder / "convert.json").read_text())["finetune"]
        for folder in (alone, tmp_path / "run")
    )
    first, second = one["stages"][0]["evaluation"], two["stages"][0]["evaluation"]
    assert {**second, "loss": None} == {**first, "loss": None}
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert len(two["epochs"]) == len(one["epochs"])
    assert abs(score(tmp_path / "run") - score(alone)) <= 10
    assert one["stages"][0]["evaluation"]["score"] < 60 < score(alone)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_one_dies_the_other_says_so_and_stops(victim: int, tiny: Path, tmp_path: Path) -> None:
    words = [*tiny_words(tiny, out=str(tmp_path / "run")), "--epochs=2000"]
    with both(words, tmp_path) as processes:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run.partial/training.pt").exists():
            assert time.monotonic() < deadline
            assert all(process.running for process in processes), processes[0].wait()
            time.sleep(0.05)
        processes[victim].kill()
        ended = processes[1 - victim].wait()
    assert ended.returncode == 1
    assert f"process {1 - victim} lost the others" in " ".join(ended.stderr.split())
    assert "--resume" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run.partial/training.pt").exists()


def test_alone_nothing_is_exchanged() -> None:
    values = torch.arange(3.0)
    assert ALONE.first
    assert ALONE.sum(values) is values
    assert ALONE.same("x") == "x"
    ALONE.wait()
    ALONE.same_tensors(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("batch", "size"), [(63, 2), (2, 2), (5, 4), (4, 4)])
def test_a_batch_that_cannot_be_shared_is_said(batch: int, size: int) -> None:
    with pytest.raises(TrainingError, match=f"--batch-size {batch} is shared by {size} processes"):
        check_batch_size(batch, World(0, size))


@pytest.mark.parametrize(("batch", "size"), [(64, 2), (2, 1), (6, 3)])
def test_a_batch_that_can_be_shared_is_taken(batch: int, size: int) -> None:
    check_batch_size(batch, World(0, size))
