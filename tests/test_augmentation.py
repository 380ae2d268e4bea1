import pytest
import torch
from torch import Tensor

from structconv_cli.data.augmentation import AUGMENTATIONS, augment_batch

IGNORED = 200
KINDS = list(AUGMENTATIONS)
# They move pixels; the others change values.
GEOMETRIC = [kind for kind in KINDS if kind != "color"]


def pairs(dtype: torch.dtype, channels: int) -> tuple[Tensor, Tensor]:
    """Images that show their masks: 60 grey levels for each class, above 60."""
    masks = torch.zeros(32, 16, 24, dtype=torch.int64)
    masks[:, 4:, :9] += 1
    masks[:, 6:, 13:] += 2
    images = (60 + 60 * masks[:, None]).expand(-1, channels, -1, -1).to(torch.uint8)
    return (images if dtype == torch.uint8 else images.float() / 255), masks


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_images_keep_their_type_and_follow_the_seed(kind: str, dtype: torch.dtype, channels: int):
    images, masks = pairs(dtype, channels)
    before, state = images.clone(), torch.get_rng_state()
    first, _ = augment_batch(images, [kind], 3)
    assert (first.shape, first.dtype) == (images.shape, dtype)
    assert not torch.equal(first, images)
    assert torch.equal(first, augment_batch(images, [kind], 3, masks, IGNORED)[0])
    assert not torch.equal(first, augment_batch(images, [kind], 4)[0])
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", GEOMETRIC)
def test_masks_move_with_their_images(kind: str):
    images, masks = pairs(torch.uint8, 1)
    changed, moved = augment_batch(images, [kind], 5, masks, IGNORED)
    assert moved is not None
    assert moved.dtype == torch.int64
    assert set(moved.unique().tolist()) <= {0, 1, 2, IGNORED}
    shown = torch.where(moved == IGNORED, 0, 60 + 60 * moved)
    # Only along the borders of classes, where images are interpolated, may the two differ.
    assert ((changed[:, 0] - shown).abs() <= 30).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["crop", "rotate", "erase"])
def test_new_pixels_are_black_and_ignored(kind: str):
    images, masks = pairs(torch.uint8, 3)
    changed, moved = augment_batch(images, [kind], 6, masks, IGNORED)
    assert moved is not None
    black = (changed == 0).all(1)
    assert black.any()
    assert bool((moved[black] == IGNORED).all())


def test_colors_leave_masks_alone():
    images, masks = pairs(torch.uint8, 3)
    changed, kept = augment_batch(images, ["color"], 0, masks, IGNORED)
    assert kept is not None
    assert torch.equal(kept, masks)
    # One change for all pixels of one image: equal pixels stay equal.
    for image, mask in zip(changed, masks, strict=True):
        assert all(len(image[:, mask == label].unique(dim=1).T) == 1 for label in range(3))


def test_kinds_are_applied_in_one_order():
    images, _ = pairs(torch.uint8, 3)
    first, _ = augment_batch(images, ["erase", "crop", "vflip"], 1)
    assert torch.equal(first, augment_batch(images, ["vflip", "erase", "crop"], 1)[0])
