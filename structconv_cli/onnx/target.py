"""Where a model is to be fast."""

from dataclasses import dataclass

import onnxruntime

from structconv_cli.timing.environment import describe_environment
from structconv_cli.timing.execution_provider import PROVIDERS, check_device


@dataclass(frozen=True)
class Target:
    """What to be fast on.

    Attributes:
        device: "cpu" or "cuda".
        threads: ONNX Runtime's intra-op threads.
        batch_size: images in one run.
    """

    device: str = "cpu"
    threads: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_device(self.device)

    @property
    def environment(self) -> str:
        """ONNX Runtime's version, provider, CPU and threads, as the cache's key."""
        provider = PROVIDERS[self.device]
        found = describe_environment(onnxruntime.__version__, provider)
        return f"onnxruntime {found.onnxruntime}, {provider}, {found.cpu}, {self.threads} threads"
