import json
import re
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.architecture import Architecture, build_model, parse_arguments

SAMPLE = Path(__file__).parents[1] / "sample_models" / "resnet_cifar.py"

NET = """
    import sys
    from torch import nn
    from building_blocks import make_conv

    WIDTH = 4
    READY = nn.ReLU()

    def tiny(width=WIDTH, *, bias: bool = True):
        from late_block import NAME
        return nn.Sequential(make_conv(width, bias), nn.Identity())

    class Net(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.depth = depth

    def raising(width=1):
        raise ValueError("the width\\n  is wrong")

    def leaving():
        sys.exit(3)

    def interrupted():
        raise KeyboardInterrupt

    def nothing():
        return None
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    (tmp_path / "building_blocks.py").write_text(
        "from torch import nn\n"
        "def make_conv(width, bias):\n"
        "    return nn.Conv2d(1, width, 3, bias=bias)\n"
    )
    (tmp_path / "late_block.py").write_text("NAME = 'late'\n")
    path = tmp_path / "net.py"
    path.write_text(textwrap.dedent(NET))
    return path


def test_factory_gets_its_arguments_and_its_siblings(net: Path):
    before = list(sys.path)
    model = build_model(Architecture(f"{net}:tiny", {"width": 6, "bias": False}))
    assert isinstance(model, nn.Sequential)
    assert model(torch.zeros(1, 1, 5, 5)).shape == (1, 6, 3, 3)
    assert model[0].bias is None
    assert sys.path == before


def test_a_class_is_a_factory_too(net: Path):
    assert build_model(Architecture(f"{net}:Net", {"depth": 20})).depth == 20


def test_relative_to_the_working_directory(net: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(net.parent)
    assert isinstance(build_model(Architecture("net.py:tiny")), nn.Sequential)


def test_same_names_in_two_folders_stay_apart(tmp_path: Path):
    for name, width in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "shared_sibling.py").write_text(f"WIDTH = {width}\n")
        (folder / "net.py").write_text(
            "from torch import nn\n"
            "from shared_sibling import WIDTH\n"
            "def make():\n"
            "    return nn.Linear(WIDTH, WIDTH)\n"
        )
    for name, width in (("one", 1), ("two", 2), ("one", 1)):
        model = build_model(Architecture(f"{tmp_path / name / 'net.py'}:make"))
        assert model.in_features == width


def test_installed_modules_are_not_shadowed_away(tmp_path: Path):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not this one')\n")
    (tmp_path / "structconv_cli").mkdir()
    (tmp_path / "torch.py").write_text(
        "import torch.nn as nn\n\ndef make():\n    return nn.ReLU()\n"
    )
    loaded = {name: sys.modules[name] for name in ("torch", "numpy", "structconv_cli")}
    assert isinstance(build_model(Architecture(f"{tmp_path / 'torch.py'}:make")), nn.ReLU)
    assert {name: sys.modules[name] for name in loaded} == loaded


@pytest.mark.parametrize(
    ("reference", "arguments", "told"),
    [
        ("net.py", {}, ["'net.py'", "FILE.py:FACTORY"]),
        ("package.models:net", {}, ["package.models:net", "pip install package"]),
        ("json.nothing:net", {}, ["json.nothing", "FILE.py:FACTORY"]),
        ("json:Net", {}, ["package json", "'Net'", "dump"]),
        ("json:dumps", {}, ["dumps()", "of json", "missing", "'obj'"]),
        ("textwrap:dedent", {"text": "x"}, ["dedent of textwrap", "str", "nn.Module"]),
        ("tf:resnet18.a1", {}, ["tf:resnet18.a1", "torchvision:NAME", "timm:NAME"]),
        ("net.py:", {}, ["'net.py:'", "FILE.py:FACTORY"]),
        ("net.py:a-b", {}, ["net.py:a-b", "FILE.py:FACTORY"]),
        ("net.txt:tiny", {}, ["net.txt:tiny", "FILE.py:FACTORY"]),
        ("absent.py:tiny", {}, ["absent.py", "nothing is there"]),
        ("folder.py:tiny", {}, ["folder.py", "a folder is there"]),
        ("net.py:tini", {}, ["net.py", "'tini'", "did you mean tiny"]),
        ("net.py:xyzzy", {}, ["'xyzzy'", "tiny", "Net", "raising"]),
        ("bare.py:make", {}, ["bare.py", "'make'", "no public function"]),
        ("net.py:WIDTH", {}, ["WIDTH", "int"]),
        ("net.py:READY", {}, ["READY", "ReLU"]),
        ("net.py:tiny", {"widht": 3}, ["widht=3", "tiny(width=4, *, bias: bool = True)"]),
        ("net.py:Net", {}, ["depth", "Net(depth)", "--arch-arg"]),
        ("net.py:raising", {"width": 9}, ["raising(width=9)", "line ", "ValueError", "is wrong"]),
        ("net.py:leaving", {}, ["leaving()", "SystemExit: 3"]),
        ("net.py:nothing", {}, ["nothing", "NoneType", "nn.Module"]),
        ("broken.py:make", {}, ["broken.py", "line 2", "SyntaxError"]),
        ("failing.py:make", {}, ["failing.py", "line 3", "ZeroDivisionError"]),
        ("unmet.py:make", {}, ["unmet.py", "line 1", "no_such_package"]),
        ("script.py:make", {}, ["script.py", "line 2", "SystemExit"]),
        ("nested.py:make", {}, ["nested.py", "line 3 of failing.py", "ZeroDivisionError"]),
    ],
)
def test_what_is_wrong_is_told_in_one_paragraph(
    net: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: str,
    arguments: dict[str, int],
    told: list[str],
):
    folder = net.parent
    monkeypatch.chdir(folder)
    (folder / "folder.py").mkdir()
    (folder / "bare.py").write_text("")
    (folder / "broken.py").write_text("x = 1\ndef make(:\n    pass\n")
    (folder / "failing.py").write_text("x = 1\n\ny = x / 0\n")
    (folder / "unmet.py").write_text("import no_such_package\n")
    (folder / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args('x')")
    (folder / "nested.py").write_text("import failing\n")
    before, modules = list(sys.path), set(sys.modules)
    with pytest.raises(ArchitectureError) as raised:
        build_model(Architecture(reference, arguments))
    message = str(raised.value)
    assert all(text in message for text in told), message
    assert "\n" not in message
    assert sys.path == before
    assert not {name for name in set(sys.modules) - modules if "broken" in name}


def test_a_keyboard_interrupt_gets_through(net: Path):
    before = list(sys.path)
    with pytest.raises(KeyboardInterrupt):
        build_model(Architecture(f"{net}:interrupted"))
    assert sys.path == before


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("a=3", 3),
        ("a=-3", -3),
        ("a=0.5", 0.5),
        ("a=True", True),
        ("a=true", True),
        ("a=false", False),
        ("a=None", None),
        ("a=relu", "relu"),
        ("a='true'", "true"),
        ("a='3'", "3"),
        ("a=", ""),
        ("a=b=c", "b=c"),
        ("a=1+2", "1+2"),
        ("a=/tmp/x y", "/tmp/x y"),
        ("a=__import__('os')", "__import__('os')"),
    ],
)
def test_values_are_literals_or_text(item: str, value: object):
    parsed = parse_arguments([item])
    assert parsed == {"a": value}
    assert type(parsed["a"]) is type(value)


names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(names, values))
def test_what_python_prints_is_parsed_back(arguments: dict[str, object]):
    arguments = {key: value for key, value in arguments.items() if abs(_number(value)) < 1e308}
    assert parse_arguments([f"{key}={value!r}" for key, value in arguments.items()]) == arguments


def _number(value: object) -> float:
    return value if isinstance(value, (int, float)) else 0


@pytest.mark.parametrize(
    ("items", "told"),
    [
        (["classes"], "'classes'"),
        (["=3"], "'=3'"),
        (["num-classes=3"], "'num-classes=3'"),
        (["a=1", "a=2"], "twice"),
        (["a=[1, 2]"], "a list"),
        (["a=1j"], "a complex"),
        (["a=b'x'"], "a bytes"),
        (["a=1e999"], "finite"),
    ],
)
def test_bad_arguments(items: list[str], told: str):
    with pytest.raises(ArchitectureError, match=re.escape(told)):
        parse_arguments(items)


def test_architectures_survive_json():
    architecture = Architecture("net.py:tiny", {"width": 3, "bias": None, "act": "relu", "s": 0.5})
    assert Architecture(**json.loads(json.dumps(asdict(architecture)))) == architecture


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"{SAMPLE} is not there")
def test_the_sample_model():
    model = build_model(Architecture(f"{SAMPLE}:resnet20"))
    assert any(isinstance(module, nn.Conv2d) for module in model.modules())
