"""The table of what requests may say, in docs/server-api.md: `python tests/server/field_table.py`
writes it anew from the models that check requests."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mlx_cerebrum.server.bodies import (
    TAKEN,
)
from mlx_cerebrum.server.responses import InputItem, ResponsesRequest
from mlx_cerebrum.server.schema import (
    ChatRequest,
    CompletionRequest,
    Drawn,
    Sampled,
)
from mlx_cerebrum.server.talk import (
    Message,
)
from mlx_cerebrum.server.tokens import DetokenizeRequest, TokenizeRequest

DOCUMENT = Path(__file__).parents[2] / "docs" / "server-api.md"
TABLES: dict[str, tuple[type[BaseModel], type[BaseModel] | None]] = {
    "Every endpoint that generates": (Drawn, None),
    "`/v1/chat/completions` and `/v1/completions`": (Sampled, Drawn),
    "`/v1/chat/completions`": (ChatRequest, Sampled),
    "`/v1/completions`": (CompletionRequest, Sampled),
    "`/v1/responses`": (ResponsesRequest, Drawn),
    "A message of `/v1/chat/completions`": (Message, None),
    "An item of `/v1/responses`": (InputItem, None),
    "`/v1/tokenize`": (TokenizeRequest, None),
    "`/v1/detokenize`": (DetokenizeRequest, None),
}
MARKS = re.compile(r"(<!-- fields: [^\n]*-->\n).*(<!-- end of fields -->)", re.S)


def written(text: str) -> str:
    """The document with its tables as the models have them."""
    found = "\n\n".join(f"## {head}\n\n{table(*kinds)}" for head, kinds in TABLES.items())
    return MARKS.sub(lambda marks: f"{marks[1]}\n{found}\n\n{marks[2]}", text)


def table(kind: type[BaseModel], below: type[BaseModel] | None) -> str:
    known = {} if below is None else below.model_fields
    rows = ["| field | taken | what happens |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        if name not in known or field.annotation != known[name].annotation:
            rows.append(f"| `{field.alias or name}` | {values(kind, name)} | {happens(field)} |")
    return "\n".join(rows)


def happens(field: FieldInfo) -> str:
    if isinstance(field.json_schema_extra, dict) and "enum" in field.json_schema_extra:
        return "Other values are refused"
    return (field.description or "Honoured").replace("|", "\\|")


def values(kind: type[BaseModel], name: str) -> str:
    field = kind.model_fields[name]
    schema = kind.model_json_schema()["properties"][field.alias or name]
    if (field.description or "").startswith(TAKEN):
        return "anything"
    return kinds(schema)


def kinds(schema: dict[str, Any]) -> str:
    """What a schema allows, in a few words."""
    if "anyOf" in schema:
        several = schema["anyOf"]
        assert isinstance(several, list)
        words = [kinds(one) for one in several if one != {"type": "null"}]
        return " or ".join(dict.fromkeys(words))
    if "enum" in schema:
        listed = schema["enum"]
        assert isinstance(listed, list)
        return ", ".join(f"`{json.dumps(one)}`" for one in listed if one is not None) or "`null`"
    if "$ref" in schema:
        return "object"
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(one for one in kind if one != "null")
    bounds = {
        "from": schema.get("minimum"),
        "above": schema.get("exclusiveMinimum"),
        "to": schema.get("maximum"),
        "below": schema.get("exclusiveMaximum"),
    }
    # Those that only say what a number of 32 or 64 bits holds are left out.
    said = [f"{word} {at}" for word, at in bounds.items() if at is not None and abs(at) < 2**31]
    return " ".join([str(kind), *said])


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text("utf-8")), encoding="utf-8")
