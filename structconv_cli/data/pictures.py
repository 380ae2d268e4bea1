"""Encoded images and masks, from any source, and their pixels once they are asked for."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from structconv_cli.errors import DataError

MODES = {1: "L", 3: "RGB"}
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


class DamagedImageError(Exception):
    """An image that cannot be read; its text is the image's name."""


class Source(Protocol):
    """Encoded images, by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call an image."""

    def open(self, index: int) -> Image.Image:
        """Read an image's header; its pixels are decoded later. Raises anything if damaged."""


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])

    def open(self, index: int) -> Image.Image:
        """As `Source.open`."""
        return Image.open(self.paths[index])


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images (N, C, H, W), uint8, or masks (N, H, W), decoded when they are asked for: `Rows`.

    Attributes:
        source: where they come from.
        height, width: in pixels, of all.
        channels: 1 to read them as grey, 3 as RGB; None for masks of class indices.
        scaled: whether images are scaled and centre-cropped to this size; else they must have it.
        like: the name of an image of this size, for messages.
        dtype: uint8; int32 for masks of more than 8 bits.
    """

    source: Source
    height: int
    width: int
    channels: int | None
    scaled: bool
    like: str
    dtype: type[np.uint8] | type[np.int32] = np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W), or (N, H, W) for masks."""
        return (len(self), *self.row_shape)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(C, H, W), or (H, W) for masks."""
        size = (self.height, self.width)
        return size if self.channels is None else (self.channels, *size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        rows = np.empty((len(indices), *self.row_shape), self.dtype)
        with quiet_pillow():
            for row, index in zip(rows, indices.tolist(), strict=True):
                try:
                    row[...] = self.decode(index)
                except DamagedImageError as error:
                    raise DataError(
                        f"The image {error} cannot be decoded, though its header can be read: "
                        "restore or remove it."
                    ) from error
        return torch.from_numpy(rows)

    def decode(self, index: int) -> npt.NDArray[Any]:
        """Decode one image to uint8 (C, H, W), or one mask to (H, W).

        Raises:
            DataError: the image is sound, but of another size or of an unsuitable kind.
            DamagedImageError: it cannot be read.
        """
        name = self.source.name(index)
        try:
            with self.source.open(index) as image:
                check_kind(image, name, mask=self.channels is None)
                if not self.scaled:
                    check_size(image.size, name, (self.width, self.height), self.like)
                if self.channels is None:
                    decoded = Image.fromarray(np.asarray(image).astype(np.int32))
                else:
                    decoded = image.convert(MODES[self.channels])
        except DataError:
            raise
        except Exception as error:
            # Pillow's decoders raise anything on damaged files.
            raise DamagedImageError(name) from error
        if self.scaled:
            bilinear = self.channels is not None
            how = Image.Resampling.BILINEAR if bilinear else Image.Resampling.NEAREST
            decoded = ImageOps.fit(decoded, (self.width, self.height), how)
        pixels = np.asarray(decoded)
        if self.channels is None:
            return pixels.astype(self.dtype)
        return pixels.reshape(self.height, self.width, self.channels).transpose(2, 0, 1)


def check_kind(image: Image.Image, name: str, *, mask: bool) -> None:
    """Check, by its header, that an image can be used.

    Raises:
        DataError: it has more than 8 bits per value, or is a mask of colours or in a JPEG file.
        DamagedImageError: it has more pixels than any sound image.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DamagedImageError(name)
    if mask and image.mode not in _MASK_MODES:
        raise DataError(
            f"The mask {name} has colours (Pillow's mode {image.mode}), and colours are no class "
            "indices: save masks as grey or palette images whose values are the classes."
        )
    if mask and image.format == "JPEG":
        raise DataError(
            f"The mask {name} is a JPEG file, whose compression changes values, and so classes: "
            "save masks as PNG, from the labels themselves."
        )
    if not mask and image.mode.startswith(("I", "F")):
        raise DataError(
            f"The image {name} has more than 8 bits per value (Pillow's mode {image.mode}): "
            "convert the images to 8 bits, or give an .npz file with float values."
        )


def check_size(size: tuple[int, int], name: str, like_size: tuple[int, int], like: str) -> None:
    """Check that an image has the size (width, height) of another.

    Raises:
        DataError: it has not.
    """
    if size != like_size:
        raise DataError(
            f"The image {name} is {size[0]}x{size[1]} pixels, while {like} is "
            f"{like_size[0]}x{like_size[1]}: give --size to bring all to one size."
        )


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's remarks on odd files: what cannot be used is counted and named."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield
