"""Writes the JSON schemas of what structconv writes, from its dataclasses and their docstrings.

    python docs/schema/generate.py

`$id` names the format and its version, as the field `schema` of each file does: a change that a
reader of the old version would stumble over gets the next number.
"""

import json
from pathlib import Path
from typing import Any

from docstring_parser import DocstringStyle, parse
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from structconv_cli.benchmarking.result import BenchmarkResult
from structconv_cli.conversion import ConvertResult
from structconv_cli.plan import Plan
from structconv_cli.planning.prediction import Prediction
from structconv_cli.verify import VerifyResult

KINDS: dict[str, type[Any]] = {
    "plan": Plan,
    "prediction": Prediction,
    "convert": ConvertResult,
    "verification": VerifyResult,
    "benchmark": BenchmarkResult,
}
"""Dataclasses by the file's name."""


class Documented(GenerateJsonSchema):
    """A schema whose properties are described by the "Attributes" of their class's docstring."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """The schema of one dataclass."""
        found = super().dataclass_schema(schema)
        text = parse(schema["cls"].__doc__ or "", DocstringStyle.GOOGLE)
        found["description"] = _one_line(text.description)
        for parameter in text.params:
            for name in parameter.arg_name.split(","):
                if name.strip() in found["properties"]:
                    found["properties"][name.strip()]["description"] = _one_line(
                        parameter.description
                    )
        return found


def schemas() -> dict[str, str]:
    """The text of every schema, by the name of its file."""
    texts = {}
    for name, kind in KINDS.items():
        schema = TypeAdapter(kind).json_schema(mode="serialization", schema_generator=Documented)
        identifier = schema["properties"]["schema"]["const"]
        heads = {"$schema": GenerateJsonSchema.schema_dialect, "$id": identifier}
        texts[f"{name}.schema.json"] = json.dumps({**heads, **schema}, indent=2) + "\n"
    return texts


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    for name, text in schemas().items():
        (Path(__file__).parent / name).write_text(text)
