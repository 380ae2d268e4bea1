"""What a conversion is asked to do, and what came of it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from structconv_cli.cost import Cost, dense_cost, structured_cost
from structconv_cli.data.spec import DataSpec
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.inventory import Inventory
from structconv_cli.onnx.example_inputs import Shapes
from structconv_cli.onnx.lower import Lowering, LoweringSettings
from structconv_cli.plan import KeptLayer, Plan
from structconv_cli.planning.settings import ProposalSettings
from structconv_cli.planning.targets import Targets
from structconv_cli.reconstruction.result import ReconstructionRecord
from structconv_cli.structure import Structure
from structconv_cli.training.hardware import Hardware
from structconv_cli.training.recipe import Recipe
from structconv_cli.training.record import FineTuneResult

NOISE = 'The "real inputs" that the run folder keeps are noise, for lack of data.'
UNLABELLED = (
    "The images have no labels, so accuracy is unmeasured; how far the outputs are from the "
    "original's is."
)
_SLIMMED = "only the channels that it reads were left to it"


@dataclass(frozen=True)
class ConvertRequest:
    """What the user asked for.

    Attributes:
        checkpoint: the user's checkpoint file.
        architecture: what builds the model that it fits; None to recognise it.
        data: what to tune or fit, and judge on; None where the task file loads it, or there is
            none, and nothing is tuned.
        recipe: how to fine-tune.
        n, channels: the rule for all layers (see `planning.rule`), where there is no plan file.
        plan_file: a plan to obey instead.
        targets: what a plan is to be made for instead; empty for none.
        proposal: how such a plan is made.
        images: training images that it is made from.
        hardware: where to fine-tune.
        out: the run folder to write.
        force: whether an existing run folder, or an unfinished conversion, is replaced.
        resume: whether to go on with an unfinished conversion, if there is one.
        enough: drop, in the metric's unit, at which fine-tuning stops early; None to go on.
        lowering: how the ONNX forms are chosen.
        task: the user's own task file, which is run; None for the task that the data has.
        shapes: sizes of the model's inputs, where neither data nor a task file tells them; empty to
            guess them.
        trust_pickle: whether a pickled module's code may be run.
        command: the command line's words, for the record.
    """

    checkpoint: Path
    architecture: Architecture | None
    data: DataSpec | None
    recipe: Recipe
    n: int
    channels: float
    plan_file: Path | None
    out: Path
    force: bool
    lowering: LoweringSettings = field(default_factory=LoweringSettings)
    targets: Targets = field(default_factory=Targets)
    proposal: ProposalSettings = field(default_factory=ProposalSettings)
    images: int = 512
    hardware: Hardware = field(default_factory=Hardware)
    task: Path | None = None
    shapes: Shapes = field(default_factory=dict)
    trust_pickle: bool = False
    resume: bool = False
    enough: float | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerOutcome:
    """One layer after conversion.

    Attributes:
        name: the layer's name.
        structure: its structure; None if it was kept dense.
        note: the ONNX form it was lowered to, or why it was kept.
        before, after: cost for one image, all its runs in one forward pass together; None if the
            model never runs it.
    """

    name: str
    structure: Structure | None
    note: str
    before: Cost | None
    after: Cost | None


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` did.

    Attributes:
        layers: every convolution and linear layer.
        before, after: cost of these layers together, for one image.
        finetune: the metric stage by stage; no stages where there is nothing to judge by.
        original_bytes, structured_bytes: sizes of the two ONNX files.
        seconds: duration of the whole conversion, verification included.
        notes: what the user should know, one sentence each.
        reconstruction: how weights were found without training; None where they were tuned.
        schema: names this format and its version.
    """

    layers: tuple[LayerOutcome, ...]
    before: Cost
    after: Cost
    finetune: FineTuneResult
    original_bytes: int
    structured_bytes: int
    seconds: float
    notes: tuple[str, ...]
    reconstruction: ReconstructionRecord | None = None
    schema: Literal["structconv-convert/1"] = "structconv-convert/1"


def layer_outcomes(
    inventory: Inventory, plan: Plan, lowering: Lowering
) -> tuple[LayerOutcome, ...]:
    """What became of every layer of a plan, in the plan's order."""
    traced = {layer.spec.name: layer for layer in inventory.layers}
    forms = {entry.name: entry.form for entry in lowering.layers}
    reasons = {entry.name: entry.reason for entry in lowering.dense}
    # Structure that lowering made no form of is dense; but a selection needs no form.
    used = {entry.name for entry in plan.layers} - set(reasons)
    outcomes = []
    for entry in plan.layers:
        layer = traced.get(entry.name)
        before = after = None
        if layer is not None:
            before = dense_cost(layer.spec, layer.output_size, layer.calls)
            outputs = lowering.outputs.get(entry.name, layer.spec.weight_shape[0])
            left = replace(layer.spec, weight_shape=(outputs, *layer.spec.axes))
            after = dense_cost(left, layer.output_size, layer.calls)
            if entry.name in used and not isinstance(entry, KeptLayer):
                after = structured_cost(left, entry.structure, layer.output_size, layer.calls)
        if isinstance(entry, KeptLayer):
            outcomes.append(LayerOutcome(entry.name, None, entry.reason, before, after))
        else:
            note = forms.get(entry.name) or f"dense ({reasons.get(entry.name, _SLIMMED)})"
            outcomes.append(LayerOutcome(entry.name, entry.structure, note, before, after))
    return tuple(outcomes)
