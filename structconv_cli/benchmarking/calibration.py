"""What the ranges of a quantised model's activations are taken from."""

import numpy as np
import onnx

from structconv_cli.benchmarking.images import Images
from structconv_cli.benchmarking.subjects import Subject
from structconv_cli.errors import StructconvError
from structconv_cli.onnx.example_inputs import example_inputs
from structconv_cli.onnx.graph import Graph
from structconv_cli.reference import REAL
from structconv_cli.rivals.making import Calibration

_IMAGES = 256
_NOISE = 8


def calibration_for(
    original: Subject, model: onnx.ModelProto, images: Images | None
) -> Calibration:
    """Training images if there are any; else the inputs that the run keeps; else noise.

    Args:
        original: The model to be quantised.
        model: The same, loaded.
        images: Images that fit it; None for none.
    """
    names = Graph(model).inputs
    if images is not None:
        drawn = images.calibration(_IMAGES)
        source = f"{len(drawn)} training images of {images.spec.source}"
        return Calibration({names[0]: drawn}, source)
    kept = _reference(original, names)
    if kept is not None:
        return kept
    noise = example_inputs(model, _NOISE, {})
    return Calibration(noise, "noise, for lack of data: its accuracy means nothing")


def _reference(original: Subject, names: tuple[str, ...]) -> Calibration | None:
    if original.run is None:
        return None
    from structconv_cli.artifacts import load_tensors

    try:
        tensors = load_tensors(original.run.reference)
        feeds = {name: tensors[f"{REAL}.{name}"].numpy() for name in names}
    except (StructconvError, KeyError):
        return None
    count = len(next(iter(feeds.values())))
    return Calibration(
        {name: np.asarray(array) for name, array in feeds.items()},
        f"the {count} inputs that the run folder keeps",
    )
