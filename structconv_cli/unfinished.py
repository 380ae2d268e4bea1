"""A conversion that was begun and not finished: `OUT.partial`, from which `--resume` goes on.

It holds what was tried so far and the state of the training at the end of its last epoch. Each file
is written beside and renamed, so that a process killed at any moment leaves the last whole state.
"""

import hashlib
import io
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from structconv_cli.conversion import ConvertRequest
from structconv_cli.errors import RunFolderError
from structconv_cli.json_file import read_json, write_json
from structconv_cli.plan_choice import Tried
from structconv_cli.run_folder import partial_folder

FORMAT = "structconv-partial/1"
_STATE, _PROGRESS = "training.pt", "progress.json"

_FREE = ("out", "force", "resume", "command", "hardware", "lowering", "data.workers")
"""What may change between the beginning and the end without changing what is tuned."""
_RATE = "recipe.learning_rate"
"""May change too: the remedy where a loss diverges."""


@dataclass(frozen=True)
class _Progress:
    """The file progress.json."""

    format: str
    made_for: dict[str, str]
    tried: tuple[Tried, ...] = ()


@dataclass
class Unfinished:
    """What is known of an unfinished conversion; nothing is written before there is something.

    Attributes:
        path: the folder.
        made_for: what determines the result, in words.
        tried: the plans so far; the last one may be unfinished.
    """

    path: Path
    made_for: Mapping[str, str]
    tried: tuple[Tried, ...] = field(default=())

    def keep(self, tried: tuple[Tried, ...]) -> None:
        """Record the plans so far."""
        self.path.mkdir(exist_ok=True)
        if not self.tried:  # what another conversion left, which --force gave up
            (self.path / _STATE).unlink(missing_ok=True)
        self.tried = tried
        write_json(_Progress(FORMAT, dict(self.made_for), tried), self.path / _PROGRESS)

    def load(self) -> dict[str, Any] | None:
        """The training's last state, of the plan tried last; None if there is none.

        Raises:
            RunFolderError: the file is damaged.
        """
        file = self.path / _STATE
        if not file.is_file():
            return None
        try:
            # The rest may run elsewhere: loading a state moves its tensors to where the model is.
            state = torch.load(file, map_location="cpu", weights_only=True)
            tried = state.pop("tried")
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError):
            raise RunFolderError(
                f"{file} is damaged, so the conversion cannot go on from it. Begin anew with "
                "--force."
            ) from None
        return dict(state) if tried == len(self.tried) else None

    def save(self, state: dict[str, Any]) -> None:
        """Keep a training's state; the last one stays until this one is whole."""
        file = self.path / _STATE
        beside = file.with_suffix(".part")
        # torch reports a full disk as an internal error, with a traceback.
        memory = io.BytesIO()
        torch.save({**state, "tried": len(self.tried)}, memory)
        beside.unlink(missing_ok=True)
        try:
            with beside.open("xb") as stream:
                stream.write(memory.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Leave no folder behind if the block fails before anything was tuned."""
        try:
            yield
        except BaseException:
            if not (self.path / _STATE).is_file():
                self.discard()
            raise

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def open_unfinished(request: ConvertRequest) -> Unfinished:
    """The unfinished conversion that a request goes on from, or an empty one.

    Raises:
        RunFolderError: there is one and neither --resume nor --force is given; or it is of another
            conversion; or cannot be read.
    """
    path = partial_folder(request.out)
    made_for = _made_for(request)
    if not path.exists():
        return Unfinished(path, made_for)
    progress_file = path / _PROGRESS
    if path.is_symlink() or not _is_ours(path):
        raise RunFolderError(
            f"{path} is in the way: an unfinished conversion would be kept there, and it is none. "
            "Choose another --out."
        )
    if request.force and not request.resume:
        return Unfinished(path, made_for)
    if not request.resume:
        raise RunFolderError(
            f"{path} holds an unfinished conversion. Go on with it by the same command with "
            "--resume, or begin anew with --force."
        )
    if not progress_file.is_file():  # killed before there was something, or while it was removed
        return Unfinished(path, made_for)
    progress = read_json(progress_file, _Progress)
    _check_same(path, progress.made_for, made_for)
    return Unfinished(path, made_for, progress.tried)


def _is_ours(path: Path) -> bool:
    """Whether a folder holds nothing but what a conversion keeps, or a part of it."""
    names = (_STATE, _PROGRESS)
    return path.is_dir() and all(
        entry.name in names
        or (entry.suffix == ".part" and entry.name.startswith(("training", _PROGRESS)))
        for entry in path.iterdir()
    )


def _check_same(path: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name != _RATE]
    if names:
        words = [f"{name} was {then.get(name)} and is {now.get(name)}" for name in names[:3]]
        raise RunFolderError(
            f"{path} is of another conversion: {'; '.join(words)}. Give the same options with "
            "--resume, or begin anew with --force."
        )


def _made_for(request: ConvertRequest) -> dict[str, str]:
    """What determines the result, by name: the options, and digests of the files."""
    whole = replace(request, proposal=replace(request.proposal, timings=None, losses=None))
    found: dict[str, str] = {}
    _flatten(TypeAdapter(ConvertRequest).dump_python(whole, mode="json"), "", found)
    free = tuple(f"{name}." for name in _FREE)
    kept = {name: v for name, v in found.items() if not f"{name}.".startswith(free)}
    files = {"checkpoint": request.checkpoint, "plan_file": request.plan_file}
    files["task"] = request.task
    if request.architecture is not None:
        files["architecture"] = Path(request.architecture.reference.rpartition(":")[0])
    for role, file in files.items():
        if file is not None and file.is_file():
            kept[f"contents of {role}"] = _digest(file)
    return kept


def _flatten(value: Any, name: str, found: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _flatten(entry, f"{name}.{key}" if name else str(key), found)
    else:
        found[name] = str(value)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
