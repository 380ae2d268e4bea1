"""Where a benchmark's figures were taken: the machine, and the software that ran the models."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Environment:
    """Where the figures were taken.

    Attributes:
        cpu: The processor's model name.
        cores: Logical cores that this process may use.
        memory_bytes: The machine's memory (bytes).
        os: The operating system and its version.
        python: Python's version.
        onnxruntime: ONNX Runtime's version.
        provider: The execution provider that every session reported.
        spinning: Whether waiting threads spin.
        affinity: The logical cores that the sessions were held to, such as "0-1"; empty for all
            that this process may use.
    """

    cpu: str
    cores: int
    memory_bytes: int
    os: str
    python: str
    onnxruntime: str
    provider: str
    spinning: bool = True
    affinity: str = ""


def describe_environment(
    onnxruntime: str, provider: str, spinning: bool = True, affinity: str = ""
) -> Environment:
    """Describe this machine, and what the sessions on it reported.

    Args:
        onnxruntime: ONNX Runtime's version.
        provider: The execution provider of every session.
        spinning: Whether their waiting threads spin.
        affinity: The logical cores that they are held to; empty for all that are allowed.
    """
    return Environment(
        cpu=_cpu_name(),
        cores=len(allowed_cores()),
        memory_bytes=psutil.virtual_memory().total,
        os=platform.platform(),
        python=platform.python_version(),
        onnxruntime=onnxruntime,
        provider=provider,
        spinning=spinning,
        affinity=affinity,
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine() or "unknown"


def allowed_cores() -> frozenset[int]:
    """The logical cores that this process may use, by number."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
