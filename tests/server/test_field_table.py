"""The document's table of fields is the one that the models give."""

import jsonschema_rs
from conftest import slow
from field_table import DOCUMENT, TABLES, happens, written


@slow
def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert written(text) == text, "run: python tests/server/field_table.py"


def test_every_field_says_what_happens() -> None:
    for kind, _ in TABLES.values():
        for name, field in kind.model_fields.items():
            assert happens(field), name


def test_the_document_says_that_a_null_is_taken() -> None:
    for kind, _ in TABLES.values():
        schema = kind.model_json_schema()
        for name, field in kind.model_fields.items():
            if not field.is_required():
                own = schema["properties"][field.alias or name]
                assert jsonschema_rs.is_valid({**own, "$defs": schema.get("$defs", {})}, None), name
