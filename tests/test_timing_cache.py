"""The file of known timings: what is saved is known, and no state of the file stops a lowering."""

import json
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structconv_cli.onnx.timing_cache import FORMAT, TimingCache, default_path

HERE, THERE = "onnxruntime 1, cpu, 1 threads", "onnxruntime 2, cpu, 1 threads"

texts = st.text(max_size=20).filter(lambda text: text.isprintable())
times = st.dictionaries(texts, st.floats(0, 1e9), max_size=5)


def stored(path: Path) -> dict[str, dict[str, float]]:
    """What the file holds, read as plain JSON."""
    content = json.loads(path.read_text())
    assert content["format"] == FORMAT
    return content["ms"]


def filled(path: Path, ms: dict[str, float], environment: str = HERE) -> TimingCache:
    cache = TimingCache(path, environment)
    for key, each in ms.items():
        cache.put(key, each)
    return cache


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "timings.json"


@given(st.lists(st.tuples(st.sampled_from([HERE, THERE]), times), max_size=4))
def test_what_is_saved_is_known_to_the_bit_and_the_last_word_counts(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[str, dict[str, float]]]
) -> None:
    path = tmp_path_factory.mktemp("cache") / "timings.json"
    known: dict[str, dict[str, float]] = {HERE: {}, THERE: {}}
    for environment, ms in rounds:
        cache = filled(path, ms, environment)
        assert cache.measured == len(ms)
        cache.save()
        known[environment].update(ms)
    for environment, ms in known.items():
        cache = TimingCache(path, environment)
        assert {key: cache.get(key) for key in ms} == ms
        assert (cache.hits, cache.measured) == (len(ms), 0)


def test_counts_of_what_was_known_and_what_was_measured(path: Path) -> None:
    filled(path, {"a": 1.5, "b": 0.0}).save()
    cache = TimingCache(path, HERE)
    assert [cache.get(key) for key in ("a", "b", "c")] == [1.5, 0.0, None]
    assert (cache.hits, cache.measured) == (2, 0)
    cache.put("c", 2.0)
    assert cache.measured == 1
    cache.put("c", 3.0)
    assert (cache.measured, cache.get("c")) == (1, 3.0)


def test_one_environment_knows_nothing_of_another(path: Path) -> None:
    filled(path, {"a": 1.0}, HERE).save()
    filled(path, {"a": 2.0}, THERE).save()
    assert TimingCache(path, HERE).get("a") == 1.0
    assert TimingCache(path, THERE).get("a") == 2.0
    assert TimingCache(path, "elsewhere").get("a") is None


def test_nothing_new_leaves_the_file_alone(path: Path) -> None:
    TimingCache(path, HERE).save()
    assert not path.exists()
    filled(path, {"a": 1.0}).save()
    path.chmod(0o444)
    before = path.stat()
    cache = TimingCache(path, HERE)
    cache.get("a")
    cache.save()
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_no_file_keeps_nothing(tmp_path: Path) -> None:
    cache = TimingCache(None, HERE)
    cache.put("a", 1.0)
    assert cache.get("a") == 1.0
    cache.save()
    assert TimingCache(None, HERE).get("a") is None
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "some/where/timings.json"
    filled(path, {"a": 1.0}).save()
    assert stored(path) == {HERE: {"a": 1.0}}


GOOD = json.dumps({"format": FORMAT, "ms": {HERE: {"a": 1.0}, THERE: {"a": 2.0}}}).encode()

BAD: dict[str, bytes] = {
    "empty": b"",
    "truncated": GOOD[:-9],
    "binary": bytes(range(256)),
    "not UTF-8": GOOD.replace(b"cpu", b"\xff\xfe"),
    "other JSON": b'{"name": "package", "version": 3}',
    "a list": b"[1, 2]",
    "another format": GOOD.replace(str(FORMAT).encode(), b"99", 1),
    "no format": b'{"ms": {}}',
    "times that are words": GOOD.replace(b"1.0", b'"fast"'),
    "null": b"null",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_an_unreadable_file_counts_as_empty_and_is_written_anew(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    cache = TimingCache(path, HERE)
    assert cache.get("a") is None
    assert cache.hits == 0
    cache.put("b", 3.0)
    cache.save()
    assert stored(path) == {HERE: {"b": 3.0}}


@pytest.mark.parametrize("cut", range(0, len(GOOD), 7))
def test_a_file_cut_anywhere_counts_as_empty(path: Path, cut: int) -> None:
    path.write_bytes(GOOD[:cut])
    assert TimingCache(path, HERE).get("a") is None


def blocked_by_a_folder(path: Path) -> None:
    path.mkdir()


def blocked_by_a_file_for_a_folder(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("")


def blocked_by_a_loop_of_links(path: Path) -> None:
    path.parent.rmdir()
    path.parent.symlink_to(path.parent)


def blocked_by_rights(path: Path) -> None:
    path.parent.chmod(0o500)


@pytest.mark.parametrize(
    "block",
    [
        blocked_by_a_folder,
        blocked_by_a_file_for_a_folder,
        blocked_by_a_loop_of_links,
        blocked_by_rights,
    ],
)
def test_a_place_that_cannot_be_written_is_no_error(
    tmp_path: Path, block: Callable[[Path], None]
) -> None:
    path = tmp_path / "home/timings.json"
    path.parent.mkdir()
    block(path)
    cache = TimingCache(path, HERE)
    cache.put("a", 1.0)
    cache.save()
    assert cache.get("a") == 1.0
    assert not list(tmp_path.rglob("*.part"))
    if path.parent.is_dir():
        path.parent.chmod(stat.S_IRWXU)


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    filled(path, {"a": 1.0}).save()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = filled(path, {f"key {i}": 1.0 for i in range(100)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        cache.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_reader_sees_the_old_file_or_the_new_one(path: Path) -> None:
    """The file is replaced, never written in place: who has it open keeps reading the old one."""
    filled(path, {"a": 1.0}).save()
    before = path.read_bytes()
    with path.open("rb") as reader:
        filled(path, {"b": 2.0}).save()
        assert reader.read() == before
    assert stored(path) == {HERE: {"a": 1.0, "b": 2.0}}


def test_what_another_process_saved_meanwhile_is_kept(path: Path) -> None:
    one, other = filled(path, {"a": 1.0}), filled(path, {"b": 2.0}, THERE)
    third = filled(path, {"c": 3.0})
    for cache in (one, other, third):
        cache.save()
    assert stored(path) == {HERE: {"a": 1.0, "c": 3.0}, THERE: {"b": 2.0}}


WRITER = """
import sys
from pathlib import Path
from structconv_cli.onnx.timing_cache import TimingCache

for count in range(60):
    cache = TimingCache(Path(sys.argv[1]), sys.argv[2])
    for key in range(300):
        cache.put(f"{count} {key}", 1.0)
    cache.save()
"""


PAUSED = """
import sys, time
from pathlib import Path
from structconv_cli.onnx.timing_cache import TimingCache

path, pause = Path(sys.argv[1]), Path(sys.argv[2])

def hold(event, arguments):
    # The new file is written, and not yet in its place.
    if event == "os.rename" and str(arguments[1]) == str(path):
        pause.touch()
        while pause.exists():
            time.sleep(0.01)

cache = TimingCache(path, "one")
cache.put("a", 1.0)
sys.addaudithook(hold)
cache.save()
"""


def test_who_saves_last_is_in_the_file(path: Path, tmp_path: Path) -> None:
    """A save is not lost because another began and ended while it was under way."""
    pause = tmp_path / "pause"
    slow = subprocess.Popen([sys.executable, "-c", PAUSED, str(path), str(pause)])
    try:
        while not pause.exists():
            assert slow.poll() is None
            time.sleep(0.01)
        filled(path, {"b": 2.0}, "two").save()
        assert stored(path) == {"two": {"b": 2.0}}
    finally:
        pause.unlink(missing_ok=True)
        slow.wait(timeout=30)
    assert slow.returncode == 0
    assert stored(path)["one"] == {"a": 1.0}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# Not strict: it is a race.
def test_writers_at_the_same_time_leave_a_whole_file(path: Path) -> None:
    """Whole at every moment; what two of them add at once may be lost, as it can be remeasured."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stderr=subprocess.PIPE)
        for name in ("one", "two", "three")
    ]
    seen = 0
    try:
        while any(writer.poll() is None for writer in writers):
            if path.exists():
                assert set(stored(path)) <= {"one", "two", "three"}
                seen += 1
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen > 0
    assert stored(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_default_place_is_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "structconv/timings.json"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert default_path() == tmp_path / "home/.cache/structconv/timings.json"
