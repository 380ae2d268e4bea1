"""The rule, plans checked against a model, and plan files."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structconv_cli.errors import PlanError
from structconv_cli.model.inventory import Inventory, take_inventory
from structconv_cli.plan import PLAN_JSON, KeptLayer, LayerPlan, Plan, read_plan
from structconv_cli.planning.check import check_plan
from structconv_cli.planning.rule import rule_plan
from structconv_cli.structure import Structure


class OwnConv(nn.Conv2d):
    pass


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),  # 0: first
        nn.Conv2d(8, 8, 3),  # 1
        nn.Conv2d(8, 8, 3, groups=8),  # 2: depthwise
        nn.Conv2d(8, 8, 1),  # 3: pointwise
        nn.Conv2d(8, 12, (1, 5), groups=2),  # 4
        OwnConv(12, 12, 3),  # 5: unsupported
        nn.Conv2d(12, 4, 2),  # 6
        nn.Flatten(),
        nn.LazyLinear(3),  # 8
    )


@pytest.fixture(scope="module")
def inventory() -> Inventory:
    model, images = network(), torch.zeros(2, 3, 24, 24)
    model(images)
    return take_inventory(model, images)


def reasons(plan: Plan) -> dict[str, str]:
    return {entry.name: entry.reason for entry in plan.kept}


# --- the rule


def test_the_rule(inventory: Inventory) -> None:
    plan = rule_plan(inventory)
    assert [entry.name for entry in plan.layers] == ["0", "1", "2", "3", "4", "6", "8", "5"]
    assert plan.structures == {
        "1": Structure((8, 3, 3), (8, 2, 2)),
        "4": Structure((4, 1, 5), (4, 1, 2)),
    }
    kept = reasons(plan)
    assert set(kept) | set(plan.structures) == {entry.name for entry in plan.layers}
    assert "first convolution" in kept["0"]
    assert "depthwise" in kept["2"]
    assert kept["3"].startswith("1x1 kernel: no larger than n=2")
    assert "--channels" in kept["3"]
    assert kept["6"].startswith("2x2 kernel: no larger than n=2")
    assert "linear" in kept["8"]
    assert "OwnConv" in kept["5"]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_kernels_shrink_to_n_and_smaller_ones_keep_their_size(inventory: Inventory, n: int) -> None:
    if n == 5:
        with pytest.raises(PlanError, match="n=5"):
            rule_plan(inventory, n=n)
        return
    structures = rule_plan(inventory, n=n).structures
    for structure in structures.values():
        assert structure.reduced[1:] == tuple(min(n, size) for size in structure.dense[1:])
        assert structure.reduced[0] == structure.dense[0]
    assert set(structures) == {1: {"1", "4", "6"}, 2: {"1", "4"}}.get(n, {"4"})


@pytest.mark.parametrize(
    ("channels", "eight", "four"),
    [(0.5, 5, 3), (0.25, 3, 2), (0.01, 1, 1), (0.75, 7, 4), (1, 8, 4)],
)
def test_a_fraction_of_the_channels_and_one_more_for_the_sum(
    inventory: Inventory, channels: float, eight: int, four: int
) -> None:
    structures = rule_plan(inventory, n=2, channels=channels).structures
    assert structures["1"].reduced == (eight, 2, 2)
    assert structures["4"].reduced == (four, 1, 2)
    assert ("3" in structures) == (channels < 1)
    if channels < 1:
        assert structures["3"] == Structure((8, 1, 1), (eight, 1, 1))
        assert structures["6"].reduced == (round(12 * channels) + 1, 2, 2)
    # Depthwise and linear layers stay whatever the fraction is.
    assert not {"0", "2", "5", "8"} & set(structures)


def test_the_first_convolution_is_the_first_to_run_and_not_a_linear_layer() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(4, 4, 3)
            self.first = nn.Conv2d(4, 4, 3)
            self.before = nn.Linear(9, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(self.before(x))).flatten(1)

    plan = rule_plan(take_inventory(Reversed(), torch.zeros(2, 4, 9, 9)))
    assert list(plan.structures) == ["last"]
    assert "first convolution" in reasons(plan)["first"]
    assert "linear" in reasons(plan)["before"]


@pytest.mark.parametrize("n", [0, -1])
def test_n_must_be_positive(inventory: Inventory, n: int) -> None:
    with pytest.raises(PlanError, match=f"--n .* found {n}"):
        rule_plan(inventory, n=n)


@pytest.mark.parametrize("channels", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_channels_must_be_a_fraction(inventory: Inventory, channels: float) -> None:
    with pytest.raises(PlanError, match=f"--channels .* found {channels}"):
        rule_plan(inventory, channels=channels)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "0: first convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten()), "1: 1x1 kernel"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "1: linear layer"),
        (nn.Flatten(), "no convolution or linear layer"),
    ],
)
def test_a_model_without_eligible_layers_is_told_why(model: nn.Module, reason: str) -> None:
    with pytest.raises(PlanError, match="no layer of this model is eligible") as error:
        rule_plan(take_inventory(model, torch.zeros(2, 3, 8, 8)))
    assert reason in str(error.value)


# --- a plan checked against the model


def layer(name: str, dense: tuple[int, ...], reduced: tuple[int, ...]) -> LayerPlan:
    return LayerPlan(name, Structure(dense, reduced))


def test_the_rules_own_plan_passes_unchanged(inventory: Inventory) -> None:
    for plan in (rule_plan(inventory), rule_plan(inventory, n=1, channels=0.5)):
        assert check_plan(plan, inventory.axes, inventory.refused) == plan


def test_layers_that_the_plan_does_not_name_are_kept(inventory: Inventory) -> None:
    plan = Plan((layer("6", (12, 2, 2), (12, 1, 2)), KeptLayer("1", "mine")))
    checked = check_plan(plan, inventory.axes, inventory.refused)
    assert [entry.name for entry in checked.layers] == ["0", "1", "2", "3", "4", "6", "8", "5"]
    assert checked.structures == plan.structures
    kept = reasons(checked)
    assert kept["1"] == "mine"
    assert kept["4"] == "not named in the plan file"
    assert "OwnConv" in kept["5"]


def test_a_plan_file_may_structure_what_the_rule_keeps(inventory: Inventory) -> None:
    inputs = inventory.layer("8").spec.axes
    entries = (
        layer("0", (3, 3, 3), (2, 3, 3)),
        layer("2", (1, 3, 3), (1, 2, 2)),
        layer("8", inputs, (5,)),
    )
    assert set(check_plan(Plan(entries), inventory.axes, inventory.refused).structures) == {
        "0",
        "2",
        "8",
    }


@pytest.mark.parametrize(
    ("entry", "messages"),
    [
        (layer("stem", (8, 3, 3), (8, 2, 2)), ["layer stem", "does not have", "0, 1, 2"]),
        (KeptLayer("stem", "mine"), ["layer stem", "does not have"]),
        (layer("5", (12, 3, 3), (12, 2, 2)), ["layer 5", "cannot be", "OwnConv", '"reason"']),
        (layer("1", (4, 3, 3), (4, 2, 2)), ["layer 1 ", "(4, 3, 3)", "(8, 3, 3)"]),
        (layer("1", (8, 3), (8, 2)), ["layer 1 ", "(8, 3)", "(8, 3, 3)"]),
        (layer("4", (8, 1, 5), (8, 1, 2)), ["layer 4 ", "(8, 1, 5)", "(4, 1, 5)"]),
        (layer("1", (8, 3, 3), (8, 3, 3)), ["layer 1:", "reduces nothing"]),
    ],
)
def test_what_does_not_fit_is_named(
    inventory: Inventory, entry: LayerPlan | KeptLayer, messages: list[str]
) -> None:
    # A sound entry beside it does not hide it.
    sound = layer("6", (12, 2, 2), (12, 1, 1))
    with pytest.raises(PlanError) as error:
        check_plan(Plan((sound, entry)), inventory.axes, inventory.refused)
    for message in messages:
        assert message in str(error.value)


def test_a_plan_of_another_model_says_which_layers_differ(inventory: Inventory) -> None:
    entries = (
        layer("6", (12, 2, 2), (12, 1, 1)),
        layer("layer1.conv1", (8, 3, 3), (8, 2, 2)),
        KeptLayer("layer1.conv2", "mine"),
        layer("fc", (9,), (3,)),
    )
    with pytest.raises(PlanError) as error:
        check_plan(Plan(entries), inventory.axes, inventory.refused)
    message = str(error.value)
    assert "another model" in message
    assert "3 layers that this one does not have (layer1.conv1, layer1.conv2, fc)" in message
    assert "does not name 7 that it has (0, 1, 2, 3, ...)" in message
    assert "structconv plan" in message
    # Layers that it does name are not among those.
    named = tuple(KeptLayer(name, "mine") for name in (*inventory.axes, *inventory.refused))
    with pytest.raises(PlanError) as error:
        check_plan(Plan((*entries[1:], *named)), inventory.axes, inventory.refused)
    assert "does not name" not in str(error.value)


def test_a_plan_of_a_wider_model_says_which_layers_differ(inventory: Inventory) -> None:
    wider = {name: (2 * axes[0], *axes[1:]) for name, axes in inventory.axes.items()}
    entries = [layer("6", (12, 2, 2), (12, 1, 1))]
    entries += [layer(name, wider[name], (1, *wider[name][1:])) for name in ("0", "1", "3", "4")]
    with pytest.raises(PlanError) as error:
        check_plan(Plan(tuple(entries)), inventory.axes, inventory.refused)
    message = str(error.value)
    assert "other sizes: 4 of 5 differ" in message
    assert "0: (6, 3, 3) and (3, 3, 3); 1: (16, 3, 3) and (8, 3, 3)" in message
    assert "4: " not in message  # the first few are enough
    assert "structconv plan" in message


def test_a_plan_that_structures_nothing_is_refused(inventory: Inventory) -> None:
    for plan in (Plan(()), Plan((KeptLayer("1", "mine"),))):
        with pytest.raises(PlanError, match="no layer at all"):
            check_plan(plan, inventory.axes, inventory.refused)


def test_a_layer_named_twice_is_refused() -> None:
    with pytest.raises(PlanError, match="layer a more than once"):
        Plan((layer("a", (3,), (2,)), KeptLayer("b", "x"), KeptLayer("a", "x")))


# --- plan files

entries = st.one_of(
    st.builds(
        lambda name, dense, data: LayerPlan(
            name, Structure(tuple(dense), tuple(1 + data % size for size in dense))
        ),
        st.text(min_size=1, max_size=8),
        st.lists(st.integers(1, 9), min_size=1, max_size=4),
        st.integers(0, 99),
    ),
    st.builds(KeptLayer, st.text(min_size=1, max_size=8), st.text(max_size=20)),
)
plans = st.lists(entries, max_size=5, unique_by=lambda entry: entry.name).map(
    lambda found: Plan(tuple(found))
)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_json_round_trip(plan: Plan) -> None:
    text = PLAN_JSON.dump_json(plan)
    restored = PLAN_JSON.validate_json(text)
    assert restored == plan
    assert [type(a) for a in restored.layers] == [type(a) for a in plan.layers]
    assert restored.digest == plan.digest
    assert hashlib.sha256(text).hexdigest() == plan.digest


@settings(max_examples=60, deadline=None)
@given(plans, plans)
def test_digests_agree_exactly_when_plans_do(first: Plan, second: Plan) -> None:
    assert (first.digest == second.digest) == (first == second)


def test_digest_notices_every_change_and_nothing_else() -> None:
    kept, made = KeptLayer("b", "first"), layer("a", (8, 3, 3), (8, 2, 2))
    plan = Plan((kept, made))
    digest = plan.digest
    assert plan.structures  # cached in the plan, and no part of it
    assert plan.digest == digest
    assert Plan((KeptLayer("b", "first"), layer("a", (8, 3, 3), (8, 2, 2)))).digest == digest
    changed = [
        Plan((made, kept)),
        Plan((made,)),
        Plan((replace(kept, reason="First"), made)),
        Plan((replace(kept, name="c"), made)),
        Plan((kept, layer("a", (8, 3, 3), (8, 2, 1)))),
        Plan((kept, layer("a", (8, 3, 4), (8, 2, 2)))),
        Plan((kept, layer("a.0", (8, 3, 3), (8, 2, 2)))),
    ]
    assert len({digest, *(other.digest for other in changed)}) == 1 + len(changed)


def write(folder: Path, content: object) -> Path:
    path = folder / "my plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


GOOD = {"name": "a", "structure": {"dense": [8, 3, 3], "reduced": [8, 2, 2]}}


def test_a_plan_file_written_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, {"layers": [GOOD, {"name": "b", "reason": "mine"}]})
    assert read_plan(path) == Plan((layer("a", (8, 3, 3), (8, 2, 2)), KeptLayer("b", "mine")))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("", "the top level"),
        ("{not json", "the top level"),
        ('{"layers": [', "the top level"),
        ("[]", "the top level"),
        ("null", "the top level"),
        ({}, "layers"),
        ({"layers": 3}, "layers"),
        ({"layers": [GOOD], "note": "x"}, "note"),
        ({"layers": [GOOD, {}]}, "line 1, "),
        ({"layers": [GOOD, 7]}, "line 1, "),
        ({"layers": [GOOD, {"name": "b"}]}, "line 1, "),
        ({"layers": [GOOD, {"name": 3, "reason": "x"}]}, "line 1, "),
        ({"layers": [{"name": "a", "reason": None}]}, "line 1, "),
        ({"layers": [GOOD | {"extra": 1}]}, "line 1, "),
        ({"layers": [GOOD | {"reason": "both"}]}, "line 1, "),
        ({"layers": [{"name": "a", "structure": {"dense": [8]}}]}, "line 1, "),
        ({"layers": [{"name": "a", "structure": {"dense": [8], "reduced": 2}}]}, "line 1, "),
        ({"layers": [{"name": "a", "structure": {"dense": [8], "reduced": ["x"]}}]}, "line 1, "),
        ({"layers": [{"name": "a", "structure": {"dense": [8], "reduced": [2.5]}}]}, "line 1, "),
    ],
)
def test_a_malformed_plan_file_is_refused_with_its_place(
    tmp_path: Path, content: object, place: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(PlanError) as error:
        read_plan(path)
    message = str(error.value)
    assert str(path) in message
    assert f"at {place}" in message
    assert '{"layers": [' in message  # how it should look


@pytest.mark.parametrize(
    ("bad", "words", "problem"),
    [
        ({"reason": 3, "name": "stem"}, "layer stem, reason", "string"),
        ({"structure": {"dense": [8, 3], "reduced": "x"}, "name": "stem"},
         "layer stem, structure.reduced", "array"),
        ({"structure": {"dense": [8, 3], "reduced": [8, "x"]}, "name": "stem"},
         "layer stem, structure.reduced.1", "integer"),
        ({"structure": {"dense": [8, 3]}, "name": "stem"},
         "layer stem, structure.reduced", "required"),
        ({"structure": {"dense": [8, 3], "reduced": [9, 3]}, "name": "stem"},
         "layer stem, structure", "9 of 8"),
        ({"structure": {"dense": [8, 3], "reduced": [2, 3], "reads": "0-x"}, "name": "stem"},
         "layer stem, structure.reads", "0-3,7"),
        ({"structure": {"dense": [8, 3], "reduced": [2, 3], "balanced": "perhaps"}, "name": "stem"},
         "layer stem, structure.balanced", "boolean"),
        ({"structure": {"dense": [8, 3], "reduced": [8, 2], "pool": 2}, "name": "stem"},
         "layer stem, structure.pool", ""),
        ({"name": "stem"}, "layer stem, structure", "required"),
        ({"name": "stem", "reasons": "mine"}, "layer stem, structure", "required"),
        ({"reason": "no name"}, "entry 2, name", "required"),
        ({"name": 7, "reason": "x"}, "entry 2, name", "string"),
        ([7], "entry 2", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("indent", [1, 2, None])
def test_the_line_the_layer_and_the_field_are_named(
    tmp_path: Path, indent: int | None, bad: object, words: str, problem: str
) -> None:
    """The line is the one on which the entry begins, wherever in the entry the mistake is."""
    decoy = {"name": 'layers": [', "reason": 'its {name} \n is "odd", ]'}
    head = '\n\n{"layers": [\n'
    head += "".join(f"{json.dumps(entry, indent=indent)},\n" for entry in (decoy, GOOD))
    text = f'{head}{json.dumps(bad, indent=indent)}, {{"name": "b", "reason": 1}}]}}'
    with pytest.raises(PlanError) as error:
        read_plan(write(tmp_path, text))
    line = head.count("\n") + 1
    message = str(error.value)
    assert f"is not valid at line {line}, {words}: " in message
    assert problem in message


def test_a_file_that_ends_early_names_the_line(tmp_path: Path) -> None:
    text = json.dumps({"layers": [GOOD, GOOD]}, indent=2)[:-8]
    with pytest.raises(PlanError) as error:
        read_plan(write(tmp_path, text))
    assert f"line {text.count(chr(10)) + 1}" in str(error.value)


@pytest.mark.parametrize("reads", ["0-3,7", "7,0-3", "2", "6,4,2,0", ""])
def test_channels_are_read_and_written_as_words(tmp_path: Path, reads: str) -> None:
    size = {"0-3,7": 5, "7,0-3": 5, "2": 1, "6,4,2,0": 4, "": 8}[reads]
    structure = {"dense": [8, 3, 3], "reduced": [size, 2, 2], **({"reads": reads} if reads else {})}
    content = {"layers": [{"name": "a", "structure": structure}]}
    plan = read_plan(write(tmp_path, content))
    written = json.loads(PLAN_JSON.dump_json(plan))
    assert written == {**content, "schema": "structconv-plan/1"}
    numbers = {
        "0-3,7": (0, 1, 2, 3, 7),
        "7,0-3": (7, 0, 1, 2, 3),
        "2": (2,),
        "6,4,2,0": (6, 4, 2, 0),
        "": (),
    }
    assert plan.structures["a"].reads == numbers[reads]


@pytest.mark.parametrize(
    "reads",
    [
        "0-8",
        "3,3",
        "-1",
        "1;2",
        "0-3,",
        "0-99999999",
        "4-2",
    ],
)
def test_channels_that_a_layer_does_not_have_are_refused(tmp_path: Path, reads: str) -> None:
    structure = {"dense": [8, 3, 3], "reduced": [2, 2, 2], "reads": reads}
    path = write(tmp_path, {"layers": [GOOD, {"name": "stem", "structure": structure}]})
    with pytest.raises(PlanError, match="line 1, layer stem, structure"):
        read_plan(path)


def test_an_unknown_key_of_a_structure_is_refused(tmp_path: Path) -> None:
    structure = {"dense": [8, 3, 3], "reduced": [8, 2, 2], "window": [1, 2, 2]}
    path = write(tmp_path, {"layers": [{"name": "a", "structure": structure}]})
    with pytest.raises(PlanError, match="window"):
        read_plan(path)


@pytest.mark.parametrize(
    ("dense", "reduced"), [([8, 3, 3], [9, 2, 2]), ([8], [0]), ([8, 3], [2]), ([], [])]
)
def test_an_impossible_structure_in_a_plan_file_is_refused(
    tmp_path: Path, dense: list[int], reduced: list[int]
) -> None:
    bad = {"name": "stage2.conv", "structure": {"dense": dense, "reduced": reduced}}
    path = write(tmp_path, {"layers": [GOOD, bad]})
    with pytest.raises(PlanError) as error:
        read_plan(path)
    message = str(error.value)
    assert str(path) in message
    assert str(tuple(dense)) in message
    assert str(tuple(reduced)) in message
    # A plan has dozens of layers: which one?
    assert "stage2.conv" in message or "line 1, " in message


def test_a_layer_named_twice_in_a_plan_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"layers": [GOOD, {"name": "a", "reason": "x"}]})
    with pytest.raises(PlanError, match="layer a more than once"):
        read_plan(path)


def test_a_plan_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(PlanError) as error:
            read_plan(path)
        assert f"cannot read the plan {path}: " in str(error.value)


def test_a_plan_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b'{"layers": [{"name": "\xff\xfe", "reason": "x"}]}')
    with pytest.raises(PlanError, match="not valid"):
        read_plan(path)
