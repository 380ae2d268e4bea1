"""What one forward pass finds in a model, and what it says when the pass fails."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from structconv_cli.errors import ArchitectureError
from structconv_cli.layer_spec import spec_of
from structconv_cli.model.inventory import (
    Inventory,
    TracedLayer,
    Unsupported,
    first_channels,
    take_inventory,
)
from structconv_cli.model.signature import TensorKind

IMAGES = torch.zeros(2, 3, 8, 10)


class Applied(nn.Module):
    """A model whose forward pass is given as a function of the model and its input."""

    def __init__(
        self, forward: Callable[[nn.Module, torch.Tensor], object], **modules: nn.Module
    ) -> None:
        super().__init__()
        self.applied = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> object:
        return self.applied(self, x)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).mean(2)


def names(inventory: Inventory) -> list[str]:
    return [layer.spec.name for layer in inventory.layers]


# --- layers


def test_layers_come_in_the_order_in_which_they_run() -> None:
    model = Applied(
        lambda m, x: m.head(flat(m.late(m.early(x)))),
        head=nn.Linear(5, 7),
        late=nn.Conv2d(4, 5, 3, stride=2, padding=1),
        early=nn.Conv2d(3, 4, (3, 1), bias=False),
    )
    inventory = take_inventory(model, IMAGES)
    assert inventory.layers == (
        TracedLayer(spec_of("early", model.early), (6, 10), 1),
        TracedLayer(spec_of("late", model.late), (3, 5), 1),
        TracedLayer(spec_of("head", model.head), (1,), 1),
    )
    assert inventory.unsupported == ()
    assert inventory.inputs == {"input": TensorKind((3, 8, 10))}
    assert inventory.outputs == {"output": TensorKind((7,))}
    assert inventory.layer("late") is inventory.layers[1]
    with pytest.raises(KeyError):
        inventory.layer("nothing")


def test_nested_names() -> None:
    block = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 2, 1))
    inventory = take_inventory(Applied(lambda m, x: flat(m.block(x)), block=block), IMAGES)
    assert names(inventory) == ["block.0.0", "block.1"]


def test_the_model_may_be_one_layer() -> None:
    inventory = take_inventory(nn.Linear(6, 4), torch.zeros(2, 6))
    assert names(inventory) == [""]
    assert inventory.outputs == {"output": TensorKind((4,))}


def test_a_module_that_runs_twice_is_one_layer_with_two_calls() -> None:
    model = Applied(
        lambda m, x: flat(m.step(m.other(m.step(m.stem(x))))),
        stem=nn.Conv2d(3, 4, 3),
        step=nn.Conv2d(4, 4, 3, padding=1),
        other=nn.Conv2d(4, 4, 1),
    )
    inventory = take_inventory(model, IMAGES)
    assert names(inventory) == ["stem", "step", "other"]
    assert [layer.calls for layer in inventory.layers] == [1, 2, 1]


def test_one_module_under_two_names_is_one_layer_with_two_calls() -> None:
    step = nn.Conv2d(3, 3, 3, padding=1)
    inventory = take_inventory(nn.Sequential(step, step, nn.Flatten()), IMAGES)
    assert names(inventory) == ["0"]
    assert inventory.layers[0].calls == 2


def test_rows_of_linear_layers_are_counted_per_image() -> None:
    model = Applied(
        lambda m, x: m.rows(x.flatten(2).transpose(1, 2)).sum((1, 2), keepdim=True)[:, 0],
        rows=nn.Linear(3, 5),
    )
    (layer,) = take_inventory(model, IMAGES).layers
    assert layer.output_size == (80,)


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_output_sizes_are_spatial_only(dims: int, kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(2, 4, 3, stride=2), nn.Flatten())
    sizes = (7, 9, 11)[:dims]
    (layer,) = take_inventory(model, torch.zeros(3, 2, *sizes)).layers
    assert layer.output_size == (3, 4, 5)[:dims]


def test_first_channels() -> None:
    assert first_channels(nn.Sequential(nn.ReLU(), nn.Conv2d(5, 2, 1), nn.Conv2d(2, 9, 1))) == 5
    assert first_channels(nn.Sequential(nn.ConvTranspose2d(6, 2, 1))) == 6
    assert first_channels(nn.Linear(3, 2)) is None


# --- what cannot be structured


class OwnConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.abs())


def test_unsupported_layers_and_their_reasons() -> None:
    shared = nn.Conv2d(4, 4, 1)
    twin = nn.Conv2d(4, 4, 1)
    twin.weight = shared.weight
    model = Applied(
        lambda m, x: flat(m.masked(m.old(m.normed(m.twin(m.shared(m.up(m.own(m.plain(x))))))))),
        plain=nn.Conv2d(3, 4, 1),
        own=OwnConv(4, 4, 1),
        up=nn.ConvTranspose2d(4, 4, 2, stride=2),
        shared=shared,
        twin=twin,
        normed=parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        old=nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)),
        masked=prune.random_unstructured(nn.Conv2d(4, 4, 1), "weight", amount=0.5),
        idle=nn.Conv2d(4, 4, 1),
        head=nn.Linear(4, 4),
    )
    inventory = take_inventory(model, IMAGES)
    assert names(inventory) == ["plain"]
    reasons = {entry.name: entry.reason for entry in inventory.unsupported}
    assert list(reasons) == [
        *("own", "up", "shared", "twin", "normed", "old", "masked"),
        *("idle", "head"),
    ]
    assert "OwnConv is not a plain convolution" in reasons["own"]
    assert "transposed" in reasons["up"]
    assert reasons["shared"] == "it shares its weight with twin"
    assert reasons["twin"] == "it shares its weight with shared"
    # The parametrised layer's class is made on the fly, so either reason is true of it.
    assert "arametri" in reasons["normed"]
    assert "parametrised" in reasons["old"]
    assert "parametrised" in reasons["masked"]
    assert reasons["idle"] == "the forward pass does not run it"
    assert reasons["head"] == "the forward pass does not run it"


def test_a_bias_parametrisation_is_not_missed() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    layer = nn.Conv2d(3, 4, 1)
    parametrize.register_parametrization(layer, "bias", Doubled())
    inventory = take_inventory(nn.Sequential(layer, nn.Flatten()), IMAGES)
    assert inventory.layers == ()
    assert [entry.name for entry in inventory.unsupported] == ["0"]


def test_a_weight_used_without_its_module_is_a_function_call() -> None:
    model = Applied(
        lambda m, x: flat(nn.functional.conv2d(x, m.conv.weight)), conv=nn.Conv2d(3, 4, 1)
    )
    assert take_inventory(model, IMAGES).unsupported == (
        Unsupported("conv", "a function call, not a module, computes it"),
    )


# --- side effects


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_mode_statistics_and_hooks_are_as_before(training: bool, fails: bool) -> None:
    seen: list[bool] = []

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(model.training)
        y = model.norm(model.conv(x))
        if fails:
            raise RuntimeError("broken on purpose")
        return flat(y)

    model = Applied(forward, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4)).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(ArchitectureError, match="broken on purpose"):
            take_inventory(model, IMAGES + 1)
    else:
        take_inventory(model, IMAGES + 1)
    assert seen == [False]
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_part_that_was_frozen_in_eval_mode_stays_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()).train()
    model[1].eval()
    take_inventory(model, IMAGES)
    assert [module.training for module in model.modules()] == [True, True, False, True]


# --- failures


def test_channels_that_do_not_fit_are_both_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    with pytest.raises(ArchitectureError) as error:
        take_inventory(model, IMAGES)
    message = str(error.value)
    assert "takes 1 channels" in message
    assert "images have 3" in message
    assert "--arch-arg" in message


def test_another_failure_is_passed_on_with_the_shape() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(17, 2))
    with pytest.raises(ArchitectureError) as error:
        take_inventory(model, IMAGES)
    message = str(error.value)
    assert "(3, 8, 10)" in message
    assert "mat1 and mat2" in message
    assert "--size" in message
    assert "\n" not in message


def fail(error: Exception) -> Callable[[nn.Module, torch.Tensor], object]:
    def forward(model: nn.Module, x: torch.Tensor) -> object:
        raise error

    return forward


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("first line\nsecond line"),
        ValueError("no"),
        TypeError("no"),
        IndexError("no"),
        AttributeError("no"),
        KeyError("no"),
        NotImplementedError("no"),
        ZeroDivisionError("no"),
        AssertionError("input height (8) does not match the model's (224)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_the_forward_pass_raises_is_reported(error: Exception) -> None:
    with pytest.raises(ArchitectureError) as reported:
        take_inventory(Applied(fail(error), conv=nn.Conv2d(3, 4, 1)), IMAGES)
    assert "(3, 8, 10)" in str(reported.value)
    assert str(error.args[0]).splitlines()[0] in str(reported.value)


def test_a_failure_without_a_message_is_reported() -> None:
    with pytest.raises(ArchitectureError, match="does not run on images"):
        take_inventory(Applied(fail(ValueError())), IMAGES)


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (lambda m, x: x.sum(), "()"),
        (lambda m, x: flat(x)[:1], "(1, 3)"),
        (lambda m, x: {"a": x, "b": [x[0]]}, "(3, 8, 10) as b_0"),
        (lambda m, x: None, "no tensor"),
        (lambda m, x: (x, "text"), "type str"),
    ],
)
def test_an_output_without_a_row_for_each_example_is_refused(
    output: Callable[[nn.Module, torch.Tensor], object], found: str
) -> None:
    with pytest.raises(ArchitectureError) as error:
        take_inventory(Applied(output), IMAGES)
    assert f"puts out {found}" in str(error.value) or found in str(error.value)


def test_several_inputs_and_outputs_have_the_names_that_the_model_gives_them() -> None:
    class Several(nn.Module):
        def forward(self, image: torch.Tensor, mask: torch.Tensor) -> object:
            best = image.argmax(1)
            return {
                "image": image,
                "aux": (mask, None, image),
                "best": best,
                "deep": {"x y": image},
            }

    found = take_inventory(Several(), IMAGES, torch.zeros(2, 5, dtype=torch.int32))
    image, mask = TensorKind((3, 8, 10)), TensorKind((5,), "int32")
    assert list(found.inputs.items()) == [("image", image), ("mask", mask)]
    # An output cannot have an input's name.
    assert list(found.outputs.items()) == [
        ("output_image", image),
        ("aux_0", mask),
        ("aux_2", image),
        ("best", TensorKind((8, 10), "int64")),
        ("deep_x_y", image),
    ]


def test_frozen_layers_are_listed_and_cannot_be_structured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten())
    model[0].weight.requires_grad_(False)
    inventory = take_inventory(model, IMAGES)
    assert [layer.frozen for layer in inventory.layers] == [True, False]
    assert list(inventory.axes) == ["1"]
    assert "frozen" in inventory.refused["0"]
