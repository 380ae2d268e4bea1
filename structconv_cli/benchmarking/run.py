"""A benchmark from beginning to end: rivals are made, models judged, every setting measured."""

import tempfile
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import onnxruntime

from structconv_cli import __version__
from structconv_cli.benchmarking.calibration import calibration_for
from structconv_cli.benchmarking.images import Images, load_images
from structconv_cli.benchmarking.layers import compare_layers
from structconv_cli.benchmarking.request import BenchmarkRequest
from structconv_cli.benchmarking.result import (
    BENCHMARK_SCHEMA,
    BenchmarkedModel,
    BenchmarkResult,
)
from structconv_cli.benchmarking.subjects import ORIGINAL, Subject, distinct
from structconv_cli.errors import BenchmarkError, StructconvError
from structconv_cli.json_file import read_json
from structconv_cli.onnx.file import load_onnx
from structconv_cli.onnx.lower import Lowering
from structconv_cli.progress import SILENT, Observer
from structconv_cli.reconstruction.samples import images_per_run
from structconv_cli.rivals.making import check_rivals, make_rivals
from structconv_cli.timing.benchmark import benchmark
from structconv_cli.timing.environment import describe_environment
from structconv_cli.timing.execution_provider import PROVIDERS, require_provider
from structconv_cli.timing.given_inputs import Arrays, read_inputs
from structconv_cli.timing.layer_times import LayerComparison
from structconv_cli.timing.model_timing import size_on_disk
from structconv_cli.timing.setting_result import SettingResult

NOT_JUDGED = "no labelled data were given (--data)."


@dataclass
class _Measured:
    """The settings measured so far, and what was said of those that could not be."""

    settings: list[SettingResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    partial: bool = False


def run_benchmark(request: BenchmarkRequest, observer: Observer = SILENT) -> BenchmarkResult:
    """Measure models against one another.

    An interruption (KeyboardInterrupt) once a round is done ends it with what there is, marked as
    partial. A setting that cannot be measured is a failure among the results if an earlier one was.

    Args:
        request: What to do.
        observer: Is told of the stages.

    Raises:
        StructconvError: The models, the data or the rivals cannot be used as asked.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    provider = require_provider(request.provider, onnxruntime.get_available_providers())
    if request.per_layer and provider != PROVIDERS["cpu"]:
        raise BenchmarkError(
            f"--per-layer takes times from ONNX Runtime's profiler, which for {provider} tells "
            "when work is handed over, not how long it takes. Use it with --provider cpu."
        )
    check_rivals(request.against)
    with tempfile.TemporaryDirectory(prefix="structconv-") as folder:
        images, missing = _images(request, observer)
        subjects = _with_rivals(request, images, Path(folder), observer)
        models = _describe(subjects, images, observer)
        given, words = _given(request, images)
        measured = _measure(request, subjects, given, observer)
    return BenchmarkResult(
        schema=BENCHMARK_SCHEMA,
        tool_version=__version__,
        created=created,
        command=request.command,
        environment=describe_environment(
            onnxruntime.__version__,
            provider,
            request.spinning,
            ",".join(map(str, request.affinity)),
        ),
        protocol=replace(request.protocol, input=words),
        models=models,
        settings=tuple(measured.settings),
        quality=images.quality if images else None,
        quality_missing=missing,
        failures=tuple(measured.failures),
        partial=measured.partial,
    )


def _images(request: BenchmarkRequest, observer: Observer) -> tuple[Images | None, str]:
    """The images asked for, or for rivals those of the run; and why models are not judged."""
    baseline = request.subjects[0]
    spec = request.data
    if spec is None and request.against and baseline.run is not None:
        spec = baseline.run.info().data
    if spec is None:
        return None, NOT_JUDGED
    try:
        with observer.stage("data"):
            images = load_images(spec, load_onnx(baseline.file), observer.steps)
    except StructconvError as error:
        if request.data is not None:
            raise
        return None, f"the run's data could not be used: {error}"
    return images, images.missing


def _with_rivals(
    request: BenchmarkRequest, images: Images | None, folder: Path, observer: Observer
) -> tuple[Subject, ...]:
    if not request.against:
        return request.subjects
    with observer.stage("rivals"):
        original = request.subjects[0]
        model = load_onnx(original.file)
        batch = images_per_run(model)
        calibration = calibration_for(original, model, images)
        rivals = make_rivals(request.against, original, folder, calibration, batch)
    return distinct([*request.subjects, *rivals])


def _describe(
    subjects: tuple[Subject, ...], images: Images | None, observer: Observer
) -> tuple[BenchmarkedModel, ...]:
    scores: dict[str, float] = {}
    if images is not None and images.task is not None:
        with observer.stage("accuracy"):
            for done, subject in enumerate(subjects):
                scores[subject.name] = images.score(subject.file)
                observer.steps(done + 1, len(subjects))
    return tuple(
        BenchmarkedModel(
            name=subject.name,
            file=str(subject.file) if subject.is_kept else "",
            size_bytes=size_on_disk(f"Model '{subject.name}' ({subject.file})", subject.file),
            role="rival" if subject.is_rival else "candidate" if index else "baseline",
            made=subject.made,
            score=scores.get(subject.name),
        )
        for index, subject in enumerate(subjects)
    )


def _given(request: BenchmarkRequest, images: Images | None) -> tuple[Arrays | None, str]:
    if request.inputs is not None:
        return read_inputs(request.inputs), f"the arrays of {request.inputs}"
    if request.data is not None and images is not None:
        rows = images.inputs(max(request.batch_sizes))
        return {"": rows}, f"{len(rows)} validation images of {images.spec.source}"
    return None, "random"


def _measure(
    request: BenchmarkRequest,
    subjects: tuple[Subject, ...],
    given: Arrays | None,
    observer: Observer,
) -> _Measured:
    measured = _Measured()
    files = {subject.name: subject.file for subject in subjects}
    for threads, batch_size in request.settings:
        title = f"{threads} thread{'s' * (threads > 1)}, batch {batch_size}"
        try:
            with observer.stage(f"benchmark, {title}"):
                found = benchmark(
                    files,
                    request.setting(threads, batch_size),
                    given=given,
                    progress=observer.steps,
                    keep_interrupted=True,
                )
            measured.settings.append(found)
            measured.partial |= found.partial
            if request.per_layer and not found.partial:
                with observer.stage(f"layers, {title}"):
                    layers = _layers(subjects, threads, batch_size)
                measured.settings[-1] = replace(found, layers=layers)
        except KeyboardInterrupt:
            measured.partial = True
            if not measured.settings:
                raise
        except BenchmarkError as error:
            if not measured.settings:
                raise
            measured.failures.append(f"Not measured with {title}: {error}")
        if measured.partial:
            break
    return measured


def _layers(
    subjects: tuple[Subject, ...], threads: int, batch_size: int
) -> tuple[LayerComparison, ...]:
    found = []
    for subject in subjects[1:]:
        if subject.is_rival or subject.name.endswith(f"/{ORIGINAL}"):
            continue
        before = _origin(subject, subjects)
        forms = {}
        if subject.run is not None and subject.run.lowering.is_file():
            lowered = read_json(subject.run.lowering, Lowering)
            forms = {layer.name: layer.form for layer in lowered.layers}
        pair = (before.name, before.file), (subject.name, subject.file)
        found.append(compare_layers(pair, threads, batch_size, forms))
    return tuple(found)


def _origin(subject: Subject, subjects: tuple[Subject, ...]) -> Subject:
    """What a model was made of: the original of its run, else the baseline."""
    others = (x for x in subjects if x is not subject and x.run is not None)
    return next((x for x in others if x.run == subject.run), subjects[0])
