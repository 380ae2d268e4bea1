"""Whether architectures compute the same from the same weights: tried on a few images."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.signature import tensors_of
from structconv_cli.model.skeleton import skeleton

# Even and odd sizes tell ways of padding and rounding apart; large values reach where activations
# saturate. Models that take one size only mostly take the last two.
_IMAGES = ((96, 1.0), (97, 30.0), (224, 1.0), (299, 1.0))
_TOLERANCE = 1e-4
"""Relative to how far the images' outputs are apart: weights may leave little but a last bias."""
_LEAST_SPREAD = 1e-9
"""Relative to the outputs: below this, float64 does not show what the images do to them."""


def with_weights(architecture: Architecture, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build a model around the tensors, in float64 and eval mode.

    Raises:
        ArchitectureError: it cannot be built, or the tensors do not fit.
    """
    model = skeleton(architecture)
    doubles = {
        name: value.double() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    for name, value in model.state_dict().items():  # old files lack batch-norms' counters
        if name.endswith("num_batches_tracked") and name not in doubles:
            doubles[name] = torch.zeros_like(value)
    try:
        model.load_state_dict(doubles, assign=True)
    except RuntimeError as error:
        raise ArchitectureError(f"{architecture} does not take the file's tensors.") from error
    return model.double().eval()


def classes_of_equal(
    architectures: Sequence[Architecture], tensors: Mapping[str, Tensor]
) -> list[list[Architecture]]:
    """Group architectures whose outputs are equal on images of several sizes.

    The first of each group is the one that came first. Those that run on no images, or whose
    outputs cannot be compared, stay alone.
    """
    groups: list[tuple[list[list[Tensor] | None], list[Architecture]]] = []
    for architecture in architectures:
        outputs = _outputs(with_weights(architecture, tensors))
        group = next((members for known, members in groups if _equal(known, outputs)), None)
        if group is None:
            groups.append((outputs, [architecture]))
        else:
            group.append(architecture)
    return [members for _, members in groups]


def _outputs(model: nn.Module) -> list[list[Tensor] | None]:
    """Its outputs for each of the images; None for a size that it does not take."""
    channels = next((value.shape[1] for value in model.state_dict().values() if value.ndim == 4), 3)
    found: list[list[Tensor] | None] = []
    for (size, scale), seed in zip(_IMAGES, count(), strict=False):
        if size > 200 and any(outputs is not None for outputs in found):
            break
        generator = torch.Generator().manual_seed(seed)
        images = scale * torch.randn(2, channels, size, size, generator=generator).double()
        try:
            with torch.no_grad():
                outputs: Any = model(images)
            found.append(tensors_of(outputs))
        except Exception:  # noqa: BLE001 - a model may refuse a size in any way
            found.append(None)
    return found


def _equal(one: Sequence[list[Tensor] | None], other: Sequence[list[Tensor] | None]) -> bool:
    if len(one) != len(other) or all(outputs is None for outputs in one):
        return False
    return all(
        (here is None and there is None)
        or (here is not None and there is not None and _close(here, there))
        for here, there in zip(one, other, strict=True)
    )


def _close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return False
    for here, there in zip(one, other, strict=True):
        spread = float((here - here.mean(0)).norm())
        if spread <= _LEAST_SPREAD * float(here.norm()):
            return False
        if not float((here - there).norm()) <= _TOLERANCE * spread:
            return False
    return True
