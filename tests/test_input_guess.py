"""The size of a model's images, told by the model or tried."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.input_guess import guess_input, program_shapes


def head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, 3)]


POOLED = [nn.AdaptiveAvgPool2d(1), *head(4)]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), *POOLED), (1, 3, 224, 224)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), *head(4 * 26 * 26)), (1, 1, 28, 28)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), *head(4 * 30 * 30)), (1, 3, 32, 32)),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), *head(4)), (1, 2, 224)),
        (nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), *POOLED), (1, 6, 224, 224)),
    ],
)
def test_channels_are_the_first_convolutions_and_the_size_one_that_runs(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    guess = guess_input(model)
    assert guess.shapes == {"input": shape}
    assert f"{shape[1]} channels" in guess.why
    assert f"{shape[2]} is the first" in guess.why


def test_metadata_is_believed_if_the_model_runs_on_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *POOLED)
    model.default_cfg = {"input_size": (3, 40, 48)}  # type: ignore[assignment]
    assert guess_input(model).shapes == {"input": (1, 3, 40, 48)}
    assert "metadata" in guess_input(model).why
    model.default_cfg = {"input_size": (5, 40, 48)}  # type: ignore[assignment]
    assert guess_input(model).shapes == {"input": (1, 3, 224, 224)}
    model.default_cfg = SimpleNamespace()  # type: ignore[assignment]
    model.image_size = 50  # type: ignore[assignment]
    assert guess_input(model).shapes == {"input": (1, 3, 50, 50)}


def test_what_cannot_be_guessed_is_asked_for() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
            return image

    with pytest.raises(ArchitectureError, match=r"2 inputs \(image, mask\).*--input-shape image="):
        guess_input(Two())
    with pytest.raises(ArchitectureError, match="no convolution"):
        guess_input(nn.Linear(3, 4))
    odd = nn.Sequential(nn.Conv2d(3, 4, 3), *head(17))
    with pytest.raises(ArchitectureError, match=r"1x3xSIZExSIZE.*--input-shape 1x3x224x224"):
        guess_input(odd)


def test_a_program_tells_its_inputs() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return image.mean((2, 3)) + mask

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Two(),
        (torch.zeros(2, 3, 8, 9), torch.zeros(2, 3)),
        dynamic_shapes=({0: batch, 2: torch.export.Dim("height")}, {0: batch}),
    )
    assert program_shapes(program).shapes == {"image": (1, 3, 8, 9), "mask": (1, 3)}
    one = torch.export.export(nn.Conv2d(3, 4, 3), (torch.zeros(2, 3, 7, 9),))
    assert program_shapes(one).shapes == {"input": (1, 3, 7, 9)}
