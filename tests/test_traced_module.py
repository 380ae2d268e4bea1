"""Programs of torch.export as modules that can be trained, structured and exported again."""

import copy
import io
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional
from torch.nn.utils import parametrizations

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.inventory import take_inventory
from structconv_cli.model.plain import restore, trainable
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.probe import layer_nodes

IMAGE = torch.randn(2, 3, 10, 12, generator=torch.Generator().manual_seed(1))
MASK = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Two inputs, a dict of outputs; shared, tied, computed, grouped and transposed layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding="same")
        self.tied = nn.Conv2d(8, 8, 3, padding="same")
        self.tied.weight, self.tied.bias = self.shared.weight, self.shared.bias
        self.grouped = nn.Conv2d(8, 8, (3, 1), stride=2, groups=2, dilation=2, padding=1)
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.twice = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(8, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Any]:
        x = functional.relu(self.norm(self.stem(image)))
        x = x + self.shared(self.tied(self.shared(x)))
        x = self.up(self.normed(self.grouped(x)))
        x = functional.conv2d(x, self.twice, padding=1) + functional.conv2d(
            x, self.twice, padding=2, dilation=2
        )
        scores = self.head(self.drop(x.mean((2, 3))))
        return {"scores": scores * mask, "pair": (scores, None)}


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def exported(model: nn.Module, kind: str) -> ExportedProgram:
    batch = {0: Dim("batch")}
    program = torch.export.export(
        model.train(kind == "training"),
        (IMAGE, MASK),
        dynamic_shapes=(batch, batch),
        strict=False,
    )
    model.eval()
    if kind == "decomposed":
        return program.run_decompositions()
    if kind == "reloaded":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file)
    return program


@pytest.mark.parametrize("kind", ["eval", "training", "decomposed", "reloaded"])
def test_a_program_becomes_layers_that_compute_the_same(kind: str) -> None:
    model = net()
    found = trainable(exported(model, kind), IMAGE, MASK)
    for image, mask in ((IMAGE, MASK), (IMAGE[:1], MASK[:1])):
        with torch.no_grad():
            expected, outputs = model(image, mask), found.model(image, mask)
        assert outputs["pair"][1] is None
        torch.testing.assert_close(outputs["scores"], expected["scores"], rtol=1e-5, atol=1e-6)
    inventory = take_inventory(found.model, IMAGE, MASK)
    assert list(inventory.inputs) == ["image", "mask"]
    assert list(inventory.outputs) == ["scores", "pair_0"]
    assert not any(layer.frozen for layer in inventory.layers)
    layers = {layer.spec.name: layer for layer in inventory.layers}
    # Of tied layers, the first or the last may give its name.
    (shared,) = {"shared", "tied"} & set(layers)
    expected_layers = {"stem", shared, "grouped", "normed"}
    expected_layers |= set() if kind == "decomposed" else {"head"}
    assert set(layers) == expected_layers
    assert layers[shared].calls == 3
    grouped = layers["grouped"].spec
    assert (grouped.stride, grouped.dilation, grouped.groups) == ((2, 2), (2, 2), 2)
    assert grouped.padding == ((1, 1), (1, 1))
    assert [entry.name for entry in inventory.unsupported] == ["up", "twice"]
    assert "several ways" in inventory.refused["twice"]


@pytest.mark.parametrize("kind", ["eval", "training"])
def test_it_trains_and_its_modes_differ(kind: str) -> None:
    model = copy.deepcopy(trainable(exported(net(), kind), IMAGE, MASK).model)
    assert not model.training
    (norm,) = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = copy.deepcopy(model.state_dict())
    model.train()
    one, other = (model(IMAGE, MASK)["scores"] for _ in range(2))
    assert not torch.equal(one, other), "dropout"
    assert not torch.equal(norm.running_mean, before["norm.running_mean"])  # type: ignore[arg-type]
    assert int(norm.num_batches_tracked) == 2  # type: ignore[arg-type]
    one.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.load_state_dict(before)
    model.eval()
    with torch.no_grad():
        one, other = (model(IMAGE, MASK)["scores"] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]
)
def test_dropouts_act_in_training_only(kind: type[nn.Module], inplace: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(0.5, inplace=inplace), nn.Conv2d(4, 2, 1)).eval()
    found = trainable(torch.export.export(model, (IMAGE,)), IMAGE).model
    assert [type(m) for m in found.modules() if isinstance(m, kind)] == [kind]
    torch.testing.assert_close(found(IMAGE), model(IMAGE), rtol=0, atol=1e-6)
    found.train()
    assert not torch.equal(found(IMAGE), found(IMAGE))
    found(IMAGE).sum().backward()


def test_weights_go_back_under_the_programs_names() -> None:
    program = exported(net(), "eval")
    found = trainable(program, IMAGE, MASK)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(1)
    original = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    restored = restore(found, found.model.state_dict(), original)
    assert set(original) - set(restored) == {
        "normed.parametrizations.weight.original0",
        "normed.parametrizations.weight.original1",
    }
    assert set(restored) - set(original) == {"normed.folded_weight"}
    for name, tensor in original.items():
        if name in restored:
            added = 0 if "unused" in name or "running" in name or "tracked" in name else 1
            torch.testing.assert_close(restored[name], tensor + added, msg=name)
    assert torch.equal(restored["shared.weight"], restored["tied.weight"])
    # The program itself is as it was.
    for name, tensor in program.state_dict.items():
        assert torch.equal(tensor, original[name])


def test_its_graph_has_the_layers_names() -> None:
    model = trainable(exported(net(), "eval"), IMAGE, MASK).model
    graph = export_onnx(model, IMAGE, MASK)
    names = [layer.spec.name for layer in take_inventory(model, IMAGE, MASK).layers]
    assert set(layer_nodes(graph, names)) == set(names)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    feeds = {"image": IMAGE.repeat(2, 1, 1, 1).numpy(), "mask": MASK.repeat(2, 1).numpy()}
    outputs = dict(
        zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True)
    )
    with torch.no_grad():
        expected = model(*(torch.from_numpy(array) for array in feeds.values()))["scores"]
    torch.testing.assert_close(torch.from_numpy(outputs["scores"]), expected, rtol=1e-4, atol=1e-5)


class Shaped(nn.Module):
    """Writes the number of rows into new shapes, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.scale = nn.Parameter(torch.rand(1, 2, 1, 1, 1))
        self.head = nn.Linear(4 * 8 * 10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        rows, channels, height, width = x.shape
        pairs = x.view(rows, 2, channels // 2, height, width).transpose(1, 2)
        x = (pairs * self.scale.expand(rows, 2, 2, 1, 1)).reshape(rows, channels, height, width)
        means = x.mean((2, 3), keepdim=True).expand(rows, channels, height, width)
        y: Tensor = self.head((x - means).reshape(x.size(0), -1))
        return y


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_a_program_that_was_exported_for_one_batch_size_takes_any(rows: int) -> None:
    torch.manual_seed(0)
    model = Shaped().eval()
    program = torch.export.export(model, (torch.zeros(rows, *IMAGE.shape[1:]),))
    found = trainable(program, IMAGE).model
    for count in (1, 2, 3, 7):
        images = torch.randn(count, *IMAGE.shape[1:])
        torch.testing.assert_close(found(images), model(images), rtol=1e-5, atol=1e-6)


class Pairs(nn.Module):
    """Two rows become one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)


class Centred(nn.Module):
    """A row's output depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("model", "told"), [(Pairs(), "another number of rows"), (Centred(), "something else")]
)
def test_a_program_for_one_batch_size_is_refused(model: nn.Module, told: str) -> None:
    program = torch.export.export(model.eval(), (IMAGE,), strict=False)
    with pytest.raises(ArchitectureError, match=rf"batch of 3: it.*{told}.*dynamic_shapes"):
        trainable(program, IMAGE)


def test_a_random_program_is_refused() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    program = torch.export.export(Noisy(), (IMAGE,), strict=False)
    with pytest.raises(ArchitectureError, match=r"random.*eval"):
        trainable(program, IMAGE)


def test_keyword_arguments_are_refused() -> None:
    program = torch.export.export(
        net(), (IMAGE,), {"mask": MASK}, dynamic_shapes=None, strict=False
    )
    with pytest.raises(ArchitectureError, match="keyword"):
        trainable(program, IMAGE, MASK)
