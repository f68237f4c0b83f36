"""A tokenizer.json, checked: the library that runs it panics, loops or grows on some.

Two styles are supported, as all Mistrals and Llamas have one: byte-level BPE, and
SentencePiece's BPE with byte fallback.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.tokenizer.detokenizer import SPACE_MARK
from mlx_cerebrum.tokenizer.vocabulary import MAX_ADDED, MAX_TOKENS, AddedToken, all_types, numbered

_STEPS = {  # normalizers and pre_tokenizers that need no data of their own
    *("Sequence", "Prepend", "Replace", "Strip", "StripAccents", "Lowercase"),
    *("NFC", "NFD", "NFKC", "NFKD", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation"),
    *("Whitespace", "WhitespaceSplit"),
}
_MAX_NESTING = 4  # sequences in sequences
_MAX_STEPS = 16
_MAX_TEXT = 4096  # characters of a pattern or replacement
_MAX_GROWTH = 64  # a text may become this many times as long


def parse(text: str, where: str) -> dict[str, Any]:
    """The content of a tokenizer.json, its parts of the types and within the bounds they need.

    `model` has `vocab` (text -> id), `merges` (pairs) and its flags, `added_tokens` the
    fields of AddedToken. Raises TokenizerError naming `where`.
    """
    raw = json_file.parse(text, where, TokenizerError)
    problem = f"{where} is not a usable tokenizer.json"
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise TokenizerError(f"{problem}: it has no model")
    decoder = _decoder(raw.get("decoder"), problem)
    model = raw["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE" or not {"ByteLevel", "ByteFallback", "Metaspace"} & all_types(decoder):
        raise TokenizerError(
            f"{where} is a {kind!s:.40} tokenizer of a style not supported; only byte-level "
            "BPE and SentencePiece BPE are"
        )
    normalizer, pre_tokenizer = raw.get("normalizer"), raw.get("pre_tokenizer")
    growth = 1
    for part in (normalizer, pre_tokenizer):
        growth *= _checked(part, problem)
    if growth > _MAX_GROWTH:
        raise TokenizerError(f"{problem}: its replacements make text {growth:.0e} times as long")
    vocab = _vocab(model.get("vocab"), problem)
    added = _added(raw.get("added_tokens"), problem)
    found = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _processor(raw.get("post_processor"), problem),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "unk_token": model.get("unk_token"),
            **{flag: model.get(flag) or False for flag in _FLAGS},
            "vocab": vocab,
            "merges": _merges(model.get("merges"), vocab, problem),
        },
    }
    unknown = found["model"]["unk_token"]
    names = vocab.keys() | {token["content"] for token in added}
    if unknown is not None and (not isinstance(unknown, str) or unknown not in names):
        raise TokenizerError(f"{problem}: its unk_token is not in its vocabulary")
    if any(type(found["model"][flag]) is not bool for flag in _FLAGS):
        raise TokenizerError(f"{problem}: {', '.join(_FLAGS)} must be true or false")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TokenizerError(f"{problem}: it marks parts of words, which is not supported")
    return found


def with_added(
    raw: dict[str, Any], added: Iterable[AddedToken], newer: bool = True
) -> dict[str, Any]:
    """The file's content with the tokens that were added beside it, ids as the library counts.

    newer: whether they say more of a token than the file does (`added_tokens_decoder` does).
    """
    tokens = {token["content"]: AddedToken(**token) for token in raw["added_tokens"]}
    for token in added:
        if newer or token.content not in tokens:
            tokens[token.content] = token
    counted = numbered(raw["model"]["vocab"], tokens.values())
    return {**raw, "added_tokens": [vars(token) for token in counted]}


def as_llama_class(raw: dict[str, Any], prefix: str, own_added: bool) -> dict[str, Any]:
    """As the LlamaTokenizer of transformers 5 has it: the file's vocabulary in its own pipeline.

    prefix: see SentencePieceVocabulary. own_added: whether the file's added tokens count.
    """
    metaspace = {"type": "Metaspace", "replacement": SPACE_MARK, "split": False}
    unmark = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [unmark, {"type": "ByteFallback"}, {"type": "Fuse"}]
    flags = {"unk_token": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return {
        **raw,
        "added_tokens": raw["added_tokens"] if own_added else [],
        "normalizer": None,
        "pre_tokenizer": metaspace | {"prepend_scheme": prefix},
        "decoder": {"type": "Sequence", "decoders": steps + [strip] * (prefix != "never")},
        "model": {**raw["model"], **flags},
    }


_FLAGS = ("fuse_unk", "byte_fallback", "ignore_merges")


def is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKENS


def _vocab(vocab: Any, problem: str) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(map(is_token_id, vocab.values())):
        raise TokenizerError(f"{problem}: its vocab must name token ids below {MAX_TOKENS:,}")
    return vocab


def _merges(merges: Any, vocab: Mapping[str, int], problem: str) -> list[list[str]]:
    """Pairs; older files write them as one text."""
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise TokenizerError(f"{problem}: its merges must be a list")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair))):
            raise TokenizerError(f"{problem}: a merge is not two texts: {pair!r:.60}")
        if not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab):
            raise TokenizerError(f"{problem}: a merge's token is not in its vocab: {pair!r:.60}")
    return pairs


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _added(added: Any, problem: str) -> list[dict[str, Any]]:
    """The fields of AddedToken of each entry."""
    if not isinstance(added or [], list) or len(added or []) > MAX_ADDED:
        raise TokenizerError(f"{problem}: added_tokens must be a list of at most {MAX_ADDED:,}")
    found = []
    for entry in added or []:
        fields = entry if isinstance(entry, dict) else {}
        flags = {flag: fields.get(flag, False) for flag in ADDED_FLAGS}
        if not is_token_id(fields.get("id")) or not _is_text(fields.get("content")):
            raise TokenizerError(f"{problem}: an added token has no id or no text: {entry!r:.80}")
        if any(type(value) is not bool for value in flags.values()):
            raise TokenizerError(f"{problem}: a flag of {fields['content']!r:.40} is no boolean")
        found.append({"id": fields["id"], "content": fields["content"], **flags})
    return found


# The fields of AddedToken that are true or false.
ADDED_FLAGS = tuple(AddedToken.__dataclass_fields__)[2:]


def _decoder(decoder: Any, problem: str) -> Any:
    def sound(step: Any) -> bool:
        inner = step.get("decoders") or [] if isinstance(step, dict) else None
        return (
            isinstance(inner, list) and isinstance(step.get("type"), str) and all(map(sound, inner))
        )

    if decoder is not None and not sound(decoder):
        raise TokenizerError(f"{problem}: its decoder has no type")
    return decoder


def _processor(processor: Any, problem: str) -> Any:
    """A post_processor, of which only what it puts before a text is used."""
    if processor is None:
        return None
    parts = processor.get("processors", [processor]) if isinstance(processor, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise TokenizerError(f"{problem}: its post_processor is not an object")
    for part in parts:
        template = part.get("single", [])
        if not isinstance(template, list) or not all(isinstance(item, dict) for item in template):
            raise TokenizerError(f"{problem}: its post_processor's single is not a list")
        for token in (item["SpecialToken"] for item in template if "SpecialToken" in item):
            if not isinstance(token, dict) or not _is_text(token.get("id")):
                raise TokenizerError(f"{problem}: its post_processor has a SpecialToken without id")
    return processor


def _checked(node: Any, problem: str, depth: int = 0) -> int:
    """How many times as long a normalizer or pre_tokenizer can make a text, once checked."""
    if node is None and depth == 0:
        return 1
    kind = node.get("type") if isinstance(node, dict) else None
    if not isinstance(kind, str) or kind not in _STEPS:
        raise TokenizerError(f"{problem}: {kind!r:.40} is not a step that is supported here")
    if kind == "Sequence":
        steps = node.get("normalizers", node.get("pretokenizers"))
        if not isinstance(steps, list) or len(steps) > _MAX_STEPS or depth == _MAX_NESTING:
            raise TokenizerError(f"{problem}: a Sequence must list at most {_MAX_STEPS} steps")
        growth = 1
        for step in steps:
            growth *= _checked(step, problem, depth + 1)
        return growth
    texts = [value for value in node.values() if isinstance(value, str)]
    pattern = node.get("pattern")
    if kind in ("Replace", "Split"):
        pattern = pattern if isinstance(pattern, dict) else {}
        expression, literal = pattern.get("Regex"), pattern.get("String")
        if (expression is None) == (literal is None):
            raise TokenizerError(f"{problem}: the pattern of a {kind} must be a String or a Regex")
        if not _is_text(literal if expression is None else expression):
            raise TokenizerError(f"{problem}: the pattern of a {kind} is empty or no text")
        if expression is not None and _may_explode(expression):
            raise TokenizerError(f"{problem}: a Regex that can take for ever: {expression!r:.60}")
        texts += pattern.values()
    if any(len(text) > _MAX_TEXT for text in texts):
        raise TokenizerError(f"{problem}: a text of a {kind} is longer than {_MAX_TEXT} characters")
    if kind == "Replace":
        content = node.get("content")
        return max(1, len(content) if isinstance(content, str) else 1)
    return 1


_REPEATED = re.compile(r"[*+]|\{\d*,?\d*\}")


def _may_explode(pattern: str) -> bool:
    """Whether a search for the pattern may take for ever, or much memory.

    The patterns of real tokenizers repeat a character or a set of them, at most two in a row;
    what repeats a group, or looks for what it has found before, is not one of theirs.
    """
    depth = at = repeats = 0
    in_set, group_ended = 0, False
    while at < len(pattern):
        char, width = pattern[at], 1
        repeated = None if in_set else _REPEATED.match(pattern, at)
        if char == "\\":
            width = 2
            if not in_set and pattern[at + 1 : at + 2] in {*"123456789gk"}:
                return True
        elif repeated:
            width, repeats = len(repeated[0]), repeats + 1
            if group_ended or repeats > 3 or re.search(r"\d{4}", repeated[0]):
                return True
        elif char in "[]":
            in_set = max(0, in_set + (1 if char == "[" else -1))
        elif char == "|" and not in_set:
            repeats = 0
        elif char == "(" and not in_set:
            depth += 1
        elif char == ")" and not in_set:
            depth -= 1
        if depth > 16:
            return True
        group_ended = char == ")" and not in_set
        at += width
    return False
