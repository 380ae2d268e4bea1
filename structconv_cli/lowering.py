"""Lowering an ONNX file: read it, lower it, prove the result equal, write it."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check
from structconv_cli.graph_check import LoweredGraph, check_graph
from structconv_cli.onnx.example_inputs import Shapes, example_inputs
from structconv_cli.onnx.file import save_onnx
from structconv_cli.onnx.lower import DEFAULT_FORM, MEASURE, Lowering, LoweringSettings, lower
from structconv_cli.onnx.lowerable import load_lowerable
from structconv_cli.onnx.probe import why_not_loaded
from structconv_cli.plan import read_plan
from structconv_cli.progress import SILENT, Observer
from structconv_cli.whole_check import check_whole


@dataclass(frozen=True)
class LowerResult:
    """The outcome of lowering a file.

    Attributes:
        lowering: what was done.
        checks: of every node, and of the whole model at several input sizes.
        written: the file; None if there was nothing to write, or the checks failed.
        bytes_before, bytes_after: sizes of the two models.
        seconds: duration of the whole.
        notes: what the user should know, one sentence each.
    """

    lowering: Lowering
    checks: tuple[Check, ...]
    written: str | None
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def found(self) -> bool:
        """Whether the model has a structured layer at all."""
        left = any(entry.structured for entry in self.lowering.dense)
        return bool(self.lowering.layers or self.lowering.removed) or left


def lower_file(
    source: Path,
    out: Path,
    settings: LoweringSettings,
    *,
    plan_file: Path | None = None,
    shapes: Shapes | None = None,
    observer: Observer = SILENT,
) -> LowerResult:
    """Lower an ONNX file; the result is written when it has been checked, whole or not at all.

    Args:
        source: the dense model, its weights structured.
        out: the file to write.
        settings: how forms are chosen.
        plan_file: which layers have which structure; None to find out by projection.
        shapes: sizes of inputs whose spatial axes are open.
        observer: is told of the stages.

    Raises:
        StructconvError: the model or the plan cannot be read, or does not fit.
    """
    start = time.perf_counter()
    _check_output_path(out)
    with observer.stage("model"):
        model, notes = load_lowerable(source)
        structures = read_plan(plan_file).structures if plan_file else None
        feeds = example_inputs(model, settings.target.batch_size, shapes or {})
        how = settings.how(feeds)
        obstacle = why_not_loaded(model)
        if obstacle:
            how = DEFAULT_FORM if settings.forms == MEASURE else how
            notes = (*notes, f"{obstacle} Nothing was timed; every node was checked by itself.")
    with observer.stage("lowering"):
        lowered, lowering = lower(model, structures, how, observer)
        observer.note(f"{len(lowering.layers)} layers in cheaper forms")
    checks: tuple[Check, ...] = ()
    written = None
    if lowering.layers or lowering.removed:
        with observer.stage("exactness"):
            found = lowering.structures
            pair = LoweredGraph(model, lowered, lowering.carried, found)
            traced = example_inputs(model, 2, shapes or {})
            whole = () if obstacle else check_whole(model, lowered, found, shapes or {})
            checks = (*check_graph(pair, traced, observer), *whole)
        if all(check.passed for check in checks):
            save_onnx(lowered, out)
            written = str(out)
    return LowerResult(
        lowering=replace(lowering, carried={}),
        checks=checks,
        written=written,
        bytes_before=model.ByteSize(),
        bytes_after=lowered.ByteSize(),
        seconds=time.perf_counter() - start,
        notes=notes,
    )


def _check_output_path(out: Path) -> None:
    """Find out before the long work that the file cannot be written."""
    if out.is_dir():
        raise OnnxError(f"{out} is a folder; expected the name of a file to write.")
    if not out.parent.is_dir():
        raise OnnxError(f"the folder {out.parent} of the output {out} does not exist. Make it.")
