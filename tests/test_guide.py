"""Every command and snippet of the guide, run as it stands there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from structconv_cli.cli import app

pytestmark = pytest.mark.usefixtures("short_rounds")

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
PAGES = ("concepts", "converting", "targets", "report", "deploying", "limits")
COMMANDS = ("converting", "targets", "report", "deploying")
"""Pages whose blocks are run one after another, in one folder."""


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """A page's blocks of code in these languages, in order, each with its language."""
    text = (GUIDE / f"{page}.md").read_text()
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(language, block) for language, block in found if language in languages]


@pytest.fixture(scope="module")
def workplace(readers_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(readers_files, tmp_path_factory.mktemp("guide") / "here"))


@pytest.fixture(scope="module")
def done(workplace: Path, quick: dict[str, dict[str, int]]) -> Path:
    """The folder after the commands and snippets of these pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        for page in COMMANDS:
            for language, block in blocks(page, "sh", "python"):
                if language == "python":
                    run([sys.executable, "-c", block], workplace)
                    continue
                for line in block.splitlines():
                    words = shlex.split(line)
                    assert words[0] == "structconv"
                    result = CliRunner().invoke(app, words[1:], default_map=quick)
                    assert result.exit_code == 0, f"{line}\n{result.output}"
    return workplace


def run(words: list[str], place: Path) -> str:
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_commands_write_what_the_guide_says(done: Path) -> None:
    assert (done / "first" / "report.html").is_file()
    for folder in ("first", "from-onnx", "planned"):
        assert (done / folder / "structured.onnx").is_file()
    assert (done / "trial.json").is_file()


def test_the_concepts_hold() -> None:
    snippets = blocks("concepts", "python")
    assert snippets
    for _, snippet in snippets:
        exec(snippet, {})


def test_the_cpp_program_computes_what_python_does(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built by the command that the guide gives, as with an unpacked release."""
    ((_, program),) = blocks("deploying", "cpp")
    (done / "run.cpp").write_text(program)
    command = program.splitlines()[0].removeprefix("// ")
    assert command.startswith("g++ ")
    monkeypatch.setenv("ORT", str(onnxruntime_release(tmp_path / "ort")))
    run(["sh", "-c", f"{command} -Wall -Wextra -Werror"], done)
    printed = float(run(["./run"], done))
    session = onnxruntime.InferenceSession(done / "first" / "structured.onnx")
    (scores,) = session.run(["output"], {"input": np.zeros((1, 3, 32, 32), np.float32)})
    assert printed == pytest.approx(scores[0, 0], rel=1e-4, abs=1e-5)


def onnxruntime_release(place: Path) -> Path:
    """Headers, with their library if it is there, else that of the Python package."""
    home = Path(os.environ.get("ORT", "/usr"))
    header = next((home / "include").rglob("onnxruntime_cxx_api.h"), None)
    if header is None or shutil.which("g++") is None:
        pytest.skip(
            f"no C++ compiler, or no ONNX Runtime headers under {home}/include: set ORT to a "
            "release, or to usr/ of Debian's libonnxruntime-dev, unpacked"
        )
    # One that is not installed, or a link to one that is not, does not count.
    beside = (file for file in home.glob("lib/**/libonnxruntime.so") if file.is_file())
    package = Path(onnxruntime.__file__).parent / "capi"
    library = next(beside, None) or next(package.glob("libonnxruntime.so*"), None)
    if library is None:
        pytest.skip(f"no libonnxruntime.so under {home}/lib nor in the Python package")
    (place / "lib").mkdir(parents=True)
    (place / "include").symlink_to(header.parent)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (place / "lib" / name).symlink_to(library)
    return place


def test_the_programs_name_the_models_inputs_and_outputs(done: Path) -> None:
    session = onnxruntime.InferenceSession(done / "first" / "structured.onnx")
    (entry,), (output,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.shape[1:], output.name) == ("input", [3, 32, 32], "output")
    ((_, program),) = blocks("deploying", "cpp")
    assert 'inputs[] = {"input"}' in program
    assert 'outputs[] = {"output"}' in program
    assert "shape{1, 3, 32, 32}" in program


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_the_javascript_program_runs(package: str, done: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("no Node.js")
    place = done / package
    place.mkdir()
    (place / "package.json").write_text("{}")
    # Its own install script would fetch GPU libraries.
    words = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", f"{package}@1.30.0"]
    found = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"npm cannot install {package}: {found.stderr[-200:]}")
    ((_, program),) = blocks("deploying", "js")
    (place / "run.mjs").write_text(program.replace("onnxruntime-node", package))
    (place / "first").symlink_to(done / "first")
    assert run(["node", "run.mjs"], place).strip().endswith("1x3")


def test_the_contents_list_every_page() -> None:
    listed = re.findall(r"\]\((\w+)\.md\)", (GUIDE / "README.md").read_text())
    assert tuple(listed) == PAGES
    assert {path.stem for path in GUIDE.glob("*.md")} == {"README", *PAGES}


def test_every_block_is_of_a_language_that_is_run() -> None:
    for page in PAGES:
        text = (GUIDE / f"{page}.md").read_text()
        languages = set(re.findall(r"^```(\w*)\n", text, re.MULTILINE)) - {""}
        assert languages <= {"sh", "python", "cpp", "js"}


def test_the_picture_is_of_the_kernel_that_the_text_describes() -> None:
    root = ElementTree.parse(GUIDE / "kernel.svg").getroot()
    words = [
        "".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")
    ]
    ones = words.count("1")
    assert ones == 4 * 4 + 4
    assert words.count("0") == 4 * 5
    assert root.get("aria-label")
