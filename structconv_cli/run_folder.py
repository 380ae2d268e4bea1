"""The run folder: what `convert` leaves behind, and later steps work from."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import RunFolderError
from structconv_cli.json_file import read_json, write_json
from structconv_cli.model.architecture import Architecture
from structconv_cli.quoting import legible

DEFAULT = Path("structconv-run")
FORMAT = "structconv-run/2"


@dataclass(frozen=True)
class RunInfo:
    """How a run came about: `run.json`.

    Attributes:
        format: names this kind of folder and its version.
        tool_version: structconv's version.
        created: ISO 8601 time, UTC.
        command: the command line's words.
        checkpoint: absolute path of the user's checkpoint or ONNX file.
        architecture: what built the model. Recorded only: no later step runs it. None for a file
            that holds the model itself.
        task: "classification", "segmentation", the absolute path of the user's task file, or "none"
            where nothing was judged by labels. Recorded only: no later step runs it.
        data: the data it was tuned or fitted, and judged on; None where the task file loads it, and
            where there was none.
        plan_sha256: digest of the plan.
        files: name in this folder of every artefact, by its role.
        kind: of the file that was converted (`model.checkpoint_kind.Kind`).
    """

    format: str
    tool_version: str
    created: str
    command: tuple[str, ...]
    checkpoint: str
    architecture: Architecture | None
    task: str
    data: DataSpec | None
    plan_sha256: str
    files: dict[str, str]
    kind: str = "torch"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def info_file(self) -> Path:
        """Names the folder: a RunInfo."""
        return self.path / "run.json"

    @property
    def plan(self) -> Path:
        """The plan that was carried out: a Plan."""
        return self.path / "plan.json"

    @property
    def prediction(self) -> Path:
        """What the plan was predicted to do, where it was made for a target: a Prediction."""
        return self.path / "prediction.json"

    @property
    def curve(self) -> Path:
        """The trade-offs there were, as a picture."""
        return self.path / "prediction.png"

    @property
    def inventory(self) -> Path:
        """The model's layers: an Inventory."""
        return self.path / "layers.json"

    @property
    def structured_weights(self) -> Path:
        """All tensors of the rewritten model, structured layers with their reduced weights."""
        return self.path / "structured.safetensors"

    def dense_weights(self, suffix: str = ".pt") -> Path:
        """The projected weights in the original's shapes and layout: a drop-in replacement."""
        return self.path / f"structured_dense{suffix}"

    @property
    def plain_weights(self) -> Path:
        """The same by the names of the plain layers, where the user's model has others."""
        return self.path / "plain_dense.safetensors"

    @property
    def original_onnx(self) -> Path:
        """The user's model as it came."""
        return self.path / "original.onnx"

    @property
    def dense_onnx(self) -> Path:
        """The structured model before lowering: the reference that `verify` holds it against."""
        return self.path / "structured_dense.onnx"

    @property
    def structured_onnx(self) -> Path:
        """The result."""
        return self.path / "structured.onnx"

    @property
    def lowering(self) -> Path:
        """How it was lowered, and what its tensors stand for: a Lowering."""
        return self.path / "lowering.json"

    @property
    def reference(self) -> Path:
        """Inputs, and what PyTorch (for an ONNX file, ONNX Runtime) computed for them, dense."""
        return self.path / "reference.safetensors"

    @property
    def convert_result(self) -> Path:
        """What `convert` did and measured."""
        return self.path / "convert.json"

    @property
    def verify_result(self) -> Path:
        """What `verify` last found."""
        return self.path / "verify.json"

    @property
    def benchmark_result(self) -> Path:
        """What `benchmark` last measured."""
        return self.path / "benchmark.json"

    def info(self) -> RunInfo:
        """Read run.json.

        Raises:
            RunFolderError: the folder is missing, is no run folder, or lacks one of its files.
        """
        if not self.path.is_dir():
            raise RunFolderError(
                f"there is no run folder at {self.path}. Run `structconv convert` first, or name "
                "the folder that it wrote."
            )
        if not self.info_file.is_file():
            raise RunFolderError(
                f"{self.path} is not a run folder: it has no run.json. Name the folder that "
                "`structconv convert` wrote."
            )
        info = read_json(self.info_file, RunInfo)
        if info.format != FORMAT:
            raise RunFolderError(
                f"{self.path} has the format {legible(info.format)}; this version of structconv "
                f"reads {FORMAT}. Run `structconv convert` again."
            )
        for role, name in info.files.items():
            if Path(name).name != name or not _is_file(self.path / name):
                raise RunFolderError(
                    f"the run folder {self.path} lacks {legible(name)} ({legible(role)}), which "
                    "its run.json lists. Run `structconv convert` again."
                )
        return info

    def file(self, info: RunInfo, role: str) -> Path:
        """Path of the artefact with this role.

        Raises:
            RunFolderError: run.json does not list it.
        """
        if role not in info.files:
            raise RunFolderError(
                f"{self.info_file} lists no file for {role}. Run `structconv convert` again."
            )
        return self.path / info.files[role]

    def write_info(self, info: RunInfo) -> None:
        """Write run.json."""
        write_json(info, self.info_file)


def model_file(path: Path) -> Path:
    """The file to convert again where a run folder is named; else the path itself.

    That is the dense structured model: a checkpoint, or an ONNX file where one was converted.

    Raises:
        RunFolderError: the run folder is incomplete or of another version.
    """
    folder = RunFolder(path)
    if not folder.info_file.is_file():
        return path
    info = folder.info()
    if info.kind == "onnx":
        return folder.dense_onnx
    return folder.file(info, "checkpoint" if "checkpoint" in info.files else "dense weights")


def partial_folder(out: Path) -> Path:
    """Where an unfinished conversion is kept, beside the run folder that it is to become."""
    return out.with_name(out.name + ".partial")


def check_destination(path: Path, force: bool) -> None:
    """Refuse to write where something would be lost; ask before the long work, not after it.

    Raises:
        RunFolderError: `path` exists and `force` is not given, or is not a run folder; or the
            folder that would hold it cannot be written.
    """
    try:
        taken = path.is_symlink() or (path.exists() and not path.is_dir())
    except OSError as error:
        raise RunFolderError(f"{path} cannot be used: {error.strerror}.") from None
    if taken:
        raise RunFolderError(f"{path} is a file or a link, not a folder. Choose another --out.")
    if path.exists() and any(path.iterdir()):
        if not _is_run(path):
            raise RunFolderError(
                f"{path} exists and is not a run folder, so it is never overwritten. Choose "
                "another --out."
            )
        if not force:
            raise RunFolderError(
                f"the run folder {path} exists. Give --force to replace it, or another --out."
            )
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunFolderError(
            f"cannot create {path}: its parent folder {parent} does not exist or cannot be "
            "written. Create it, or choose another --out."
        )


@contextmanager
def new_run_folder(path: Path, force: bool) -> Iterator[RunFolder]:
    """A folder beside `path` that takes its place when the block ends well, and goes if it fails.

    It is created here, so that nothing in it can be a link that leads elsewhere; `path` itself is
    refused if it is one.

    Raises:
        RunFolderError: see `check_destination`; or the folder beside is there already.
    """
    check_destination(path, force)
    target = path.absolute()
    beside = target.with_name(f".structconv-{os.getpid()}.part")
    try:
        beside.mkdir()
    except FileExistsError:
        raise RunFolderError(
            f"{beside}, where the run is to be prepared, exists already: an ended run left it "
            "there. Delete it."
        ) from None
    try:
        yield RunFolder(beside)
        check_destination(path, force)
        if target.exists():
            old = beside.with_suffix(".old")
            target.rename(old)
            try:
                beside.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _is_run(path: Path) -> bool:
    """Whether a folder's run.json says that this tool wrote it, in any version."""
    try:
        written = json.loads((path / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(written, dict) and str(written.get("format")).startswith("structconv-run/")
