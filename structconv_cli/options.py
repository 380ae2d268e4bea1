"""Arguments and options that commands share: their types, limits and help."""

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="Trained weights: a checkpoint, safetensors, a .pt2 or TorchScript archive, a run "
        "folder; or an ONNX file, which is not tuned."
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="Model",
        help="What builds a checkpoint's model: FILE.py:FACTORY, torchvision:NAME, timm:NAME or "
        "PACKAGE.MODULE:FACTORY. It is run. Without it, the weights tell, if it is a known one.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="Data",
        help="`digits` (the bundled sample), a folder of class folders of images (or of train/ "
        "and val/ with these), a folder of images/ and masks/, an .npz of x and y, or hf:NAME, a "
        "Hugging Face dataset or a folder of one. Not with --task.",
    ),
]
Task = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel="Data",
        help="FILE.py with your own loaders, loss and metric (see README.md), in place of --data. "
        "It is run.",
    ),
]
ArchArg = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel="Model",
        metavar="KEY=VALUE",
        help="Argument of the factory; may be repeated.",
    ),
]
Out = Annotated[Path, typer.Option(rich_help_panel="Run folder", help="Run folder to write.")]
Force = Annotated[
    bool,
    typer.Option("--force", rich_help_panel="Run folder", help="Replace an existing run folder."),
]
N = Annotated[
    int, typer.Option(rich_help_panel="Structure", help="Spatial size of the reduced kernels.")
]
Channels = Annotated[
    float,
    typer.Option(
        rich_help_panel="Structure",
        help="Fraction of the input channels to keep; 1 leaves them alone.",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel="Structure",
        help="Plan file (as plan.json in a run folder), instead of --n, --channels.",
    ),
]
Size = Annotated[
    int | None, typer.Option(rich_help_panel="Data", min=1, help="Scale images to SIZE x SIZE.")
]
Mean = Annotated[
    str,
    typer.Option(rich_help_panel="Data", help="Per channel, on values in 0..1: 0.485,0.456,0.406."),
]
Std = Annotated[str, typer.Option(rich_help_panel="Data", help="Per channel: 0.229,0.224,0.225.")]
ValSplit = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Data", help="Fraction to validate on, if the data has no such part."
    ),
]
IgnoreLabel = Annotated[
    int,
    typer.Option(
        rich_help_panel="Data", min=0, help="Mask pixels of this value are not learned or judged."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        rich_help_panel="Data",
        min=0,
        help="Processes that decode images that do not fit in memory. By default by the cores.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        rich_help_panel="Fine-tuning", min=0, help="Seed of splits, order and augmentation."
    ),
]
Forms = Annotated[
    str,
    typer.Option(
        help="measure: time every layer's ONNX forms here, take the fastest. Or one form for all, "
        "for reproducible builds: split, banded, sliced or prefix (channels), average or ones "
        "(space), or one of each, such as split+average.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="ONNX Runtime's threads in a run.")]
ImagesPerRun = Annotated[int, typer.Option(min=1, help="Images per run.")]
Timings = Annotated[
    Path | None,
    typer.Option(help="File of known timings. By default in the user's cache folder."),
]
Run = Annotated[
    Path, typer.Argument(help="Run folder that `structconv convert` wrote.", show_default=True)
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE|-", help="Write the result as JSON; - prints it, and no tables."
    ),
]
Model = Annotated[Path, typer.Argument(help="An ONNX file, trained weights, or a run folder.")]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        "--input",
        rich_help_panel="Model",
        metavar="SHAPE",
        help="Sizes of an input with open axes: NAME=1x3x224x224; the name may be left out for a "
        "checkpoint, whose sizes are guessed without it.",
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        rich_help_panel="Model",
        help="Unpickle a pickled module, which runs whatever code its file asks for. Only for "
        "files from people you trust.",
    ),
]
PlanOut = Annotated[
    Path,
    typer.Option(help="Plan file to write; beside it its .prediction.json and a picture, .png."),
]
ForcePlan = Annotated[bool, typer.Option("--force", help="Replace an existing plan file.")]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(rich_help_panel="Target", help="How many times as fast the model is to be: 1.5."),
]
TargetLatency = Annotated[
    str | None, typer.Option(rich_help_panel="Target", help="Time of one run at most: 5ms.")
]
TargetMacs = Annotated[
    float | None,
    typer.Option(rich_help_panel="Target", help="Share of the MACs that may be left: 0.5."),
]
TargetParams = Annotated[
    float | None,
    typer.Option(rich_help_panel="Target", help="Share of the parameters that may be left: 0.5."),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Target",
        help="Points of accuracy that may be lost: the fastest plan that holds it.",
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="Data",
        help="Images to predict losses from: `digits`, a folder of class folders, or an .npz of x "
        "and y. Without it, losses are estimated from the weights.",
    ),
]
PlanImages = Annotated[
    int,
    typer.Option(
        rich_help_panel="Data",
        min=2,
        help="Training images to use: half to fit weights to, half to predict losses on.",
    ),
]
PlanSeconds = Annotated[
    float,
    typer.Option(
        rich_help_panel="Data",
        min=1,
        help="About how long predicting may take; what is not measured then is interpolated.",
    ),
]
Untuned = Annotated[
    bool,
    typer.Option(
        "--no-finetune",
        help="Plan for a model that is not fine-tuned, as an ONNX file never is: for the least "
        "loss before fine-tuning instead of the least behind it.",
    ),
]
JudgedPlan = Annotated[
    Path | None,
    typer.Option("--plan", help="Predict what this plan file does, instead of making a plan."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        rich_help_panel="Structure",
        help="Plan and predict only, as `structconv plan` does; writes only plan.json.",
    ),
]
RunBatch = Annotated[
    int,
    typer.Option(rich_help_panel="Target", min=1, help="Images per run that it is to be fast for."),
]
RunThreads = Annotated[
    int,
    typer.Option(
        rich_help_panel="Target", min=1, help="ONNX Runtime's threads that it is to be fast with."
    ),
]
