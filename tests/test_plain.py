"""Any model as one of plain layers: the same outputs, and a way back to the user's own."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from structconv_cli.model.inventory import take_inventory
from structconv_cli.model.layer_form import form_of
from structconv_cli.model.plain import Plain, plain, restore

X = torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(1))


class SameConv(nn.Conv2d):
    """TensorFlow's padding, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        pads = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in sizes]
        flat = [size for total in reversed(pads) for size in (total // 2, total - total // 2)]
        x = functional.pad(x, flat)
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class StandardConv(nn.Conv2d):
    """Weight standardisation, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Inherits(nn.Conv2d):
    pass


class OwnLayer(nn.Module):
    """A convolution of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3) / 6)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.kernel, self.shift, padding=1)


class Around(nn.Module):
    """A stem, the layer to be looked at, a batch norm and a head."""

    def __init__(self, layer: nn.Module, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.stem = conv(3, 4, 3, padding=1)
        self.layer = layer
        self.norm = norm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm(self.layer(functional.relu(self.stem(x)))))
        result: Tensor = self.head(y.flatten(2).mean(2))
        return result


class Functional(nn.Module):
    """Convolutions by function calls, one of them with a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3) / 6)
        self.shift = nn.Parameter(torch.randn(6))
        self.inner = nn.Conv2d(6, 6, 3)
        self.gain = nn.Parameter(torch.rand(6, 1, 1, 1) + 0.5)
        self.scaled = nn.Parameter(torch.randn(6, 6, 3, 3) / 6)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.norm(functional.conv2d(x, self.kernel, self.shift, padding=1)))
        x = functional.conv2d(x, self.inner.weight, self.inner.bias, stride=2, padding=1)
        x = functional.conv2d(functional.relu(x), self.gain * self.scaled, padding="same")
        return {"scores": self.head(self.drop(x.mean((2, 3)))), "features": x}


class Lists(nn.Module):
    """Convolutions in lists and dicts, one shared, two tied."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])
        self.named = nn.ModuleDict({"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(3, 6, 3)})
        self.steps[1].weight, self.steps[1].bias = self.steps[0].weight, self.steps[0].bias

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = functional.relu(step(step(x)))
        return self.named["a"](x) + self.named["b"](x)


def conv(**settings: object) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, **settings)  # type: ignore[arg-type]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Around(conv()),
    "grouped, dilated": lambda: Around(conv(groups=2, dilation=2)),
    "inherits": lambda: Around(Inherits(4, 6, 3, padding=1)),
    "inherits, reflect": lambda: Around(Inherits(4, 6, 3, padding=1, padding_mode="reflect")),
    "same": lambda: Around(SameConv(4, 6, 3)),
    "same, stride 2": lambda: Around(SameConv(4, 6, 3, stride=2)),
    "same, even kernel, dilated": lambda: Around(
        SameConv(4, 6, (4, 2), stride=(1, 2), dilation=(3, 1))
    ),
    "standardised": lambda: Around(StandardConv(4, 6, 3, padding=1)),
    "weight norm": lambda: Around(parametrizations.weight_norm(conv())),
    "weight norm, dim 1": lambda: Around(parametrizations.weight_norm(conv(), dim=1)),
    "weight norm, hooks": lambda: Around(nn.utils.weight_norm(conv(bias=False))),
    "spectral norm": lambda: Around(parametrizations.spectral_norm(conv())),
    "spectral norm, hooks": lambda: Around(nn.utils.spectral_norm(conv())),
    "pruned": lambda: Around(prune.random_unstructured(conv(), "weight", amount=0.5)),
    "own layer": lambda: Around(OwnLayer()),
    "lazy": lambda: Around(nn.LazyConv2d(6, 3, groups=2)),
    "compiled inside": lambda: Around(torch.compile(conv(), backend="eager")),  # type: ignore[arg-type]
    "compiled": lambda: torch.compile(Around(conv()), backend="eager"),  # type: ignore[return-value]
    "parallel": lambda: nn.DataParallel(Around(conv())),
    "lists": Lists,
    "functional": Functional,
}


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
    return model.eval()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(MODELS[name]())


def leaves(outputs: object) -> list[Tensor]:
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]  # type: ignore[list-item]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return leaves(model(x))


def assert_same(one: list[Tensor], other: list[Tensor], tolerance: float) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert float((a - b).norm()) <= tolerance * float(a.norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_stay_and_every_layer_can_be_structured(name: str, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    model = made(name).to(dtype)
    model(x)
    expected = outputs(model, x)
    state = copy.deepcopy(model.state_dict())
    found = plain(model, x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert_same(expected, outputs(found.model, x), tolerance)
    # The user's own model is as it was.
    assert_same(expected, outputs(model, x), 0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert isinstance(found.model, torch.fx.GraphModule) == (name == "functional")
    inventory = take_inventory(found.model, x)
    assert inventory.unsupported == ()
    assert {layer.spec.kind for layer in inventory.layers} <= {"conv2d", "linear"}
    assert any(layer.spec.weight_shape[0] == 6 for layer in inventory.layers)


def changed(found: Plain) -> Plain:
    """With other weights, as fine-tuning leaves them."""
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num(0.1))
    return found


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("standardised",)])
def test_changed_weights_go_back_into_the_users_model(name: str) -> None:
    model = made(name).double()
    model(X.double())
    found = changed(plain(model, X.double()))
    original = model.state_dict()
    restored = restore(found, found.model.state_dict(), original)
    if name == "functional":
        assert set(restored) - set(original) == {"scaled_folded.folded_weight"}
        assert set(original) - set(restored) == {"gain", "scaled"}
        return
    assert list(restored) == list(original)
    model.load_state_dict(restored)
    assert_same(outputs(found.model, X.double()), outputs(model.eval(), X.double()), 1e-10)
    assert not any("cannot compute" in note for note in found.notes)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_other_dimensions(dims: int, asymmetric: bool) -> None:
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 2, *(3,) * dims) / 3)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.pad(x, [0, 1] * dims) if asymmetric else x
            return convolve(x, self.weight, None, 2, 1, 1, 2)

    torch.manual_seed(0)
    model = randomised(Around(Own(), dims)).double()
    x = torch.randn(2, 3, *(5, 6, 7)[:dims]).double()
    found = plain(model, x)
    assert_same(outputs(model, x), outputs(found.model, x), 1e-10)
    spec = take_inventory(found.model, x).layer("layer").spec
    assert spec.kind == f"conv{dims}d"
    assert spec.padding == ((1, 2 if asymmetric else 1),) * dims
    assert (spec.stride, spec.groups, spec.bias) == ((2,) * dims, 2, False)
    assert found.is_as_it_was


class Branches(nn.Module):
    """Cannot be traced: which convolution runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.a = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return functional.conv2d(x, self.a if x.sum() > 1e9 else 2 * self.a)


class Dynamic(nn.Module):
    """The weight depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.a = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return functional.conv2d(x, self.a * x.mean())


class Read(nn.Module):
    """Reads what only its own kind of layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SameConv(3, 4, 3, stride=2)
        self.layer.gain = 2.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer.gain  # type: ignore[no-any-return, operator]


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SameConv(4, 4, 3, stride=2))
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    return model


@pytest.mark.parametrize(
    ("make", "name", "reason", "note"),
    [
        (Branches, "the model itself", "function call", "are kept: torch.export cannot trace"),
        (Dynamic, "the model itself", "no parameter", ""),
    ],
)
def test_what_cannot_be_plain_is_kept_with_a_reason(
    make: Callable[[], nn.Module], name: str, reason: str, note: str
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    found = plain(model, X)
    assert_same(outputs(model, X), outputs(found.model, X), 0)
    refused = take_inventory(found.model, X).refused
    assert list(refused) == [name]
    assert reason in refused[name]
    assert note in " ".join(found.notes)


def test_a_layer_whose_attributes_are_read_is_taken_from_a_graph() -> None:
    model = Read().eval()
    found = plain(model, X)
    assert_same(outputs(model, X), outputs(found.model, X), 1e-6)
    assert take_inventory(found.model, X).refused == {}


def test_hooks_that_change_outputs_are_not_lost() -> None:
    torch.manual_seed(0)
    model = hooked().eval()
    found = plain(model, X)
    # A graph holds what they do.
    assert_same(outputs(model, X), outputs(found.model, X), 1e-6)
    assert len(take_inventory(found.model, X).layers) == 2


def test_frozen_layers_stay_frozen() -> None:
    model = Around(parametrizations.weight_norm(conv())).eval()
    model.layer.requires_grad_(False)
    layers = {x.spec.name: x.frozen for x in take_inventory(plain(model, X).model, X).layers}
    assert layers == {"stem": False, "layer": True, "head": False}


class Applied(nn.Conv2d):
    """A convolution whose forward pass is given."""

    def __init__(self, applied: Callable[[nn.Conv2d, Tensor], Tensor]) -> None:
        super().__init__(3, 4, 3)
        self.applied = applied

    def forward(self, x: Tensor) -> Tensor:
        return self.applied(self, x)

    def twice(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(x, self.weight)[:, :3], self.weight)


@pytest.mark.parametrize(
    ("applied", "reason"),
    [
        (lambda m, x: functional.conv2d(x, m.weight) + 1, "goes on behind"),
        (lambda m, x: functional.conv2d(x.abs(), m.weight), "changes its input"),
        (
            lambda m, x: functional.conv2d(functional.pad(x, [1] * 4, value=2.0), m.weight),
            "changes",
        ),
        (lambda m, x: functional.conv2d(x, m.weight * x.mean()), "weight depends"),
        (lambda m, x: functional.conv2d(x, m.weight, m.bias * x.mean()), "bias depends"),
        (Applied.twice, "computes 2"),
        (lambda m, x: x, "computes 0"),
    ],
)
def test_what_is_no_single_layer_is_told(
    applied: Callable[[nn.Conv2d, Tensor], Tensor], reason: str
) -> None:
    found = form_of(Applied(applied).eval(), X)
    assert isinstance(found, str)
    assert reason in found
