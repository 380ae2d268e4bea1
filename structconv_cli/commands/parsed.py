"""What several commands make of their options."""

from typing import TYPE_CHECKING, cast, get_args

import typer

if TYPE_CHECKING:
    from structconv_cli.data.spec import DataSpec
    from structconv_cli.planning.targets import Targets
    from structconv_cli.training.hardware import Hardware


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


def parse_hardware(device: str, precision: str, channels_last: bool, compiled: bool) -> "Hardware":
    """Where and how to train.

    Raises:
        typer.BadParameter: a name is not known.
    """
    import torch

    from structconv_cli.training.hardware import Hardware, Precision

    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--train-device is auto, cpu or cuda; found {device!r}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision not in get_args(Precision):
        raise typer.BadParameter(f"--precision is fp32 or bf16; found {precision!r}.")
    return Hardware(device, cast(Precision, precision), channels_last, compiled)


def _floats(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers separated by commas, such as 0.5,0.5,0.5; found {text!r}."
        ) from None
