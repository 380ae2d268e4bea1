"""Verification of a real run: exact as converted, and not after any damage to any of its files.

One small run is converted for all of them; every test works on a copy of its folder.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from structconv_cli.artifacts import PLAN_KEY, load_artifacts
from structconv_cli.conversion import ConvertRequest, ConvertResult
from structconv_cli.convert import convert
from structconv_cli.data.dataset import load_dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import RunFolderError, StructconvError
from structconv_cli.json_file import read_json, write_json
from structconv_cli.model.architecture import Architecture
from structconv_cli.onnx.lower import Lowering, LoweringSettings
from structconv_cli.plan import LayerPlan, Plan, read_plan
from structconv_cli.run_folder import RunFolder
from structconv_cli.run_verification import verify_run
from structconv_cli.structure import Structure
from structconv_cli.training.recipe import Recipe
from structconv_cli.verify import VerifyResult, verify

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "sample_models"
IMAGES = 32

SPATIAL = "layer1.0.conv1"
STRIDED = "layer2.0.conv1"
CHANNEL = "layer2.1.conv2"
BOTH = "layer3.1.conv1"
PIXEL = "layer1.2.conv2"
LAYERS = [SPATIAL, PIXEL, STRIDED, CHANNEL, BOTH]
PLAN = Plan(
    (
        LayerPlan(SPATIAL, Structure((16, 3, 3), (16, 2, 2))),
        LayerPlan("layer1.1.conv1", Structure((16, 3, 3), (16, 2, 3))),
        LayerPlan(PIXEL, Structure((16, 3, 3), (16, 1, 1))),
        LayerPlan(STRIDED, Structure((16, 3, 3), (16, 2, 2))),
        LayerPlan(CHANNEL, Structure((32, 3, 3), (17, 3, 3))),
        LayerPlan("layer3.0.conv2", Structure((64, 3, 3), (64, 2, 2))),
        LayerPlan(BOTH, Structure((64, 3, 3), (33, 2, 2))),
    )
)


@pytest.fixture(scope="module")
def converted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, ConvertResult, VerifyResult]:
    """The sample model and some of its data, layers structured in every way, no fine-tuning."""
    folder = tmp_path_factory.mktemp("verify")
    write_json(PLAN, folder / "plan.json")
    digits = load_dataset(DataSpec("digits"), channels=1)
    arrays = {}
    for part, split in (("train", digits.train), ("val", digits.val)):
        images, labels = split.fetch(torch.arange(IMAGES))
        arrays[f"x_{part}"], arrays[f"y_{part}"] = images.movedim(1, -1).numpy(), labels.numpy()
    np.savez(folder / "digits.npz", **arrays)
    request = ConvertRequest(
        checkpoint=SAMPLES / "resnet20_digits.pt",
        architecture=Architecture(f"{SAMPLES / 'resnet_cifar.py'}:resnet20", {"in_channels": 1}),
        data=DataSpec(str(folder / "digits.npz"), size=16),
        recipe=Recipe(epochs=0, regularised=0),
        n=2,
        channels=1.0,
        plan_file=folder / "plan.json",
        out=folder / "run",
        force=False,
        lowering=LoweringSettings("split"),
    )
    return folder / "run", *convert(request)


@pytest.fixture
def run(converted: tuple[Path, ConvertResult, VerifyResult], tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(converted[0], tmp_path / "run"))


def checks_only(run: RunFolder) -> VerifyResult:
    """What `verify_run` finds, without running the data through the models."""
    return verify(load_artifacts(run), "not measured here")


def edit_json(path: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensor(path: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors[name].view(-1))
    save_file(tensors, path, metadata=metadata)


def edit_initializer(path: Path, name: str, change: Callable[[np.ndarray], None]) -> None:  # type: ignore[type-arg]
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    value = numpy_helper.to_array(tensor).copy()
    change(value.reshape(-1))
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(model, path)


def edit_graph(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def emitted(model: onnx.ModelProto, layer: str, parameter: str = "weight") -> list[str]:
    """The initialisers that the lowering made of a layer's weight or bias: one, or its parts."""
    pattern = re.compile(rf"{re.escape(layer)}[./]{parameter}(_\d+)?")
    return [t.name for t in model.graph.initializer if pattern.fullmatch(t.name)]


def emitted_weight(run: RunFolder, layer: str) -> str:
    """The largest of them."""
    model = onnx.load(run.structured_onnx)
    sizes = {t.name: np.prod(t.dims) for t in model.graph.initializer}
    return max(emitted(model, layer), key=lambda name: sizes[name])


def node_with(model: onnx.ModelProto, weight: str) -> onnx.NodeProto:
    (node,) = [n for n in model.graph.node if len(n.input) > 1 and n.input[1] == weight]
    return node


def positions(size: int, values: np.ndarray) -> list[int]:  # type: ignore[type-arg]
    """The largest value, the last one, one in the middle, and one of about 1 % of the largest."""
    order = np.argsort(np.abs(values))
    limit = np.searchsorted(np.abs(values)[order], 1e-2 * np.abs(values).max())
    return [int(order[-1]), int(order[limit]), int(order[size // 2])]


def scale_at(position: int, factor: float = 1.01) -> Callable[[object], None]:
    def change(values: object) -> None:
        values[position] *= factor  # type: ignore[index]

    return change


def assert_diverges_at(result: VerifyResult, layer: str) -> None:
    assert not result.exact
    assert result.first_diverging == layer
    assert {check.subject for check in result.failures} & {layer}
    assert all(check.detail for check in result.failures)


def test_a_converted_run_is_exact(converted: tuple[Path, ConvertResult, VerifyResult]) -> None:
    path, result, verification = converted
    assert verification.exact
    assert (verification.first_diverging, verification.failures) == (None, ())
    for what in ("weights", "ONNX kernel"):
        checked = {check.subject for check in verification.layers if check.what == what}
        assert checked >= {layer.name for layer in PLAN.layers}
    assert {"all others", "the model"} <= {check.subject for check in verification.layers}
    lowering = read_json(path / "lowering.json", Lowering)
    assert {layer.name for layer in lowering.layers} == {layer.name for layer in PLAN.layers}
    assert lowering.carried
    assert (lowering.forms, lowering.ms, lowering.timed) == ("split+average", {}, 0)
    assert {check.subject for check in verification.model} == {
        "batch 1",
        "batch 2 (traced)",
        "batch 5",
        "real inputs",
    }
    assert verification.approximation is not None
    assert verification.approximation.examples == IMAGES
    assert read_json(path / "verify.json", VerifyResult) == verification
    assert read_json(path / "convert.json", ConvertResult) == result


def test_verifying_again_finds_the_same(
    run: RunFolder, converted: tuple[Path, ConvertResult, VerifyResult]
) -> None:
    run.verify_result.unlink()
    again = verify_run(run.path)
    assert again == converted[2]
    assert read_json(run.verify_result, VerifyResult) == again


def test_a_run_may_be_moved(run: RunFolder, tmp_path: Path) -> None:
    moved = run.path.rename(tmp_path / "elsewhere")
    assert verify_run(moved).exact


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["largest", "hundredth", "median"])
def test_one_reduced_weight_one_per_cent_off_is_found(
    run: RunFolder, layer: str, place: int
) -> None:
    name = f"{layer}.weight"
    weight = load_file(run.structured_weights)[name].flatten().numpy()
    position = positions(len(weight), weight)[place]
    edit_tensor(run.structured_weights, name, scale_at(position))
    assert_diverges_at(checks_only(run), layer)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["largest", "hundredth", "median"])
def test_one_weight_of_the_onnx_model_one_per_cent_off_is_found(
    run: RunFolder, layer: str, place: int
) -> None:
    def change(values: np.ndarray) -> None:  # type: ignore[type-arg]
        values[positions(len(values), values)[place]] *= np.float32(1.01)

    before = run.structured_onnx.read_bytes()
    names = emitted(onnx.load(run.structured_onnx), layer)
    assert names
    for name in names:
        edit_initializer(run.structured_onnx, name, change)
        assert_diverges_at(checks_only(run), layer)
        run.structured_onnx.write_bytes(before)


@pytest.mark.parametrize("layer", LAYERS)
def test_one_bias_of_the_onnx_model_one_per_cent_off_is_found(run: RunFolder, layer: str) -> None:
    model = onnx.load(run.structured_onnx)
    biases = {
        node.input[2]
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1] in emitted(model, layer) and node.input[2:]
    }
    assert biases
    before = run.structured_onnx.read_bytes()
    for bias in biases:
        edit_initializer(run.structured_onnx, bias, scale_at(3))
        assert_diverges_at(checks_only(run), layer)
        run.structured_onnx.write_bytes(before)


@pytest.mark.parametrize("layer", LAYERS)
def test_one_dense_weight_one_per_cent_off_is_found(run: RunFolder, layer: str) -> None:
    path = run.dense_weights(".pt")
    saved = torch.load(path, weights_only=True)
    saved["state_dict"][f"{layer}.weight"].view(-1)[5] *= 1.01
    torch.save(saved, path)
    assert_diverges_at(checks_only(run), layer)


@pytest.mark.parametrize("layer", [SPATIAL, BOTH])
def test_one_weight_of_the_dense_onnx_model_off_is_found(run: RunFolder, layer: str) -> None:
    edit_initializer(run.dense_onnx, f"{layer}.weight", scale_at(5))
    assert not checks_only(run).exact


def test_the_first_of_several_layers_is_named(run: RunFolder) -> None:
    for layer in (BOTH, STRIDED, CHANNEL):
        edit_tensor(run.structured_weights, f"{layer}.weight", scale_at(7))
    edit_initializer(run.structured_onnx, emitted_weight(run, BOTH), scale_at(7))
    assert_diverges_at(checks_only(run), STRIDED)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layer", [SPATIAL, CHANNEL])
def test_a_weight_of_the_onnx_model_that_is_not_finite_is_found(
    run: RunFolder, layer: str, value: float
) -> None:
    def change(values: np.ndarray) -> None:  # type: ignore[type-arg]
        values[7] = value

    edit_initializer(run.structured_onnx, emitted_weight(run, layer), change)
    result = checks_only(run)
    assert_diverges_at(result, layer)
    assert any("not finite" in check.detail for check in result.failures)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reduced_weight_that_is_not_finite_is_found_and_recorded(
    run: RunFolder, value: float
) -> None:
    def change(values: torch.Tensor) -> None:
        values[7] = value

    edit_tensor(run.structured_weights, f"{CHANNEL}.weight", change)
    result = verify_run(run.path)
    assert_diverges_at(result, CHANNEL)
    assert any("not finite" in check.detail for check in result.failures)
    recorded = read_json(run.verify_result, VerifyResult)
    assert (recorded.exact, recorded.first_diverging) == (False, CHANNEL)


def test_a_dense_layer_of_the_onnx_model_off_is_found(run: RunFolder) -> None:
    def change(values: np.ndarray) -> None:  # type: ignore[type-arg]
        values *= np.float32(1.01)

    edit_initializer(run.structured_onnx, "linear.weight", change)
    result = checks_only(run)
    assert not result.exact
    assert result.first_diverging == "linear"
    assert [c.what for c in result.layers if not c.passed] == ["kept ONNX nodes"]
    assert not any(check.passed for check in result.model)


def test_a_kept_convolution_of_the_onnx_model_off_is_found(run: RunFolder) -> None:
    edit_initializer(run.structured_onnx, "layer2.2.conv1.weight", scale_at(0, 30.0))
    assert "layer2.2.conv1" not in read_plan(run.plan).structures
    result = checks_only(run)
    assert not result.exact
    assert result.first_diverging == "layer2.2.conv1"


def not_counting_the_border(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "AveragePool" and node.name.startswith(SPATIAL):
            (flag,) = [a for a in node.attribute if a.name == "count_include_pad"]
            flag.i = 0


def shifted_padding(model: onnx.ModelProto) -> None:
    for weight in emitted(model, CHANNEL):
        (pads,) = [a for a in node_with(model, weight).attribute if a.name == "pads"]
        pads.ints[:] = [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("change", "layer"), [(not_counting_the_border, SPATIAL), (shifted_padding, CHANNEL)]
)
def test_a_changed_node_of_a_layer_is_found(
    run: RunFolder, change: Callable[[onnx.ModelProto], None], layer: str
) -> None:
    """The first errs at the border only, where the kernel does not show it."""
    before = run.structured_onnx.read_bytes()
    edit_graph(run.structured_onnx, change)
    assert run.structured_onnx.read_bytes() != before
    result = checks_only(run)
    assert not result.exact
    assert result.first_diverging == layer


def drop_an_activation(model: onnx.ModelProto) -> None:
    relu = [node for node in model.graph.node if node.op_type == "Relu"][4]
    relu.op_type = "Identity"


def test_a_changed_node_between_layers_is_found(run: RunFolder) -> None:
    edit_graph(run.structured_onnx, drop_an_activation)
    result = checks_only(run)
    assert not result.exact
    assert result.first_diverging is not None


def batch_of_two_only(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def fewer_classes(model: onnx.ModelProto) -> None:
    output = model.graph.output[0].name
    for node in model.graph.node:
        if output in node.output:
            node.output[0] = "all_classes"
    bounds = [("from", 0), ("to", 7), ("along", 1)]
    for name, value in bounds:
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    names = ["all_classes", *(name for name, _ in bounds)]
    model.graph.node.append(helper.make_node("Slice", names, [output], "cut"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7


def unrunnable_layer(model: onnx.ModelProto) -> None:
    """Its kernel asks for more channels than the pool puts out."""
    first = emitted(model, SPATIAL)[0]
    (tensor,) = [t for t in model.graph.initializer if t.name == first]
    value = np.zeros((16, 15, 2, 2), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for info in list(model.graph.value_info):
        model.graph.value_info.remove(info)


def other_input_name(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "input":
                node.input[index] = "pictures"
    model.graph.input[0].name = "pictures"


def two_outputs_swapped(model: onnx.ModelProto) -> None:
    first = node_with(model, "conv1.weight").output[0]
    model.graph.output[0].name = first
    model.graph.output[0].type.tensor_type.ClearField("shape")


@pytest.mark.parametrize(
    "change",
    [
        batch_of_two_only,
        fewer_classes,
        unrunnable_layer,
        two_outputs_swapped,
    ],
)
def test_a_graph_that_runs_otherwise_is_found_or_refused(
    run: RunFolder, change: Callable[[onnx.ModelProto], None]
) -> None:
    edit_graph(run.structured_onnx, change)
    try:
        result = verify_run(run.path)
    except StructconvError:
        return
    assert not result.exact


def test_another_name_of_the_input_is_found(run: RunFolder) -> None:
    """Whoever serves the model feeds it by name."""
    edit_graph(run.structured_onnx, other_input_name)
    result = checks_only(run)
    assert not result.exact
    assert "the model" in {check.subject for check in result.failures}


@pytest.mark.parametrize(
    "name", ["linear.weight", "linear.bias", "bn1.running_var", "conv1.weight"]
)
def test_a_changed_tensor_of_a_kept_layer_in_the_structured_weights_is_found(
    run: RunFolder, name: str
) -> None:
    """Both forms hold it, and it must be the same in both."""
    edit_tensor(run.structured_weights, name, scale_at(0, 1.5))
    assert not checks_only(run).exact


@pytest.mark.parametrize("name", ["conv1.weight", "linear.bias"])
def test_a_kept_initialiser_that_differs_in_one_bit_is_found(run: RunFolder, name: str) -> None:
    def next_float(values: np.ndarray) -> None:
        values.flat[0] = np.nextafter(values.flat[0], np.float32(1))

    edit_initializer(run.structured_onnx, name, next_float)
    result = checks_only(run)
    assert not result.exact
    assert result.first_diverging == name.split(".")[0]


@pytest.mark.parametrize("name", ["linear.weight", "bn1.running_var"])
def test_a_changed_tensor_of_a_kept_layer_in_the_dense_weights_is_found(
    run: RunFolder, name: str
) -> None:
    path = run.dense_weights(".pt")
    saved = torch.load(path, weights_only=True)
    saved["state_dict"][name].view(-1)[0] *= 1.5
    torch.save(saved, path)
    assert not checks_only(run).exact


@pytest.mark.parametrize("name", ["batch 1.output", "batch 5.output", "real inputs.output"])
def test_a_changed_reference_output_is_found(run: RunFolder, name: str) -> None:
    edit_tensor(run.reference, name, scale_at(2, 1.5))
    result = checks_only(run)
    assert [check.subject for check in result.failures] == [name.removesuffix(".output")]


def test_a_reference_that_is_not_finite_is_found(run: RunFolder) -> None:
    for value in (float("nan"), float("inf")):
        edit_tensor(run.reference, "batch 1.output", lambda v, value=value: v.fill_(value))
        result = verify_run(run.path)
        assert not result.exact


def without_batch_five(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["batch 5.input"]


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["batch 5.input"] = tensors["batch 5.input"][:, :, :-1, :, None].contiguous()


def of_another_batch(tensors: dict[str, torch.Tensor]) -> None:
    tensors["batch 5.output"] = tensors["batch 5.output"][:3].contiguous()


def of_another_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["batch 1.input"] = tensors["batch 1.input"].double()


def of_no_images(tensors: dict[str, torch.Tensor]) -> None:
    tensors["real inputs.input"] = tensors["real inputs.input"][:0]
    tensors["real inputs.output"] = tensors["real inputs.output"][:0]


@pytest.mark.parametrize(
    "change",
    [without_batch_five, of_another_shape, of_another_batch, of_another_dtype, of_no_images],
)
def test_a_reference_that_does_not_fit_is_found_or_refused(
    run: RunFolder, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    tensors = load_file(run.reference)
    change(tensors)
    save_file(tensors, run.reference, metadata={PLAN_KEY: read_plan(run.plan).digest})
    try:
        result = checks_only(run)
    except StructconvError:
        return
    assert not result.exact


def test_an_edited_plan_is_refused(run: RunFolder) -> None:
    edit_json(run.plan, lambda plan: plan["layers"][-1].update(reason="another reason"))
    with pytest.raises(RunFolderError, match=r"plan.*is not the one"):
        verify_run(run.path)


def test_a_plan_edited_together_with_run_json_is_refused(run: RunFolder) -> None:
    def change(plan: dict) -> None:  # type: ignore[type-arg]
        (entry,) = [e for e in plan["layers"] if e["name"] == SPATIAL]
        entry["structure"]["reduced"] = [16, 2, 3]

    edit_json(run.plan, change)
    digest = read_plan(run.plan).digest
    edit_json(run.info_file, lambda info: info.update(plan_sha256=digest))
    with pytest.raises(RunFolderError):
        verify_run(run.path)


def test_a_stamp_of_another_plan_is_refused(run: RunFolder) -> None:
    def change(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == PLAN_KEY:
                entry.value = "0" * 64

    edit_graph(run.structured_onnx, change)
    with pytest.raises(RunFolderError):
        verify_run(run.path)


READ = [
    "run.json",
    "plan.json",
    "layers.json",
    "structured.safetensors",
    "structured_dense.pt",
    "structured_dense.onnx",
    "original.onnx",
    "structured.onnx",
    "lowering.json",
    "reference.safetensors",
]
WRITTEN_ONLY = ["convert.json", "verify.json"]


def test_every_file_of_a_run_is_tried_below(run: RunFolder) -> None:
    assert sorted(p.name for p in run.path.iterdir()) == sorted(READ + WRITTEN_ONLY)


def delete(path: Path) -> None:
    path.unlink()


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def lose_the_last_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes().rstrip()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def randomise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [delete, halve, lose_the_last_bytes, empty, randomise, make_a_folder]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_is_refused(
    run: RunFolder, name: str, damage: Callable[[Path], None]
) -> None:
    damage(run.path / name)
    with pytest.raises(StructconvError) as caught:
        verify_run(run.path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("damage", [delete, halve, empty, randomise])
@pytest.mark.parametrize("name", WRITTEN_ONLY)
def test_results_of_earlier_steps_are_not_needed(
    run: RunFolder, name: str, damage: Callable[[Path], None]
) -> None:
    damage(run.path / name)
    assert verify_run(run.path).exact


SWAPS = [
    ("original.onnx", "structured_dense.onnx"),
    ("structured_dense.onnx", "structured.onnx"),
    ("original.onnx", "structured.onnx"),
    ("structured.safetensors", "reference.safetensors"),
    ("reference.safetensors", "structured.safetensors"),
    ("structured.safetensors", "structured_dense.pt"),
    ("structured.onnx", "structured_dense.onnx"),
    ("plan.json", "layers.json"),
    ("layers.json", "plan.json"),
    ("plan.json", "run.json"),
    ("convert.json", "lowering.json"),
    ("lowering.json", "plan.json"),
]


@pytest.mark.parametrize(("source", "target"), SWAPS)
def test_one_file_in_place_of_another_is_found_or_refused(
    run: RunFolder, source: str, target: str
) -> None:
    shutil.copy(run.path / source, run.path / target)
    try:
        result = verify_run(run.path)
    except StructconvError:
        return
    assert not result.exact


@pytest.mark.parametrize(
    "role", ["plan", "structured weights", "dense weights", "structured model"]
)
def test_files_outside_the_folder_are_refused(run: RunFolder, role: str) -> None:
    def change(info: dict) -> None:  # type: ignore[type-arg]
        name = info["files"][role]
        shutil.copy(run.path / name, run.path.parent / name)
        info["files"][role] = f"../{name}"

    edit_json(run.info_file, change)
    with pytest.raises(RunFolderError, match=r"\.\./"):
        verify_run(run.path)


@pytest.mark.parametrize(
    "change",
    [
        {"data": None},
        {"task": "segmentation"},
        {"files": {}},
        {"format": "structconv-run/9"},
        {"plan_sha256": ""},
        {"architecture": {"reference": "", "arguments": {}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_values_in_run_json_never_crash(run: RunFolder, change: dict) -> None:  # type: ignore[type-arg]
    edit_json(run.info_file, lambda info: info.update(change))
    try:
        verify_run(run.path)
    except StructconvError as error:
        assert str(run.path) in str(error) or "run.json" in str(error)  # noqa: PT017


def other_carried(entry: list[dict]) -> Iterator[list[dict]]:  # type: ignore[type-arg]
    """False claims for one tensor, as lowering.json holds them: [[NAME, CHANNELS], ...]."""
    name, channels = entry[0]
    yield entry[1:]
    yield [[entry[-1][0], channels], *entry[1:-1], [name, entry[-1][1]]]
    yield [["nothing", channels], *entry[1:]]
    for plus in ([[0, 1]], [[3, 2]], [[-1, 3]], [[100, 108]], [[1, 9]], []):
        yield [[name, {**channels, "plus": plus}], *entry[1:]]
    yield [[name, {**channels, "minus": [[0, 1]]}], *entry[1:]]
    yield [[name, {**channels, "total": [[0, 10**6]]}], *entry[1:]]


def test_false_claims_of_what_tensors_hold_are_found_or_refused(run: RunFolder) -> None:
    content = json.loads(run.lowering.read_bytes())
    assert content["carried"]
    for tensor, entry in content["carried"].items():
        for other in other_carried(entry):
            changed = {**content, "carried": {**content["carried"], tensor: other}}
            run.lowering.write_text(json.dumps(changed))
            try:
                assert not checks_only(run).exact, (tensor, other)
            except StructconvError:
                continue


def test_without_its_claims_a_run_is_not_exact(run: RunFolder) -> None:
    edit_json(run.lowering, lambda lowering: lowering.update(carried={}))
    result = checks_only(run)
    assert not result.exact
    assert all(check.detail for check in result.failures)


def test_forms_and_times_in_lowering_json_decide_nothing(run: RunFolder) -> None:
    edit_json(run.lowering, lambda lowering: lowering.update(layers=[], dense=[], forms="x"))
    assert checks_only(run).exact


def test_the_users_code_is_never_run(run: RunFolder, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = tmp_path / "model.py"
    code.write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\ndef make(): pass\n")

    def change(info: dict) -> None:  # type: ignore[type-arg]
        info["architecture"] = {"reference": f"{code}:make", "arguments": {}}

    edit_json(run.info_file, change)
    assert verify_run(run.path).exact
    assert not marker.exists()


def test_the_bundled_sample_data_are_found_by_name(run: RunFolder) -> None:
    edit_json(run.info_file, lambda info: info["data"].update(source="digits"))
    result = verify_run(run.path)
    assert result.exact
    assert result.approximation is not None
    assert result.approximation.examples == 450


def test_missing_data_leave_exactness_as_it_is(run: RunFolder, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    edit_json(run.info_file, lambda info: info["data"].update(source=str(gone)))
    result = verify_run(run.path)
    assert result.exact
    assert result.approximation is None
    assert str(gone) in result.approximation_missing
    assert read_json(run.verify_result, VerifyResult) == result


def test_data_of_another_size_leave_exactness_as_it_is(run: RunFolder, tmp_path: Path) -> None:
    """The user has put other images where the run's were."""
    images = np.zeros((20, 5, 5, 1), np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_val=images, y_val=labels)

    def change(info: dict) -> None:  # type: ignore[type-arg]
        info["data"].update(source=str(tmp_path / "data.npz"))

    edit_json(run.info_file, change)
    result = verify_run(run.path)
    assert result.exact


def test_no_folder_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RunFolderError, match="run folder"):
            verify_run(path)
