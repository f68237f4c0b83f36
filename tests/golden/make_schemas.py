"""The schemas of `tests/decoding/test_schemas.py`: of JSON Schema's own test suite, and as programs
write them.

    git clone https://github.com/json-schema-org/JSON-Schema-Test-Suite SUITE
    python tests/golden/make_schemas.py SUITE
    npm install zod@4 && node tests/golden/make_schemas.mjs > tests/golden/schemas_zod.json

Each case of the suite is a line: `[name, schema, [valid, ...], [invalid, ...]]`.
"""

import datetime
import decimal
import enum
import json
import sys
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import AnyUrl, BaseModel, ConfigDict, Field, SecretStr, TypeAdapter

HERE = Path(__file__).parent
DRAFTS = ("draft2020-12", "draft7")


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class Address(BaseModel):
    street: str
    city: str
    zip: Optional[str] = None  # noqa: UP045


class Person(BaseModel):
    """A person."""

    name: str = Field(description="full name", max_length=40)
    age: Annotated[int, Field(ge=0, le=150)]
    address: Address
    favourite: Color = Color.red
    tags: list[str] = []


class Tree(BaseModel):
    value: int
    children: list["Tree"] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    breed: str


class Pet(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Meeting(BaseModel):
    at: datetime.datetime
    day: datetime.date
    length: datetime.timedelta
    id: uuid.UUID
    price: decimal.Decimal


class Links(BaseModel):
    url: AnyUrl
    anything: Any = None
    secret: SecretStr


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    a: int
    b: float | None
    c: int | str | None
    d: tuple[int, str]
    e: dict[str, int]


class Expression(BaseModel):
    op: Literal["+", "-"]
    left: Union["Expression", float]
    right: Union["Expression", float]


class Entities(BaseModel):
    entities: list[Person] = Field(min_length=1, max_length=5)


class Patterns(BaseModel):
    code: str = Field(pattern=r"^[A-Z]{3}\d{2,4}$")
    n: Annotated[int, Field(multiple_of=5)]
    f: Annotated[float, Field(gt=0, lt=1)]


class Sets(BaseModel):
    some: set[int]


MODELS = (Person, Tree, Pet, Meeting, Links, Strict, Expression, Entities, Patterns, Sets)


def lines(cases: list[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]"


def main(suite: Path) -> None:
    drafts = []
    for draft in DRAFTS:
        cases = []
        for file in sorted((suite / "tests" / draft).glob("*.json")):
            for case in json.loads(file.read_text()):
                kinds = (
                    [t["data"] for t in case["tests"] if t["valid"] is v] for v in (True, False)
                )
                cases.append([f"{file.stem}: {case['description']}", case["schema"], *kinds])
        drafts.append(f'"{draft}": {lines(cases)}')
    (HERE / "schema_suite.json").write_text("{\n" + ",\n".join(drafts) + "\n}\n")
    schemas = {model.__name__: model.model_json_schema() for model in MODELS}
    schemas["list"] = TypeAdapter(list[int]).json_schema()
    (HERE / "schemas_pydantic.json").write_text(json.dumps(schemas, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
