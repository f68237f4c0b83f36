"""The tokenizer as GGUF metadata: `tokenizer.ggml.*` and the chat template.

SentencePiece goes as llama.cpp's "llama" model, byte-level BPE as "gpt2" with the name of its
pre-tokenizer, a GGUF source's own keys as they are. What is made here is read back and must
give the source's ids on texts that tell tokenizers apart; else the export is refused.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer.detokenizer import SPACE_MARK
from mlx_cerebrum.tokenizer.files import TokenizerFiles, read_bytes, read_text
from mlx_cerebrum.tokenizer.gguf_vocabulary import PRE_TOKENIZERS
from mlx_cerebrum.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceVocabulary,
    read_pieces,
)
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.tokenizer.tokenizer_json import parse, with_added
from mlx_cerebrum.tokenizer.vocabulary import TokenizersVocabulary, Vocabulary
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.gguf_checkpoint import GGUFCheckpoint
from mlx_cerebrum.weights.opening import load_tokenizer

# Runs of spaces, digits, newlines; contractions in both cases; letters with marks, composed and
# not; scripts without spaces; symbols and what is outside the vocabulary.
PROBES = (
    "Hello, world! It's I'VE we'll  two   three",
    "a  12 345 67890 3.14159 1,000,000 x1y2",
    " leading\n\n  indented\r\n\ttab \n \n end ",
    "caf\u00e9 cafe\u0301 na\u00efve \u00df\u00d8\u0142 \ufb01ne \u00bd \u2460",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093 \ud55c\uad6d \u0440\u0443\u0441 \u0639\u0631 \u0939",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2581 \u00a0\u3000 \x00\x7f <0x41>",
    'def f(x):\n    return x**2  # ok\n\n\n<s>[INST] {"k": [1, 2]}</s> --- ...!?',
)
# llama.cpp's values for the entries it adds itself.
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0
_MODEL = "tokenizer.ggml.model"


def tokenizer_metadata(checkpoint: Checkpoint, rows: int) -> tuple[dict[str, Any], list[str]]:
    """The metadata of the checkpoint's tokenizer for `rows` tokens, and notes a person should see.

    Raises TokenizerError, one line, for one that GGUF can't express.
    """
    tokenizer = load_tokenizer(checkpoint)
    notes = []
    if tokenizer.chat_template is None:
        notes.append("the source has no chat template: llama.cpp will chat in a format of its own")
    if isinstance(checkpoint, GGUFCheckpoint):
        keys = checkpoint.file.metadata.items()
        return {key: value for key, value in keys if key.startswith("tokenizer.")}, notes
    files = TokenizerFiles.read(checkpoint.path)
    sentencepiece = (checkpoint.path / "tokenizer.model").exists()
    read = _sentencepiece if sentencepiece else _byte_level
    vocabulary, candidates = read(checkpoint, files, rows)
    common = _special(tokenizer, vocabulary, files, notes, rows)
    for found in candidates:
        read_back = Tokenizer.from_gguf(found | common)
        if _same_ids(tokenizer, read_back):
            return found | common, notes
        if files.prefix == "first" and _same_ids(tokenizer, read_back, str.lstrip):
            notes.append(
                "the tokenizer is one of `legacy: false`: llama.cpp will give text a space mark"
                " more where it begins with a space or follows a control token"
            )
            return found | common, notes
    raise TokenizerError(
        f"{checkpoint.path}: its tokenizer can't be expressed in GGUF, where the same text would"
        " become other ids"
    )


def _same_ids(
    one: Tokenizer, other: Tokenizer, trim: Callable[[str], str] = lambda text: text
) -> bool:
    return all(one.encode(t, False) == other.encode(t, False) for t in map(trim, PROBES))


def _special(
    tokenizer: Tokenizer, vocabulary: Vocabulary, files: TokenizerFiles, notes: list[str], rows: int
) -> dict[str, Any]:
    """Special tokens and the template. Adds to `notes` what GGUF has no key for."""
    named = {"eos_token": "</s>"} | files.special_tokens
    ids = {name: vocabulary.token_id(text) for name, text in named.items()}
    first = ids["eos_token"]
    reached = [token for token in tokenizer.eos_token_ids if token < rows]
    ends = sorted(reached, key=lambda token: (token != first, token))
    if len(ends) > 3:
        notes.append(f"GGUF names three end tokens at most; left out: {ends[3:]}")
    special: dict[str, int | None] = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    special |= {"bos": tokenizer.bos_token_id}
    special |= {"unknown": ids.get("unk_token"), "padding": ids.get("pad_token")}
    metadata: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": token
        for name, token in special.items()
        if token is not None and token < rows
    }
    metadata["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    metadata["tokenizer.ggml.add_eos_token"] = False
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _sentencepiece(
    checkpoint: Checkpoint, files: TokenizerFiles, rows: int
) -> tuple[Vocabulary, list[dict[str, Any]]]:
    """The vocabulary and its metadata."""
    file = checkpoint.path / "tokenizer.model"
    model = read_bytes(file)
    vocabulary = SentencePieceVocabulary(model, str(file), files.added_tokens)
    pieces: dict[int, Piece] = dict(enumerate(read_pieces(model)))
    for token in files.added_tokens:
        if token.id not in pieces or pieces[token.id][0] != token.content:
            kind = CONTROL if token.special else USER_DEFINED
            pieces[token.id] = (token.content, _ADDED_SCORE, kind)
    entries = [pieces.get(i) or (_padding(i), _PADDING_SCORE, UNUSED) for i in range(rows)]
    first = vocabulary.content(next(iter(vocabulary.encode("a")), -1)) or ""
    metadata = {
        _MODEL: "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text for text, _, _ in entries],
        "tokenizer.ggml.scores": [score for _, score, _ in entries],
        "tokenizer.ggml.token_type": [kind for _, _, kind in entries],
        "tokenizer.ggml.add_space_prefix": first.startswith(SPACE_MARK),
    }
    return vocabulary, [metadata]


def _byte_level(
    checkpoint: Checkpoint, files: TokenizerFiles, rows: int
) -> tuple[Vocabulary, list[dict[str, Any]]]:
    """The vocabulary and its metadata with each pre-tokenizer, the likeliest first."""
    file = checkpoint.path / "tokenizer.json"
    raw = with_added(parse(read_text(file), str(file)), files.added_tokens, files.has_decoder)
    vocabulary = TokenizersVocabulary(raw, str(file), files.control_tokens)
    model: Mapping[str, Any] = raw["model"]
    if model["byte_fallback"]:
        raise TokenizerError(
            f"{file} is a SentencePiece tokenizer, whose scores GGUF needs: put the model's"
            " tokenizer.model beside it"
        )
    added = vocabulary.added
    tokens, types = [], []
    for i in range(rows):
        content = vocabulary.content(i)
        tokens.append(_padding(i) if content is None else content)
        if i in added:
            types.append(CONTROL if added[i].special else USER_DEFINED)
        else:
            types.append(UNUSED if content is None else NORMAL)
    metadata = {
        _MODEL: "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }
    # "default" means something else to llama.cpp. What is spelled the same goes first.
    names = [name for name in PRE_TOKENIZERS if name != "default"]
    own = raw["pre_tokenizer"]
    names.sort(key=lambda name: json.loads(PRE_TOKENIZERS[name]().__getstate__()) != own)
    return vocabulary, [metadata | {"tokenizer.ggml.pre": name} for name in names]


def _padding(token: int) -> str:
    return f"[PAD{token}]"
