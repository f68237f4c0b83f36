"""Ids are those of transformers, for directories of many settings and texts of many kinds.

The vocabularies are small, so that some hundred directories are read in seconds.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import slow

from mlx_cerebrum.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    write_model,
)
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

TEXTS: tuple[str, ...] = (
    *("", "The", " The", "  two  spaces   here ", "a\n\nb\n", " \n x", "\u65e5\u672c \u30c6"),
    *("\U0001f389\U0001f469\u200d\U0001f469 na\u00efve", "\u2581lit\u2581mark", "woord", " woord "),
    *(
        "awoord woordb woord",
        "say woord.woord  woord",
        "woord_ woord1",
        "[REF]x [REF] y",
        "the[REF]",
    ),
    *("CerebrumAI is CerebrumAI", "a\0b\ttab", "  <|pad|>  z", "woord  <|pad|>x woord"),
    *("[INST] hi [/INST]", "</s><s> <unk> x", "<0x0A>", "1,234.56e-7", "<|im_end|> hi"),
)
WORDS = ("\u2581the", "\u2581\u2581", "\u2581\u2581\u2581", "\u2581wo", "ord", "\u2581is", "in")


def pieces(user_defined: bool) -> list[Piece]:
    """A vocabulary of Mistral's kind: control tokens, bytes, a few words and their parts."""
    found: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    found += [("[INST]", 0.0, CONTROL), ("[/INST]", 0.0, CONTROL)]
    found += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    if user_defined:
        found += [("[REF]", 0.0, USER_DEFINED)]
    merged = dict.fromkeys(word[:end] for word in WORDS for end in range(2, len(word) + 1))
    found += [(text, -float(rank), NORMAL) for rank, text in enumerate(merged)]
    letters = dict.fromkeys(["\u2581", *map(chr, range(33, 127))])
    return found + [(text, -500.0 - rank, NORMAL) for rank, text in enumerate(letters)]


def added(start: int, rng: random.Random) -> dict[int, dict[str, Any]]:
    """Added tokens with flags of every kind."""

    def token(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
        names = ("lstrip", "rstrip", "single_word", "normalized")
        return {"content": content, "special": special} | dict.fromkeys(names, False) | flags

    flip = lambda: rng.random() < 0.4  # noqa: E731
    return {
        1: token("<s>", True),
        2: token("</s>", True),
        start: token("<|im_end|>", True),
        start + 1: token("woord", lstrip=flip(), rstrip=flip(), single_word=flip()),
        start + 2: token("CerebrumAI", normalized=flip()),
        start + 3: token("<|pad|>", lstrip=flip(), rstrip=flip()),
    }


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def peer_of(path: Path) -> Any:
    """Transformers' own, which leaves control tokens in a text alone as ours does."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path, split_special_tokens=True)


def write(path: Path, model: bytes, size: int, settings: Sequence[Any], seed: int) -> None:
    model_type, kind, legacy, prefix, how = settings
    path.mkdir()
    (path / "tokenizer.model").write_bytes(model)
    tokens = added(size, random.Random(seed))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for key, value in (("tokenizer_class", kind), ("legacy", legacy), ("add_prefix_space", prefix)):
        config |= {} if value is None else {key: value}
    if how == "decoder":
        config["added_tokens_decoder"] = {str(i): token for i, token in tokens.items()}
    elif how == "added.json":
        names = {token["content"]: i for i, token in tokens.items() if i >= size}
        (path / "added_tokens.json").write_text(json.dumps(names))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))


MISTRALS = list(
    itertools.product(
        ["mistral", "llama"],
        ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None],
        [None, True, False],
        [None, True, False],
        ["decoder", "added.json", None],
    )
)
SAMPLE = random.Random(1).sample(MISTRALS, 60)


@pytest.mark.parametrize("user_defined", [False, True])
@slow
def test_the_ids_of_a_directory_are_transformers(tmp_path: Path, user_defined: bool) -> None:
    """Each directory three times: with a tokenizer.model, with a tokenizer.json, with both."""
    vocabulary = pieces(user_defined)
    model = write_model(vocabulary)
    wrong, compared = [], 0
    for number, settings in enumerate(SAMPLE):
        path = tmp_path / str(number)
        write(path, model, len(vocabulary), settings, number)
        peer = peer_of(path)
        saved = path / "saved"
        peer.save_pretrained(saved)
        texts = TEXTS
        if type(peer).__name__ == "LlamaTokenizer":
            # It takes the model's own words for added tokens, and merges in order of ids.
            texts = tuple(text for text in TEXTS if "[REF]" not in text and "  " not in text)
        for files in ("model", "both", "json"):
            if files == "both":
                (path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
            elif files == "json":
                (path / "tokenizer.model").unlink()
            peer = peer if files == "model" else peer_of(path)
            ours = Tokenizer.from_directory(path)
            for text in texts:
                compared += 1
                expected = peer.encode(text, add_special_tokens=False)
                if ours.encode(text, add_bos=False) != expected:
                    wrong.append((settings, files, text))
                if ours.decode(expected) != peer.decode(expected, skip_special_tokens=True):
                    wrong.append((settings, files, f"{text} decoded"))
    assert not wrong, f"{len(wrong)} of {compared}: {wrong[:3]}"
    assert compared > 3000


def test_a_word_that_is_looked_for_in_the_normalized_text(tmp_path: Path) -> None:
    """As `<tool_call>` was added to many: with the space mark that a normalizer puts before it."""
    vocabulary = pieces(False)
    (tmp_path / "tokenizer.model").write_bytes(write_model(vocabulary))
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    raw = json.loads(peer_of(tmp_path)._tokenizer.to_str())
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, mark]  # as the files on the hub have it
    raw |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word"), False)
    for n, (name, normalized) in enumerate((("<call>", True), ("</call>", True), ("<ref>", False))):
        token = {"id": len(vocabulary) + n, "content": name, "normalized": normalized}
        raw["added_tokens"].append(token | flags)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    words = {name: len(vocabulary) + 3 + n for n, name in enumerate(("woord", "<|new|>"))}
    (tmp_path / "added_tokens.json").write_text(json.dumps(words))
    ours, peer = Tokenizer.from_directory(tmp_path), peer_of(tmp_path)
    for text in (
        "<call>",
        "is <call>in</call> is",
        "<call><call> <call>\n</call>",
        "in <ref> <call>",
        "is woord<|new|> is",
    ):
        ids = peer.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_bos=False) == ids
        assert ours.decode(ids) == peer.decode(ids)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<call>")
    marked = Tokenizer.from_directory(tmp_path)  # now a control token, where the model writes it
    ids = peer.encode("is <call>in", add_special_tokens=False)
    assert marked.decode(ids) == peer.decode(ids) == "is <call>in"


@pytest.mark.parametrize("legacy", [True, False])
def test_a_control_token_before_text(tmp_path: Path, legacy: bool) -> None:
    """A template's own tokens, and the text behind each: with a space mark only in the old way."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
        "'[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    vocabulary = pieces(False)
    write(
        tmp_path / "a",
        write_model(vocabulary),
        len(vocabulary),
        ("mistral", "LlamaTokenizer", legacy, None, None),
        0,
    )
    (tmp_path / "a" / "chat_template.jinja").write_text(template)
    import transformers

    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    talk = [
        {"role": "user", "content": "the word"},
        {"role": "assistant", "content": "is"},
        {"role": "user", "content": " two  spaces\n"},
    ]
    expected = peer.apply_chat_template(talk, return_dict=False)
    peer.save_pretrained(tmp_path / "b")
    for files in ("a", "b"):
        ours = Tokenizer.from_directory(tmp_path / files)
        assert ours.apply_chat_template(talk, add_generation_prompt=False) == expected
        begun = peer.apply_chat_template(talk[:2], continue_final_message=True, return_dict=False)
        assert ours.apply_chat_template(talk[:2], continue_final_message=True) == begun
    spelled = [ours.content(token) for token in expected[:3]]
    assert spelled == ["<s>", "[INST]", "\u2581" if legacy else "\u2581the"]
