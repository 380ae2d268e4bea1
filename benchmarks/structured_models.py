"""Dense ONNX files of random weights that lie in a structured subspace.

What a lowering gains does not depend on where the weights came from, only on their structure, so
random weights are put inside the subspace by projection. Half of the input channels stay:

- balanced: w[:, j] = -w[:, j + C/2], the structure c = C/2 + 1 whose common sum S is zero, so that
  C/2 channels of differences are all that remains (design notes, section 2);
- general: the structure c = C/2, whose differences and common sum are C/2 channels together.

Kernels larger than 2x2 go to n = 2. Each weight keeps its norm and batch norms are fitted to noise,
so that activations neither vanish nor explode, and a comparison of outputs means something.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
import torch
from architectures import timm_model, torchvision_model
from torch import nn

from structconv_cli.calibrate import reestimate_batch_norm
from structconv_cli.json_file import read_json, write_json
from structconv_cli.model.inventory import TracedLayer, take_inventory
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.file import save_onnx
from structconv_cli.onnx.nodes import is_transposed, layer_of
from structconv_cli.structure import Structure

PIXELS = 224
"""Height and width of the images."""

SPATIAL = 2
"""Size that larger kernels are reduced to, per axis."""


@dataclass(frozen=True)
class Recipe:
    """What of an architecture is structured.

    Attributes:
        title: How tables name it.
        source: "torchvision" or "timm".
        architecture: The source's name of it.
        spatial: Whether kernels go to n = 2.
        least_channels: Fewest input channels that are halved; 0 halves none.
        pointwise_only: Whether only 1x1 layers are halved.
        linear: Whether linear layers are halved too.
    """

    title: str
    source: str
    architecture: str
    spatial: bool = True
    least_channels: int = 32
    pointwise_only: bool = False
    linear: bool = False


RECIPES = {
    "resnet18-n2": Recipe("ResNet-18, n=2", "torchvision", "resnet18", least_channels=0),
    "resnet18": Recipe("ResNet-18", "torchvision", "resnet18"),
    "resnet34": Recipe("ResNet-34", "torchvision", "resnet34"),
    "resnet50-n2": Recipe("ResNet-50, n=2", "torchvision", "resnet50", least_channels=0),
    "resnet50": Recipe("ResNet-50", "torchvision", "resnet50"),
    "mobilenet_v2": Recipe("MobileNetV2", "torchvision", "mobilenet_v2", False, 2, True),
    "efficientnet_b1": Recipe("EfficientNet-B1", "torchvision", "efficientnet_b1", False, 2, True),
    "hrnet_w18_small": Recipe("HRNet-W18-small", "timm", "hrnet_w18_small"),
    "regnet_y_1_6gf": Recipe("RegNetY-1.6GF", "torchvision", "regnet_y_1_6gf"),
    "vgg16": Recipe("VGG-16", "torchvision", "vgg16"),
    "vgg16-linear": Recipe("VGG-16, FC too", "torchvision", "vgg16", linear=True),
}
"""The models of the table, by the names of their files."""


@dataclass(frozen=True)
class LayerStructure:
    """One layer's subspace.

    Attributes:
        dense: (C / groups, N, N) of the weight.
        reduced: (channels, n, n) that remain to be multiplied.
        balanced: Whether halved channels are differences only, without the common sum.
    """

    dense: tuple[int, ...]
    reduced: tuple[int, ...]
    balanced: bool

    def project(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest weight in the subspace, rescaled to the norm of `weight`."""
        halved = self.reduced[0] < self.dense[0]
        if halved and self.balanced:
            spatial = Structure(self.dense, (self.dense[0], *self.reduced[1:])).project(weight)
            first, second = spatial.chunk(2, dim=1)
            difference = (first - second) / 2
            projected = torch.cat((difference, -difference), dim=1)
        else:
            projected = Structure(self.dense, self.reduced).project(weight)
        return projected * (weight.norm() / projected.norm())


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of all Conv, Gemm and MatMul nodes for one image.

    Attributes:
        dense: As the file has them.
        structured: With every structured layer's kernel reduced; sum-pools multiply nothing.
    """

    dense: int
    structured: int

    @property
    def ratio(self) -> float:
        """Dense over structured."""
        return self.dense / self.structured


def dense_file(name: str, folder: Path, *, general: bool) -> tuple[Path, Macs]:
    """A model of `RECIPES` as an ONNX file in `folder`, made unless it is there.

    Args:
        name: Key of `RECIPES`.
        folder: Holds NAME.onnx and NAME.macs.json; -general is added to the names of the rest.
        general: Whether halved channels include the common sum.
    """
    stem = f"{name}-general" if general else name
    file, macs_file = folder / f"{stem}.onnx", folder / f"{stem}.macs.json"
    if not (file.is_file() and macs_file.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        proto, macs = _build(RECIPES[name], balanced=not general)
        save_onnx(proto, file)
        write_json(macs, macs_file)
    return file, read_json(macs_file, Macs)


@torch.no_grad()
def _build(recipe: Recipe, *, balanced: bool) -> tuple[onnx.ModelProto, Macs]:
    make = {"torchvision": torchvision_model, "timm": timm_model}[recipe.source]
    model = make(recipe.architecture)
    images = torch.randn(8, 3, PIXELS, PIXELS)
    structures = _structures(model, images[:2], recipe, balanced=balanced)
    modules = dict(model.named_modules())
    for layer, structure in structures.items():
        weight = modules[layer].weight
        assert isinstance(weight, nn.Parameter)
        weight.copy_(structure.project(weight.double()))
    _randomise(model, images)
    proto = export_onnx(model, images[:2])
    return proto, _macs(proto, structures)


def _structures(
    model: nn.Module, images: torch.Tensor, recipe: Recipe, *, balanced: bool
) -> dict[str, LayerStructure]:
    kinds = ("conv2d", "linear") if recipe.linear else ("conv2d",)
    layers = [layer for layer in take_inventory(model, images).layers if layer.spec.kind in kinds]
    structures = {
        layer.spec.name: LayerStructure(layer.spec.axes, _reduced(layer, recipe), balanced)
        for layer in layers[1:]
    }
    return {name: found for name, found in structures.items() if found.reduced != found.dense}


def _reduced(layer: TracedLayer, recipe: Recipe) -> tuple[int, ...]:
    spec = layer.spec
    channels, *kernel = spec.axes
    # One output pixel: squeeze-and-excite, too cheap to be worth a sum-pool.
    single = spec.kind == "conv2d" and prod(layer.output_size) == 1
    if spec.is_depthwise or single:
        return spec.axes
    halve = (
        spec.groups == 1
        and channels % 2 == 0
        and 0 < recipe.least_channels <= channels
        and not (recipe.pointwise_only and prod(kernel) > 1)
    )
    sizes = [min(SPATIAL, size) if recipe.spatial else size for size in kernel]
    return (channels // 2 if halve else channels, *sizes)


def _randomise(model: nn.Module, images: torch.Tensor) -> None:
    """Give biases and batch norms values of their own, and statistics that fit them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.normal_(0, 0.1)
    reestimate_batch_norm(model, [images])
    outputs = model.eval()(images)
    if not (torch.isfinite(outputs).all() and 1e-3 < outputs.std() < 1e3):
        raise ValueError(f"outputs have standard deviation {outputs.std():.2g}: not a sane model")


def _macs(proto: onnx.ModelProto, structures: dict[str, LayerStructure]) -> Macs:
    """Count from the shapes that onnx infers for a batch of one."""
    single = onnx.ModelProto()
    single.CopyFrom(proto)
    del single.graph.value_info[:]
    for value in (*single.graph.input, *single.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    single = onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*single.graph.value_info, *single.graph.output)
    }
    weights = {tensor.name: list(tensor.dims) for tensor in single.graph.initializer}
    dense = structured = 0
    unmet = set(structures)
    for node in single.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        products = _products(node, weights[node.input[1]])
        macs = prod(shapes[node.output[0]]) * products
        if macs == 0:
            raise ValueError(f"{node.op_type} {node.name}: its output's shape is unknown")
        dense += macs
        layer = layer_of(node) or ""
        if layer in structures:
            unmet.discard(layer)
            macs = macs * prod(structures[layer].reduced) // products
        structured += macs
    if unmet:
        raise ValueError(f"structured layers without a node of their name: {sorted(unmet)}")
    return Macs(dense, structured)


def _products(node: onnx.NodeProto, weight: list[int]) -> int:
    """Multiplications for one value of the node's output."""
    if node.op_type == "Conv":
        return prod(weight[1:])
    return weight[0] if is_transposed(node) else weight[1]
