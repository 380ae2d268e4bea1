"""Every structconv command and snippet of the README, run as it stands there."""

import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from test_world import LAUNCHER
from typer.testing import CliRunner

from structconv_cli.cli import app

pytestmark = pytest.mark.usefixtures("short_rounds")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [
        textwrap.dedent(block)
        for block in re.findall(rf" *```{language}\n(.*?)```", README, re.DOTALL)
    ]


@pytest.fixture
def workplace(readers_files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(readers_files, tmp_path / "here"))


def test_commands_and_snippets(
    workplace: Path, quick: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    commands = [
        line.split("  #")[0]
        for block in blocks("sh")
        for line in block.splitlines()
        if line and not line.startswith("make ")
    ]
    assert len([line for line in commands if line.startswith("structconv ")]) >= 6
    for line in commands:
        words = shlex.split(line)
        if words[0] == "torchrun":
            assert words[: len(LAUNCHER)] == LAUNCHER
            words = ["structconv", *words[len(LAUNCHER) :]]
        if words[0] == "structconv":  # in this process: each start would take seconds
            result = CliRunner().invoke(app, words[1:], default_map=quick)
            assert result.exit_code == 0, f"{line}\n{result.output}"
            continue
        done = subprocess.run(words, cwd=workplace, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    for snippet in blocks("python"):
        exec(snippet, {})


def test_every_file_that_the_readme_lists_is_written(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(
        next(x for x in blocks("sh")[1].splitlines() if x.startswith("structconv convert"))
    )
    monkeypatch.chdir(workplace)
    assert CliRunner().invoke(app, [*words[1:], "--epochs", "0"]).exit_code == 0
    table = README.split("## What you get")[1].split("Use it like")[0]
    listed = set(re.findall(r"`([a-z_]+\.[a-z]+)`", table)) - {"benchmark.json"}
    assert listed == {path.name for path in (workplace / "structconv-run").iterdir()}
