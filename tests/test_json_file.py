"""Dataclasses as JSON: what is read is what was written, and damage is told by its place."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structconv_cli.approximation import Approximation
from structconv_cli.conversion import ConvertResult, LayerOutcome
from structconv_cli.cost import Cost
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import RunFolderError, StructconvError
from structconv_cli.exactness import Check
from structconv_cli.json_file import read_json, to_json, write_json
from structconv_cli.layer_spec import LayerSpec
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.inventory import Inventory, TracedLayer, Unsupported
from structconv_cli.model.signature import TensorKind
from structconv_cli.plan import KeptLayer, LayerPlan, Plan
from structconv_cli.run_folder import RunInfo
from structconv_cli.structure import Structure
from structconv_cli.tasks.task import Evaluation, Metric
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import EpochResult, FineTuneResult, StageResult
from structconv_cli.verify import VerifyResult

RUN_INFO = RunInfo(
    format="structconv-run/2",
    tool_version="0.1.0",
    created="2026-01-02T03:04:05+00:00",
    command=("structconv", "convert", "a b.pt", "--n", "2", "ü"),
    checkpoint="/models/a b.pt",
    architecture=Architecture("net.py:make", {"a": 1, "b": 0.5, "c": "x", "d": True, "e": None}),
    data=DataSpec("/data/files", 32, (0.5, 0.25), (1.0, 2.0), 0.1, 3),
    task="classification",
    plan_sha256="0" * 64,
    files={"plan": "plan.json", "reference outputs": "reference.safetensors"},
)
PLAN = Plan((LayerPlan("a", Structure((8, 3, 3), (5, 2, 1))), KeptLayer("b.c", "first")))
INVENTORY = Inventory(
    layers=(
        TracedLayer(
            LayerSpec("a", "conv1d", (4, 2, 3), (2,), ((1, 2),), (1,), 2, "reflect"), (5,), 2
        ),
        TracedLayer(LayerSpec("fc", "linear", (4, 2), bias=True), (1,), 1),
    ),
    unsupported=(Unsupported("up", "transposed"),),
    inputs={"input": TensorKind((2, 8))},
    outputs={"out": TensorKind((4,)), "best": TensorKind((), "int64")},
)
CONVERT_RESULT = ConvertResult(
    layers=(
        LayerOutcome(
            "a", Structure((8, 3, 3), (8, 2, 2)), "AveragePool + Conv", Cost(9, 8, 7), Cost(4, 3, 2)
        ),
        LayerOutcome("b", None, "kept", None, None),
    ),
    before=Cost(10**15, 1, 2),
    after=Cost(3, 4, 5),
    finetune=FineTuneResult(
        recipe=Recipe(3, 1 / 3, augment=("crop",)),
        metric=Metric("mIoU", "%"),
        stages=(StageResult("original", Evaluation(99.1, 0.25, 100), 0.125, 1.5),),
        epochs=(EpochResult(1, "regularised", 0.1, 1e-17, Evaluation(9, 8, 7, {"top-5": 1 / 3})),),
    ),
    original_bytes=12,
    structured_bytes=11,
    seconds=0.1 + 0.2,
    notes=("one", "two"),
)
VERIFY_RESULT = VerifyResult(
    exact=False,
    first_diverging="a",
    layers=(Check("a", "weights", 1e-300, 1 / 3, True), Check("a", "x", None, 0.5, False, "NaN")),
    model=(Check("batch 1", "output", 0.1, 0.2, True),),
    approximation=Approximation(450, 0.2707867577340868, Metric("mIoU", "%"), 99.5, 99.25, 98.0),
    approximation_missing="",
)
VALUES = [RUN_INFO, PLAN, INVENTORY, CONVERT_RESULT, VERIFY_RESULT]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_is_read_is_what_was_written(value: object, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(value, path)
    assert read_json(path, type(value)) == value
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_results_without_an_approximation_come_back(tmp_path: Path) -> None:
    value = VerifyResult(True, None, (), (), None, "the data is gone")
    write_json(value, tmp_path / "value.json")
    assert read_json(tmp_path / "value.json", VerifyResult) == value


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_check_whose_tolerance_is_not_finite_comes_back(number: float, tmp_path: Path) -> None:
    """As `compare` makes them of weights that are not finite."""
    value = VerifyResult(False, "a", (Check("a", "w", None, number, False, "NaN"),), (), None, "")
    write_json(value, tmp_path / "value.json")
    (check,) = read_json(tmp_path / "value.json", VerifyResult).layers
    assert (check.subject, check.error, check.passed, check.detail) == ("a", None, False, "NaN")


@given(value=st.floats(allow_nan=False, allow_infinity=False), text=st.text())
@settings(max_examples=60, deadline=None)
def test_numbers_and_texts_come_back_exactly(
    value: float, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    check = Check(text, text, value, value, True)
    if not text.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        return
    write_json(check, path)
    assert read_json(path, Check) == check


@dataclass(frozen=True)
class Broken:
    value: object


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(PLAN, path)
    with pytest.raises(Exception, match="Unable to serialize"):
        write_json(Broken(object()), path)
    assert read_json(path, Plan) == PLAN
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_a_write_that_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "value.json").mkdir()
    with pytest.raises(OSError, match=r"value\.json"):
        write_json(PLAN, tmp_path / "value.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        (b'"task"', b'"tasks"', "task"),
        (b'"0.1.0"', b"7", "tool_version"),
        (b'"command": [', b'"command": [1,', "command.0"),
        (b'"size": 32', b'"size": "large"', "data.size"),
        (b'"plan": "plan.json"', b'"plan": null', "files.plan"),
    ],
)
def test_malformed_entries_are_named_by_their_place(
    old: bytes, new: bytes, place: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    content = to_json(RUN_INFO)
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(RunFolderError, match=rf"run\.json.* at {place}\."):
        read_json(path, RunInfo)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00", b"{}", b"[" * 100_000]
)
@pytest.mark.parametrize("kind", [RunInfo, Plan, Inventory, ConvertResult, VerifyResult])
def test_other_content_is_refused(content: bytes, kind: type, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"value\.json"):
        read_json(path, kind)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_truncated_file_is_refused_wherever_it_ends(value: object, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    content = to_json(value)
    for end in range(0, len(content.rstrip()), 7):
        path.write_bytes(content[:end])
        with pytest.raises(RunFolderError):
            read_json(path, type(value))


def test_impossible_structures_in_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "convert.json"
    path.write_bytes(
        to_json(CONVERT_RESULT).replace(b'"note": "AveragePool + Conv"', b'"note": ""')
    )
    content = path.read_text()
    assert content.count("\n          3\n") >= 1
    path.write_text(content.replace("\n          3\n", "\n          1\n"))
    with pytest.raises(StructconvError):
        read_json(path, ConvertResult)


def test_a_plan_that_names_a_layer_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(to_json(PLAN).replace(b'"b.c"', b'"a"'))
    with pytest.raises(StructconvError):
        read_json(path, Plan)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(RunFolderError, match=path.name):
            read_json(path, RunInfo)


@pytest.mark.parametrize("source", ["~no-such-user-here/data", "a\x00b"])
def test_data_sources_of_any_text_do_not_crash(source: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    text = source.replace("\x00", "\\u0000").encode()
    path.write_bytes(to_json(RUN_INFO).replace(b"/data/files", text))
    with contextlib.suppress(StructconvError):
        read_json(path, RunInfo)
