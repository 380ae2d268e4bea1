"""A user's task file: what it may say, and what is told of every mistake in it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner, Result

from structconv_cli.cli import app
from structconv_cli.errors import TaskError, TrainingError
from structconv_cli.tasks.user_task import UserTask
from structconv_cli.training.finetune import finetune
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("short_rounds")

MODEL = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hint = nn.Conv2d(2, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 1, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, image, hint):
        x = torch.relu(self.norm(self.stem(image)) + self.hint(hint))
        x = torch.relu(self.body(x))
        return {
            "clean": image + self.up(x),
            "relu": (self.head(x.mean((2, 3))), None),
            "best": self.head(x.mean((2, 3))).argmax(1),
        }

def two(frozen=False):
    torch.manual_seed(0)
    model = Two()
    if frozen:
        for part in (model.stem, model.norm, model.hint):
            part.requires_grad_(False)
    return model
"""

TASK = """
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

metric_name = "PSNR"
metric_unit = "dB"

class Noisy(Dataset):
    def __init__(self, first, count):
        generator = torch.Generator().manual_seed(first)
        self.clean = torch.rand(count, 1, 8, 8, generator=generator)
        self.noise = 0.1 * torch.randn(count, 1, 8, 8, generator=generator)

    def __len__(self):
        return len(self.clean)

    def __getitem__(self, i):
        image = self.clean[i] + self.noise[i]
        return {"image": image, "hint": torch.cat([image, image ** 2]), "clean": self.clean[i]}

def train_loader(batch_size, seed, rank, world):
    return DataLoader(Noisy(0, 48), batch_size, shuffle=True, drop_last=True)

def val_loader(batch_size):
    return DataLoader(Noisy(1, 12), batch_size)

def inputs(batch):
    return batch["image"], batch["hint"]

def loss(outputs, batch):
    return functional.mse_loss(outputs["clean"], batch["clean"])

def metric(results):
    errors = [(out["clean"] - batch["clean"]).square().mean() for out, batch in results]
    return -10 * torch.log10(torch.stack(errors).mean())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two inputs and three outputs, and its task."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "model.py").write_text(MODEL)
    (folder / "task.py").write_text(TASK)
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    torch.save(namespace["two"]().state_dict(), folder / "model.pt")  # type: ignore[operator]
    return folder


def two() -> nn.Module:
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    return namespace["two"]()  # type: ignore[operator,no-any-return]


def task_of(folder: Path, source: str, **settings: int) -> UserTask:
    (folder / "own.py").write_text(source)
    return UserTask(folder / "own.py", **({"batch_size": 8} | settings))  # type: ignore[arg-type]


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def convert(place: Path, out: Path, *words: object) -> Result:
    return run(
        *("convert", place / "model.pt", "--arch", f"{place}/model.py:two", "--out", out),
        *("--task", place / "task.py", "--batch-size", 8, "--forms", "split", *words),
    )


# --- what a task file says


def test_a_denoiser_of_two_inputs_and_a_dict_of_outputs_goes_the_whole_way(
    place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = convert(place, out, "--epochs", 2)
    assert done.exit_code == 0, done.output
    assert "PSNR (dB) by stage, 12 examples" in done.output
    assert "accuracy" not in done.output
    (out / "verify.json").unlink()
    shutil.move(place / "task.py", tmp_path / "task.py")  # no later step runs it
    try:
        checked = run("verify", out)
    finally:
        shutil.move(tmp_path / "task.py", place / "task.py")
    assert checked.exit_code == 0, checked.output
    assert "The rewrite is exact" in checked.output
    assert "best is not compared" in checked.output
    assert "does not run the task file" in " ".join(checked.output.split())
    subjects = {check["what"] for check in json.loads((out / "verify.json").read_bytes())["model"]}
    assert subjects == {"output clean", "output relu_0"}
    stages = json.loads((out / "convert.json").read_bytes())["finetune"]["stages"]
    assert stages[0]["evaluation"]["examples"] == 12
    info = json.loads((out / "run.json").read_bytes())
    assert (info["task"], info["data"]) == (str(place / "task.py"), None)


def test_the_result_runs_in_onnx_runtime_by_the_names_of_the_model(
    place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert convert(place, out, "--epochs", 0).exit_code == 0
    model = two()
    model.load_state_dict(torch.load(out / "structured_dense.pt", weights_only=True))
    model.eval()
    feeds = {"image": torch.randn(3, 1, 8, 8), "hint": torch.randn(3, 2, 8, 8)}
    expected = model(**feeds)
    session = onnxruntime.InferenceSession(out / "structured.onnx")
    found = session.run(["clean", "relu_0", "best"], {name: x.numpy() for name, x in feeds.items()})
    np.testing.assert_allclose(found[0], expected["clean"].detach(), atol=1e-5)
    np.testing.assert_allclose(found[1], expected["relu"][0].detach(), atol=1e-5)
    assert (found[2] == expected["best"].numpy()).all()


def test_a_damaged_second_output_is_found(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert convert(place, out, "--epochs", 0).exit_code == 0
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(out / "reference.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(out / "reference.safetensors")
    tensors["batch 5.relu_0"][3, 1] += 0.01
    save_file(tensors, out / "reference.safetensors", metadata)
    done = run("verify", out)
    assert done.exit_code == 3
    assert "batch 5, output relu_0" in done.output


def test_a_frozen_part_stays_as_it_was_to_the_bit(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = convert(place, out, "--epochs", 1, "--arch-arg", "frozen=true")
    assert done.exit_code == 0, done.output
    assert "frozen" in done.output
    before = two().state_dict()
    after = torch.load(out / "structured_dense.pt", weights_only=True)
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.split(".")[0] in ("stem", "norm", "hint")}
    assert same == frozen


def test_a_plan_is_made_for_a_target(place: Path, tmp_path: Path) -> None:
    done = convert(place, tmp_path / "run", "--epochs", 0, "--target-macs", 0.7)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run/prediction.json").read_bytes())["loss"] >= 0


def test_points_of_accuracy_are_no_target_for_another_metric(place: Path, tmp_path: Path) -> None:
    done = convert(place, tmp_path / "run", "--max-drop", 1)
    assert done.exit_code == 1
    assert "judged by PSNR" in " ".join(done.stderr.split())


@pytest.mark.parametrize("words", [["--data", "digits"], ["--size", "8"], ["--mean", "0.5"]])
def test_data_options_do_not_go_with_a_task_file(
    place: Path, tmp_path: Path, words: list[str]
) -> None:
    assert convert(place, tmp_path / "run", *words).exit_code == 2


def test_epochs_are_the_same_each_time_and_differ_from_one_another(tmp_path: Path) -> None:
    def epoch(task: UserTask, number: int) -> torch.Tensor:
        torch.manual_seed(number)  # as the trainer does
        return torch.cat([batch["image"] for batch in task.training(number)])

    augmented = TASK.replace(
        'return {"image"', 'import random; image = image * random.random()\n        return {"image"'
    )
    one, other = task_of(tmp_path, augmented), task_of(tmp_path, augmented)
    assert torch.equal(epoch(one, 1), epoch(other, 1))
    assert torch.equal(epoch(one, 0), epoch(other, 0))
    assert not torch.equal(epoch(one, 0), epoch(one, 1))


def test_a_loaders_own_generator_and_sampler_follow_the_epoch(tmp_path: Path) -> None:
    task = task_of(
        tmp_path,
        TASK.replace("shuffle=True", "shuffle=True, generator=torch.Generator().manual_seed(7)"),
    )
    first, second = ([b["clean"] for b in task.training(e)] for e in (0, 1))
    assert torch.equal(torch.cat([b["clean"] for b in task.training(0)]), torch.cat(first))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    sampled = task_of(
        tmp_path,
        TASK.replace(
            "    return DataLoader(Noisy(0, 48), batch_size, shuffle=True, drop_last=True)",
            "    from torch.utils.data import DistributedSampler as D\n"
            "    data = Noisy(0, 48)\n"
            "    return DataLoader(data, batch_size, sampler=D(data, world, rank, seed=seed))",
        ),
    )
    assert not torch.equal(*(next(iter(sampled.training(e)))["clean"] for e in (0, 1)))


def test_calibration_leaves_random_states_alone_and_an_epoch_under_way(tmp_path: Path) -> None:
    task = task_of(tmp_path, TASK)
    torch.manual_seed(3)
    whole = torch.cat([batch["clean"] for batch in task.training(0)])
    expected = torch.rand(1)
    torch.manual_seed(3)
    parts = []
    for step, batch in enumerate(task.training(0)):
        parts.append(batch["clean"])
        if step == 2:
            drawn = sum(len(other["clean"]) for other in task.calibration())
            assert drawn == 48
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.rand(1), expected)


def test_following_the_original_is_relative_to_its_outputs(tmp_path: Path) -> None:
    task = task_of(tmp_path, TASK)
    taught = {"a": torch.randn(4, 3), "b": (torch.randn(4, 2) * 100, torch.ones(4).long())}
    ours = {"a": 1.5 * taught["a"], "b": (0.5 * taught["b"][0], torch.zeros(4).long())}
    with torch.no_grad():
        assert float(task.distillation(ours, taught, None)) == pytest.approx(0.25)
        assert float(task.distillation(taught, taught, None)) == 0


def test_the_defaults_take_the_first_of_a_tuple(tmp_path: Path) -> None:
    source = TASK[: TASK.index("def inputs")] + TASK[TASK.index("def loss") :]
    source = source.replace(
        'return {"image": image, "hint": torch.cat([image, image ** 2]), "clean": self.clean[i]}',
        "return image, self.clean[i]",
    )
    source = source.replace('["clean"] - batch["clean"]', " - batch[1]")
    source = source.replace('["clean"], batch["clean"]', ", batch[1]")
    task = task_of(tmp_path, source)
    task.check(nn.Conv2d(1, 1, 3, padding=1))
    (example,) = task.examples(5)
    assert example.shape == (5, 1, 8, 8)


def test_the_example_of_the_readme_works(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (source,) = [
        x for x in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "def loss" in x
    ]
    task = task_of(tmp_path, source)
    task.check(nn.Conv2d(3, 3, 3, padding=1))
    # Of a model that leaves its input alone, the noise.
    found = task.evaluate(lambda batch: batch[0])
    assert found.score == pytest.approx(20, abs=0.2)
    assert task.metric.text(found.score).endswith(" dB")


# --- mistakes


def changed(old: str, new: str) -> str:
    assert old in TASK
    return TASK.replace(old, new)


LOSS = "return functional.mse_loss(outputs["
METRIC = "return -10 * torch"
LOADER = "return DataLoader(Noisy(1, 12), batch_size)"
MISTAKES = {
    "no loss": (changed("def loss", "def losses"), "lacks the hook loss(outputs, batch)"),
    "a near name": (changed("def metric(", "def metrics("), "by metrics?"),
    "loss is a number": (TASK + "\nloss = 3\n", "loss in the task file"),
    "signature": (changed("def loss(outputs, batch)", "def loss(outputs)"), "loss(outputs)"),
    "syntax": (TASK + "\ndef loss(:\n", "line"),
    "raises when run": (TASK + "\n1 / 0\n", "ZeroDivisionError"),
    "exits": (TASK + "\nraise SystemExit(1)\n", "SystemExit"),
    "name": (TASK + "\nmetric_name = 3\n", "metric_name"),
    "direction": (TASK + "\nhigher_is_better = 'yes'\n", "higher_is_better"),
    "loss raises": (changed(LOSS, "raise ValueError('too bad')\n    " + LOSS), "too bad"),
    "loss is a float": (changed(LOSS, "return 3.0\n    " + LOSS), "gives a float"),
    "loss is no scalar": (changed('"clean"], b', '"clean"], reduction="none", target=b'), "(8, 1"),
    "loss is detached": (
        changed(LOSS, "outputs = {'clean': outputs['clean'].detach()}\n    " + LOSS),
        "requires_grad",
    ),
    "loss is nan": (
        changed(LOSS, "return outputs['clean'].mean() * float('nan')\n    " + LOSS),
        "hook loss",
    ),
    "metric is nan": (changed(METRIC, "return float('nan')\n    " + METRIC), "gives nan"),
    "metric is text": (changed(METRIC, "return 'good'\n    " + METRIC), "gives a str"),
    "metric is nothing": (changed(METRIC, "return None\n    " + METRIC), "gives None"),
    "metric raises": (changed(METRIC, "raise KeyError('x')\n    " + METRIC), "KeyError: 'x'"),
    "metric reads nothing": (changed("    errors =", "    return 1.0\n    errors ="), "reads none"),
    "no validation": (changed("Noisy(1, 12)", "[]"), "val_loader"),
    "no loader": (changed(LOADER, "return None"), "val_loader"),
    "no length": (
        changed("Noisy(0, 48), batch_size, shuffle=True, drop_last=True", "Endless()").replace(
            "def train_loader",
            "from torch.utils.data import IterableDataset\n\n"
            "class Endless(IterableDataset):\n    def __iter__(self):\n        return iter([])\n\n"
            "def train_loader",
        ),
        "without a length",
    ),
    "empty": (changed("Noisy(0, 48)", "Noisy(0, 2)"), "no batch"),
    "wrong structure": (
        changed('return batch["image"], batch["hint"]', "return batch"),
        "gives a dict",
    ),
    "no inputs hook": (changed("def inputs", "def the_inputs"), "yields a dict"),
    "inputs of text": (changed('return batch["image"],', 'return "x",'), "a tuple of a str"),
    "rows": (changed('return batch["image"],', 'return batch["image"][:1],'), "a row for each"),
    "inputs raise": (changed('batch["image"],', 'batch["picture"],'), "'picture'"),
    "dataset raises": (
        changed("        image = self", "        oops\n        image = self"),
        "name 'oops'",
    ),
    "in a worker": (
        changed("        image = self", "        oops\n        image = self")
        .replace("batch_size)\n\ndef inputs", "batch_size, num_workers=1)\n\ndef inputs")
        .replace("drop_last=True)", "num_workers=1)"),
        "name 'oops'",
    ),
    "wrong shape": (changed('batch["hint"]', 'batch["image"]'), "does not run on inputs of shape"),
    "distillation": (TASK + "\ndef distillation(a, b, c):\n    return 1\n", "gives an int"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_hook_and_file(name: str, tmp_path: Path) -> None:
    source, told = MISTAKES[name]
    with pytest.raises(TaskError) as error:
        task_of(tmp_path, source).check(two())
    assert told in str(error.value)
    assert str(tmp_path / "own.py") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["loss raises", "metric raises", "dataset raises", "in a worker"])
def test_the_line_that_failed_is_told(name: str, tmp_path: Path) -> None:
    source = MISTAKES[name][0]
    bad = next(x for x in ("raise ValueError", "raise KeyError", "oops") if x in source)
    number = source[: source.index(bad)].count("\n") + 1
    with pytest.raises(TaskError, match=rf"at line {number} of own\.py"):
        task_of(tmp_path, source).check(two())


@pytest.mark.parametrize(
    ("file", "told"), [("none.py", "not there"), ("model.pt", "another kind"), (".", "a folder")]
)
def test_what_is_no_task_file_is_refused(place: Path, file: str, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        UserTask(place / file)


def test_a_loader_that_runs_short_is_told(tmp_path: Path) -> None:
    source = changed("    return DataLoader(Noisy(0", "    return Short(Noisy(0").replace(
        "def train_loader",
        "class Short(DataLoader):\n"
        "    def __iter__(self):\n"
        "        return iter(list(super().__iter__())[:2])\n\n"
        "def train_loader",
    )
    with pytest.raises(TaskError, match="gives 2 batches in epoch 1, and its length says 6"):
        list(task_of(tmp_path, source).training(0))


def test_outputs_that_change_in_training_need_a_hook_to_follow_them(tmp_path: Path) -> None:
    task = task_of(tmp_path, TASK)
    with pytest.raises(TaskError, match="distillation"):
        task.distillation({"loss": torch.ones(())}, [torch.ones(3)], None)


class Viewed(nn.Module):
    """Flattens by view, which asks for the plain layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, image: torch.Tensor, hint: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = self.conv(image).view(len(image), 128)
        return {"clean": flat.view(len(image), 2, 64).mean(1).view(image.shape)}


def test_what_is_wrong_with_the_hardware_is_not_blamed_on_the_loaders(tmp_path: Path) -> None:
    task, recipe = task_of(tmp_path, TASK), Recipe(1, 0.0, batch_size=8)
    finetune(Viewed(), {}, task, recipe)
    with pytest.raises(TrainingError, match=r"Leave out --channels-last"):
        finetune(Viewed(), {}, task, recipe, hardware=Hardware(channels_last=True))


def test_on_the_command_line_a_mistake_is_one_paragraph(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(MISTAKES["metric is nan"][0])
    done = run(
        *("convert", place / "model.pt", "--arch", f"{place}/model.py:two"),
        *("--out", tmp_path / "run", "--task", tmp_path / "bad.py", "--batch-size", 8),
    )
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert "the hook metric" in done.stderr
    assert not (tmp_path / "run").exists()
