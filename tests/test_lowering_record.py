"""lowering.json: what was done to a graph, read back as it was written."""

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_lower_command import network

from structconv_cli.errors import RunFolderError
from structconv_cli.json_file import read_json, to_json, write_json
from structconv_cli.onnx.channels import Channels
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.lower import DenseLayer, LoweredLayer, Lowering, lower

names = st.text(string.printable + "äß日/.", max_size=12)
ranges = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=3).map(tuple)
channels = st.builds(Channels, ranges, ranges, ranges)
numbers = st.floats(allow_nan=False, allow_infinity=False)

lowerings = st.builds(
    Lowering,
    layers=st.lists(st.builds(LoweredLayer, names, names, names, names), max_size=3).map(tuple),
    dense=st.lists(st.builds(DenseLayer, names, names), max_size=3).map(tuple),
    carried=st.dictionaries(
        names, st.lists(st.tuples(names, channels), max_size=3).map(tuple), max_size=3
    ),
    removed=st.dictionaries(names, st.integers(0, 10**6), max_size=3),
    forms=names,
    environment=names,
    ms=st.dictionaries(names, numbers, max_size=3),
    timed=st.integers(0, 10**9),
    known=st.integers(0, 10**9),
)


@given(lowerings)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, lowering: Lowering
) -> None:
    path = tmp_path_factory.mktemp("record") / "lowering.json"
    write_json(lowering, path)
    found = read_json(path, Lowering)
    assert found == lowering
    # Tuples stay tuples, ranges above all: they are compared with ones made in memory.
    assert to_json(found) == to_json(lowering)
    for parts in found.carried.values():
        assert isinstance(parts, tuple)
        for _, each in parts:
            assert hash(each) == hash(Channels(each.plus, each.minus, each.total))


@pytest.mark.parametrize(
    "form", [Form("split", "average"), Form("banded", "ones"), Form("dense", "average")]
)
def test_a_real_lowering(tmp_path: Path, form: Form) -> None:
    _, lowering = lower(network(), how=form)
    assert lowering.layers
    assert bool(lowering.carried) == (form.channels == "split")
    path = tmp_path / "lowering.json"
    write_json(lowering, path)
    found = read_json(path, Lowering)
    assert found == lowering
    for name, parts in lowering.carried.items():
        assert [each.indices for _, each in found.carried[name]] == [e.indices for _, e in parts]
    plain = json.loads(path.read_text())
    assert {entry["name"] for entry in plain["layers"]} == {"a", "b"}
    assert plain["forms"] == f"{form.channels}+{form.space}"


def test_what_it_says_is_carried_is_in_the_model(tmp_path: Path) -> None:
    lowered, lowering = lower(network())
    made = {name for node in lowered.graph.node for name in node.output}
    assert lowering.carried
    for parts in lowering.carried.values():
        assert {tensor for tensor, _ in parts} <= made


def without(key: str) -> Callable[[dict[str, object]], object]:
    return lambda content: {k: v for k, v in content.items() if k != key}


DAMAGE: dict[str, Callable[[dict[str, object]], object]] = {
    "no layers": without("layers"),
    "no carried": without("carried"),
    "a list": lambda content: [content],
    "layers that are words": lambda content: {**content, "layers": ["conv1"]},
    "a range of three": lambda content: {
        **content,
        "carried": {"x": [["x/part", {"plus": [[0, 1, 2]]}]]},
    },
    "channels that are words": lambda content: {
        **content,
        "carried": {"x": [["x/part", {"plus": [["a", "b"]]}]]},
    },
    "a part without a name": lambda content: {**content, "carried": {"x": [[{"plus": []}]]}},
    "a count that is no number": lambda content: {**content, "timed": "many"},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_with_its_file(
    tmp_path: Path, damage: Callable[[dict[str, object]], object]
) -> None:
    path = tmp_path / "lowering.json"
    write_json(lower(network())[1], path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RunFolderError, match=r"lowering\.json is not what structconv wrote"):
        read_json(path, Lowering)


@pytest.mark.parametrize("cut", range(5))
def test_a_file_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "lowering.json"
    write_json(lower(network())[1], path)
    content = path.read_bytes()
    path.write_bytes(content[: cut * len(content) // 5])
    with pytest.raises(RunFolderError, match=r"lowering\.json"):
        read_json(path, Lowering)
