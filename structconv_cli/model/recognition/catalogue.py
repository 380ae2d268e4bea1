"""Which architectures a checkpoint is compared with, in the order in which they are preferred."""

from pathlib import Path

from structconv_cli.model.architecture import Architecture
from structconv_cli.model.library import Library, model_names

_SAMPLES = Path(__file__).parents[3] / "sample_models"
_SEGMENTATION = ("deeplabv3_", "fcn_")
_AUXILIARY = ("googlenet", "inception_v3")


def sample_architectures() -> list[Architecture]:
    """Those of the sample models, in a checkout."""
    resnet, unet = _SAMPLES / "resnet_cifar.py", _SAMPLES / "unet.py"
    if not resnet.is_file() or not unet.is_file():
        return []
    resnets = [
        Architecture(f"{resnet}:resnet{depth}", arguments)
        for depth in (20, 32, 44, 56)
        for arguments in ({}, {"shortcut": "B"})
    ]
    widths = [Architecture(f"{unet}:unet", {"width": width}) for width in (16, 32, 64)]
    return [*resnets, *widths]


def library_architectures(library: Library) -> list[Architecture]:
    """Those of an installed library, each with the arguments that change its tensors or inputs.

    Raises:
        ArchitectureError: it is not installed, or cannot be imported.
    """
    found = []
    for name in sorted(model_names(library), key=lambda name: (len(name), name)):
        found.append(Architecture(f"{library}:{name}"))
        if library == "timm":
            continue
        # torchvision's own trained weights were made with these.
        if name.startswith(_SEGMENTATION):
            found.append(Architecture(f"{library}:{name}", {"aux_loss": True}))
        if name in _AUXILIARY:
            found += [
                Architecture(f"{library}:{name}", {"aux_logits": False}),
                Architecture(f"{library}:{name}", {"transform_input": True}),
                Architecture(f"{library}:{name}", {"aux_logits": False, "transform_input": True}),
            ]
    return found
