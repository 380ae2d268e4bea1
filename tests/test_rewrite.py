"""Rewriting whole models: the original is untouched, and the copy computes the same."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from structconv_cli.errors import PlanError, StructureError
from structconv_cli.layers import StructuredConv2d, StructuredLinear
from structconv_cli.rewrite import project_weights, residuals, rewrite, structured_parameters
from structconv_cli.structure import Structure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sample_models"))

import resnet_cifar

STRUCTURE = Structure((4, 3, 3), (3, 2, 2))


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class Nested(nn.Module):
    """Convolutions in every kind of container, one of them used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv()
        shared = conv()
        self.steps = nn.ModuleList([conv(), nn.Sequential(nn.ReLU(), shared)])
        self.named = nn.ModuleDict({"a": nn.Sequential(conv(), nn.BatchNorm2d(4)), "b": shared})
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.steps[1](self.steps[0](self.stem(x)))
        x = self.named["b"](self.named["a"](x))
        return self.head(x.mean((2, 3)))


CONVOLUTIONS = ["stem", "steps.0", "steps.1.1", "named.a.0"]


@pytest.fixture
def model() -> Nested:
    torch.manual_seed(0)
    return Nested().double().eval()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(value, before[name]), name


def projected(model: nn.Module, structures: dict[str, Structure]) -> nn.Module:
    """A dense copy whose weights are projected with the Kronecker product of the axes' bases."""
    dense = copy.deepcopy(model)
    modules = dict(dense.named_modules())
    for name, structure in structures.items():
        weight = modules[name].weight
        q = torch.ones(1, 1, dtype=torch.float64)
        for axis in structure.orthonormal_basis():
            q = torch.einsum("ij,kl->ikjl", q, axis).reshape(
                q.shape[0] * axis.shape[0], q.shape[1] * axis.shape[1]
            )
        with torch.no_grad():
            flat = weight.double().flatten(1) @ q @ q.T
            weight.copy_(flat.reshape(weight.shape))
    return dense


# --- rewrite


def test_the_rewritten_model_equals_the_projected_dense_one(model: Nested) -> None:
    structures = dict.fromkeys(CONVOLUTIONS, STRUCTURE) | {"head": Structure((4,), (3,))}
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    expected = projected(model, structures)(x)
    found = rewrite(model, structures)(x)
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-12
    assert float((found - model(x)).detach().norm() / expected.detach().norm()) > 1e-3


def test_the_original_is_untouched(model: Nested) -> None:
    before, types = state(model), [type(module) for module in model.modules()]
    objects = [id(module) for module in model.modules()]
    rewritten = rewrite(model, dict.fromkeys(CONVOLUTIONS, STRUCTURE))
    with torch.no_grad():
        for parameter in rewritten.parameters():
            parameter.fill_(7)
    assert_same_state(model, before)
    assert [type(module) for module in model.modules()] == types
    assert [id(module) for module in model.modules()] == objects


def test_named_layers_are_replaced_and_no_others(model: Nested) -> None:
    rewritten = rewrite(model, {"steps.0": STRUCTURE, "head": Structure((4,), (3,))})
    before, after = dict(model.named_modules()), dict(rewritten.named_modules())
    assert list(after) == list(before)
    assert type(after["steps.0"]) is StructuredConv2d
    assert type(after["head"]) is StructuredLinear
    for name in set(after) - {"steps.0", "head"}:
        assert type(after[name]) is type(before[name])
    for name in set(rewritten.state_dict()) - {"steps.0.weight", "head.weight"}:
        assert torch.equal(rewritten.state_dict()[name], model.state_dict()[name]), name


def test_a_module_in_two_places_is_replaced_by_one_object_in_both(model: Nested) -> None:
    rewritten = rewrite(model, {"steps.1.1": STRUCTURE})
    assert type(rewritten.named["b"]) is StructuredConv2d
    assert rewritten.named["b"] is rewritten.steps[1][1]
    assert model.named["b"] is model.steps[1][1]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = projected(model, {"steps.1.1": STRUCTURE})(x)
    assert float((rewritten(x) - expected).detach().abs().max()) < 1e-12


def test_an_attribute_that_is_not_in_a_container() -> None:
    # The same layer under two attributes of one module.
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = conv()
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    rewritten = rewrite(Twice(), {"first": STRUCTURE})
    assert type(rewritten.first) is StructuredConv2d
    assert rewritten.second is rewritten.first


def test_the_model_may_be_the_convolution_itself() -> None:
    root = conv().double()
    rewritten = rewrite(root, {"": STRUCTURE})
    assert type(rewritten) is StructuredConv2d
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = projected(root, {"": STRUCTURE})(x)
    assert float((rewritten(x) - expected).detach().abs().max()) < 1e-13
    assert type(root) is nn.Conv2d


def test_no_structures_make_a_plain_copy(model: Nested) -> None:
    rewritten = rewrite(model, {})
    assert rewritten is not model
    assert_same_state(rewritten, state(model))


@pytest.mark.parametrize("training", [False, True])
def test_modes_stay(model: Nested, training: bool) -> None:
    model.train(training)
    model.named["a"].train(not training)
    rewritten = rewrite(model, dict.fromkeys(CONVOLUTIONS, STRUCTURE))
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in rewritten.named_modules()} == modes


@pytest.mark.parametrize("function", [rewrite, project_weights, residuals, structured_parameters])
def test_an_unknown_layer_is_named(model: Nested, function) -> None:  # type: ignore[no-untyped-def]
    before = state(model)
    with pytest.raises(PlanError, match=r"no layer stem\.conv,"):
        function(model, {"stem": STRUCTURE, "stem.conv": STRUCTURE})
    assert_same_state(model, before)


@pytest.mark.parametrize("name", ["named.a.1", "steps.1.0"])
def test_a_layer_of_another_kind_is_refused(model: Nested, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        rewrite(model, {name: STRUCTURE})


def test_a_structure_of_another_shape_is_refused(model: Nested) -> None:
    before = state(model)
    with pytest.raises(StructureError):
        rewrite(model, {"stem": Structure((3, 3, 3), (2, 2, 2))})
    assert_same_state(model, before)


# --- project_weights and residuals


def test_projecting_weights_is_idempotent_and_touches_the_named_ones_only(model: Nested) -> None:
    structures = {"stem": STRUCTURE, "named.a.0": Structure((4, 3, 3), (4, 1, 2))}
    before, expected = state(model), projected(model, structures).state_dict()
    project_weights(model, structures)
    once = state(model)
    for name, value in once.items():
        assert float((value - expected[name]).abs().max()) < 1e-14, name
        if name not in {"stem.weight", "named.a.0.weight"}:
            assert torch.equal(value, before[name])
    project_weights(model, structures)
    for name, value in state(model).items():
        assert float((value - once[name]).abs().max()) < 1e-15, name


def test_projecting_keeps_the_parameters_and_their_dtype() -> None:
    model = nn.Sequential(conv(), conv())
    parameters = list(model.parameters())
    project_weights(model, {"0": STRUCTURE})
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    # Projected in float64 and rounded once.
    assert residuals(model, {"0": STRUCTURE})["0"] < torch.finfo(torch.float32).eps / 2


def test_residuals_of_every_layer(model: Nested) -> None:
    structures = {"stem": STRUCTURE, "steps.0": STRUCTURE}
    project_weights(model, {"stem": STRUCTURE})
    found = residuals(model, structures)
    assert list(found) == ["stem", "steps.0"]
    assert found["stem"] < 1e-15
    dense = projected(model, structures)
    weight = model.steps[0].weight.detach()
    expected = (weight - dense.steps[0].weight.detach()).norm() / weight.norm()
    assert found["steps.0"] == pytest.approx(float(expected), rel=1e-12)


# --- a whole network


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = resnet_cifar.resnet20().train()
    with torch.no_grad():  # statistics that are not the initial 0 and 1
        model(torch.randn(16, 3, 16, 16))
    return model.eval()


def every_block(model: nn.Module, n: int, share: float) -> dict[str, Structure]:
    return {
        name: Structure(tuple(module.weight.shape[1:]), (round(share * module.in_channels), n, n))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name != "conv1"
    }


@pytest.mark.parametrize(("n", "share"), [(2, 1.0), (1, 1.0), (2, 0.5)])
def test_resnet20_equals_its_projection(resnet: nn.Module, n: int, share: float) -> None:
    structures = every_block(resnet, n, share)
    assert len(structures) == 18
    before = state(resnet)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    wide = copy.deepcopy(resnet).double()
    with torch.no_grad():
        exact = projected(wide, structures)(images.double())
        dense = projected(resnet, structures)(images)
        rewritten = rewrite(resnet, structures)
        found = rewritten(images)
        found_wide = rewrite(wide, structures)(images.double())
    assert_same_state(resnet, before)
    size = float(exact.norm())
    # 19 layers of at most 64 * 9 products round by sqrt(K) u each (Higham and Mary 2019), times
    # four standard deviations, on both sides; channel windows cancel, which costs a digit.
    growth = 2 * 4 * 19 * (64 * 9) ** 0.5 * (1 if share == 1 else 10)
    assert float((found_wide - exact).norm()) < growth * torch.finfo(torch.float64).eps / 2 * size
    bound = growth * torch.finfo(torch.float32).eps / 2 * size
    assert float((found - dense).norm()) < bound
    assert float((found - exact).norm()) < bound
    assert sum(p.numel() for p in rewritten.parameters()) < sum(
        p.numel() for p in resnet.parameters()
    )


def test_one_flipped_bit_changes_the_output(resnet: nn.Module) -> None:
    rewritten = rewrite(resnet, every_block(resnet, 2, 1.0))
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = rewritten(images)
        weight = rewritten.get_submodule("layer3.2.conv2").weight
        bits = weight.view(torch.int32)
        assert torch.equal(rewritten(images), before)
        bits[5, 7, 1, 0] ^= 1 << 28  # an exponent bit
        after = rewritten(images)
    assert not torch.equal(after, before)


def test_the_dense_model_of_a_structured_one_comes_back(resnet: nn.Module) -> None:
    structures = every_block(resnet, 2, 0.5)
    rewritten = rewrite(resnet, structures)
    for name, structure in structures.items():
        weight = resnet.get_submodule(name).weight.detach().double()
        found = rewritten.get_submodule(name).dense_weight().detach().double()
        error = (found - structure.project(weight)).norm() / weight.norm()
        assert float(error) < 1e-5
        assert functional.cosine_similarity(found.flatten(), weight.flatten(), dim=0) > 0
