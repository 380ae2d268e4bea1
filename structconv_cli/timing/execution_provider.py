"""ONNX Runtime's execution providers, which run a model on a kind of device."""

from collections.abc import Sequence

from structconv_cli.errors import BenchmarkError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""The provider for each device that a benchmark can be asked for."""

_PACKAGES = {
    "cpu": "Install ONNX Runtime with `pip install onnxruntime`.",
    "cuda": (
        "Remove the CPU package with `pip uninstall onnxruntime` and install the one for NVIDIA "
        "GPUs with `pip install onnxruntime-gpu`."
    ),
}


def check_device(device: str) -> None:
    """Check that there is a provider for a device.

    Raises:
        BenchmarkError: The device is not in `PROVIDERS`.
    """
    if device not in PROVIDERS:
        raise BenchmarkError(f"Unknown device '{device}'. Choose one of: {', '.join(PROVIDERS)}.")


def require_provider(device: str, available: Sequence[str]) -> str:
    """Return the name of the provider for a device, which is one of `PROVIDERS`.

    Args:
        device: The device.
        available: The providers that the installed ONNX Runtime has.

    Raises:
        BenchmarkError: The provider is not available.
    """
    provider = PROVIDERS[device]
    if provider not in available:
        raise BenchmarkError(
            f"Device '{device}' needs ONNX Runtime's {provider}; the installed package "
            f"has {', '.join(available)}. {_PACKAGES[device]}"
        )
    return provider
