"""What was measured for one number of threads and one batch size."""

from dataclasses import dataclass

from structconv_cli.timing.conditions import Conditions
from structconv_cli.timing.layer_times import LayerComparison
from structconv_cli.timing.model_timing import ModelTiming
from structconv_cli.timing.speedup import Speedup


@dataclass(frozen=True)
class SettingResult:
    """What was measured for one number of threads and one batch size.

    Attributes:
        threads: ONNX Runtime's intra-op threads of every session.
        batch_size: Images in one run.
        input_shapes: Shape of each input, batch axis included, by the input's name.
        models: The models' figures, the baseline's first.
        speedups: Each later model over the baseline.
        blocks: For every round, the number (from 0) of its block: for each block, all models'
            processes were started anew.
        conditions: What else the machine did meanwhile.
        layers: Where the time goes, one comparison for each model that was lowered from the
            baseline by structconv; empty unless it was asked for.
        warnings: What a reader must know before trusting these figures, one sentence each.
        partial: Whether the measurement was interrupted; the figures are of the rounds till then.
    """

    threads: int
    batch_size: int
    input_shapes: dict[str, tuple[int, ...]]
    models: tuple[ModelTiming, ...]
    speedups: tuple[Speedup, ...]
    blocks: tuple[int, ...]
    conditions: Conditions
    layers: tuple[LayerComparison, ...] = ()
    warnings: tuple[str, ...] = ()
    partial: bool = False
