"""The architectures of torchvision and timm, by name, without their trained weights.

Both packages are optional. Nothing is downloaded: the weights come from the user's checkpoint.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from structconv_cli.errors import ArchitectureError, one_line
from structconv_cli.model.torchvision_operators import declare_missing_operators

Library = Literal["torchvision", "timm"]
LIBRARIES: tuple[Library, ...] = ("torchvision", "timm")
_WEIGHTS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "checkpoint_path")


@dataclass(frozen=True)
class NamedModel:
    """One architecture of a library.

    Attributes:
        build: takes the architecture's arguments by keyword and returns the model.
        parameters: names of the arguments that say how many classes and input channels there are.
    """

    build: Callable[..., Any]
    parameters: tuple[str, ...]


def installed(library: Library) -> bool:
    """Whether a library is installed; it is not imported."""
    return importlib.util.find_spec(library) is not None


def version(library: Library) -> str:
    """An installed library's version."""
    return importlib.metadata.version(library)


def model_names(library: Library) -> list[str]:
    """All names of a library.

    Raises:
        ArchitectureError: it is not installed, or cannot be imported.
    """
    module = _imported(library)
    names: list[str] = (
        module.models.list_models() if library == "torchvision" else (module.list_models())
    )
    # Quantised models have the tensors of the plain ones until they are quantised.
    return [name for name in names if not name.startswith("quantized_")]


def named_model(library: Library, name: str) -> NamedModel:
    """Find an architecture by name.

    Raises:
        ArchitectureError: the library is not installed or cannot be imported, or has no such name.
    """
    module = _imported(library)
    if library == "timm":
        # A tag after the dot says which trained weights; the architecture is the same.
        plain, _, _ = name.partition(".")
        if ":" not in name and "/" not in name and module.is_model(plain):
            build = partial(_quietly, module.create_model, plain, pretrained=False)
            return NamedModel(build, ("num_classes", "in_chans"))
    elif name in module.models.list_models():
        builder = module.models.get_model_builder(name)
        taken = inspect.signature(builder).parameters
        none = {key: None for key in ("weights", "weights_backbone") if key in taken}
        return NamedModel(partial(_quietly, builder, **none), ("num_classes",))
    known = model_names(library)
    near = difflib.get_close_matches(name, known, n=4) or [key for key in known if name in key][:4]
    remedy = f"did you mean {' or '.join(near)}?" if near else "check the name."
    raise ArchitectureError(
        f"{library} {version(library)} has no architecture {name!r}: {remedy} "
        f"Its {len(known)} names are those of {library}"
        f"{'.models' if library == 'torchvision' else ''}.list_models()."
    )


def refuse_weights(reference: str, arguments: Mapping[str, object]) -> None:
    """Refuse arguments that would bring a library's own trained weights.

    Raises:
        ArchitectureError: there is one.
    """
    for key in _WEIGHTS:
        if arguments.get(key):
            raise ArchitectureError(
                f"The architecture argument {key}={arguments[key]!r} asks {reference} for trained "
                "weights: leave it out, as the weights are those of the checkpoint."
            )


def _imported(library: Library) -> Any:
    if not installed(library):
        raise ArchitectureError(
            f"The architectures of {library} need the package {library}, which is not installed: "
            f"`pip install {library}`."
        )
    declare_missing_operators()  # timm imports torchvision too
    try:
        return importlib.import_module(library)
    except (Exception, SystemExit) as error:
        raise ArchitectureError(
            f"The package {library} is installed, but importing it failed with "
            f"{type(error).__name__}: {one_line(error)}. Install a version that fits this torch: "
            f"`pip install --upgrade {library}`."
        ) from error


def _quietly(build: Callable[..., Any], *names: str, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        # About how random weights are drawn, and names that have changed.
        warnings.simplefilter("ignore")
        return build(*names, **arguments)
