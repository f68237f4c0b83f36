"""The vocabulary inside a GGUF file: its `tokenizer.ggml.*` keys, no other file needed."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, decoders, pre_tokenizers

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceVocabulary,
    write_model,
)
from mlx_cerebrum.tokenizer.tokenizer_json import ADDED_FLAGS
from mlx_cerebrum.tokenizer.vocabulary import (
    MAX_ADDED,
    MAX_TOKENS,
    AddedToken,
    TokenizersVocabulary,
    Vocabulary,
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_only])


# How text is cut up before byte-pair merging, by the file's own name for it.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _llama3,
}


def vocabulary_from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """Byte-level BPE (`gpt2`) or SentencePiece (`llama`); TokenizerError for anything else."""
    model = metadata.get("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(str(model))
    if build is None:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.model {model!r:.60} is not supported; only gpt2 and llama are"
        )
    tokens = gguf_list(metadata, "tokens", str)
    if not tokens or "" in tokens:
        raise TokenizerError("GGUF: tokenizer.ggml.tokens is missing or has an empty token")
    if len(tokens) > MAX_TOKENS:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.tokens has {len(tokens):,} tokens, more than {MAX_TOKENS:,}"
        )
    if len(set(tokens)) != len(tokens):
        raise TokenizerError("GGUF: tokenizer.ggml.tokens names a token twice")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        raise TokenizerError("GGUF: tokenizer.ggml.tokens has text that is no Unicode") from None
    types = _types(metadata, tokens)
    if sum(kind in (CONTROL, USER_DEFINED) for kind in types) > MAX_ADDED:
        raise TokenizerError(f"GGUF: more than {MAX_ADDED:,} control and user-defined tokens")
    return build(metadata, tokens, types)


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    """The type of each token: the file's, else (they are optional) as the names say."""
    types = gguf_list(metadata, "token_type", int)
    if "tokenizer.ggml.token_type" not in metadata:
        types = [BYTE if _is_byte(token) else NORMAL for token in tokens]
    if len(types) != len(tokens):
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    if wrong := sorted(set(types) - set(range(BYTE + 1))):
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.token_type has {wrong[0]!r:.20}; 0 to 6 are known"
        )
    types = [kind or NORMAL for kind in types]
    # A file may list its own BOS and EOS as ordinary text. Further ends may be just that.
    for name in ("bos", "eos", "eot", "eom"):
        token = gguf_token_id(metadata, name, len(tokens))
        ordinary = (NORMAL, USER_DEFINED) if name in ("bos", "eos") else (USER_DEFINED,)
        if token is not None and types[token] in ordinary:
            types[token] = CONTROL
    return types


def gguf_list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """A `tokenizer.ggml` array as a list; empty when absent."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return []
    if not isinstance(value, list) or not set(map(type, value)) <= {kind}:
        raise TokenizerError(f"GGUF: tokenizer.ggml.{key} is not a list of {kind.__name__}")
    return list(value)


def gguf_flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """A `tokenizer.ggml` boolean; a number is not one, as in llama.cpp."""
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"GGUF: tokenizer.ggml.{key} is {value!r:.40}, not a boolean")
    return value


def gguf_token_id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    """The id of the `bos`, `eos`, ... token; None where it is not named.

    BOS and EOS must be in the vocabulary. Others that are not are as good as unnamed: -1 is
    written for "none", and a padding token past the end is never used.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if type(value) is int and not 0 <= value < size and name not in ("bos", "eos"):
        return None
    if type(value) is not int or not 0 <= value < size:
        raise TokenizerError(f"GGUF: {key} is {value!r:.40}; the vocabulary has {size} tokens")
    return value


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(
            f"GGUF: pre-tokenizer {pre!r:.60} is not supported (only {known}); use the model's "
            "safetensors checkpoint"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [merge.split(" ") for merge in gguf_list(metadata, "merges", str)]
    misfit = "GGUF: tokenizer.ggml.merges does not fit its tokens"
    for merge in merges:
        if len(merge) != 2 or not (
            merge[0] in vocab and merge[1] in vocab and merge[0] + merge[1] in vocab
        ):
            raise TokenizerError(f"{misfit}: {' '.join(merge)!r:.60}")
    flags = dict.fromkeys(ADDED_FLAGS, False)
    added = [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    raw = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": json.loads(PRE_TOKENIZERS[pre]().__getstate__()),
        "post_processor": None,
        "decoder": json.loads(decoders.ByteLevel().__getstate__()),
        "model": {
            **{"type": "BPE", "unk_token": None, "fuse_unk": False, "byte_fallback": False},
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocab,
            "merges": merges,
        },
    }
    unused = [i for i, kind in enumerate(types) if kind == UNUSED]  # rows of padding
    return TokenizersVocabulary(raw, misfit, hidden=unused)


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    scores = gguf_list(metadata, "scores", float)
    if "tokenizer.ggml.scores" not in metadata:  # optional; then all are the same
        scores = [0.0] * len(tokens)
    if len(scores) != len(tokens):
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens"
        )
    if not all(abs(score) < 1e30 for score in scores):
        raise TokenizerError("GGUF: tokenizer.ggml.scores has a number out of range")
    wrong = [t for t, k in zip(tokens, types, strict=True) if k == BYTE and not _is_byte(t)]
    if wrong:
        raise TokenizerError(f"GGUF: {wrong[0]!r:.60} is no name of a byte, such as <0x0A>")
    # SentencePiece must have one unknown token, and no other.
    unknown = gguf_token_id(metadata, "unknown", len(tokens))
    if unknown is None or types[unknown] not in (UNKNOWN, NORMAL):
        unknown = types.index(UNKNOWN) if UNKNOWN in types else 0
    types = [CONTROL if kind == UNKNOWN else kind for kind in types]
    types[unknown] = UNKNOWN
    bos = gguf_token_id(metadata, "bos", len(tokens))
    eos = gguf_token_id(metadata, "eos", len(tokens))
    # As llama.cpp has it: these are found before the text is cut up.
    words = [
        AddedToken(i, token, special=False)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == USER_DEFINED
    ]
    types = [CONTROL if kind == USER_DEFINED else kind for kind in types]
    model = write_model(
        zip(tokens, scores, types, strict=True),
        bos="<s>" if bos is None else tokens[bos],
        eos="</s>" if eos is None else tokens[eos],
        add_dummy_prefix=gguf_flag(metadata, "add_space_prefix", True),
    )
    return SentencePieceVocabulary(model, "GGUF tokenizer", words)


_BYTE_NAME = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _is_byte(token: str) -> bool:
    return _BYTE_NAME.fullmatch(token) is not None
