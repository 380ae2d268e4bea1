"""ONNX Runtime's execution providers, which run a model on a kind of device."""

from collections.abc import Sequence

from structconv_cli.errors import BenchmarkError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""The provider for each device that layers can be timed on."""

_SUFFIX = "ExecutionProvider"
_PACKAGES = {
    "cpu": "Install ONNX Runtime with `pip install onnxruntime`.",
    "cuda": (
        "Remove the CPU package with `pip uninstall onnxruntime` and install the one for NVIDIA "
        "GPUs with `pip install onnxruntime-gpu`."
    ),
    "tensorrt": (
        "Install TensorRT, and in place of the CPU package `pip install onnxruntime-gpu`."
    ),
    "openvino": "In place of the CPU package, `pip install onnxruntime-openvino`.",
    "coreml": "It is part of ONNX Runtime's package for macOS.",
    "dml": "In place of the CPU package, on Windows, `pip install onnxruntime-directml`.",
}
_BUILD = "Install a build of ONNX Runtime that has it."


def check_device(device: str) -> None:
    """Check that there is a provider for a device.

    Raises:
        BenchmarkError: The device is not in `PROVIDERS`.
    """
    if device not in PROVIDERS:
        raise BenchmarkError(f"Unknown device '{device}'. Choose one of: {', '.join(PROVIDERS)}.")


def short_name(provider: str) -> str:
    """A provider's name without what all of them end in, in small letters: "cuda"."""
    return provider.removesuffix(_SUFFIX).casefold()


def require_provider(name: str, available: Sequence[str]) -> str:
    """Return ONNX Runtime's own name of a provider.

    Args:
        name: Its name, short ("cuda", "tensorrt") or long ("CUDAExecutionProvider").
        available: The providers that the installed ONNX Runtime has.

    Raises:
        BenchmarkError: It is not available, or there is none of this name.
    """
    short = name.casefold().removesuffix(_SUFFIX.casefold())
    for provider in available:
        if short_name(provider) == short:
            return provider
    remedy = _PACKAGES.get(short, _BUILD)
    raise BenchmarkError(
        f"Provider '{name}' is not part of the installed ONNX Runtime, which has "
        f"{', '.join(available)}. {remedy}"
    )
