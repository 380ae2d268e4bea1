"""Predicted losses kept in files: what was asked before is known, what differs in anything is not.

Predictions here are numbers that say how often they were made.
"""

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from structconv_cli.planning.loss_cache import FORMAT, Question, cached_losses
from structconv_cli.planning.sensitivity import (
    PredictedLoss,
    Predictions,
    SensitivitySettings,
    predict_losses,
)
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.structure import Structure

HALF, WINDOW = Structure((4, 3, 3), (4, 2, 2)), Structure((4, 3, 3), (3, 3, 3))


def model(seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.standard_normal((4, 4, 3, 3)).astype(np.float32)
        for name in ("one.weight", "two.weight")
    }
    nodes = [
        helper.make_node("Conv", ["x", "one.weight"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "two.weight"], ["y"], pads=[1] * 4),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 5, 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def images(seed: int = 0, count: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4, 5, 5)).astype(np.float32)


CANDIDATES = {"one": (HALF, WINDOW), "two": (WINDOW,)}
SAMPLES = Samples({"x": images()}, np.arange(6))
SETTINGS = SensitivitySettings(seconds=1.0, images=4)
QUESTION: Question = (model(), CANDIDATES, SAMPLES, SETTINGS)


class Predictor:
    """Makes up predictions of the right shape, other ones every time."""

    def __init__(self, question: Question = QUESTION) -> None:
        self.candidates, self.calls = question[1], 0

    def __call__(self) -> Predictions:
        self.calls += 1
        points = None if self.calls % 2 else 1 / 3
        return {
            name: {
                structure: PredictedLoss(self.calls + 0.1 * i, points, 1e-7 / 3, 0.1, "measured")
                for i, structure in enumerate(structures)
            }
            for name, structures in self.candidates.items()
        }


def is_known(folder: Path, question: Question) -> bool:
    """Whether a question is answered without predicting; what is answered fits it."""
    predictor = Predictor(question)
    found = cached_losses(folder, question, predictor)
    assert {name: tuple(each) for name, each in found.items()} == {
        name: tuple(each) for name, each in question[1].items()
    }
    return predictor.calls == 0


def test_what_was_predicted_is_known_to_the_bit(tmp_path: Path) -> None:
    folder, predictor = tmp_path / "some/where", Predictor()
    first = cached_losses(folder, QUESTION, predictor)
    assert predictor.calls == 1
    # Asked again by equal, not the same, things.
    same: Question = (
        model(),
        dict(CANDIDATES),
        Samples({"x": images()}, np.arange(6)),
        replace(SETTINGS),
    )
    assert cached_losses(folder, same, predictor) == first
    assert predictor.calls == 1
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_real_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    def predict() -> Predictions:
        return predict_losses(model(), CANDIDATES, Samples({"x": images()}), SETTINGS)

    question: Question = (model(), CANDIDATES, Samples({"x": images()}), SETTINGS)
    first = cached_losses(tmp_path, question, predict)
    assert {name: list(each) for name, each in first.items()} == {
        name: list(each) for name, each in CANDIDATES.items()
    }
    assert cached_losses(tmp_path, question, Predictor()) == first


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    predictor = Predictor()
    for calls in (1, 2):
        cached_losses(None, QUESTION, predictor)
        assert predictor.calls == calls
    assert list(tmp_path.iterdir()) == []


def changed_image(index: tuple[int, ...]) -> Samples:
    x = images()
    x[index] = np.nextafter(x[index], np.float32(9))
    return Samples({"x": x}, np.arange(6))


def other_attribute() -> onnx.ModelProto:
    other = model()
    attribute = helper.make_attribute("group", 1)
    other.graph.node[0].attribute.append(attribute)
    return other


BALANCED = Structure((4, 3, 3), (3, 3, 3), balanced=True)
ORDERED = Structure((4, 3, 3), (3, 3, 3), (1, 0, 2, 3))
OTHERS: dict[str, Question] = {
    "weights": (model(1), CANDIDATES, SAMPLES, SETTINGS),
    "an attribute": (other_attribute(), CANDIDATES, SAMPLES, SETTINGS),
    "one candidate less": (model(), {**CANDIDATES, "one": (HALF,)}, SAMPLES, SETTINGS),
    "another candidate": (model(), {**CANDIDATES, "two": (HALF,)}, SAMPLES, SETTINGS),
    "a balanced one": (model(), {**CANDIDATES, "two": (BALANCED,)}, SAMPLES, SETTINGS),
    "another order": (model(), {**CANDIDATES, "two": (ORDERED,)}, SAMPLES, SETTINGS),
    "candidates the other way": (
        model(),
        {**CANDIDATES, "one": (WINDOW, HALF)},
        SAMPLES,
        SETTINGS,
    ),
    "one layer less": (model(), {"one": CANDIDATES["one"]}, SAMPLES, SETTINGS),
    "layers exchanged": (model(), {"two": (HALF, WINDOW), "one": (WINDOW,)}, SAMPLES, SETTINGS),
    "no samples": (model(), CANDIDATES, None, SETTINGS),
    "no labels": (model(), CANDIDATES, Samples({"x": images()}), SETTINGS),
    "other labels": (model(), CANDIDATES, Samples({"x": images()}, np.arange(6)[::-1]), SETTINGS),
    "fewer images": (model(), CANDIDATES, SAMPLES.part(slice(0, 5)), SETTINGS),
    "one pixel": (model(), CANDIDATES, changed_image((3, 1, 2, 2)), SETTINGS),
    "the order of images": (
        model(),
        CANDIDATES,
        Samples({"x": images()[::-1]}, np.arange(6)),
        SETTINGS,
    ),
    "the input's name": (model(), CANDIDATES, Samples({"z": images()}, np.arange(6)), SETTINGS),
    "the images' shape": (
        model(),
        CANDIDATES,
        Samples({"x": images().reshape(6, 4, 25, 1)}, np.arange(6)),
        SETTINGS,
    ),
    "seconds": (model(), CANDIDATES, SAMPLES, replace(SETTINGS, seconds=2.0)),
    "images": (model(), CANDIDATES, SAMPLES, replace(SETTINGS, images=5)),
    "rescale": (model(), CANDIDATES, SAMPLES, replace(SETTINGS, rescale=False)),
    "seed": (model(), CANDIDATES, SAMPLES, replace(SETTINGS, seed=1)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_question_is_not_known(tmp_path: Path, other: Question) -> None:
    assert not is_known(tmp_path, QUESTION)
    assert not is_known(tmp_path, other)
    # Neither took the other's place.
    assert is_known(tmp_path, QUESTION)
    assert is_known(tmp_path, other)
    assert len(list(tmp_path.iterdir())) == 2


def damages() -> dict[str, Callable[[bytes], bytes]]:
    def changed(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
        def damage(content: bytes) -> bytes:
            value = json.loads(content)
            change(value)
            return json.dumps(value).encode()

        return damage

    return {
        "empty": lambda _: b"",
        "truncated": lambda content: content[: len(content) // 2],
        "binary": lambda _: bytes(range(256)),
        "not UTF-8": lambda content: content.replace(b"measured", b"\xff\xfe"),
        "null": lambda _: b"null",
        "a list": lambda _: b"[]",
        "deep": lambda _: b"[" * 100_000,
        "another format": changed(lambda value: value.update(format=FORMAT + 1)),
        "no format": changed(lambda value: value.pop("format")),
        "a layer less": changed(lambda value: value["losses"].pop("two")),
        "a loss less": changed(lambda value: value["losses"]["one"].pop()),
        "a loss more": changed(lambda value: value["losses"]["two"].append(_a_loss(value))),
        "a word for a loss": changed(lambda value: _a_loss(value).update(loss="much")),
        "a loss without points": changed(lambda value: _a_loss(value).pop("points")),
        "a way that is none": changed(lambda value: _a_loss(value).update(how="guessed")),
    }


def _a_loss(value: dict) -> dict:
    return value["losses"]["one"][0]


@pytest.mark.parametrize("damage", damages().values(), ids=damages())
def test_a_damaged_file_counts_as_absent_and_is_written_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cached_losses(tmp_path, QUESTION, Predictor())
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    predictor = Predictor()
    predictor.calls = 4
    found = cached_losses(tmp_path, QUESTION, predictor)
    assert predictor.calls == 5
    assert found["one"][HALF].loss == 5
    assert cached_losses(tmp_path, QUESTION, predictor) == found
    assert predictor.calls == 5


def blocked_by_a_file(folder: Path) -> None:
    folder.write_text("")


def blocked_by_a_file_above(folder: Path) -> None:
    folder.parent.rmdir()
    folder.parent.write_text("")


def blocked_by_a_loop_of_links(folder: Path) -> None:
    folder.symlink_to(folder)


def blocked_by_rights(folder: Path) -> None:
    folder.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)


def blocked_by_folders_of_that_name(folder: Path) -> None:
    cached_losses(folder, QUESTION, Predictor())
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "block",
    [
        blocked_by_a_file,
        blocked_by_a_file_above,
        blocked_by_a_loop_of_links,
        blocked_by_rights,
        blocked_by_folders_of_that_name,
    ],
)
def test_a_place_that_cannot_be_written_is_no_error(
    tmp_path: Path, block: Callable[[Path], None]
) -> None:
    folder = tmp_path / "home/losses"
    folder.parent.mkdir()
    block(folder)
    predictor = Predictor()
    found = cached_losses(folder, QUESTION, predictor)
    assert predictor.calls == 1
    assert found["one"][HALF].loss == 1
    assert not list(tmp_path.rglob("*.part"))
