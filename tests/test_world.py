"""Several processes that train one model: torchrun, and what happens when one of them dies."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from forked import Command
from test_cli import run, tiny_words
from test_user_task import MODEL, TASK
from typer.testing import CliRunner

from structconv_cli.cli import app
from structconv_cli.data.memory import fits_memory, require_memory
from structconv_cli.errors import DataError, StructconvError, TaskError, TrainingError
from structconv_cli.world import ALONE, World, check_batch_size, local_size, reached

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


def wait_for(state: Path, processes: tuple[Command, Command]) -> None:
    """Until an epoch has been kept."""
    deadline = time.monotonic() + 120
    while not state.exists():
        assert time.monotonic() < deadline
        assert all(process.running for process in processes), processes[0].wait()
        time.sleep(0.002)


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
        wait_for(tmp_path / "run.partial/training.pt", processes)
        processes[victim].kill()
        ended = processes[1 - victim].wait()
    assert ended.returncode == 1
    assert f"process {1 - victim} lost the others" in " ".join(ended.stderr.split())
    assert "--resume" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run.partial/training.pt").exists()


# --- a task of the user's own


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a model, some of whose parameters have no part in the loss, and its task."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "task.py").write_text(TASK)
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    torch.save(namespace["two"]().state_dict(), tmp_path / "model.pt")
    return tmp_path


def own_words(own: Path, out: str, *more: str) -> list[str]:
    model = ("convert", f"{own}/model.pt", f"--arch={own}/model.py:two", f"--task={own}/task.py")
    tuning = ("--batch-size=16", "--epochs=6", "--sr-epochs=1", "--forms=split")
    return [*model, *tuning, f"--out={own / out}", *more]


def test_two_processes_go_on_to_the_same_weights(own: Path) -> None:
    by_hand(own_words(own, "whole", "--accumulate=2"), own)
    words = own_words(own, "run", "--accumulate=2", "--resume")
    with both(words, own) as processes:
        wait_for(own / "run.partial/training.pt", processes)
        for process in processes:
            process.kill()
    assert not (own / "run").exists()
    by_hand(words, own)
    whole, again = (
        torch.load(own / name / "structured_dense.pt", weights_only=True)
        for name in ("whole", "run")
    )
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_one_process_decides_when_to_stop(own: Path) -> None:
    # What process 1 finds grows worse and worse.
    worse = "    global calls\n    calls += 1\n    return -1000 * calls * rank - 10 * torch"
    rank = "import os\nimport torch\n\ncalls, rank = 0, int(os.environ.get('RANK', 0))\n"
    source = TASK.replace("    return -10 * torch", worse).replace("import torch\n", rank, 1)
    (own / "task.py").write_text(source)
    by_hand(own_words(own, "run", "--stop-at-drop=100"), own)
    record = json.loads((own / "run/convert.json").read_bytes())["finetune"]
    assert len(record["epochs"]) == 1


def test_where_the_loss_fails_in_one_process_the_other_stops_too(own: Path) -> None:
    fails = """
    global calls
    calls += torch.is_grad_enabled()
    if calls > 9 and os.environ["RANK"] == "1":
        raise ValueError("too bad")
    return functional"""
    source = TASK.replace("\n    return functional", fails)
    (own / "task.py").write_text(source.replace("import torch\n", "import os\nimport torch\n", 1))
    with (own / "task.py").open("a") as file:
        file.write("\ncalls = 0\n")
    with both(own_words(own, "run"), own) as processes:
        first, second = (process.wait(120) for process in processes)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "ValueError: too bad" in second.stderr
    assert "process 0 lost the others" in " ".join(first.stderr.split())
    assert "Traceback" not in first.stderr + second.stderr


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        ("[gloo/transport/tcp/pair.cc] Connection closed by peer", "process 0 lost the others"),
        ("shapes do not fit", "the model does not run"),
    ],
)
def test_a_process_lost_within_a_hook_is_said(
    cause: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")

    def run_in_a_hook() -> None:
        try:
            raise RuntimeError(cause)
        except RuntimeError as error:
            raise TaskError("the model does not run") from error

    with pytest.raises(StructconvError, match=told), reached():
        run_in_a_hook()


# --- alone


def test_cores_and_memory_are_shared_by_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert local_size() == 1
    available = psutil.virtual_memory().available
    assert fits_memory(available // 6)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert local_size() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert local_size() == 2
    assert not fits_memory(available // 6)
    with pytest.raises(DataError, match="in each of 2 processes"):
        require_memory(available // 2, "x.npz", "use a smaller archive")


@pytest.mark.parametrize("words", [["--dry-run"], ["model.onnx"]])
def test_what_trains_nothing_is_not_for_several_processes(
    words: list[str], tiny: Path, tmp_path: Path
) -> None:
    given = tiny_words(tiny, out=str(tmp_path / "run"))
    if words == ["model.onnx"]:
        exported = run(*given, "--epochs=0")
        assert exported.exit_code == 0, exported.output
        given, words = ["convert", str(tmp_path / "run/original.onnx")], []
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "COLUMNS": "200"}
    refused = CliRunner(env=environment).invoke(app, [*given, *words])
    assert refused.exit_code == 2
    assert "without torchrun" in refused.stderr


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
