"""A run folder appears whole or not at all, and never in place of anything else."""

import os
from pathlib import Path

import pytest
from test_json_file import RUN_INFO

from structconv_cli.errors import RunFolderError
from structconv_cli.json_file import to_json
from structconv_cli.run_folder import RunFolder, check_destination, new_run_folder


def write_run(folder: RunFolder, content: str = "content") -> None:
    (folder.path / "plan.json").write_text(content)
    (folder.path / "reference.safetensors").write_text(content)
    folder.write_info(RUN_INFO)


def existing_run(path: Path, content: str = "old") -> Path:
    path.mkdir()
    write_run(RunFolder(path), content)
    return path


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {
        str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None
        for entry in sorted(path.rglob("*"))
    }


def test_a_finished_run_appears_with_all_it_holds(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with new_run_folder(out, force=False) as folder:
        write_run(folder)
        assert not out.exists()
    assert sorted(snapshot(tmp_path)) == [
        "run",
        "run/plan.json",
        "run/reference.safetensors",
        "run/run.json",
    ]
    assert RunFolder(out).info() == RUN_INFO


class Stop(BaseException):
    """Like KeyboardInterrupt: no Exception."""


def fail_while_writing(out: Path, force: bool, error: type[BaseException]) -> None:
    before = snapshot(out) if out.exists() else None
    with new_run_folder(out, force) as folder:
        write_run(folder, "new")
        assert (snapshot(out) if out.exists() else None) == before
        raise error


def meet_another_folder(out: Path) -> None:
    with new_run_folder(out, force=True) as folder:
        write_run(folder)
        out.mkdir()
        (out / "thesis.txt").write_text("precious")


@pytest.mark.parametrize("error", [ValueError, OSError, Stop])
@pytest.mark.parametrize("force", [False, True])
def test_a_failed_run_leaves_nothing_behind(
    error: type[BaseException], force: bool, tmp_path: Path
) -> None:
    with pytest.raises(error):
        fail_while_writing(tmp_path / "run", force, error)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("error", [ValueError, Stop])
def test_a_failed_run_leaves_the_existing_one_untouched(
    error: type[BaseException], tmp_path: Path
) -> None:
    out = existing_run(tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(error):
        fail_while_writing(out, True, error)
    assert snapshot(tmp_path) == before


def test_force_replaces_a_run_wholly(tmp_path: Path) -> None:
    out = existing_run(tmp_path / "run")
    (out / "benchmark.json").write_text("measured on the old run")
    with new_run_folder(out, force=True) as folder:
        write_run(folder, "new")
    assert sorted(snapshot(out)) == ["plan.json", "reference.safetensors", "run.json"]
    assert (out / "plan.json").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_existing_run_needs_force(tmp_path: Path) -> None:
    out = existing_run(tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(RunFolderError, match="--force"), new_run_folder(out, force=False):
        pytest.fail("the block must not run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_is_taken(force: bool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with new_run_folder(tmp_path / "run", force) as folder:
        write_run(folder)
    assert RunFolder(tmp_path / "run").info() == RUN_INFO
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "plan.json", "sub/run.json", ".hidden"])
def test_a_folder_that_is_no_run_is_never_overwritten(
    name: str, force: bool, tmp_path: Path
) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("precious")
    before = snapshot(tmp_path)
    with (
        pytest.raises(RunFolderError, match="not a run folder"),
        new_run_folder(tmp_path / "run", force),
    ):
        pytest.fail("the block must not run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ["{}", '{"format": "another-tool/3"}', "not JSON at all"])
def test_a_folder_with_another_tools_run_json_is_never_overwritten(
    content: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(content)
    (out / "thesis.txt").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(RunFolderError), new_run_folder(out, force=True) as folder:
        write_run(folder)
    assert snapshot(tmp_path) == before


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        meet_another_folder(tmp_path / "run")
    assert snapshot(tmp_path) == {"run": None, "run/thesis.txt": b"precious"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to a run", "link to nothing", "link to a file"])
def test_files_and_links_are_refused(kind: str, force: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    elsewhere = existing_run(tmp_path / "elsewhere")
    if kind == "file":
        out.write_text("precious")
    else:
        targets = {
            "run": elsewhere,
            "nothing": tmp_path / "nothing",
            "file": elsewhere / "run.json",
        }
        out.symlink_to(targets[kind.split()[-1]])
    before = snapshot(tmp_path)
    with pytest.raises(RunFolderError, match="file or a link"), new_run_folder(out, force):
        pytest.fail("the block must not run")
    assert snapshot(tmp_path) == before
    assert out.is_symlink() is (kind != "file")


@pytest.mark.parametrize("force", [False, True])
def test_a_missing_parent_is_refused(force: bool, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="parent"):
        check_destination(tmp_path / "absent" / "run", force)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError):
        check_destination(tmp_path / "file" / "run", force)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunFolderError, match="parent"):
            check_destination(tmp_path / "run", force=False)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("length", [200, 250, 300])
def test_long_names_work_or_are_refused(length: int, tmp_path: Path) -> None:
    out = tmp_path / ("n" * length)
    try:
        with new_run_folder(out, force=False) as folder:
            write_run(folder)
    except RunFolderError:
        assert snapshot(tmp_path) == {}
    else:
        assert RunFolder(out).info() == RUN_INFO


def test_a_relative_destination_is_beside_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with new_run_folder(Path("run"), force=False) as folder:
        write_run(folder)
    assert RunFolder(tmp_path / "run").info() == RUN_INFO


def test_the_folder_may_be_read_by_others(tmp_path: Path) -> None:
    with new_run_folder(tmp_path / "run", force=False) as folder:
        write_run(folder)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    return existing_run(tmp_path / "run")


def test_a_complete_folder_gives_its_info(run_path: Path) -> None:
    folder = RunFolder(run_path)
    info = folder.info()
    assert info == RUN_INFO
    assert folder.file(info, "plan") == run_path / "plan.json"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: path / "absent", "no run folder"),
        (lambda path: path / "run.json", "no run folder"),
        (lambda path: path.parent, "not a run folder"),
    ],
)
def test_what_is_no_run_folder_is_refused(make: object, match: str, run_path: Path) -> None:
    with pytest.raises(RunFolderError, match=match):
        RunFolder(make(run_path)).info()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["plan.json", "reference.safetensors"])
def test_a_missing_file_is_named_with_its_role(name: str, run_path: Path) -> None:
    (run_path / name).unlink()
    with pytest.raises(RunFolderError, match=name):
        RunFolder(run_path).info()


@pytest.mark.parametrize(
    "name",
    [
        "../plan.json",
        "/etc/passwd",
        "sub/plan.json",
        "./plan.json",
        "..",
        ".",
        "",
        "a" * 300,
        "a\\u0000",
    ],
)
def test_files_outside_the_folder_are_refused(name: str, run_path: Path) -> None:
    (run_path.parent / "plan.json").write_text("outside")
    (run_path / "sub").mkdir()
    (run_path / "sub" / "plan.json").write_text("below")
    content = to_json(RUN_INFO)
    (run_path / "run.json").write_bytes(
        content.replace(b'"plan": "plan.json"', f'"plan": "{name}"'.encode())
    )
    with pytest.raises(RunFolderError):
        RunFolder(run_path).info()


def test_another_format_is_refused_by_name(run_path: Path) -> None:
    content = to_json(RUN_INFO).replace(b"structconv-run/2", b"structconv-run/9")
    (run_path / "run.json").write_bytes(content)
    with pytest.raises(RunFolderError, match="structconv-run/9"):
        RunFolder(run_path).info()


@pytest.mark.parametrize("good", ["structconv-run/2", "original model", "plan.json", "task"])
def test_a_damaged_run_json_is_quoted_without_control_characters(good: str, run_path: Path) -> None:
    bad = good[:3] + "\x7f\u202e\x85" + good[4:]
    content = to_json(RUN_INFO).replace(f'"{good}"'.encode(), f'"{bad}"'.encode())
    (run_path / "run.json").write_bytes(content)
    folder = RunFolder(run_path)
    with pytest.raises(RunFolderError) as raised:
        folder.file(folder.info(), "original model")
    assert str(raised.value).isprintable()


def test_a_role_that_is_not_listed_is_refused(run_path: Path) -> None:
    folder = RunFolder(run_path)
    with pytest.raises(RunFolderError, match="dense weights"):
        folder.file(folder.info(), "dense weights")
