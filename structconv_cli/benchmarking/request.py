"""What a benchmark is asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

from structconv_cli.benchmarking.protocol import Protocol
from structconv_cli.benchmarking.subjects import Subject
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import BenchmarkError
from structconv_cli.timing.settings import BenchmarkSettings


@dataclass(frozen=True)
class BenchmarkRequest:
    """What a benchmark is asked to do.

    Attributes:
        subjects: The models, the baseline first.
        threads: ONNX Runtime's intra-op threads, each to be measured.
        batch_sizes: Images in one run, each to be measured with every number of threads.
        provider: ONNX Runtime's execution provider, by its short or long name.
        spinning: Whether waiting threads spin.
        affinity: Logical cores that the models are held to; empty for all.
        protocol: How long, and from which seed.
        against: Rivals of the baseline: "int8", "fp16", or ONNX files.
        data: Images to run on, to calibrate on and, with labels, to judge by; None for none.
        inputs: A NumPy file of inputs to run on; None for images or noise.
        per_layer: Whether to tell where the time goes.
        command: The command line's words, for the record.

    Raises:
        BenchmarkError: Two of these contradict one another.
    """

    subjects: tuple[Subject, ...]
    threads: tuple[int, ...] = (1,)
    batch_sizes: tuple[int, ...] = (1,)
    provider: str = "cpu"
    spinning: bool = True
    affinity: tuple[int, ...] = ()
    protocol: Protocol = field(default_factory=Protocol)
    against: tuple[str, ...] = ()
    data: DataSpec | None = None
    inputs: Path | None = None
    per_layer: bool = False
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.subjects:
            raise BenchmarkError(
                "There is no model to benchmark. Give at least one ONNX file or run folder."
            )
        # What is out of range is said before anything is loaded or made.
        for threads, batch_size in self.settings:
            self.setting(threads, batch_size)

    @property
    def settings(self) -> tuple[tuple[int, int], ...]:
        """Every number of threads with every batch size."""
        return tuple((t, b) for t in self.threads for b in self.batch_sizes)

    def setting(self, threads: int, batch_size: int) -> BenchmarkSettings:
        """How to measure one of them."""
        protocol = self.protocol
        return BenchmarkSettings(
            provider=self.provider,
            threads=threads,
            batch_size=batch_size,
            rounds=1 if protocol.rounds is None else protocol.rounds,
            round_ms=protocol.round_ms,
            warmup_ms=protocol.warmup_ms,
            seed=protocol.seed,
            duration_s=protocol.duration_s,
            blocks=protocol.blocks,
            spinning=self.spinning,
            affinity=self.affinity,
        )
