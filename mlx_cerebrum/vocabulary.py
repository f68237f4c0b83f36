"""Plain text to ids and ids to pieces: what a vocabulary does, and one from a tokenizer.json.

Nothing here can be talked into a control token: `encode` sees text only, and `<s>` in it
is three characters. Control tokens have names (`controls`), which the chat template uses.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import tokenizers
from tokenizers.pre_tokenizers import Metaspace

from mlx_cerebrum import json_file
from mlx_cerebrum.detokenizer import PER_BYTE, PER_SEQUENCE, StreamingDetokenizer
from mlx_cerebrum.errors import TokenizerError


@dataclass(frozen=True)
class AddedToken:
    """A token with a name of its own: matched whole, never built from text.

    `lstrip` and `rstrip`: a template's white space before or after it belongs to it.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class Vocabulary(Protocol):
    """What a tokenizer needs from its vocabulary. `len` is one past the last id."""

    controls: dict[str, AddedToken]

    def __len__(self) -> int: ...

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """The ids of plain text; `at_start` is false after a control token."""

    def token_id(self, content: str) -> int | None: ...

    def content(self, token: int) -> str | None: ...

    def piece(self, token: int) -> str | bytes:
        """What the id adds to the text (see detokenizer.py); control tokens add nothing."""

    def detokenizer(self, limit: int) -> StreamingDetokenizer:
        """A fresh one; it refuses ids of `limit` and above."""

    def tokenizer_json(self, bos_token: str | None) -> str:
        """A tokenizer.json that gives the same ids; with a BOS before text, if named."""


def first_line(error: BaseException) -> str:
    """An exception of another library, as part of a one-line message."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return symbols | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = byte_symbols()
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizersVocabulary:
    """A `tokenizer.json`: byte-level BPE, or SentencePiece's BPE with byte fallback.

    byte_level: which of the two.
    strip_space: decoding drops the first space (SentencePiece style only).
    unknown: the unknown token's text, shown as SentencePiece shows it.
    prefix_token: the control token its post_processor puts before a text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        byte_level: bool = True,
        strip_space: bool = False,
        unknown: str | None = None,
        prefix_token: str | None = None,
    ) -> None:
        # A special token spelled in text stays text; length settings are not ours.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._byte_level = byte_level
        self._strip_space = strip_space
        self._unknown = unknown
        self.prefix_token = prefix_token
        added = tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        self.controls = {
            token.content: AddedToken(i, token.content, True, token.lstrip, token.rstrip)
            for i, token in added.items()
            if token.special
        }
        self._size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def from_text(
        cls, text: str, where: str, special: Iterable[str] = ()
    ) -> "TokenizersVocabulary":
        """Read a tokenizer.json's text.

        special: texts that are control tokens whatever the file says of them.
        Raises TokenizerError naming `where` for a damaged file or a style not known here.
        """
        try:
            raw: Any = json_file.parse(text, where, TokenizerError)
            model, decoders = raw["model"], _kinds(raw["decoder"])
            added = raw.get("added_tokens") or []
            for token in added:
                token["special"] = token["special"] or token["content"] in special
            controls = {token["content"] for token in added if token["special"]}
            kind = model.get("type", "BPE")
            if kind != "BPE" or not decoders & {"ByteLevel", "ByteFallback", "Metaspace"}:
                raise TokenizerError(
                    f"{where} is a {kind} tokenizer of a style not supported; only byte-level "
                    "BPE and SentencePiece BPE are"
                )
            # A merge that spells a control token would let text become one.
            model["merges"] = [
                merge
                for merge in model["merges"]
                if (merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge))
                not in controls
            ]
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
            plain = controls.union(special) - {token["content"] for token in added}
            tokenizer.add_special_tokens(
                [text for text in sorted(plain) if tokenizer.token_to_id(text) is not None]
            )
        except TokenizerError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"{where} is not a usable tokenizer.json: {first_line(error)}"
            ) from None
        return cls(
            tokenizer,
            byte_level="ByteLevel" in decoders,
            strip_space=bool(decoders & {"Strip", "Metaspace"}),
            unknown=model.get("unk_token"),
            prefix_token=_prefix_token(raw.get("post_processor")),
        )

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        tokenizer = self.tokenizer if at_start else self._continuation
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _continuation(self) -> tokenizers.Tokenizer:
        """For text after a control token: a "first" Metaspace has put its space already."""
        pre = self.tokenizer.pre_tokenizer
        if not isinstance(pre, Metaspace) or pre.prepend_scheme != "first":
            return self.tokenizer
        copy = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        copy.pre_tokenizer = Metaspace(pre.replacement, "never", pre.split)
        copy.encode_special_tokens = True
        return copy

    def token_id(self, content: str) -> int | None:
        token: int | None = self.tokenizer.token_to_id(content)
        return token

    def content(self, token: int) -> str | None:
        content: str | None = None
        if 0 <= token < self._size:
            content = self.tokenizer.id_to_token(token)
        return content

    def piece(self, token: int) -> str | bytes:
        content = self.content(token)
        if self._byte_level:
            if content is None or token in self._special:
                return b""  # the bytes on both sides of a control token still join
            if all(char in _BYTE_OF for char in content):
                return bytes(_BYTE_OF[char] for char in content)
            return content.encode()
        if content is None or (token in self._special and content != self._unknown):
            return ""
        if content == self._unknown:
            return " \u2047 "
        byte = _BYTE_PIECE.fullmatch(content)
        return bytes.fromhex(byte[1]) if byte else content

    def detokenizer(self, limit: int) -> StreamingDetokenizer:
        errors = PER_SEQUENCE if self._byte_level else PER_BYTE
        strip_space = self._strip_space and not self._byte_level
        return StreamingDetokenizer(self.piece, limit, errors, strip_space)

    def tokenizer_json(self, bos_token: str | None) -> str:
        raw = json.loads(self.tokenizer.to_str())
        raw["post_processor"] = bos_processor(bos_token, self.token_id(bos_token or ""))
        return json.dumps(raw, ensure_ascii=False)


def _kinds(node: Any) -> set[str]:
    """The types of a decoder, a "Sequence" being its members'."""
    if node is None:
        return set()
    members = node.get("decoders") or []
    return {node["type"]}.union(*map(_kinds, members))


def _prefix_token(processor: Any) -> str | None:
    """What a post_processor puts before a text."""
    for part in (processor or {}).get("processors") or [processor or {}]:
        first = (part.get("single") or [{}])[0]
        if "SpecialToken" in first:
            return str(first["SpecialToken"]["id"])
    return None


def bos_processor(bos_token: str | None, bos_id: int | None) -> dict[str, Any] | None:
    """The post_processor entry that puts `bos_token` before a text; None for no BOS."""
    if bos_token is None or bos_id is None:
        return None
    bos: dict[str, Any] = {"SpecialToken": {"id": bos_token, "type_id": 0}}
    first: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    second: dict[str, Any] = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"SpecialToken": {"id": bos_token, "type_id": 1}}, second],
        "special_tokens": {bos_token: {"id": bos_token, "ids": [bos_id], "tokens": [bos_token]}},
    }
