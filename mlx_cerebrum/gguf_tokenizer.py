"""The vocabulary inside a GGUF file: its `tokenizer.ggml.*` keys, no other file needed."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    SentencePieceVocabulary,
    write_model,
)
from mlx_cerebrum.vocabulary import TokenizersVocabulary, Vocabulary, first_line

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
            f"GGUF: tokenizer.ggml.model {model!r} is not supported; only gpt2 and llama are"
        )
    tokens = gguf_list(metadata, "tokens", str)
    if not tokens or "" in tokens:
        raise TokenizerError("GGUF: tokenizer.ggml.tokens is missing or has an empty token")
    if len(set(tokens)) != len(tokens):
        raise TokenizerError("GGUF: tokenizer.ggml.tokens names a token twice")
    types = gguf_list(metadata, "token_type", int) or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    # A file may list its own end token as ordinary text.
    for name in ("bos", "eos", "eot", "eom"):
        token = gguf_token_id(metadata, name, len(tokens))
        if token is not None and types[token] in (NORMAL, USER_DEFINED):
            types[token] = CONTROL
    return build(metadata, tokens, types)


def gguf_list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """A `tokenizer.ggml` array as a list; empty when absent."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TokenizerError(f"GGUF: tokenizer.ggml.{key} is not a list of {kind.__name__}")
    return list(value)


def gguf_token_id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    """The id of the `bos`, `eos`, ... token, checked against the vocabulary."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < size:
        raise TokenizerError(f"GGUF: {key} is {value!r}; the vocabulary has {size} tokens")
    return value


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(
            f"GGUF: pre-tokenizer {pre!r} is not supported (only {known}); use the model's "
            "safetensors checkpoint"
        )
    merges = [tuple(merge.split(" ")) for merge in gguf_list(metadata, "merges", str)]
    try:
        tokenizer = tokenizers.Tokenizer(
            models.BPE(
                vocab=dict(zip(tokens, itertools.count(), strict=False)),
                merges=merges,
                ignore_merges=pre == "llama-bpe",
            )
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.merges does not fit its tokens: {first_line(error)}"
        ) from None
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    # Unused tokens (padding rows) become special too, so that they decode to nothing.
    named = {CONTROL: True, UNUSED: True, USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=named[kind], normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in named
        ]
    )
    return TokenizersVocabulary(tokenizer)


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    scores = gguf_list(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens"
        )
    bos = gguf_token_id(metadata, "bos", len(tokens))
    eos = gguf_token_id(metadata, "eos", len(tokens))
    model = write_model(
        zip(tokens, scores, types, strict=True),
        bos="<s>" if bos is None else tokens[bos],
        eos="</s>" if eos is None else tokens[eos],
        add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )
    return SentencePieceVocabulary(model, "GGUF tokenizer")
