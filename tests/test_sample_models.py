import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
SAMPLES = REPO / "sample_models"
SHARED_CHECKPOINTS = REPO.parent / "shared" / "checkpoints"
sys.path.insert(0, str(SAMPLES))

import resnet_cifar  # noqa: E402
import train  # noqa: E402

DEPTHS = ["resnet20", "resnet32", "resnet44", "resnet56"]


def parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Table 6 of He et al. gives these in millions, to two digits.
@pytest.mark.parametrize(
    ("factory", "millions"), list(zip(DEPTHS, [0.27, 0.46, 0.66, 0.85], strict=True))
)
def test_parameter_count_is_the_published_one(factory: str, millions: float) -> None:
    count = parameter_count(getattr(resnet_cifar, factory)())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("factory", "file"),
    [("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")],
)
def test_published_checkpoint_loads_strictly(factory: str, file: str) -> None:
    path = SHARED_CHECKPOINTS / file
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in saved.items()}
    getattr(resnet_cifar, factory)().load_state_dict(state, strict=True)


def test_padded_shortcut_subsamples_and_centres_the_channels() -> None:
    x = torch.rand(2, 16, 7, 8)
    y = resnet_cifar.PaddedShortcut(8)(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_option_b_adds_a_convolution_and_batch_norm_per_change_of_stage() -> None:
    a = resnet_cifar.resnet20(shortcut="A").state_dict()
    b = resnet_cifar.resnet20(shortcut="B").eval()
    added = set(b.state_dict()) - set(a)
    assert set(a) <= set(b.state_dict())
    assert {name.rsplit(".", 2)[0] for name in added} == {"layer2.0.shortcut", "layer3.0.shortcut"}
    assert b.get_parameter("layer2.0.shortcut.0.weight").shape == (32, 16, 1, 1)
    assert b.get_parameter("layer3.0.shortcut.1.weight").shape == (64,)
    assert b(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("shortcut", ["C", "a", ""])
def test_unknown_shortcut_is_refused(shortcut: str) -> None:
    with pytest.raises(ValueError, match=f"shortcut must be 'A' .* or 'B' .*, not '{shortcut}'"):
        resnet_cifar.resnet20(shortcut=shortcut)


@pytest.mark.parametrize("factory", DEPTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_output_shape(factory: str, batch: int) -> None:
    model = getattr(resnet_cifar, factory)(num_classes=7, in_channels=2).eval()
    assert model(torch.rand(batch, 2, 32, 32)).shape == (batch, 7)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_exported_batch_stays_dynamic(shortcut: str) -> None:
    model = resnet_cifar.resnet20(shortcut=shortcut).eval()
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(model, (torch.rand(2, 3, 32, 32),), dynamic_shapes=(batch,))
    for size in (1, 3):
        x = torch.rand(size, 3, 32, 32)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_split_is_disjoint_and_stratified() -> None:
    data = train.load_data()
    assert data.train_x.shape == (1347, 1, 32, 32)
    assert data.test_x.shape == (450, 1, 32, 32)
    share = torch.bincount(data.test_y) / torch.bincount(torch.cat([data.train_y, data.test_y]))
    assert len(share) == 10
    assert ((share - 0.25).abs() < 0.01).all()
    # By content, not only by index: no image may stand on both sides.
    train_images = {image.numpy().tobytes() for image in data.train_x}
    assert not any(image.numpy().tobytes() in train_images for image in data.test_x)


def test_images_are_scaled_and_only_scaled() -> None:
    data = train.load_data()
    x = torch.cat([data.train_x, data.test_x])
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1


def test_random_shift_moves_each_image_without_wrapping() -> None:
    torch.manual_seed(0)
    x = torch.zeros(64, 1, 9, 9)
    x[:, :, 4, 4] = 1
    shifted = train.random_shift(x)
    assert shifted.shape == x.shape
    where = shifted.nonzero()[:, 2:] - 4
    assert len(where) == 64
    assert where.abs().max() == train.MAX_SHIFT
    assert len(where.unique(dim=0)) > 20
    assert train.random_shift(torch.ones(64, 1, 9, 9)).sum() < 64 * 81


def test_shipped_checkpoint_is_accurate_and_says_so() -> None:
    model, metadata = train.load_checkpoint()
    data = train.load_data()
    accuracy = train.accuracy(model, data.test_x, data.test_y)
    assert accuracy >= 0.98
    # Another CPU's rounding may turn a borderline image.
    assert accuracy == pytest.approx(metadata["test_accuracy"], abs=2 / 450)


@pytest.mark.slow
def test_one_epoch_of_training_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "new" / "digits.pt"
    command = [sys.executable, str(SAMPLES / "train.py"), "--epochs", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == ["digits.pt"]
    model, metadata = train.load_checkpoint(out)
    assert metadata["epochs"] == 1
    assert model(torch.rand(3, 1, 32, 32)).shape == (3, 10)


def test_make_data_reproduces_the_shipped_split(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="only making the data needs scikit-learn")
    path = tmp_path / "digits.npz"
    train.make_data(path)
    for made, shipped in zip(train.load_data(path), train.load_data(), strict=True):
        assert torch.equal(made, shipped)
