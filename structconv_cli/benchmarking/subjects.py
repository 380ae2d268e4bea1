"""Which models a benchmark is of: ONNX files, and the two of each run folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from structconv_cli.errors import BenchmarkError
from structconv_cli.run_folder import RunFolder

ORIGINAL, STRUCTURED = "original", "structured"


@dataclass(frozen=True)
class Subject:
    """A model to benchmark.

    Attributes:
        name: As it is called in the figures: unique.
        file: Its ONNX file.
        run: The run folder that it comes from; None for a file of its own.
        made: How a rival was made, in words; empty if that is not known.
        is_rival: Whether --against asked for it.
        is_kept: Whether its file is still there after the benchmark.
    """

    name: str
    file: Path
    run: RunFolder | None = None
    made: str = ""
    is_rival: bool = False
    is_kept: bool = True


def find_subjects(paths: Sequence[Path]) -> tuple[Subject, ...]:
    """The models that paths name, in order: an ONNX file is one, a run folder two.

    The models of a single run folder are called "original" and "structured"; of several, these
    names follow the folder's. A file is called by its name without suffix, or by its path where
    another has that name.

    Raises:
        BenchmarkError: There is no such file, or one is named twice.
        RunFolderError: A folder is no run folder, or lacks one of its files.
    """
    folders = [path for path in paths if path.is_dir()]
    subjects: list[Subject] = []
    for path in paths:
        if path.is_dir():
            subjects += _of_run(path, prefix="" if len(folders) == 1 else f"{_stem(path)}/")
        elif path.is_file():
            subjects.append(Subject(path.stem, path))
        elif path.suffix == ".onnx":
            raise BenchmarkError(
                f"There is no file {path}. Give ONNX files, and folders that `structconv convert` "
                "wrote."
            )
        else:
            subjects += _of_run(path, prefix="")
    return distinct(subjects)


def distinct(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """The same subjects; those of a name that others have are called by their paths.

    Raises:
        BenchmarkError: A file is named twice.
    """
    names = [subject.name for subject in subjects]
    files = [subject.file.absolute() for subject in subjects]
    for file in files:
        if files.count(file) > 1:
            raise BenchmarkError(
                f"{file} is named twice. Name each model once; to measure a file against itself, "
                "copy it."
            )
    return tuple(
        subject if names.count(subject.name) == 1 else replace(subject, name=str(subject.file))
        for subject in subjects
    )


def with_baseline(subjects: Sequence[Subject], name: str | None) -> tuple[Subject, ...]:
    """The subjects, the baseline first.

    Raises:
        BenchmarkError: None has this name.
    """
    if name is None:
        return tuple(subjects)
    chosen = [subject for subject in subjects if name in (subject.name, str(subject.file))]
    if not chosen:
        known = ", ".join(subject.name for subject in subjects)
        raise BenchmarkError(f"There is no model '{name}'. The baseline is one of: {known}.")
    return (chosen[0], *(subject for subject in subjects if subject is not chosen[0]))


def _of_run(path: Path, prefix: str) -> list[Subject]:
    folder = RunFolder(path)
    folder.info()
    return [
        Subject(prefix + ORIGINAL, folder.original_onnx, folder),
        Subject(prefix + STRUCTURED, folder.structured_onnx, folder),
    ]


def _stem(path: Path) -> str:
    return path.absolute().name
