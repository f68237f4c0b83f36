"""Tokenizer files that someone made to harm: each ends in one line, soon, and in little memory."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import slow
from test_tokenizer_peers import pieces

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Piece,
    write_model,
)
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.tokenizer.tokenizer_json import parse
from mlx_cerebrum.tokenizer.vocabulary import MAX_ADDED, MAX_TOKENS

MODEL = write_model(pieces(False))
TOKEN = {"id": 3, "content": "x", "special": False}


def refused(path: Path, complaint: str) -> None:
    before = time.monotonic()
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer.from_directory(path)
    assert time.monotonic() - before < 10
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(path), "")) < 300


@pytest.mark.parametrize(
    ("name", "key", "value", "complaint"),
    [
        ("tokenizer_config", "added_tokens_decoder", [1], "must be an object"),
        ("tokenizer_config", "added_tokens_decoder", "abc", "must be an object"),
        ("tokenizer_config", "added_tokens_decoder", {"9" * 5000: TOKEN}, "bad entry"),
        ("tokenizer_config", "added_tokens_decoder", {"9" * 8: TOKEN}, "no token id below"),
        ("tokenizer_config", "added_tokens_decoder", {"-1": TOKEN}, "bad entry '-1'"),
        ("tokenizer_config", "added_tokens_decoder", {"\u0663": TOKEN}, "bad entry"),
        ("tokenizer_config", "added_tokens_decoder", {"9": {"content": []}}, "a token's text"),
        ("tokenizer_config", "added_tokens_decoder", {"9": TOKEN | {"lstrip": 2}}, "lstrip of 'x'"),
        ("tokenizer_config", "chat_template", ["x"], "must have a name"),
        ("tokenizer_config", "chat_template", [{"name": [], "template": "x"}], "must have a name"),
        ("tokenizer_config", "chat_template", {"rag": "x"}, "named 'default'"),
        ("tokenizer_config", "chat_template", {"default": 1}, "chat_template must be text"),
        ("tokenizer_config", "legacy", "no", "legacy must be true or false"),
        ("tokenizer_config", "add_prefix_space", 1, "add_prefix_space must be true or false"),
        ("tokenizer_config", "extra_special_tokens", 5, "extra_special_tokens must be a list"),
        ("tokenizer_config", "extra_special_tokens", [5], "extra_special_tokens must be"),
        ("tokenizer_config", "bos_token", "\ud800", "half a surrogate pair"),
        ("tokenizer_config", "bos_token", ["<s>"], "bos_token must be a token's text"),
        ("special_tokens_map", "eos_token", 2, "eos_token must be a token's text"),
        ("special_tokens_map", "additional_special_tokens", "x", "must be a list"),
        ("added_tokens", "x", 2**60, "'x' has no token id below"),
        ("added_tokens", "x", True, "'x' has no token id below"),
        ("added_tokens", "x", 1.0, "'x' has no token id below"),
        ("generation_config", "eos_token_id", [[2]], "eos_token_id must be"),
        ("generation_config", "eos_token_id", 1e400, "eos_token_id must be"),
        ("chat_template", "chat_template", [1], "must have a name"),
    ],
)
def test_files_of_other_shapes(
    tmp_path: Path, name: str, key: str, value: Any, complaint: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL)
    (tmp_path / f"{name}.json").write_text(json.dumps({key: value}))
    refused(tmp_path, complaint)


def test_more_added_tokens_than_any_model_has(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL)
    names = {f"<|{i}|>": i for i in range(MAX_ADDED + 1)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    refused(tmp_path, "more than 16,384 added tokens")


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
@slow
def test_more_pieces_than_any_model_has(tmp_path: Path, kind: int) -> None:
    count = MAX_TOKENS if kind == NORMAL else MAX_ADDED
    more: list[Piece] = [(f"p{i}", 0.0, kind) for i in range(count + 1)]
    (tmp_path / "tokenizer.model").write_bytes(write_model([*pieces(False), *more]))
    (tmp_path / "chat_template.jinja").write_text("x")
    refused(tmp_path, "more than (524,288|16,384 (control and added tokens|user-defined pieces))")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (MODEL[:5000], "not a SentencePiece model"),
        (b"\x0a\x03\x0a\x01\xff" + MODEL, "damaged"),
        (b"\x0b\xff" * 1000, "not a SentencePiece model"),
    ],
)
def test_a_damaged_model(tmp_path: Path, damage: bytes, complaint: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(damage)
    refused(tmp_path, complaint)


# ---- tokenizer.json

MODEL_JSON: dict[str, Any] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
RAW: dict[str, Any] = {"model": MODEL_JSON, "decoder": {"type": "ByteLevel"}}


def split(regex: Any) -> dict[str, Any]:
    pattern = {"pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Split", **pattern}}


def replaced(content: str, times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [step] * times}}


def nested(depth: int) -> dict[str, Any]:
    node: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        node = {"type": "Sequence", "normalizers": [node]}
    return {"normalizer": node}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        # The library panics, or never ends, on these.
        ({"model": MODEL_JSON | {"continuing_subword_prefix": "\u00e9\u00e9"}}, "parts of words"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "not a step"),
        (split("a*a*a*a*a*$"), "can take for ever"),
        (split("(a|a)*$"), "can take for ever"),
        (split("(a+)+$"), "can take for ever"),
        (split(r"(.)\1*\1*$"), "can take for ever"),
        (split("(?:a?){900}"), "can take for ever"),
        (split("a{99999}"), "can take for ever"),
        (split("(" * 2000 + ")" * 2000), "can take for ever"),
        (split("("), "not a usable tokenizer.json"),
        (split(""), "empty or no text"),
        (split(5), "empty or no text"),
        (replaced("aa", 16), "make text 7e\\+04 times as long"),
        (replaced("a" * 5000, 1), "longer than 4096"),
        (replaced("a", 17), "at most 16 steps"),
        (nested(6), "at most 16 steps"),
        (nested(40), "nested over 64 deep"),
        ({"normalizer": {"type": ["NFC"]}}, "not a step"),
        ({"pre_tokenizer": [1]}, "not a step"),
        ({"model": MODEL_JSON | {"vocab": ["a"]}}, "its vocab must name token ids"),
        ({"model": MODEL_JSON | {"vocab": {"a": 2**32}}}, "its vocab must name token ids"),
        ({"model": MODEL_JSON | {"vocab": {"a": -1}}}, "its vocab must name token ids"),
        ({"model": MODEL_JSON | {"merges": [["a"]]}}, "a merge is not two texts"),
        ({"model": MODEL_JSON | {"merges": {"a": "b"}}}, "its merges must be a list"),
        ({"model": MODEL_JSON | {"merges": [["b", "a"]]}}, "token is not in its vocab"),
        ({"model": MODEL_JSON | {"unk_token": "?"}}, "unk_token is not in its vocabulary"),
        ({"model": MODEL_JSON | {"unk_token": [1]}}, "unk_token is not in its vocabulary"),
        ({"model": MODEL_JSON | {"byte_fallback": 2}}, "must be true or false"),
        ({"model": [1]}, "it has no model"),
        ({"added_tokens": {"x": 1}}, "added_tokens must be a list"),
        ({"added_tokens": [[]]}, "has no id or no text"),
        ({"added_tokens": [TOKEN | {"id": 2**32}]}, "has no id or no text"),
        ({"added_tokens": [TOKEN | {"single_word": "yes"}]}, "is no boolean"),
        ({"added_tokens": [TOKEN] * (MAX_ADDED + 1)}, "at most 16,384"),
        ({"post_processor": 5}, "post_processor is not an object"),
        ({"post_processor": {"processors": [5]}}, "post_processor is not an object"),
        ({"post_processor": {"single": [{"SpecialToken": {}}]}}, "a SpecialToken without id"),
        ({"decoder": 5}, "decoder has no type"),
    ],
)
def test_a_tokenizer_json_to_harm(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(RAW | change))
    refused(tmp_path, complaint)


def test_a_panic_of_the_library_is_one_line(tmp_path: Path) -> None:
    """A PanicException is no Exception. What the checks above let through ends so, too."""

    class PanicException(BaseException):
        pass

    (tmp_path / "tokenizer.json").write_text(json.dumps(RAW))
    tokenizer = Tokenizer.from_directory(tmp_path)

    class Panics:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise PanicException("called `Option::unwrap()` on a `None` value")

    tokenizer._vocabulary.__dict__["_at_start"] = Panics()
    with pytest.raises(TokenizerError, match=r"not a usable tokenizer\.json: called `Option"):
        tokenizer.encode("ab")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?| ?[^\s\p{L}]+[\r\n/]*",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+",
        r" ?[^(\s|[.,!?\u2026])]+",
    ],
)
def test_the_patterns_of_real_tokenizers_pass(pattern: str) -> None:
    found = parse(json.dumps(RAW | split(pattern)), "here")
    assert found["pre_tokenizer"]["pattern"]["Regex"] == pattern
