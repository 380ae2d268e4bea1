"""A layer's check passes for rounding alone, and fails for anything else, naming the layer."""

from dataclasses import replace

import pytest
import torch
from test_onnx_lower import block_basis, structured_weight
from torch import nn

from structconv_cli.exactness import (
    Check,
    LayerWeights,
    check_layer,
    compare,
    dense_output,
    random_input,
)
from structconv_cli.layer_spec import LayerSpec, spec_of
from structconv_cli.structure import Structure

NAME = "features.3.conv"


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "usual": (nn.Conv2d(8, 4, 3, padding=1), (8, 2, 2)),
    "no bias": (nn.Conv2d(8, 4, 3, padding=1, bias=False), (8, 2, 2)),
    "one pixel": (nn.Conv2d(8, 4, 3, stride=2, padding=1), (8, 1, 1)),
    "channels": (nn.Conv2d(8, 4, 1), (5, 1, 1)),
    "one channel": (nn.Conv2d(8, 4, 3), (1, 3, 3)),
    "both": (nn.Conv2d(8, 4, 3, stride=2, padding=2), (3, 2, 2)),
    "same": (nn.Conv2d(4, 4, (4, 3), padding="same"), (4, 2, 2)),
    "reflect": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (4, 2, 2)),
    "replicate": (nn.Conv2d(4, 4, 3, padding=2, padding_mode="replicate"), (4, 1, 2)),
    "circular": (nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular"), (3, 2, 2)),
    "dilated": (nn.Conv2d(4, 4, 3, padding=2, dilation=2), (4, 2, 2)),
    "grouped": (nn.Conv2d(8, 6, 3, padding=1, groups=2), (3, 2, 2)),
    "depthwise": (nn.Conv2d(6, 6, 5, padding=2, stride=2, groups=6), (1, 3, 3)),
    "rectangular": (nn.Conv2d(4, 4, (3, 5), padding=(0, 2)), (4, 2, 1)),
    "1d": (nn.Conv1d(6, 4, 7, padding=3, stride=3), (4, 3)),
    "3d": (nn.Conv3d(3, 4, 3, padding=1), (3, 2, 2, 2)),
    "linear": (nn.Linear(10, 4), (6,)),
    "linear to one": (nn.Linear(10, 4, bias=False), (1,)),
}


def weights_of(kind: str) -> LayerWeights:
    module, reduced = LAYERS[kind]
    spec = spec_of(NAME, module)
    structure = Structure(spec.axes, reduced)
    dense = structured_weight(spec.axes, reduced, spec.weight_shape[0])
    basis = block_basis(spec.axes, reduced)
    solved = torch.linalg.lstsq(basis, dense.double().flatten(1).T).solution.T
    bias = torch.linspace(-2, 3, spec.weight_shape[0]) if spec.bias else None
    return LayerWeights(spec, structure, dense, solved.reshape(-1, *reduced).float(), bias, bias)


def checked(layer: LayerWeights, padded: bool = False) -> list[Check]:
    inputs = {
        "random": random_input(layer.spec, torch.Generator().manual_seed(0)),
        "large": 1e3 * random_input(layer.spec, torch.Generator().manual_seed(1)),
    }
    return check_layer(layer, inputs, padded=padded)


@pytest.mark.parametrize("kind", LAYERS)
def test_rounding_alone_passes(kind: str) -> None:
    checks = checked(weights_of(kind))
    assert [check.what for check in checks] == [
        "weights",
        "float64, random input",
        "float32, random input",
        "float64, large input",
        "float32, large input",
    ]
    assert all(check.passed and not check.detail for check in checks), checks
    assert {check.subject for check in checks} == {NAME}
    for check in checks:
        assert check.error is not None
        assert 0 <= check.error <= check.tolerance


@pytest.mark.parametrize("kind", LAYERS)
def test_a_reduced_weight_one_per_cent_off_fails_with_the_layers_name(kind: str) -> None:
    layer = weights_of(kind)
    for position in (0, layer.reduced.numel() // 2, layer.reduced.numel() - 1):
        changed = layer.reduced.clone()
        changed.view(-1)[position] *= 1.01
        checks = checked(replace(layer, reduced=changed))
        assert not any(check.passed for check in checks if "weights" in check.what)
        failed = [check for check in checks if not check.passed]
        assert len(failed) > 1, "the outputs must show it too"
        assert {check.subject for check in failed} == {NAME}
        assert all(check.detail for check in failed)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dense_weight_one_per_cent_off_fails(kind: str) -> None:
    layer = weights_of(kind)
    changed = layer.dense.clone()
    largest = int(changed.abs().argmax())
    changed.view(-1)[largest] *= 1.01
    failed = [check for check in checked(replace(layer, dense=changed)) if not check.passed]
    assert "weights" in {check.what for check in failed}


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if LAYERS[kind][0].bias is not None])
def test_a_bias_larger_than_all_else_passes(kind: str, scale: float) -> None:
    """In dark parts of images: every addition then rounds what is as large as the bias."""
    layer = weights_of(kind)
    dark = {"dark": scale * random_input(layer.spec, torch.Generator().manual_seed(2))}
    checks = check_layer(layer, dark)
    assert all(check.passed for check in checks), [check.detail for check in checks]


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if LAYERS[kind][0].bias is not None])
def test_a_changed_bias_fails_with_the_layers_name(kind: str) -> None:
    layer = weights_of(kind)
    assert layer.bias is not None
    changed = layer.bias.clone()
    changed[1] *= 1.01
    checks = checked(replace(layer, reduced_bias=changed))
    failed = [check for check in checks if not check.passed]
    assert {check.subject for check in failed} == {NAME}
    assert any("bias" in check.detail for check in failed)


@pytest.mark.parametrize("ulp", [1, -1])
def test_a_bias_one_rounding_off_fails(ulp: int) -> None:
    layer = weights_of("usual")
    assert layer.bias is not None
    changed = torch.nextafter(layer.bias, torch.full_like(layer.bias, ulp * torch.inf))
    assert not checked(replace(layer, reduced_bias=changed))[0].passed


def test_a_bias_that_only_one_form_has_fails() -> None:
    layer = weights_of("usual")
    for changed in (replace(layer, reduced_bias=None), replace(layer, bias=None)):
        assert any(not check.passed for check in checked(changed))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_fails_everywhere(kind: str, value: float) -> None:
    layer = weights_of(kind)
    reduced, dense = layer.reduced.clone(), layer.dense.clone()
    reduced.view(-1)[-1] = value
    dense.view(-1)[-1] = value
    for changed in (replace(layer, reduced=reduced), replace(layer, dense=dense)):
        checks = checked(changed)
        assert not any(check.passed for check in checks), checks
        assert {check.subject for check in checks} == {NAME}
        assert all("not finite" in check.detail and check.error is None for check in checks)


def test_a_bias_that_is_not_finite_fails() -> None:
    layer = weights_of("usual")
    assert layer.bias is not None
    bias = layer.bias.clone()
    bias[2] = float("nan")
    assert not all(check.passed for check in checked(replace(layer, bias=bias, reduced_bias=bias)))


def test_padded_inputs_are_not_padded_again() -> None:
    """Reflection by 3 of an input 3 wide is impossible, so padding it again would raise."""
    layer = weights_of("reflect")
    layer = replace(layer, spec=replace(layer.spec, padding=((3, 3), (3, 3))))
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert all(check.passed for check in check_layer(layer, {"real": x}, padded=True))
    with pytest.raises(RuntimeError):
        check_layer(layer, {"real": x})


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", LAYERS)
def test_dense_output_is_the_modules(kind: str) -> None:
    module, _ = LAYERS[kind]
    x = random_input(spec_of(NAME, module), torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        weight, bias = module.get_parameter("weight"), module.bias
        assert torch.equal(dense_output(spec_of(NAME, module), weight, bias, x), module(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_random_inputs_fit_and_reach_beyond_the_kernel(kind: str) -> None:
    module, _ = LAYERS[kind]
    spec: LayerSpec = spec_of(NAME, module)
    x = random_input(spec, torch.Generator().manual_seed(0))
    assert torch.equal(x, random_input(spec, torch.Generator().manual_seed(0)))
    output = module.double()(x)
    module.float()
    assert all(size > 1 for size in output.shape[2:])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("deviation", "allowed", "passed"),
    [
        ([0.0, 0.0], [1.0, 1.0], True),
        ([1.0, -1.0], [1.0, 1.0], True),
        ([0.0, 1.1], [1.0, 1.0], False),
        ([0.0, -1.1], [1.0, 1.0], False),
        ([5.0, 0.2], [10.0, 0.1], False),
        ([NAN, 0.0], [1.0, 1.0], False),
        ([0.0, NAN], [1.0, 1.0], False),
        ([2.0, NAN], [1.0, 1.0], False),
        ([0.0, INF], [1.0, 1.0], False),
        ([0.0, -INF], [1.0, INF], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 5.0], [0.0, 1.0], False),
        ([0.0, 1e-30], [0.0, 0.0], False),
        ([0.0, 0.5], [1.0, NAN], False),
        ([0.0, 5.0, 0.0], [NAN, 1.0, 1.0], False),
    ],
)
def test_compare_allows_every_element_its_own_room(
    deviation: list[float], allowed: list[float], passed: bool
) -> None:
    check = compare("a", "b", torch.tensor([deviation]), torch.tensor([allowed]), "the thing")
    assert check.passed is passed
    assert bool(check.detail) is not passed
    assert (check.subject, check.what) == ("a", "b")


def test_compare_reports_the_worst_place_by_what_is_allowed_there() -> None:
    deviation = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    allowed = torch.tensor([[2.0, 1.0], [1.0, 0.1]])
    check = compare("a", "b", deviation, allowed, "the thing")
    assert (check.error, check.tolerance) == (0.5, pytest.approx(0.1))
    assert "the thing differs by 0.5 at (1, 1)" in check.detail


def test_compare_counts_and_places_what_is_not_finite() -> None:
    deviation = torch.tensor([[9.0, NAN], [INF, 0.0]])
    check = compare("a", "b", deviation, torch.ones(2, 2), "the thing")
    assert check.error is None
    assert "the thing is not finite at (0, 1) (2 values)" in check.detail
