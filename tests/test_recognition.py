"""Architectures found from the names and shapes of a file's tensors."""

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from structconv_cli.errors import ArchitectureError, CheckpointError
from structconv_cli.model.architecture import Architecture, build_model
from structconv_cli.model.checkpoint import load_checkpoint, save_like
from structconv_cli.model.fitting import fit_arguments
from structconv_cli.model.library import installed
from structconv_cli.model.opening import open_model
from structconv_cli.model.recognition.description import Description, describe
from structconv_cli.model.recognition.index import Entry, read_index, write_index
from structconv_cli.model.recognition.indexing import describe_architecture
from structconv_cli.model.recognition.recognise import AmbiguousArchitectureError, recognise
from structconv_cli.model.skeleton import shapes_of, skeleton
from structconv_cli.progress import Observer

ROOT = Path(__file__).parents[1]
RESNET = f"{ROOT / 'sample_models' / 'resnet_cifar.py'}:resnet20"
UNET = f"{ROOT / 'sample_models' / 'unet.py'}:unet"

NETS = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes=10, in_channels=3, *, stride=1, pad="zeros", eps=1e-5,
                     act=nn.ReLU, width=8):
            super().__init__()
            self.stem = nn.Conv2d(in_channels, width, 3, stride, 1, padding_mode=pad, bias=False)
            self.norm = nn.BatchNorm2d(width, eps=eps)
            self.act = act()
            self.head = nn.Linear(width, num_classes)

        def forward(self, x):
            return self.head(self.act(self.norm(self.stem(x))).mean((2, 3)))

    class Same(Net):
        "Another class that computes the same."

    def plain(num_classes=10, in_channels=3): return Net(num_classes, in_channels)
    def twin(num_classes=10, in_channels=3): return Net(num_classes, in_channels)
    def subclass(num_classes=10, in_channels=3): return Same(num_classes, in_channels)
    def strided(num_classes=10, in_channels=3): return Net(num_classes, in_channels, stride=2)
    def reflecting(num_classes=10, in_channels=3):
        return Net(num_classes, in_channels, pad="reflect")
    def other_eps(num_classes=10, in_channels=3): return Net(num_classes, in_channels, eps=1e-3)
    def relu6(num_classes=10, in_channels=3): return Net(num_classes, in_channels, act=nn.ReLU6)
    def wide(num_classes=10, in_channels=3): return Net(num_classes, in_channels, width=16)
    def fixed(): return Net()
    def classes_first(classes): return Net(classes)
    def old_names(n_classes, in_chans=3): return Net(n_classes, in_chans)
    def needs_width(num_classes, *, width): return Net(num_classes, width=width)
    def computing():
        net = Net()
        assert float(net.head.weight.detach().abs().sum()) > 0
        return net
    def offset():
        net = Net()
        net.register_buffer("offset", torch.ones(3), persistent=False)
        return net
    def in_place():
        "Random weights, changes in place of parameters' shapes, and of what is none."
        net = Net()
        net.stem.weight.data.mul_(2)
        nn.init.orthogonal_(net.head.weight)
        net.scale = nn.Parameter(torch.zeros(1, 8).fill_(3).squeeze_(0))
        with torch.no_grad():
            net.scale.unsqueeze_(0).t_()
            net.scale.uniform_(1, 2)
        net.register_buffer("offset", torch.ones(3).mul_(2).add_(1), persistent=False)
        return net
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(textwrap.dedent(NETS))
    return path


def of(*architectures: Architecture) -> Callable[[Observer], Sequence[Entry]]:
    """An index of these only."""
    return lambda _: [describe_architecture(one) for one in architectures]


def weights(reference: str, **arguments: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(Architecture(reference, arguments)).state_dict()  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("reference", "arguments"),
    [(RESNET, {}), (RESNET, {"shortcut": "B"}), (UNET, {"width": 16})],
)
def test_sample_models_with_any_head_and_input(
    reference: str, arguments: dict[str, object], classes: int, channels: int
):
    given = {**arguments, "num_classes": classes, "in_channels": channels}
    tensors = weights(reference, **given)
    found = recognise(tensors, known=of())
    model = build_model(found.architecture)
    assert found.architecture.reference == reference
    assert shapes_of(model.state_dict()) == shapes_of(tensors)
    assert reference in found.note


def test_the_bundled_checkpoint_opens_by_itself():
    file = ROOT / "sample_models" / "resnet20_digits.pt"
    opened = open_model(file)
    told = open_model(file, Architecture(RESNET, {"in_channels": 1}))
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(opened.model(images), told.model(images))
    assert not opened.model.training
    assert opened.architecture.arguments["in_channels"] == 1
    assert any("recognised as" in note for note in opened.notes)
    assert told.notes == ()


def test_classes_and_channels_are_read_from_the_weights(tmp_path: Path):
    tensors = weights(RESNET, num_classes=7, in_channels=1)
    torch.save(tensors, tmp_path / "model.pt")
    opened = open_model(tmp_path / "model.pt", Architecture(RESNET))
    assert opened.architecture.arguments == {"num_classes": 7, "in_channels": 1}
    assert opened.notes == ("num_classes=7 and in_channels=1, read from the weights",)
    with pytest.raises(CheckpointError, match="of another shape"):  # what is given stays
        open_model(tmp_path / "model.pt", Architecture(RESNET, {"num_classes": 8}))


@pytest.mark.parametrize("told", [True, False])
def test_a_wrapper_around_the_model(tmp_path: Path, told: bool):
    tensors = weights(RESNET)
    torch.save({f"model.backbone.{k}": v for k, v in tensors.items()}, tmp_path / "model.pt")
    opened = open_model(tmp_path / "model.pt", Architecture(RESNET) if told else None)
    assert any("model.backbone." in note for note in opened.notes)
    assert all(torch.equal(opened.model.state_dict()[k], v) for k, v in tensors.items())
    save_like(opened.checkpoint, opened.model.state_dict(), tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert list(again) == [f"model.backbone.{k}" for k in tensors]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_training_module_with_a_loss_beside_the_model(tmp_path: Path, told: bool, kind: str):
    """As Lightning writes it."""
    write = save_file if kind == "safetensors" else torch.save
    beside = {"criterion.weight": torch.rand(10), "val_loss_fn.centres.a": torch.rand(2, 3)}
    tensors = weights(RESNET)
    held = {**{f"net.{k}": v for k, v in tensors.items()}, **beside}
    write(held, tmp_path / "model.pt")
    opened = open_model(tmp_path / "model.pt", Architecture(RESNET) if told else None)
    assert any(all(name in note for name in beside) for note in opened.notes)
    assert all(torch.equal(opened.model.state_dict()[k], v) for k, v in tensors.items())
    save_like(opened.checkpoint, opened.model.state_dict(), tmp_path / "again.pt")
    again = load_checkpoint(tmp_path / "again.pt").tensors
    assert again.keys() == held.keys()
    assert all(torch.equal(again[k], v) for k, v in held.items())


@pytest.mark.parametrize("told", [True, False])
def test_a_layer_behind_the_model_is_not_left_out(tmp_path: Path, told: bool):
    held = {f"net.{k}": v for k, v in weights(RESNET).items()}
    torch.save({**held, "head.weight": torch.rand(3, 10)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError if told else ArchitectureError):
        open_model(tmp_path / "model.pt", Architecture(RESNET) if told else None)


def test_old_files_without_counters(nets: Path):
    tensors = weights(f"{nets}:plain")
    old = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    found = recognise(
        old,
        known=of(Architecture(f"{nets}:plain"), Architecture(f"{nets}:strided")),
        names=["strided"],
    )
    assert found.architecture.reference == f"{nets}:strided"


def test_equal_ones_are_one_answer(nets: Path):
    names = ("plain", "twin", "subclass", "wide")
    known = of(*(Architecture(f"{nets}:{name}") for name in names))
    found = recognise(weights(f"{nets}:twin", num_classes=4), known=known)
    assert found.architecture == Architecture(f"{nets}:plain", {"num_classes": 4})
    assert [str(one).rpartition(":")[2] for one in found.alternatives] == [
        "twin (num_classes=4)",
        "subclass (num_classes=4)",
    ]
    assert "twin" in found.note


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("strided", "stem has stride=(1,1) in the first and stride=(2,2) in the second"),
        ("reflecting", "stem has padding_mode='zeros' in the first and padding_mode='reflect'"),
        ("other_eps", "norm has eps=1e-05 in the first and eps=0.001 in the second"),
        ("relu6", "act is ReLU in the first and ReLU6 in the second"),
    ],
)
def test_equal_tensors_with_another_computation_are_asked_about(nets: Path, other: str, told: str):
    known = of(Architecture(f"{nets}:plain"), Architecture(f"{nets}:{other}"))
    tensors = weights(f"{nets}:{other}", num_classes=4)
    with pytest.raises(AmbiguousArchitectureError) as raised:
        recognise(tensors, known=known)
    message = str(raised.value)
    assert f"{nets}:plain (num_classes=4)" in message
    assert f"{nets}:{other} (num_classes=4)" in message
    assert f"--arch {nets}:plain or --arch {nets}:{other}:" in message
    assert told in message
    assert len(raised.value.classes) == 2
    # What the file says, or is called, decides; other words do not.
    for names in ([other], ["model.pt", f"{other}-f37072fd.pth"], [f"{other}.tag", "plain.pt"]):
        found = recognise(tensors, names=names, known=known)
        assert found.architecture.reference.endswith(f":{other}")
        assert "tells of" in found.note
    with pytest.raises(AmbiguousArchitectureError):
        recognise(tensors, names=["resnet18", f"{other}_v2.pt", f"my-{other}.pt"], known=known)


def test_a_last_bias_does_not_drown_what_differs(nets: Path):
    known = of(Architecture(f"{nets}:plain"), Architecture(f"{nets}:strided"))
    tensors = weights(f"{nets}:plain")
    tensors["stem.weight"] *= 1e-4
    tensors["head.bias"] += 100
    with pytest.raises(AmbiguousArchitectureError):
        recognise(tensors, known=known)
    tensors["stem.weight"] *= 0  # nothing is seen of the images
    with pytest.raises(AmbiguousArchitectureError):
        recognise(tensors, known=known)


def test_what_fits_nothing_is_compared_with_the_nearest(nets: Path):
    tensors = weights(f"{nets}:plain")
    tensors["norm.weight"] = torch.zeros(9)
    tensors["extra"] = torch.zeros(2)
    known = of(Architecture(f"{nets}:plain"), Architecture(f"{nets}:wide"))
    with pytest.raises(ArchitectureError) as raised:
        recognise(tensors, known=known)
    message = str(raised.value)
    assert "nearest is " + f"{nets}:plain" in message
    assert "norm.weight 9 instead of 8" in message
    assert "the file has also extra" in message
    with pytest.raises(ArchitectureError, match="no name is shared"):
        recognise({"xyzzy": torch.zeros(2)}, known=known)


@pytest.mark.parametrize(
    ("factory", "given", "made_with", "filled"),
    [
        ("plain", {}, {}, {}),
        ("plain", {}, {"num_classes": 4}, {"num_classes": 4}),
        ("plain", {}, {"in_channels": 1}, {"in_channels": 1}),
        ("classes_first", {}, {"num_classes": 4}, {"classes": 4}),
        ("old_names", {}, {"num_classes": 4, "in_channels": 1}, {"n_classes": 4, "in_chans": 1}),
        ("needs_width", {"width": 8}, {"num_classes": 4}, {"num_classes": 4}),
        ("plain", {"num_classes": 5}, {"num_classes": 4}, {}),
        ("fixed", {}, {"num_classes": 4}, {}),
        ("wide", {}, {"num_classes": 4}, {}),
    ],
)
def test_arguments_that_give_the_shapes(
    nets: Path, factory: str, given: dict, made_with: dict, filled: dict
):
    tensors = weights(f"{nets}:plain", **made_with)
    architecture = Architecture(f"{nets}:{factory}", given)
    assert fit_arguments(architecture, tensors).arguments == {**given, **filled}


def test_an_argument_that_nothing_tells_is_asked_for(nets: Path):
    with pytest.raises(ArchitectureError, match="width"):
        fit_arguments(Architecture(f"{nets}:needs_width"), weights(f"{nets}:plain"))


def test_skeletons_have_shapes_and_no_weights(nets: Path):
    bare = skeleton(Architecture(f"{nets}:offset"))
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert bare.offset.tolist() == [1, 1, 1]
    whole = skeleton(Architecture(f"{nets}:computing"))
    assert not any(parameter.is_meta for parameter in whole.parameters())
    assert shapes_of(bare.state_dict()) == shapes_of(whole.state_dict())
    changed = Architecture(f"{nets}:in_place")
    bare, whole = skeleton(changed), build_model(changed)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert bare.offset.tolist() == [3, 3, 3]
    assert shapes_of(bare.state_dict()) == shapes_of(whole.state_dict())
    assert bare.state_dict()["scale"].shape == (8, 1)
    assert describe(bare) == describe(whole)
    assert not nn.Linear(2, 2).weight.is_meta  # only inside


def test_structures_tell_settings_apart_but_not_training_ones(nets: Path):
    def structure(name: str) -> str:
        return describe(skeleton(Architecture(f"{nets}:{name}"))).structure

    assert structure("plain") == structure("twin")
    others = ("strided", "reflecting", "other_eps", "relu6", "subclass", "offset")
    assert len({structure(name) for name in ("plain", *others)}) == 1 + len(others)
    one, other = nn.BatchNorm2d(3, momentum=0.1), nn.BatchNorm2d(3, momentum=0.2)
    assert describe(one).structure == describe(other.eval()).structure


names = st.text("abc.", min_size=1, max_size=6)
descriptions = st.builds(
    Description,
    st.dictionaries(names, st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=6),
    st.text("0123456789abcdef", min_size=16, max_size=16),
)
arguments = st.dictionaries(names, st.integers() | st.booleans() | st.text(max_size=3), max_size=2)
entries = st.builds(
    Entry, st.builds(Architecture, names, arguments), descriptions, st.just("")
) | st.builds(Entry, st.builds(Architecture, names), st.none(), st.just("cannot be built"))


@settings(max_examples=30, deadline=None)
@given(st.lists(entries, max_size=5))
def test_an_index_is_read_as_it_was_written(tmp_path_factory, written: list[Entry]):
    path = tmp_path_factory.mktemp("index") / "deep" / "index.json"
    write_index(written, "timm 1", path)
    assert read_index("timm 1", path) == written
    assert read_index("timm 2", path) == []
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_index_counts_as_none(nets: Path, tmp_path: Path):
    path = tmp_path / "index.json"
    write_index([describe_architecture(Architecture(f"{nets}:plain"))], "here", path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert read_index("here", path) == []
    path.write_bytes(whole.replace(b'"shapes":[0', b'"shapes":[99'))
    assert read_index("here", path) == []
    write_index([], "here", tmp_path / "index.json" / "no folder")  # no error


needs_torchvision = pytest.mark.skipif(
    not installed("torchvision"), reason="torchvision is not installed"
)
needs_timm = pytest.mark.skipif(
    not (installed("timm") and installed("torchvision")), reason="timm is not installed"
)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_not_installed(library: str):
    if installed(library):  # type: ignore[arg-type]
        pytest.skip(f"{library} is installed")
    with pytest.raises(ArchitectureError, match=f"pip install {library}"):
        build_model(Architecture(f"{library}:resnet18"))


@needs_torchvision
@pytest.mark.parametrize(
    ("reference", "arguments", "told"),
    [
        ("torchvision:resnet81", {}, "did you mean .*resnet18"),
        ("torchvision:xyzzy", {}, "list_models"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "those of the checkpoint"),
        ("torchvision:resnet18", {"widht": 3}, "widht"),
    ],
)
def test_what_torchvision_has_not(reference: str, arguments: dict, told: str):
    with pytest.raises(ArchitectureError, match=told):
        build_model(Architecture(reference, arguments))


@needs_timm
@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("timm:lcnet_05", "did you mean .*lcnet_050"),
        ("timm:hf-hub:timm/lcnet_050", "has no architecture"),
    ],
)
def test_what_timm_has_not(reference: str, told: str):
    with pytest.raises(ArchitectureError, match=told):
        build_model(Architecture(reference))


@needs_timm
def test_torchvision_and_timm_agree_on_resnet18():
    known = of(*(Architecture(f"{each}:resnet18") for each in ("torchvision", "timm")))
    bare = weights("torchvision:resnet18", num_classes=3)
    found = recognise(bare, known=known)
    assert found.architecture == Architecture("torchvision:resnet18", {"num_classes": 3})
    assert found.alternatives == (Architecture("timm:resnet18", {"num_classes": 3}),)


@needs_timm
def test_padding_as_in_tensorflow_is_asked_about():
    # Their tensors are the same; one pads unevenly and has another epsilon.
    lite = [
        Architecture(f"timm:{name}") for name in ("efficientnet_lite0", "tf_efficientnet_lite0")
    ]
    tensors = weights("timm:tf_efficientnet_lite0", num_classes=5)
    with pytest.raises(AmbiguousArchitectureError) as raised:
        recognise(tensors, known=of(*lite))
    named = [[replace(member, arguments={}) for member in each] for each in raised.value.classes]
    assert named == [[lite[0]], [lite[1]]]
    found = recognise(tensors, names=["tf_efficientnet_lite0.in1k"], known=of(*lite))
    assert found.architecture == Architecture(lite[1].reference, {"num_classes": 5})


def test_a_file_that_registers_operators_is_run_once(tmp_path: Path):
    path = tmp_path / "net.py"
    path.write_text(
        "import torch\n"
        "from torch import nn\n"
        "LIBRARY = torch.library.Library('structconv_test_recognition', 'DEF')\n"
        "LIBRARY.define('twice(Tensor x) -> Tensor')\n"
        "def net(): return nn.Linear(2, 2)\n"
    )
    assert isinstance(build_model(Architecture(f"{path}:net")), nn.Linear)
    assert isinstance(build_model(Architecture(f"{path}:net")), nn.Linear)
    path.write_text("from torch import nn\ndef net(): return nn.ReLU(inplace=True)\n")
    assert isinstance(build_model(Architecture(f"{path}:net")), nn.ReLU)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import any_checkpoint

    yield any_checkpoint
    sys.modules.pop("any_checkpoint", None)


@pytest.mark.slow
@needs_timm
def test_nearly_all_architectures_convert(table):
    outcomes = [
        table.in_own_process(reference, size, name_it=False)
        for reference, size in table.catalogue().items()
    ]
    assert len(outcomes) >= 60
    assert sum(outcome.exact for outcome in outcomes) >= 0.95 * len(outcomes)
    assert all(outcome.reason for outcome in outcomes if not outcome.exact)
    assert [outcome.reference for outcome in outcomes if not outcome.right] == []
