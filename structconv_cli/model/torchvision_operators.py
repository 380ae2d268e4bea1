"""Letting torchvision be imported where its compiled operators do not load.

PyPI's torchvision for Linux is built for CUDA, and its operators do not load beside a CPU build of
torch. The import then stops at "operator torchvision::nms does not exist", though no architecture
needs the operators until it runs: that they are declared is enough.
"""

import importlib.util
from pathlib import Path

import torch

_MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []
"""torch forgets what a library declared when the library is collected."""


def declare_missing_operators() -> None:
    """Declare the operators that importing torchvision asks for, if it is installed and cannot load
    its own.

    Running one of them then fails with torch's message that it has no implementation.
    """
    spec = importlib.util.find_spec("torchvision")
    if _declared or spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _MISSING:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)


def _loads(package: Path) -> bool:
    """Whether the package's compiled operators can be loaded here; they are then."""
    for file in (*package.glob("_C*.so"), *package.glob("_C*.pyd")):
        try:
            torch.ops.load_library(file)  # type: ignore[no-untyped-call]
        except (OSError, ImportError):
            return False
        return True
    return False
