"""The schemas in docs/schema are those of the dataclasses, and every property is described."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

FOLDER = Path(__file__).parents[1] / "docs/schema"


def generated() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts: dict[str, str] = module.schemas()
    return texts


def test_the_files_are_current() -> None:
    assert {path.name: path.read_text() for path in FOLDER.glob("*.json")} == generated(), (
        "run `python docs/schema/generate.py`"
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_schema_is_valid_and_versioned(path: Path) -> None:
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"].startswith("structconv-")
    assert schema["$id"].rpartition("/")[2].isdecimal()


def test_every_property_of_a_benchmark_is_described() -> None:
    schema = json.loads((FOLDER / "benchmark.schema.json").read_text())
    for kind in (schema, *schema["$defs"].values()):
        for name, entry in properties(kind):
            assert entry.get("description"), f"{kind['title']}.{name}"


def properties(kind: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from kind.get("properties", {}).items()
