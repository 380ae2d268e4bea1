"""Files of every kind become the model that was trained, with its own outputs."""

import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from structconv_cli.errors import CheckpointError
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.opening import open_model
from structconv_cli.model_graph import known_shapes, open_source

SOURCE = """
    from torch import nn

    def block(conv, norm, head):
        return nn.Sequential(
            conv(3, 8, 3) if conv is nn.Conv2d else conv(8, 3), nn.ReLU(),
            conv(8, 8, 3) if conv is nn.Conv2d else conv(8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), head,
        )

    def build():
        return block(nn.Conv2d, nn.BatchNorm2d, nn.Linear(8, 4))

    def lazy():
        return block(nn.LazyConv2d, nn.LazyBatchNorm2d, nn.LazyLinear(4))
"""
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(textwrap.dedent(SOURCE))
    return tmp_path


def trained(place: Path) -> nn.Module:
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    exec((place / "net.py").read_text(), namespace)
    model: nn.Module = namespace["build"]()  # type: ignore[operator]
    return model.eval()


def save(kind: str, model: nn.Module, path: Path) -> None:
    if kind == "module":
        torch.save(model, path)
    elif kind == "script":
        torch.jit.save(torch.jit.trace(model, IMAGES), path)
    elif kind == "exported":
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    found: Tensor = model(IMAGES)
    return found


@pytest.mark.parametrize("kind", ["state", "module", "script", "exported"])
@pytest.mark.parametrize("factory", ["build", "lazy"])
def test_weights_of_every_kind_go_into_an_architecture(
    kind: str, factory: str, place: Path
) -> None:
    model = trained(place)
    save(kind, model, place / "file")
    opened = open_model(place / "file", Architecture(f"{place}/net.py:{factory}"))
    torch.testing.assert_close(outputs(opened.model), outputs(model), rtol=1e-6, atol=1e-7)
    plain = opened.plain(IMAGES)
    assert plain.model.get_submodule("0").in_channels == 3
    torch.testing.assert_close(outputs(plain.model), outputs(model), rtol=1e-6, atol=1e-7)


def test_an_exported_program_needs_no_architecture(place: Path) -> None:
    model = trained(place)
    save("exported", model, place / "file")
    opened = open_model(place / "file")
    assert opened.architecture is None
    torch.testing.assert_close(outputs(opened.model), outputs(model), rtol=1e-6, atol=1e-7)
    assert known_shapes(opened, {})[0] == {"input": (1, 3, 32, 32)}
    graph, _ = open_source(place / "file", None).graph({})
    assert {node.op_type for node in graph.graph.node} >= {"Conv", "Gemm"}


def test_what_an_exported_program_cannot_take_back_is_told_once(place: Path) -> None:
    model = trained(place)
    torch.nn.utils.parametrizations.weight_norm(model[2])  # type: ignore[index]
    save("exported", model, place / "file")
    _, notes = open_source(place / "file", None).graph({})
    assert [("folded_weight" in note) for note in notes].count(True) == 1
    assert len(set(notes)) == len(notes)


def test_a_pickled_module_is_only_unpickled_if_the_user_says_so(place: Path) -> None:
    model = trained(place)
    save("module", model, place / "file")
    with pytest.raises(
        CheckpointError, match=r"torch\.nn\.modules\.container\.Sequential.*--trust-"
    ):
        open_model(place / "file")
    opened = open_model(place / "file", trust_pickle=True)
    torch.testing.assert_close(outputs(opened.model), outputs(model))
    assert "--trust-pickle" in opened.notes[0]


def test_a_torchscript_archive_without_architecture_has_a_way_out(place: Path) -> None:
    save("script", trained(place), place / "file")
    with pytest.raises(CheckpointError, match="--arch, or export the original model to ONNX"):
        open_model(place / "file")


def test_sizes_that_nothing_tells_are_guessed(place: Path) -> None:
    save("state", trained(place), place / "file")
    opened = open_model(place / "file", Architecture(f"{place}/net.py:build"))
    shapes, (why,) = known_shapes(opened, {})
    assert shapes == {"input": (1, 3, 224, 224)}
    assert "first of some typical sizes" in why
    assert known_shapes(opened, {"input": (1, 3, 40, 40)}) == ({"input": (1, 3, 40, 40)}, ())
