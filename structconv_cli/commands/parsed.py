"""What several commands make of their options."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from structconv_cli.data.spec import DataSpec
    from structconv_cli.planning.targets import Targets


def parse_targets(
    speedup: float | None,
    latency: str | None,
    macs: float | None,
    params: float | None,
    max_drop: float | None,
) -> "Targets":
    """The targets of a plan.

    Raises:
        PlanError: one is out of range, is no time, or contradicts another.
    """
    from structconv_cli.planning.targets import Targets, parse_latency

    ms = parse_latency(latency) if latency is not None else None
    return Targets(speedup, ms, macs, params, max_drop)


def parse_data(
    source: str,
    size: int | None,
    mean: str,
    std: str,
    val_split: float | None,
    seed: int,
    ignore_label: int = 255,
    workers: int | None = None,
) -> "DataSpec":
    """What data to load, and how.

    Raises:
        typer.BadParameter: the mean or the std are no lists of numbers.
    """
    from structconv_cli.data.spec import DataSpec

    means, stds = _floats("--mean", mean), _floats("--std", std)
    return DataSpec(source, size, means, stds, val_split, seed, ignore_label, workers)


def parse_augmentation(text: str) -> tuple[str, ...]:
    """The kinds of random changes to training images; none for "none".

    Raises:
        typer.BadParameter: one is unknown.
    """
    from structconv_cli.data.augmentation import AUGMENTATIONS

    kinds = tuple(kind for kind in text.split(",") if kind and kind != "none")
    if unknown := [kind for kind in kinds if kind not in AUGMENTATIONS]:
        raise typer.BadParameter(
            f"--augment knows {', '.join(AUGMENTATIONS)} and none; found {unknown[0]}."
        )
    return kinds


def _floats(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers separated by commas, such as 0.5,0.5,0.5; found {text!r}."
        ) from None
