"""The document's table of fields is the one that the models give."""

from field_table import DOCUMENT, TABLES, happens, written


def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert written(text) == text, "run: python tests/server/field_table.py"


def test_every_field_says_what_happens() -> None:
    for kind, _ in TABLES.values():
        for name, field in kind.model_fields.items():
            assert happens(field), name
