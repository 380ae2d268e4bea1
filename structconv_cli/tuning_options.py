"""Options of fine-tuning: their types, limits and help."""

from typing import Annotated

import typer

Epochs = Annotated[
    int | None,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=0,
        help="Epochs of fine-tuning in all; 6 by default.",
    ),
]
NoFinetune = Annotated[
    bool,
    typer.Option(
        "--no-finetune",
        rich_help_panel="Fine-tuning",
        help="Do not train: fit the weights by least squares to what the layers put out on a few "
        "hundred training images. The same as --epochs 0.",
    ),
]
SrEpochs = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=0,
        help="Epochs of these with structural regularisation, which end inside the structure; "
        "the others tune inside it. By default a tenth (--recipe paper: all).",
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        rich_help_panel="Fine-tuning",
        help="default, or paper: the structural loss alone, at a fixed lambda, then projection.",
    ),
]
Accumulate = Annotated[
    int,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=1,
        help="Steps whose gradients are added up before the weights change.",
    ),
]
StopAtDrop = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Fine-tuning",
        help="Stop early once no more than this is lost, in points of the metric.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        rich_help_panel="Run folder",
        help="Go on with an interrupted conversion, if there is one (OUT.partial).",
    ),
]
TrainDevice = Annotated[
    str,
    typer.Option(
        rich_help_panel="Training hardware",
        help="auto, cpu or cuda. Under torchrun each process takes a GPU.",
    ),
]
TrainPrecision = Annotated[
    str,
    typer.Option(
        "--precision",
        rich_help_panel="Training hardware",
        help="fp32, or bf16 (autocast): up to twice as fast where the processor has it, much "
        "slower where it has not.",
    ),
]
ChannelsLast = Annotated[
    bool,
    typer.Option(
        "--channels-last",
        rich_help_panel="Training hardware",
        help="Lay out images and weights so: quicker on GPUs, and for most networks on CPUs.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", rich_help_panel="Training hardware", help="Train with torch.compile."
    ),
]
SrLambda = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=0,
        help="Weight of the structural regularisation loss. By default 0.1.",
    ),
]
Distill = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=0,
        max=1,
        help="Share of the loss that follows the original model's outputs; the rest follows the "
        "labels. By default 0.9 for classification, 0.5 otherwise; use less, or 0, if the "
        "original is poor on this data.",
    ),
]
Hints = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=0,
        help="Weight of the distance between what blocks put out and what the original's do, "
        "added to the loss. By default 0.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=2,
        help="Images per training step, of all processes together.",
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=0,
        help="Peak learning rate, which falls as a cosine. By default 0.02; 0.001 for adamw.",
    ),
]
OptimizerName = Annotated[
    str,
    typer.Option(
        "--optimizer",
        rich_help_panel="Fine-tuning",
        help="sgd (Nesterov momentum 0.9), or adamw, for networks that were trained with it.",
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="Fine-tuning",
        min=0,
        help="Weight decay. By default 0.0005; 0.01 for adamw.",
    ),
]
Augment = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="Data",
        help="Random changes to training images, such as crop,flip, or none. Known: crop, flip, "
        "resized-crop, vflip, rotate, color, erase. By default crop, and flip where the "
        "original is as right on mirror images. Not with --task.",
    ),
]
