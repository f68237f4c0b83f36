"""Which tokens a schema, an expression or a grammar lets come: beside what the bytes say."""

import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from conftest import byte_tokenizer, mistral_model, slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_cerebrum.decoding import constraint
from mlx_cerebrum.decoding.constraint import Constraint, Grammar, Grammars, Words
from mlx_cerebrum.decoding.grammar_text import MOST_BYTES, Ask
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import load_tokenizer, open_checkpoint

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
            "additionalProperties": False,
        }
    },
}


def ask(schema: Any) -> Ask:
    return Ask("json_schema", json.dumps(schema))


def bytes_vocabulary(path: Path) -> Tokenizer:
    byte_tokenizer(path)
    return Tokenizer.from_directory(path)


def added_tokens(path: Path) -> Tokenizer:
    """Mistral's, with a marker of the template's, a word, and two end tokens."""
    shutil.copy(mistral_model(), path / "tokenizer.model")
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    names = {"32000": "<|im_end|>", "32001": "<|im_start|>", "32002": "Cerebrum"}
    added = {number: flags | {"content": name} for number, name in names.items()}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added, "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(path, [2])


def mistral(path: Path) -> Tokenizer:
    shutil.copy(mistral_model(), path / "tokenizer.model")
    return Tokenizer.from_directory(path)


MADE: dict[str, Callable[[Path], Tokenizer]]
MADE = {"bytes": bytes_vocabulary, "mistral": mistral, "added": added_tokens}


@pytest.fixture(scope="module", params=["bytes", "mistral", "added", "gguf"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Tokenizer:
    if request.param == "gguf":
        return load_tokenizer(open_checkpoint(request.getfixturevalue("demo")))
    return MADE[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + 13)  # rows of padding


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    made = bytes_vocabulary(tmp_path_factory.mktemp("small"))
    return Grammars(made, made.vocab_size)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars of these tests need no process of their own to be tried in."""
    monkeypatch.setattr(constraint, "found_wrong", lambda written: "")


def allowed(mask: Words) -> list[int]:
    found: list[int] = np.flatnonzero(
        np.unpackbits(mask.view(np.uint8), bitorder="little")
    ).tolist()
    return found


def piece(tokenizer: Tokenizer, token: int) -> bytes:
    found = tokenizer.piece(token)
    return found if isinstance(found, bytes) else found.replace("\u2581", " ").encode()


def walk(
    grammar: Grammar, tokenizer: Tokenizer, draw: random.Random, most: int = 300
) -> tuple[str, Constraint]:
    """The text of a random answer: a short token mostly, since long ones lead far."""
    held, tokens = grammar.start(), list[int]()
    while len(tokens) < most and not held.over:
        choices = allowed(held.masks()[0])
        token = draw.choice(choices)
        held.accept([token])
        assert held.failure is None
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(token)
    return tokenizer.decode(tokens), held


# Beside what the bytes say.


def accepts(matcher: Any, text: bytes) -> bool:
    count = matcher.try_consume_tokens(list(text))
    matcher.rollback(count)
    return bool(count == len(text))


CASES = [
    ask(PERSON),
    ask(TREE),
    Ask("json_object"),
    Ask("regex", r"[A-Z][a-zé]+( \d{4}){2}|Cerebrum<\|im_end\|>"),
    Ask("lark", 'start: "<" WORD (" " WORD)* ">"\nWORD: /[^<> ]+/'),
    Ask("choice", '["Cerebrum", "<|im_start|>", "naïve", "na"]'),
    Ask("call", json.dumps([{"name": "f", "parameters": PERSON}, {"name": "fg"}])),
]


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.one_in(8)
def test_a_token_may_come_where_its_bytes_may(
    number: int, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    from llguidance import LLMatcher, LLTokenizer

    draw, grammar = random.Random(number), grammars.compile(CASES[number])
    text_of = {token: piece(tokenizer, token) for token in range(tokenizer.vocab_size)}
    closed = tokenizer.control_ids | tokenizer.eos_token_ids
    usable = [token for token, text in text_of.items() if text and token not in closed]
    held, oracle = grammar.start(), LLMatcher(LLTokenizer("byte"), grammar._written.text)
    asked = {draw.randrange(3), draw.randrange(3, 20)}
    for count in range(30):
        found = allowed(held.masks()[0])
        if count in asked:
            ends = tokenizer.eos_token_ids if oracle.is_accepting() else frozenset[int]()
            wanted = [token for token in usable if accepts(oracle, text_of[token])]
            if forced := held.forced(1):
                assert found == forced
                assert forced[0] in wanted
            else:
                assert found == sorted({*wanted, *ends})
        choices = [token for token in found if token not in tokenizer.eos_token_ids]
        if not choices:
            break
        token = draw.choice(choices)
        held.accept([token])
        assert oracle.try_consume_tokens(list(text_of[token])) == len(text_of[token])


def test_what_is_forced_is_spelled_as_the_tokenizer_does(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    text = '{"name": "get_current_weather", "arguments": {'
    held = grammars.compile(Ask("call", '[{"name": "get_current_weather"}]')).start()
    wanted, found = tokenizer.encode("\n" + text, add_bos=False), list[int]()
    while forced := held.forced(7):
        held.accept(forced)
        found += forced
    assert len(tokenizer.decode(found)) > 30
    assert found in (wanted[start : start + len(found)] for start in (1, 2))


@pytest.mark.usefixtures("untried")
def test_masks_after_guesses_are_those_of_the_guesses_kept(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    for seed, case in enumerate(CASES):
        draw, grammar = random.Random(seed), grammars.compile(case)
        held, plain = grammar.start(), grammar.start()
        for _ in range(8):
            guesses: list[int] = []
            probe = grammar.start()
            probe.accept(plain._tokens)
            for _ in range(draw.randrange(4)):
                token = draw.choice(allowed(probe.masks()[0]))
                if token in tokenizer.eos_token_ids or probe.forced(1):
                    break
                probe.accept([token])
                guesses.append(token)
            assert held.cut(guesses) == guesses
            rows = held.masks(guesses)
            assert held.masks(guesses).tolist() == rows.tolist()
            for number, row in enumerate(rows):
                assert plain.masks()[0].tolist() == row.tolist()
                plain.accept(guesses[number : number + 1])
            held.accept(guesses)
            if not (choices := [t for t in allowed(rows[-1]) if t not in tokenizer.eos_token_ids]):
                break
            token = draw.choice(choices)
            held.accept([token])
            plain.accept([token])


@pytest.mark.usefixtures("untried")
def test_control_tokens_never_come(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Whatever a grammar names."""
    for text in ("start: <[*]> /[a-z]/", 'start: <[0-9]> | "a"'):
        grammar = grammars.compile(Ask("lark", text))
        closed = tokenizer.control_ids | tokenizer.eos_token_ids
        assert not closed & {*allowed(grammar.start().masks()[0])}
        assert max(allowed(grammar.start().masks()[0])) < tokenizer.vocab_size


@slow
def test_all_end_tokens_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    held = grammars.compile(Ask("regex", "ab?")).start()
    held.accept(allowed(held.masks()[0])[:1])
    assert tokenizer.eos_token_ids <= {*allowed(held.masks()[0])}
    assert not held.finished
    held.accept([max(tokenizer.eos_token_ids)])
    assert held.finished
    assert {*allowed(held.masks()[0])} == tokenizer.eos_token_ids


# Documents.

LEAVES = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -20, "maximum": 300},
    {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 50},
    {"type": "number", "minimum": 0.5, "exclusiveMaximum": 8},
    {"type": "string", "maxLength": 4},
    {"type": "string", "pattern": "^[a-c]{1,4}\\d?$"},
    {"type": "string", "format": "date"},
    {"enum": ["x", 1, None, {"y": [1]}, True]},
    {"const": 'é\n"\\'},
    {"type": ["string", "integer"], "maxLength": 2, "maximum": 9, "minimum": 0},
]
NAMES = st.sampled_from(["a", "b", "ab", "é", 'q"'])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    closed = st.builds(
        lambda properties, count: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:count],
            "additionalProperties": False,
        },
        st.dictionaries(NAMES, inner, max_size=3),
        st.integers(0, 3),
    )
    arrays = st.builds(
        lambda items, first, least: (
            {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": least + 2,
            }
            | ({"prefixItems": first} if first else {})
        ),
        inner,
        st.lists(inner, max_size=2),
        st.integers(0, 2),
    )
    either = st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
    return closed | arrays | either


SCHEMAS = st.recursive(st.sampled_from(LEAVES), containers, max_leaves=6)
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_document(grammars: Grammars, schema: Any, seed: int) -> bool:
    """A random document that is complete is valid; whether it is complete."""
    tokenizer = grammars._tokenizer
    text, held = walk(grammars.compile(ask(schema)), tokenizer, random.Random(seed))
    if held.finished:
        assert jsonschema_rs.is_valid(schema, json.loads(text)), (schema, text)
    return held.finished


@pytest.mark.usefixtures("untried")
@settings(SLOW, max_examples=60)
@given(schema=SCHEMAS, seed=st.integers(0, 999))
def test_documents_are_valid(small: Grammars, schema: Any, seed: int) -> None:
    check_document(small, schema, seed)


@pytest.mark.usefixtures("untried")
@settings(SLOW, max_examples=10)
@given(schema=SCHEMAS, seed=st.integers(0, 999))
def test_documents_are_valid_in_every_vocabulary(
    grammars: Grammars, schema: Any, seed: int
) -> None:
    check_document(grammars, schema, seed)


@pytest.mark.usefixtures("untried")
@pytest.mark.long
@settings(SLOW, max_examples=3000)
@given(schema=SCHEMAS, seed=st.integers(0, 999))
def test_many_documents_are_valid(small: Grammars, schema: Any, seed: int) -> None:
    check_document(small, schema, seed)


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("schema", [PERSON, TREE, {"type": "array", "items": {"type": "boolean"}}])
def test_most_documents_end(small: Grammars, schema: Any) -> None:
    """White space does not go on for ever."""
    assert sum(check_document(small, schema, seed) for seed in range(20)) > 15


@pytest.mark.parametrize("text", ['{"a": 1, "b": [1, 2]}', '{"a":1,"b":[1,2]}', None])
def test_documents_are_written_as_people_do(small: Grammars, text: str | None) -> None:
    text = text or json.dumps({"a": 1, "b": [1, {"c": []}]}, indent=4)
    grammar = small.compile(Ask("json_object"))
    held = grammar.start()
    held.accept(small._tokenizer.encode(text, add_bos=False))
    assert held.failure is None
    assert held.finished


# What is refused.

DEEP: Any = {"type": "array"}
for _ in range(70):
    DEEP = {"type": "array", "items": DEEP}

REFUSED = [
    (ask([1]), r"json_schema must be a JSON schema, an object, not \[1\]"),
    (Ask("json_schema", "{"), "json_schema is not valid JSON"),
    (Ask("json_schema", "{}", "response_format.schema"), None),
    (Ask("json_schema", "[]", "response_format.schema"), "^response_format.schema must be"),
    (Ask("json_schema", json.dumps({"a": "x" * MOST_BYTES})), "larger than 128 KiB"),
    (ask(DEEP), "nested over 64 deep"),
    (ask({"$ref": "#"}), "json_schema: no finite document can fulfil it"),
    (
        ask({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "no finite document",
    ),
    (ask({"type": "array", "items": {"$ref": "#"}, "minItems": 1}), "no finite document"),
    (ask(False), r"json_schema"),
    (
        ask({"properties": {"a": {"$ref": "https://example.com/a.json"}}}),
        r"^json_schema.properties.a.\$ref must point into the schema itself",
    ),
    (ask({"$ref": "#/$defs/a"}), r"json_schema"),
    (ask({"oneOf": [{"$ref": [1]}, {"type": "null"}]}), r"oneOf\[0\].\$ref must point"),
    (
        ask({"properties": {"a": {"items": {"type": "string", "pattern": "(?=a)b"}}}}),
        r"^json_schema.properties.a.items.pattern: regex parse error",
    ),
    (
        ask({"allOf": [{"type": "string"}, {"type": "array", "uniqueItems": True}]}),
        r"^json_schema.allOf\[1\].uniqueItems: Unimplemented keys",
    ),
    (
        ask({"properties": {"a": {"type": "string", "format": "idn-email"}}}),
        "^json_schema.properties.a.format: Unknown format: idn-email",
    ),
    (ask({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "^json_schema.oneOf: oneOf"),
    (ask({"const": ["x" * 5000]}), "^json_schema.const is longer than 4096 characters"),
    (Ask("choice", json.dumps(["x" * 5000])), r"^choice\[0\] is longer"),
    (ask({"type": "string", "minLength": 3, "maxLength": 1}), "json_schema.*: Unsatisfiable"),
    (ask({"type": "object", "minProperties": 3}), "^json_schema.minProperties can't be kept above"),
    (ask({"type": "strnig"}), "json_schema.*strnig"),
    (Ask("regex", "(a"), "^regex: "),
    (Ask("regex", r"\p{Nope}"), "^regex: "),
    (Ask("lark", "begin: /a/"), "^lark: "),
    (Ask("lark", '{"grammars": []}'), "^lark: "),
    (Ask("lark", ""), "^lark: "),
    (Ask("choice", "[]"), "^choice must be a list of texts"),
    (Ask("choice", '["a", 1]'), "^choice must be a list of texts"),
    (Ask("call", "[]"), "^call must be a list of functions"),
    (Ask("call", '[{"name": "a b"}]'), r"^call\[0\].name must match"),
    (
        Ask("call", '[{"name": "a"}, {"name": "b", "parameters": {"not": {}}}]'),
        r"^call\[1\].parameters.not: Unimplemented",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_can_t_be_kept_is_refused_by_name(number: int, small: Grammars) -> None:
    case, message = REFUSED[number]
    if message is None:
        small.compile(case)
        return
    with pytest.raises(RequestError, match=message) as caught:
        small.compile(case)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def chain(length: int) -> Any:
    """Each schema refers to the next: as deep as one schema in the other."""
    parts = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**parts, str(length): {"type": "null"}}}


RULES = "\n".join(f"r{i}: r{i + 1}" for i in range(900))
HOSTILE = [
    ask(chain(2000)),
    Ask("lark", f'start: r0\n{RULES}\nr900: "y"'),
    Ask("lark", f'start: {"(" * 4000}"y"{")" * 4000}'),
    Ask("regex", "(" * 8000 + "a" + ")" * 8000),
    Ask("regex", "a{1000000000}"),
    ask({"type": "integer", "multipleOf": 99999989}),
]
HARD = [
    Ask("regex", "(.*)" * 3000),
    Ask("regex", "(x+x+)+y"),
    Ask("regex", "(.*a){40}"),
    Ask("regex", "((a{0,100}){0,100}){0,100}"),
    Ask("regex", r"(\w+\s?){1,2000}"),
    Ask("regex", r"(\p{L}{1,9}\w\d){50}"),
    Ask("choice", json.dumps([f"text {i}" for i in range(5000)])),
    ask({"type": "string", "pattern": "[ab]*a[ab]{25}"}),
    ask({"type": "string", "format": "email", "pattern": "^.{1,60}$", "minLength": 6}),
    ask({"type": "string", "minLength": 10**7}),
    ask({"type": "array", "maxItems": 10**6, "items": {"type": "array", "maxItems": 10**6}}),
    ask(
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in "abc"]} for i in range(12)]}
    ),
    ask({"patternProperties": {f"^[a-z]+{i}$": {} for i in range(300)}}),
    ask({"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    ask(chain(100)),
]


def numbers(count: int, *slow: int) -> list[Any]:
    marks = [[pytest.mark.long] if number in slow else [] for number in range(count)]
    return [pytest.param(number, marks=marks[number]) for number in range(count)]


@pytest.mark.parametrize("number", numbers(len(HOSTILE), 5))
def test_what_would_end_the_program_is_refused(number: int, small: Grammars) -> None:
    """By too deep a stack, or too much time or memory."""
    with pytest.raises(RequestError, match=f"^{HOSTILE[number].kind}: "):
        small.compile(HOSTILE[number])


@pytest.mark.parametrize("number", numbers(len(HARD), 0, 12, 13))
def test_what_is_hard_is_compiled_or_refused(number: int, small: Grammars) -> None:
    """And what is compiled can be walked, or fails in one line."""
    try:
        held = small.compile(HARD[number]).start()
    except RequestError:
        return
    draw = random.Random(1)
    for _ in range(30):
        if held.finished or held.failure is not None:
            break
        held.accept([draw.choice(allowed(held.masks()[0]))])


def test_pydantic_s_recursive_and_told_apart_options(small: Grammars) -> None:
    kinds = {
        name: {
            "type": "object",
            "properties": {"kind": {"const": name}, "next": {"$ref": "#/$defs/any"}},
            "required": ["kind"],
            "additionalProperties": False,
        }
        for name in ("cat", "dog")
    }
    options = [{"$ref": f"#/$defs/{name}"} for name in kinds]
    schema = {"$ref": "#/$defs/any", "$defs": {"any": {"oneOf": options}, **kinds}}
    for seed in range(9):
        check_document(small, schema, seed)


# Several answers.


def test_answers_of_a_grammar_do_not_know_each_other(small: Grammars) -> None:
    grammar = small.compile(Ask("regex", "ab|cd"))
    first, second = grammar.start(), grammar.start()
    first.accept(small._tokenizer.encode("a", add_bos=False))
    assert len(allowed(first.masks()[0])) == 1
    assert len(allowed(second.masks()[0])) == 2


@pytest.mark.usefixtures("untried")
def test_what_is_asked_again_is_not_compiled_again(small: Grammars) -> None:
    grammar = small.compile(ask(PERSON))
    assert small.compile(Ask("json_schema", json.dumps(PERSON), "elsewhere")) is grammar
    for number in range(constraint.KEPT):
        small.compile(Ask("regex", f"a{number}"))
    assert small.compile(ask(PERSON)) is not grammar


def test_a_limit_that_others_met_is_not_this_answer_s(small: Grammars) -> None:
    """All that share a matcher share what it may take; who meets a limit goes on alone."""
    grammar = small.compile(Ask("regex", "[ab]{1,4}"))
    held = grammar.start()
    held.accept(small._tokenizer.encode("a", add_bos=False))
    wanted = held.masks()[0].tolist()
    assert not held._matcher.consume_token(0)  # as if a limit was met
    assert held._matcher.is_error()
    assert held.masks()[0].tolist() == wanted
    assert held.failure is None
    assert small.compile(Ask("regex", "[ab]{1,4}")) is not grammar
    held._matcher.consume_token(0)
    held.masks()
    assert held.failure is not None
    assert held.over


@pytest.mark.usefixtures("untried")
def test_grammars_are_compiled_beside_running_answers(small: Grammars) -> None:
    grammar, faults = small.compile(ask(PERSON)), list[BaseException]()
    wanted = [walk(grammar, small._tokenizer, random.Random(seed))[0] for seed in range(4)]

    def work(seed: int) -> None:
        try:
            for number in range(4):
                small.compile(Ask("regex", f"{seed}{number}[a-z]*"))
                own = small.compile(ask(PERSON))
                assert walk(own, small._tokenizer, random.Random(number))[0] == wanted[number]
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, mlx_cerebrum.decoding.decoder, mlx_cerebrum.decoding.constraint as c;"
        "c.Grammars(None, 9); sys.exit('llguidance' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
