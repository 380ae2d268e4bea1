"""Options of `benchmark`: their types, limits and help."""

from pathlib import Path
from typing import Annotated

import typer

Models = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[MODEL.onnx | RUN]...",
        help="ONNX files, and run folders that `structconv convert` wrote, which hold two models "
        "each. By default structconv-run.",
        show_default=False,
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(help="Name or file of the model that the others are compared with: the first."),
]
Threads = Annotated[
    str, typer.Option(metavar="N[,N...]", help="ONNX Runtime's threads in a run: 1,2.")
]
BatchSizes = Annotated[
    str, typer.Option("--batch-size", metavar="N[,N...]", help="Images in a run: 1,8.")
]
Rounds = Annotated[
    int | None, typer.Option(min=1, help="Interleaved rounds to measure. By default 30.")
]
Duration = Annotated[
    float | None,
    typer.Option(min=0.1, help="Seconds to measure each setting for, instead of --rounds."),
]
Blocks = Annotated[
    int,
    typer.Option(
        min=1,
        help="Parts of the rounds; for each, all processes start anew. With fewer than 6, a "
        "process's luck with its memory can pass for a difference.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda: the provider of this name.", show_default="cpu")
]
Provider = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="ONNX Runtime",
        help="Any execution provider of the installed ONNX Runtime: cuda, tensorrt, openvino, "
        "coreml, or its long name.",
    ),
]
Spinning = Annotated[
    str,
    typer.Option(
        rich_help_panel="ONNX Runtime",
        metavar="on|off",
        help="Whether waiting threads spin, as they do in ONNX Runtime by default.",
    ),
]
Affinity = Annotated[
    str,
    typer.Option(
        rich_help_panel="ONNX Runtime",
        metavar="CORES",
        help="Logical cores to hold the models to: 0-1, or 0,2.",
    ),
]
Input = Annotated[
    Path | None,
    typer.Option(
        "--input",
        rich_help_panel="Data",
        help="FILE.npy, or FILE.npz of arrays by the inputs' names, to run on.",
    ),
]
Images = Annotated[
    str | None,
    typer.Option(
        "--data",
        rich_help_panel="Data",
        help="Images to run on, to calibrate on and, where they have labels, to judge by: as for "
        "`convert`. By default inputs are random.",
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel="Rivals",
        metavar="int8|fp16|FILE.onnx",
        help="Compare with another way to make the baseline faster: static INT8, float16, or a "
        "file of yours. May be repeated. Accuracy is compared on --data, or on the run's.",
    ),
]
PerLayer = Annotated[
    bool,
    typer.Option("--per-layer", help="Show which layers gained, and how near each is to the peak."),
]
FailBelow = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Exit with status 3 unless every candidate's speed-up is at least this, the lower end "
        "of its interval, in every setting: 1.3. Rivals do not count.",
    ),
]
MarkdownOut = Annotated[
    str | None,
    typer.Option(
        "--markdown",
        metavar="FILE|-",
        help="Write a summary for pull requests; - prints it, and no tables.",
    ),
]
