"""What benchmarks/ builds to weigh structured models against: low rank, pruned, equally fast."""

import copy
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "benchmarks"
IMAGES = torch.randn(2, 12, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """A module of benchmarks/; skipped where the packages that it needs are not installed."""
    name, *needed = request.param
    for package in needed:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


low_rank = pytest.mark.parametrize("script", [("low_rank", "tensorly")], indirect=True)
pruning = pytest.mark.parametrize("script", [("pruning", "torch_pruning")], indirect=True)
equal_latency = pytest.mark.parametrize("script", [("equal_latency",)], indirect=True)

LAYERS = {
    "plain": nn.Conv2d(12, 20, 3, padding=1),
    "strided": nn.Conv2d(12, 20, (3, 5), stride=(2, 1), padding=(2, 0), bias=False),
    "dilated": nn.Conv2d(12, 10, 3, dilation=2, padding=2, padding_mode="circular"),
    "pointwise": nn.Conv2d(12, 20, 1, stride=2),
}


def of_low_rank(conv: nn.Conv2d, by: str) -> nn.Conv2d:
    """A convolution like another, whose weight has rank 2 in the sense of this method."""
    conv, generator = copy.deepcopy(conv), torch.Generator().manual_seed(1)

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    outputs, inputs, height, width = conv.weight.shape
    weight = torch.einsum("or,ci,rchw->oihw", noise(outputs, 2), noise(2, inputs),
                          noise(2, 2, height, width))  # fmt: skip
    if by == "spatial":
        weight = torch.einsum("rih,orw->oihw", noise(2, inputs, height), noise(outputs, 2, width))
    conv.weight.data.copy_(weight)
    return conv


@low_rank
@pytest.mark.parametrize("method", ["tucker", "spatial"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_of_low_rank_are_decomposed_exactly(
    layer: str, method: str, script: ModuleType
) -> None:
    model = nn.Sequential(of_low_rank(LAYERS[layer], method)).eval()
    way = script.LowRank(method, "energy", round_to=1, ratio=1e-9)
    found, ranks = script.low_ranked(copy.deepcopy(model), way)
    assert set(ranks["0"]) == {2}
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, found))
    assert after < before
    wanted = model(IMAGES).detach()
    torch.testing.assert_close(found(IMAGES), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@low_rank
def test_linear_layers_and_shared_ones(script: ModuleType) -> None:
    linear = nn.Linear(30, 30)
    linear.weight.data.copy_(torch.outer(torch.randn(30), torch.randn(30)))
    model = nn.ModuleDict({"one": linear, "same": linear})
    way = script.LowRank("tucker", "energy", round_to=1, ratio=1e-9)
    found, ranks = script.low_ranked(copy.deepcopy(model), way)
    assert ranks == {"one": (1,), "same": (1,)}
    assert found["one"] is found["same"]
    rows = torch.randn(3, 30)
    torch.testing.assert_close(found["one"](rows), linear(rows), rtol=1e-4, atol=1e-3)


@low_rank
def test_what_would_not_get_cheaper_stays(script: ModuleType) -> None:
    grouped = nn.Conv2d(12, 12, 3, groups=3)
    frozen = nn.Conv2d(12, 12, 3).requires_grad_(False)
    full, narrow = nn.Conv2d(12, 12, 3), nn.Conv2d(4, 12, 3)
    model = nn.ModuleList([grouped, frozen, full, narrow])
    assert not script.low_ranked(model, script.LowRank("tucker", "share", 1, 0, 0.0))[1]
    assert set(script.low_ranked(model, script.LowRank("tucker", "share", 1, 8, 0.9))[1]) == {"2"}


@equal_latency
@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        pytest.param([0.5, 0.9, 1.01, 1.3], 2, id="a step within the tolerance"),
        pytest.param([0.5, 0.9, 1.2, 1.3], 2, id="the next faster one"),
        pytest.param([0.5, 0.6, 0.7, 0.9], None, id="slower at any ratio"),
        pytest.param([1.3, 1.4, 1.5, 1.6], 0, id="faster at any ratio"),
    ],
)
def test_the_ratio_is_found(steps: list[float], wanted: int | None, script: ModuleType) -> None:
    """A variant of `4 - i` features for each step, `steps[i]` times as fast as the target."""
    measured = []

    def speed(model: nn.Module) -> float:
        measured.append(model.out_features)
        return steps[4 - int(model.out_features)]  # type: ignore[arg-type]

    met = script.meet(lambda ratio: nn.Linear(1, 4 - int(4 * ratio)), speed)
    assert len(measured) == len(set(measured))
    assert (met and met.model.out_features) == (None if wanted is None else 4 - wanted)


class Residual(nn.Module):
    """A block whose shortcut pads with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 32, 3, stride=2, padding=1)
        self.outer = nn.Conv2d(32, 16, 3, padding=1)
        self.shortcut = nn.Module()
        self.shortcut.pad = 4
        self.shortcut.forward = lambda x: nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.shortcut(x) + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


@pruning
def test_pruning_leaves_outputs_and_with_blocks_the_stream(script: ModuleType) -> None:
    for inside in (False, True):
        model = script.with_convolved_shortcuts(Residual())
        wanted = Residual()
        wanted.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(model(IMAGES), wanted(IMAGES))
        found = script.pruned(model, IMAGES, script.Pruning(inside, False, 8, 0.5))
        assert found(IMAGES).shape == (2, 3)
        assert found.inner.out_channels == 16
        assert found.outer.out_channels == (16 if inside else 8)
        assert [n for n, p in found.named_parameters() if not p.requires_grad] == [
            "shortcut.weight"
        ]
