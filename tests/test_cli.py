"""The command line as a user meets it: real commands, right and wrong input, interruptions."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from forked import Command
from PIL import Image
from typer.testing import CliRunner, Result

from structconv_cli import __version__
from structconv_cli.cli import app
from structconv_cli.data.dataset import load_dataset
from structconv_cli.data.spec import DataSpec

pytestmark = pytest.mark.usefixtures("short_rounds")

ROOT = Path(__file__).parents[1]
SAMPLE = [
    str(ROOT / "sample_models/resnet20_digits.pt"),
    "--arch",
    str(ROOT / "sample_models/resnet_cifar.py") + ":resnet20",
    "--arch-arg",
    "in_channels=1",
]


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(word) for word in words])


def tiny_words(tiny: Path, **changed: str | None) -> list[str]:
    options = {"arch": f"{tiny}/tiny.py:tiny", "data": f"{tiny}/data.npz", "val-split": "0.25"}
    options |= {
        "epochs": "1",
        "forms": "split",
        **{key.replace("_", "-"): v for key, v in changed.items()},
    }  # type: ignore[dict-item]
    checkpoint = options.pop("checkpoint", f"{tiny}/tiny.pt")
    words = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return ["convert", checkpoint, *words]


def assert_error(result: Result, *told: str, status: int = 1) -> None:
    assert result.exit_code == status, result.output
    message = " ".join(result.stderr.split())
    for text in told:
        assert text in message.replace(" ", "") or text in message, message
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit | type(None)), result.exception


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample and some of its data, converted as a real process in an empty folder."""
    folder = tmp_path_factory.mktemp("sample")
    digits = load_dataset(DataSpec("digits"), channels=1)
    arrays = {}
    for part, split, count in (("train", digits.train, 640), ("val", digits.val, 200)):
        images, labels = split.fetch(torch.arange(count))
        arrays[f"x_{part}"], arrays[f"y_{part}"] = images.movedim(1, -1).numpy(), labels.numpy()
    data = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(data, **arrays)
    words = ["convert", *SAMPLE, "--data", str(data), "--epochs", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "structconv_cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Nothing but what is told of long work.
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    # The default measures the forms, and remembers what it measured.
    assert (Path(os.environ["XDG_CACHE_HOME"]) / "structconv/timings.json").is_file()
    assert "The rewrite is exact" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    return folder


@pytest.fixture(scope="module")
def tiny_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny_run") / "run"
    result = run(*tiny_words(tiny, out=str(out)))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def tiny_copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "copy"))


def test_the_sample_converts_verifies_and_benchmarks(sample_run: Path) -> None:
    folder = sample_run / "structconv-run"
    stages = json.loads((folder / "convert.json").read_text())["finetune"]["stages"]
    assert stages[0]["evaluation"]["score"] >= 98
    assert [stage["stage"] for stage in stages] == [
        "original",
        "regularised",
        "projected",
        "batch norm re-estimated",
        "fine-tuned",
    ]
    assert stages[-1]["evaluation"]["score"] >= stages[0]["evaluation"]["score"] - 2

    with Command("verify", cwd=sample_run) as command:
        verified = command.wait()
    assert verified.returncode == 0, verified.stderr
    assert "The rewrite is exact" in verified.stdout
    assert max(map(len, verified.stdout.splitlines())) <= 80

    words = ("benchmark", "--device", "cpu", "--rounds", 5, "--blocks", 1)
    with Command(*words, cwd=sample_run) as command:
        timed = command.wait()
    assert timed.returncode == 0, timed.stderr
    assert "median of paired rounds" in " ".join(timed.stdout.split())
    assert max(map(len, timed.stdout.splitlines())) <= 80
    assert json.loads((folder / "benchmark.json").read_text())["models"][1]["name"] == "structured"


def test_the_run_folder_holds_what_later_steps_and_users_need(sample_run: Path) -> None:
    folder = sample_run / "structconv-run"
    info = json.loads((folder / "run.json").read_text())
    assert info["format"] == "structconv-run/2"
    for name in info["files"].values():
        assert (folder / name).is_file()
    # The structured dense weights replace the user's own checkpoint, in its own layout.
    before = torch.load(SAMPLE[0], weights_only=True)
    after = torch.load(folder / "structured_dense.pt", weights_only=True)
    assert after["metadata"] == before["metadata"]
    assert {k: v.shape for k, v in after["state_dict"].items()} == {
        k: v.shape for k, v in before["state_dict"].items()
    }
    plan = json.loads((folder / "plan.json").read_text())
    assert len([x for x in plan["layers"] if "structure" in x]) == 18
    assert {x["name"] for x in plan["layers"] if "reason" in x} == {"conv1", "linear"}


def test_the_model_runs_in_plain_onnxruntime_at_any_batch(sample_run: Path) -> None:
    session = onnxruntime.InferenceSession(sample_run / "structconv-run/structured.onnx")
    for batch in (1, 3):
        images = np.zeros((batch, 1, 32, 32), np.float32)
        (scores,) = session.run(None, {"input": images})
        assert scores.shape == (batch, 10)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["structconv.version"] == __version__
    layers = json.loads(metadata["structconv.layers"])
    assert layers["layer1.0.conv1"]["reduced"] == [16, 2, 2]


def test_a_converted_run_is_a_checkpoint_to_convert_again(
    tiny: Path, tiny_run: Path, tmp_path: Path
) -> None:
    words = tiny_words(tiny, checkpoint=f"{tiny_run}/structured_dense.pt", out=str(tmp_path / "b"))
    result = run(*words, "--epochs=0", f"--plan={tiny_run}/plan.json")
    assert result.exit_code == 0, result.output
    stages = json.loads((tmp_path / "b/convert.json").read_text())["finetune"]["stages"]
    assert stages[0]["max_residual"] < 1e-6


def test_json_goes_to_standard_output_alone(tiny_run: Path) -> None:
    result = run("verify", tiny_run, "--json", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["exact"] is True
    result = run("benchmark", tiny_run, "--rounds", 5, "--blocks", 1, "--json", "-")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["models"]) == 2


def test_channels_and_n_and_flip(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = tiny_words(tiny, out=str(out), n="1", channels="0.5", augment="crop,flip", epochs="0")
    assert run(*words).exit_code == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["layers"][1]["structure"] == {"dense": [8, 3, 3], "reduced": [5, 1, 1]}


def test_a_plan_file_is_obeyed(tiny: Path, tmp_path: Path) -> None:
    plan = {
        "layers": [
            {"name": "conv", "structure": {"dense": [8, 3, 3], "reduced": [8, 3, 2]}},
            {"name": "head", "structure": {"dense": [16], "reduced": [9]}},
        ]
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    out = tmp_path / "run"
    result = run(*tiny_words(tiny, out=str(out), plan=str(tmp_path / "plan.json")))
    assert result.exit_code == 0, result.output
    written = json.loads((out / "plan.json").read_text())["layers"]
    assert written[0] == {"name": "stem", "reason": "not named in the plan file"}
    assert written[1:] == plan["layers"]


def test_help_and_version() -> None:
    for words in ([], ["convert"], ["lower"], ["verify"], ["benchmark"]):
        result = run(*words, "--help")
        assert result.exit_code == 0
        assert "Example: structconv" in result.output or not words
    assert __version__ in run("--version").output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["convert"], "Missing argument"),
        (["convert", "x.pt", "--arch", "a.py:b", "--data", "digits", "--mean", "a,b"], "--mean"),
        (
            ["convert", "x.pt", "--arch", "a.py:b", "--data", "digits", "--augment", "mixup"],
            "mixup",
        ),
        (["convert", "x.pt", "--arch", "a.py:b", "--data", "digits", "--sr-epochs", "9"], "9"),
        (
            ["convert", "x.pt", "--arch", "a.py:b", "--data", "digits", "--optimizer", "lion"],
            "lion",
        ),
        (["lower", "x.onnx"], "--output"),
        (["lower", "x.onnx", "-o", "y.onnx", "--input-shape", "1x3x8x8"], "1x3x8x8"),
        (["lower", "x.onnx", "-o", "y.onnx", "--input-shape", "x=1xax8"], "x=1xax8"),
        (["lower", "x.onnx", "-o", "y.onnx", "--input-shape", "x=1x0x8"], "x=1x0x8"),
        (["lower", "x.onnx", "-o", "y.onnx", "--batch-size", "0"], "batch-size"),
        (["lower", "x.onnx", "-o", "y.onnx", "--threads", "0"], "threads"),
        (["benchmark", "--rounds", "0"], "rounds"),
        (["unknown"], "unknown"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], told: str) -> None:
    assert_error(run(*words), told, status=2)


class TestBadInput:
    """Every mistake: one paragraph that names the culprit, status 1, and nothing left behind."""

    @pytest.fixture(autouse=True)
    def _leaves_nothing_behind(self, tmp_path: Path) -> Iterator[None]:
        self.out = tmp_path / "out"
        yield
        assert not self.out.exists()
        assert not list(tmp_path.glob(".*.part"))

    def refused(self, tiny: Path, *told: str, **changed: str | None) -> None:
        assert_error(run(*tiny_words(tiny, **({"out": str(self.out)} | changed))), *told)

    def test_missing_checkpoint(self, tiny: Path) -> None:
        self.refused(tiny, "gone.pt", checkpoint="gone.pt")

    def test_wrong_file_type(self, tiny: Path) -> None:
        self.refused(tiny, "data.npz", checkpoint=f"{tiny}/data.npz")

    def test_state_dict_of_another_architecture(self, tiny: Path) -> None:
        self.refused(tiny, "missing", "stem.weight", "bn1.weight", checkpoint=SAMPLE[0])

    def test_head_of_another_size(self, tiny: Path) -> None:
        arch = f"{tiny}/tiny.py:tiny"
        self.refused(tiny, "head.weight", "3x16", "7x16", arch=arch, arch_arg="classes=7")

    def test_nan_weights(self, tiny: Path, tmp_path: Path) -> None:
        state = torch.load(tiny / "tiny.pt", weights_only=True)
        state["conv.weight"][0, 0, 0, 0] = float("nan")
        torch.save(state, tmp_path / "nan.pt")
        self.refused(tiny, "conv.weight", checkpoint=str(tmp_path / "nan.pt"))

    def test_pickled_code_is_not_run(self, tiny: Path, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pt")
        self.refused(tiny, "hostile.pt", checkpoint=str(tmp_path / "hostile.pt"))
        assert not (tmp_path / "ran").exists()

    def test_missing_factory(self, tiny: Path) -> None:
        self.refused(tiny, "tinny", "tiny", arch=f"{tiny}/tiny.py:tinny")

    def test_no_eligible_layer(self, tiny: Path, tmp_path: Path) -> None:
        sys.path.insert(0, str(tiny))
        try:
            import tiny as module  # type: ignore[import-not-found]
        finally:
            sys.path.pop(0)
        for name in ("linear_only", "pointwise"):
            torch.save(getattr(module, name)().state_dict(), tmp_path / "w.pt")
            told = "no convolution" if name == "linear_only" else "no layer of this model"
            arch = f"{tiny}/tiny.py:{name}"
            self.refused(tiny, told, arch=arch, checkpoint=str(tmp_path / "w.pt"))

    def test_missing_data(self, tiny: Path) -> None:
        self.refused(tiny, "nowhere", data="nowhere")

    def test_empty_dataset(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        self.refused(tiny, "empty", data=str(tmp_path / "empty"))

    def test_one_class_only(self, tiny: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "one.npz", x=np.zeros((9, 8, 8), np.uint8), y=np.zeros(9, np.int64))
        self.refused(tiny, "one.npz", "one class", data=str(tmp_path / "one.npz"))

    def test_labels_beyond_the_classes(self, tiny: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) % 5)
        self.refused(tiny, "4", "3 outputs", data=str(tmp_path / "d.npz"))

    def test_channels_that_do_not_fit(self, tiny: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", x=np.zeros((40, 3, 8, 8), np.uint8), y=np.arange(40) % 3)
        self.refused(tiny, "channel", data=str(tmp_path / "d.npz"))

    def test_unreadable_images(self, tiny: Path, tmp_path: Path) -> None:
        for label in range(3):
            (tmp_path / f"images/{label}").mkdir(parents=True)
            for index in range(20):
                path = tmp_path / f"images/{label}/{index}.png"
                Image.fromarray(np.full((8, 8), 60 * label, np.uint8)).save(path)
        (tmp_path / "images/1/5.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
        self.refused(tiny, "5.png", "1", data=str(tmp_path / "images"))

    def test_plan_of_another_model(self, tiny: Path, tmp_path: Path) -> None:
        plan = tmp_path / "plan.json"
        entry = {"name": "layer9", "structure": {"dense": [8, 3, 3], "reduced": [8, 2, 2]}}
        plan.write_text(json.dumps({"layers": [entry]}))
        self.refused(tiny, "layer9", plan=str(plan))
        plan.write_text("{")
        self.refused(tiny, "plan.json", plan=str(plan))

    def test_unknown_form(self, tiny: Path) -> None:
        self.refused(tiny, "spilt", "split+average", forms="spilt")

    def test_diverging_training(self, tiny: Path) -> None:
        self.refused(tiny, "--lr", lr="1e30", epochs="2")

    def test_disk_full(self, tiny: Path, tmp_path: Path) -> None:
        words = tiny_words(tiny, out=str(self.out))
        with Command(*words, cwd=tmp_path, most_bytes=4096) as command:
            done = command.wait()
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "Error:" in done.stderr


def test_an_existing_run_is_kept_without_force(tiny: Path, tiny_copy: Path) -> None:
    before = (tiny_copy / "run.json").read_bytes()
    assert_error(run(*tiny_words(tiny, out=str(tiny_copy))), "--force")
    assert (tiny_copy / "run.json").read_bytes() == before
    assert run(*tiny_words(tiny, out=str(tiny_copy)), "--force").exit_code == 0
    assert (tiny_copy / "run.json").read_bytes() != before


def test_a_folder_that_is_no_run_is_never_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    result = run(*tiny_words(tiny, out=str(tmp_path / "precious")), "--force")
    assert_error(result, "not a run folder")
    assert (tmp_path / "precious/file").read_text() == "x"


@pytest.mark.parametrize("command", ["verify", "benchmark"])
def test_runs_that_are_not_there_or_not_whole(
    command: str, tiny_copy: Path, tmp_path: Path
) -> None:
    assert_error(run(command, tmp_path / "none"), "none")
    (tmp_path / "empty").mkdir()
    assert_error(run(command, tmp_path / "empty"), "run.json")
    (tiny_copy / "structured.onnx").unlink()
    assert_error(run(command, tiny_copy), "structured.onnx")


def test_a_provider_that_is_not_installed(tiny_run: Path) -> None:
    assert_error(run("benchmark", tiny_run, "--device", "cuda"), "onnxruntime-gpu")
    assert_error(run("benchmark", tiny_run, "--device", "abacus"), "abacus")


def test_the_form_that_was_asked_for_is_written(tiny: Path, tmp_path: Path) -> None:
    found = {}
    for forms in ("average", "ones", "dense"):
        out = tmp_path / forms
        result = run(*tiny_words(tiny, out=str(out), epochs="0", forms=forms))
        assert result.exit_code == 0, result.output
        lowering = json.loads((out / "lowering.json").read_text())
        assert (lowering["ms"], lowering["timed"], lowering["environment"]) == ({}, 0, "")
        found[forms] = {layer["name"]: layer["form"] for layer in lowering["layers"]}
        assert [layer["name"] for layer in lowering["dense"]] == (
            ["conv"] if forms == "dense" else []
        )
    assert found == {
        "average": {"conv": "AveragePool + Conv"},
        "ones": {"conv": "depthwise ones + Conv"},
        "dense": {},
    }


def test_a_conversion_measures_once(tiny: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        words = tiny_words(tiny, out=str(tmp_path / name), epochs="0", forms="measure")
        result = run(*words, "--timings", tmp_path / "timings.json")
        assert result.exit_code == 0, result.output
        runs.append(json.loads((tmp_path / name / "lowering.json").read_text()))
    one, two = runs
    assert one["timed"] > 0
    assert (two["timed"], two["ms"], two["layers"]) == (0, one["ms"], one["layers"])


def test_a_damaged_weight_fails_verification_with_3(tiny_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_copy / "structured.safetensors")
    weights["conv.weight"].view(-1)[7] *= 1.01
    metadata = {"format": "pt"}
    save_file(weights, tiny_copy / "structured.safetensors", metadata=metadata)
    result = run("verify", tiny_copy)
    assert result.exit_code == 3
    assert "First diverging layer: conv" in result.output
    assert json.loads((tiny_copy / "verify.json").read_text())["first_diverging"] == "conv"


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("checkpoint", marks=pytest.mark.slow),
        pytest.param("export of the original", marks=pytest.mark.slow),
        "training",
        pytest.param("rewrite", marks=pytest.mark.slow),
        "lowering",
    ],
)
def test_ctrl_c_is_a_clean_stop_in_every_stage(stage: str, tiny: Path, tmp_path: Path) -> None:
    words = [*tiny_words(tiny, out=str(tmp_path / "run"), epochs="3"), "--sr-epochs=3"]
    status, shown = interrupt_at(stage, words, tmp_path)
    assert status == 130, shown
    assert "Traceback" not in shown
    assert "Stopped" in shown
    tuned = (tmp_path / "run.partial/training.pt").exists()
    assert tuned or stage not in ("rewrite", "lowering")
    assert tuned == ("--resume" in shown)
    left = {"run.partial"} if tuned else set()
    assert {entry.name for entry in tmp_path.iterdir()} == left
    # What is left can be gone on from; where nothing is, that is no error.
    result = run(*words, "--resume")
    assert result.exit_code == 0, result.output
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}


def test_ctrl_c_in_a_benchmark(tiny_copy: Path) -> None:
    (tiny_copy / "benchmark.json").unlink(missing_ok=True)
    status, shown = interrupt_at("benchmark", ["benchmark", str(tiny_copy)], tiny_copy.parent)
    assert status == 130, shown
    assert "Traceback" not in shown
    assert not (tiny_copy / "benchmark.json").exists()


def interrupt_at(stage: str, words: list[str], cwd: Path) -> tuple[int, str]:
    """Run on a terminal, press Ctrl-C when the stage shows, return the status and the screen."""
    terminal, theirs = pty.openpty()
    shown, sent, deadline = b"", False, time.monotonic() + 60
    with Command(
        *words, cwd=cwd, env={"TERM": "xterm", "COLUMNS": "80"}, terminal=theirs
    ) as command:
        os.close(theirs)
        while time.monotonic() < deadline:
            try:
                shown += os.read(terminal, 4096)
            except OSError:
                break
            if not sent and stage.encode() in shown:
                command.interrupt()
                sent = True
        os.close(terminal)
        return command.wait(20).returncode, shown.decode(errors="replace")
