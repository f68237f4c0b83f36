"""Plain text to ids and ids to pieces: what a vocabulary does, and one from a tokenizer.json.

Nothing here can be talked into a control token: `encode` sees text only, and `<s>` in it
is three characters. Control tokens have names (`controls`), which the chat template uses.
Other added tokens are words, found whole wherever a text has them.
"""

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import tokenizers

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer.detokenizer import PER_BYTE, PER_SEQUENCE, StreamingDetokenizer

# Real vocabularies have up to 262,144 tokens, of which a few thousand were added.
MAX_TOKENS = 2**19
MAX_ADDED = 2**14


@dataclass(frozen=True)
class AddedToken:
    """A token with a name of its own: matched whole, never built from text.

    special: a control token, which adds nothing to a decoded text.
    lstrip, rstrip: white space before or after it belongs to it.
    single_word: found only where no letter, digit or underscore touches it.
    normalized: looked for in the normalized text, by a tokenizer.json that normalizes.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Vocabulary(Protocol):
    """What a tokenizer needs from its vocabulary. `len` is one past the last id."""

    controls: dict[str, AddedToken]

    def __len__(self) -> int: ...

    def reserve(self, template: str, ends: Container[int]) -> None:
        """Count the added tokens that a template spells, and its end tokens, as controls.

        Raises TokenizerError where text can't be cut up with what is left.
        """

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """The ids of plain text; `at_start` is false after a control token."""

    def token_id(self, content: str) -> int | None: ...

    def content(self, token: int) -> str | None: ...

    def is_added(self, token: int) -> bool:
        """Whether ordinary text never needs the id: it is an added token's, or nobody's."""

    def piece(self, token: int) -> str | bytes:
        """What the id adds to the text (see detokenizer.py); control tokens add nothing."""

    def detokenizer(self, limit: int) -> StreamingDetokenizer:
        """A fresh one; it refuses ids of `limit` and above."""

    def tokenizer_json(self, bos_token: str | None) -> str | None:
        """A tokenizer.json that gives the same ids; with a BOS before text, if named."""


def controls_among(
    added: Iterable[AddedToken], template: str, ends: Container[int]
) -> dict[str, AddedToken]:
    """The tokens that no text may become, by name.

    Markers such as `<|im_start|>` are often added without `special`; the template tells.
    """
    return {
        token.content: token
        for token in added
        if token.special or token.id in ends or token.content in template
    }


def numbered(vocab: Mapping[str, int], added: Iterable[AddedToken]) -> list[AddedToken]:
    """Added tokens with the ids the tokenizers library gives them, whatever a file says.

    A name that the vocabulary has keeps its id there; others are counted on from its end.
    """
    ids = dict(vocab)
    found: list[AddedToken] = []
    following = len(vocab)
    for token in added:
        following += token.content not in ids
        found.append(replace(token, id=ids.setdefault(token.content, following - 1)))
    return found


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

    raw: the file's content, checked (see tokenizer_json.py).
    where: how an error message begins.
    special: texts that are control tokens whatever the file says of them.
    hidden: ids besides the control tokens' that decode to nothing.
    """

    def __init__(
        self,
        raw: dict[str, Any],
        where: str,
        special: Iterable[str] = (),
        hidden: Iterable[int] = (),
    ) -> None:
        self.raw = raw
        self._where = where
        model = raw["model"]
        decoders = all_types(raw["decoder"])
        self._byte_level = "ByteLevel" in decoders
        self._strip_space = not self._byte_level and bool(decoders & {"Strip", "Metaspace"})
        self._unknown: str | None = model["unk_token"]
        self.prefix_token = _prefix_token(raw["post_processor"])
        self._added = {token["content"]: AddedToken(**token) for token in raw["added_tokens"]}
        self._ids: dict[str, int] = {**model["vocab"]}
        self._ids |= {token.content: token.id for token in self._added.values()}
        for content in sorted(set(special) & self._ids.keys()):
            token = self._added.get(content) or AddedToken(self._ids[content], content)
            self._added[content] = replace(token, special=True)
        self._contents = {token: content for content, token in self._ids.items()}
        self._contents |= {token.id: token.content for token in self._added.values()}
        self._added_ids = {token.id for token in self._added.values()}
        self._hidden = {token.id for token in self._added.values() if token.special}.union(hidden)
        self._shown: dict[int, str] = {}
        self.controls = controls_among(self._added.values(), "", ())

    def __len__(self) -> int:
        return 1 + max(self._contents, default=-1)

    def reserve(self, template: str, ends: Container[int]) -> None:
        self.controls = controls_among(self._added.values(), template, ends)
        self.__dict__.pop("_at_start", None)
        self.__dict__.pop("_continuation", None)
        with self._told():
            _ = self._continuation  # a fault is to show now, not at the first text
            # As the library shows them: with the space mark that a normalizer puts in front.
            if (normalizer := self._at_start.normalizer) is not None:
                self._shown = {
                    token.id: normalizer.normalize_str(token.content)
                    for token in self._added.values()
                    if token.normalized
                }

    @cached_property
    def _at_start(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, without what no text may become.

        It is told neither of the control tokens nor of the merges that would spell one.
        """
        model = self.raw["model"]
        vocab = dict(model["vocab"])
        closed = self.controls.keys() | {self._contents[i] for i in self._hidden}
        for content in closed:
            vocab.pop(content, None)
        vocab |= {token.content: token.id for token in self._words}
        flags = {name: model[name] for name in ("fuse_unk", "byte_fallback", "ignore_merges")}
        if self._unknown is not None:
            flags["unk_token"] = "\U0010ffff"  # under a name that is no one's
            vocab["\U0010ffff"] = self._ids[self._unknown]
        # It panics over a merge of what it does not know.
        merges = [
            (a, b)
            for a, b in model["merges"]
            if not (a in closed or b in closed or a + b in closed)
        ]
        bpe = tokenizers.models.BPE(vocab, merges, **flags)
        return self._assemble(bpe, self.raw["pre_tokenizer"])

    @cached_property
    def _continuation(self) -> tokenizers.Tokenizer:
        """For text after a control token: a "first" Metaspace has put its space already."""
        pre = self.raw["pre_tokenizer"]
        later = _never_first(pre)
        return self._at_start if later == pre else self._assemble(self._at_start.model, later)

    @property
    def added(self) -> dict[int, AddedToken]:
        """Every token that is found whole, by id."""
        return {token.id: token for token in self._added.values()}

    @property
    def _words(self) -> list[AddedToken]:
        return [token for token in self._added.values() if token.content not in self.controls]

    def _assemble(self, model: Any, pre_tokenizer: Any) -> tokenizers.Tokenizer:
        shell = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
        shell |= {"normalizer": self.raw["normalizer"], "pre_tokenizer": pre_tokenizer}
        parts = tokenizers.Tokenizer.from_str(json.dumps(shell))
        tokenizer = tokenizers.Tokenizer(model)
        if parts.normalizer is not None:
            tokenizer.normalizer = parts.normalizer
        if parts.pre_tokenizer is not None:
            tokenizer.pre_tokenizer = parts.pre_tokenizer
        words = []
        for token in sorted(self._words, key=lambda token: token.id):
            flags = {name: value for name, value in asdict(token).items() if name != "id"}
            words.append(tokenizers.AddedToken(**flags))
        tokenizer.add_tokens(words)
        return tokenizer

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The library's own errors, and its panics, as TokenizerError."""
        try:
            yield
        except BaseException as error:
            # It raises bare Exception; its PanicException is not even one.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise TokenizerError(f"{self._where}: {first_line(error)}") from None
            raise

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        with self._told():
            tokenizer = self._at_start if at_start else self._continuation
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token_id(self, content: str) -> int | None:
        return self._ids.get(content)

    def content(self, token: int) -> str | None:
        return self._contents.get(token)

    def is_added(self, token: int) -> bool:
        return token in self._added_ids or token in self._hidden or token not in self._contents

    def piece(self, token: int) -> str | bytes:
        content = self._shown.get(token, self.content(token))
        if self._byte_level:
            if content is None or token in self._hidden:
                return b""  # the bytes on both sides of a control token still join
            if token not in self._added_ids and all(char in _BYTE_OF for char in content):
                return bytes(_BYTE_OF[char] for char in content)
            return content.encode()
        if content == self._unknown and content is not None:
            return " \u2047 "  # as SentencePiece shows it
        if content is None or token in self._hidden:
            return ""
        byte = _BYTE_PIECE.fullmatch(content)
        return bytes.fromhex(byte[1]) if byte else content

    def detokenizer(self, limit: int) -> StreamingDetokenizer:
        errors = PER_SEQUENCE if self._byte_level else PER_BYTE
        return StreamingDetokenizer(self.piece, limit, errors, self._strip_space)

    def tokenizer_json(self, bos_token: str | None) -> str:
        processor = bos_processor(bos_token, self.token_id(bos_token or ""))
        return json.dumps({**self.raw, "post_processor": processor}, ensure_ascii=False)


def _never_first(node: Any) -> Any:
    """A pre_tokenizer with each Metaspace of the scheme "first" made "never"."""
    if isinstance(node, dict):
        later = {key: _never_first(value) for key, value in node.items()}
        first = node.get("type") == "Metaspace" and node.get("prepend_scheme") == "first"
        return later | {"prepend_scheme": "never"} if first else later
    return [_never_first(item) for item in node] if isinstance(node, list) else node


def all_types(node: Any) -> set[str]:
    """Every "type" in a part of a tokenizer.json."""
    if isinstance(node, list):
        return set().union(*map(all_types, node))
    if not isinstance(node, dict):
        return set()
    return {str(node.get("type"))}.union(*map(all_types, node.values()))


def _prefix_token(processor: Any) -> str | None:
    """What a post_processor puts before a text."""
    for part in processor.get("processors", [processor]) if processor else []:
        if part.get("type") == "TemplateProcessing" and part.get("single"):
            token = part["single"][0].get("SpecialToken")
            return str(token["id"]) if token else None
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
