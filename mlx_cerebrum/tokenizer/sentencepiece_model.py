"""A SentencePiece `tokenizer.model`: use it, write one by hand, turn one into tokenizer.json.

The file is a protobuf message (sentencepiece_model.proto). Only its pieces and a few
settings matter here, and the wire format of those is thirty lines: no protobuf needed.
"""

import json
import re
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import sentencepiece

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer.detokenizer import PER_BYTE, SPACE_MARK, StreamingDetokenizer
from mlx_cerebrum.tokenizer.vocabulary import (
    MAX_ADDED,
    MAX_TOKENS,
    AddedToken,
    bos_processor,
    controls_among,
    first_line,
    numbered,
)

# Piece types; GGUF numbers them the same.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BPE = 2  # trainer_spec.model_type

Piece = tuple[str, float, int]  # text, score, type


class SentencePieceVocabulary:
    """A `tokenizer.model`, plus tokens that were added outside it.

    added: in order of their ids, which count on from the model's.
    prefix: which stretches of text between added tokens get a space mark in front: "always",
        "first" (only what begins the text) or "never". A model without one never does.
    twice: whether a text that begins with a space gets one more, as SentencePiece has it;
        Metaspace, the pre_tokenizer of transformers, leaves such a text alone.
    renames: whether an added token takes the place of a piece that has its id.
    Raises TokenizerError naming `where` for a damaged model.
    """

    def __init__(
        self,
        model: bytes,
        where: str,
        added: Iterable[AddedToken] = (),
        prefix: str = "always",
        twice: bool = True,
        renames: bool = True,
    ) -> None:
        # An empty model loads, and then complains on stderr at every use.
        if not model:
            raise TokenizerError(f"{where} is empty")
        self._where = where
        self.model = model
        sp = self._processor = self._load(model)
        self._size: int = sp.vocab_size()
        if self._size > MAX_TOKENS:
            raise TokenizerError(f"{where} has {self._size:,} pieces, more than {MAX_TOKENS:,}")
        ids = list(range(self._size))
        self._reading(sp.id_to_piece, ids)  # each of them is text
        self._added = {token.id: token for token in self._placed(tuple(added), renames)}
        marked = zip(ids, sp.is_control(ids), sp.is_unknown(ids), strict=True)
        named = [i for i, control, unknown in marked if control or unknown]
        self._own = [AddedToken(i, sp.id_to_piece(i)) for i in named if i not in self._added]
        if len(self._own) + len(self._added) > MAX_ADDED:
            raise TokenizerError(f"{where}: more than {MAX_ADDED:,} control and added tokens")
        space = sp.piece_to_id(SPACE_MARK)
        prefixes = not sp.is_unknown(space) and sp.decode([space]) == ""
        self._prefix, self._twice = prefix if prefixes else "never", twice
        self._strip_space = self._prefix != "never"
        self.reserve("", ())

    def _placed(self, added: Sequence[AddedToken], renames: bool) -> list[AddedToken]:
        """The added tokens with the ids that transformers gives them."""
        if not added:
            return []
        names = {token.id: token.content for token in added} if renames else {}
        pieces = self._processor.id_to_piece(list(range(self._size)))
        vocab = {piece: i for i, piece in enumerate(pieces)}
        kept = {piece for piece, i in vocab.items() if i not in names}
        for piece, i in list(vocab.items()):
            if i in names and names[i] not in kept:
                del vocab[piece]
                vocab[names[i]] = i
        return numbered(vocab, added)

    def _load(self, model: bytes) -> sentencepiece.SentencePieceProcessor:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise TokenizerError(
                f"{self._where} is not a SentencePiece model: {first_line(error)}"
            ) from None

    def reserve(self, template: str, ends: Container[int]) -> None:
        added = [*self._own, *self._added.values()]
        if template:  # which may write the model's own words as markers
            added += self._user_defined
        self.controls = controls_among(added, template, ends)
        words = {t.content: t for t in self._added.values() if t.content not in self.controls}
        self._words = words
        longest_first = sorted(words, key=len, reverse=True)
        self._find_words = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.__dict__.pop("_prefixing", None)
        self.__dict__.pop("_bare", None)

    @cached_property
    def _user_defined(self) -> list[AddedToken]:
        """The model's own words, which SentencePiece finds by itself, space marks and all."""
        if _int(3, USER_DEFINED) not in self.model:  # spares most models the reading
            return []
        found = [
            AddedToken(i, text, special=False)
            for i, (text, _, kind) in enumerate(self.pieces)
            if kind == USER_DEFINED and i not in self._added
        ]
        if len(found) > MAX_ADDED:
            raise TokenizerError(f"{self._where}: more than {MAX_ADDED:,} user-defined pieces")
        return found

    @property
    def pieces(self) -> list[Piece]:
        """The model's own, in id order."""
        pieces: list[Piece] = self._reading(read_pieces, self.model)
        return pieces

    def _reading(self, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error):
            raise TokenizerError(f"{self._where} is damaged") from None

    @cached_property
    def _prefixing(self) -> sentencepiece.SentencePieceProcessor:
        """Encodes text as the model does, but for pieces that no text may become."""
        sp = self._processor
        closed = {
            token.id
            for token in (*self._added.values(), *self.controls.values())
            if token.id < self._size
            and not (sp.is_control(token.id) or sp.is_unknown(token.id) or sp.is_byte(token.id))
            and (token.content in self.controls or sp.id_to_piece(token.id) != token.content)
        }
        return self._load(self._reading(_as_controls, self.model, closed)) if closed else sp

    @cached_property
    def _bare(self) -> sentencepiece.SentencePieceProcessor:
        """The same without a space mark in front."""
        # Fields that come again overwrite: normalizer_spec.add_dummy_prefix = false.
        model: bytes = self._prefixing.serialized_model_proto()
        return self._load(model + _bytes(3, _int(3, False)))

    def __len__(self) -> int:
        return max(self._size, 1 + max(self._added, default=-1))

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """SentencePiece's own ids of each stretch of text between words."""
        ids: list[int] = []
        at = 0
        for match in self._find_words.finditer(text):
            token = self._words[match[0]]
            start, end = match.span()
            if token.single_word and _touched(text, start, end):
                continue
            while token.lstrip and start > at and text[start - 1].isspace():
                start -= 1
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
            ids += self._stretch(text[at:start], at_start and at == 0)
            ids.append(token.id)
            at = end
        return ids + self._stretch(text[at:], at_start and at == 0)

    def _stretch(self, text: str, first: bool) -> list[int]:
        marked = not self._twice and text.startswith((" ", SPACE_MARK))
        prefix = self._prefix == "always" or (self._prefix == "first" and first)
        ids: list[int] = (self._prefixing if prefix and not marked else self._bare).encode(text)
        return ids

    def token_id(self, content: str) -> int | None:
        known = self.controls.get(content) or self._words.get(content)
        if known is not None:
            return known.id
        token: int = self._processor.piece_to_id(content)
        return None if self._processor.is_unknown(token) or token in self._added else token

    def content(self, token: int) -> str | None:
        if token in self._added:
            return self._added[token].content
        return self._processor.id_to_piece(token) if 0 <= token < self._size else None

    def is_added(self, token: int) -> bool:
        sp = self._processor
        own = token < self._size and not (sp.is_control(token) or sp.is_unused(token))
        return token in self._added or not own

    def piece(self, token: int) -> str | bytes:
        added = self._added.get(token)
        if added is not None:
            return "" if added.special else added.content
        sp = self._processor
        if token >= self._size or sp.is_control(token) or sp.is_unused(token):
            return ""
        if sp.is_unknown(token):
            return str(sp.decode([token]))
        piece: str = sp.id_to_piece(token)
        return bytes.fromhex(piece[3:5]) if sp.is_byte(token) else piece

    def detokenizer(self, limit: int) -> StreamingDetokenizer:
        return StreamingDetokenizer(self.piece, limit, PER_BYTE, self._strip_space)

    def tokenizer_json(self, bos_token: str | None) -> str | None:
        """The same vocabulary as a tokenizer.json, same ids; None for a model that is no BPE."""
        if self._reading(_model_type, self.model) != _BPE:
            return None
        pieces = self.pieces
        vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
        for token in sorted(self._added.values(), key=lambda token: token.id):
            if token.id < len(pieces):
                vocab.pop(pieces[token.id][0], None)
                vocab[token.content] = token.id
        user_defined = [token.content for token in self._user_defined]
        mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
        normalizers: list[dict[str, Any]] = [mark]
        steps: list[dict[str, Any]] = []
        if self._prefix == "always" and self._twice:
            normalizers.insert(0, {"type": "Prepend", "prepend": SPACE_MARK})
        elif self._prefix != "never":
            metaspace = {"type": "Metaspace", "replacement": SPACE_MARK, "split": False}
            steps.append(metaspace | {"prepend_scheme": self._prefix})
        if user_defined:  # SentencePiece never joins them with what is beside them
            either = "|".join(map(re.escape, sorted(user_defined, key=len, reverse=True)))
            split = {"type": "Split", "pattern": {"Regex": either}, "behavior": "Isolated"}
            steps.append(split | {"invert": False})
        unmark = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoders = [unmark, {"type": "ByteFallback"}, {"type": "Fuse"}]
        raw: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [
                vars(token) | {"normalized": False}  # as `encode` finds them
                for token in sorted([*self._own, *self._added.values()], key=lambda t: t.id)
            ],
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps else None,
            "post_processor": bos_processor(bos_token, self.token_id(bos_token or "")),
            "decoder": {
                "type": "Sequence",
                "decoders": [*decoders, strip] if self._strip_space else decoders,
            },
            "model": {
                "type": "BPE",
                "unk_token": self._processor.id_to_piece(self._processor.unk_id()),
                "fuse_unk": True,
                "byte_fallback": any(kind == BYTE for _, _, kind in pieces),
                "ignore_merges": bool(user_defined),
                "vocab": vocab,
                "merges": _merges(
                    [piece if piece[0] in vocab else ("", *piece[1:]) for piece in pieces]
                ),
            },
        }
        return json.dumps(raw, ensure_ascii=False)


def _touched(text: str, start: int, end: int) -> bool:
    """Whether a letter, digit or underscore is right before or after text[start:end]."""
    return re.match(r"\w", text[max(start - 1, 0) : start] or " ") is not None or (
        re.match(r"\w", text[end : end + 1] or " ") is not None
    )


def _merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """Every way to join two pieces into a third, best score first: SentencePiece's order."""
    ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind == NORMAL}
    ranked = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces[i][1], i, ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(ranked)]


def write_model(
    pieces: Iterable[Piece], bos: str = "<s>", eos: str = "</s>", add_dummy_prefix: bool = True
) -> bytes:
    """A SentencePiece BPE model of these pieces, white space kept as it is (Llama's settings)."""
    out = bytearray()
    unknown, bytes_in_use = "<unk>", False
    for text, score, kind in pieces:
        out += _bytes(1, _bytes(1, text.encode()) + _float(2, score) + _int(3, kind))
        bytes_in_use |= kind == BYTE
        unknown = text if kind == UNKNOWN else unknown
    trainer = _int(3, _BPE) + _int(35, bytes_in_use)
    trainer += b"".join(_bytes(45 + n, name.encode()) for n, name in enumerate((unknown, bos, eos)))
    normalizer = _bytes(1, b"identity") + _int(3, add_dummy_prefix) + _int(4, False) + _int(5, True)
    return bytes(out + _bytes(2, trainer) + _bytes(3, normalizer))


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces of a serialized model, in id order. Raises ValueError and the like for others."""
    pieces = []
    for number, value in _fields(model):
        if number == 1:
            fields = dict(_fields(value))
            kind = fields.get(3, NORMAL)
            score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
            pieces.append((fields[1].decode(), score, kind))
    return pieces


def _as_controls(model: bytes, ids: Container[int]) -> bytes:
    """The model with these pieces made control tokens, which no text becomes."""
    out, piece = bytearray(), 0
    for number, value in _fields(model):
        if number == 1:
            closed, piece = piece in ids, piece + 1
            value += _int(3, CONTROL) if closed else b""  # a field that comes again overwrites
        out += _int(number, value) if isinstance(value, int) else _bytes(number, value)
    return bytes(out)


def _model_type(model: bytes) -> int:
    """Unigram is 1, BPE 2; read from the last trainer_spec."""
    trainers = [value for number, value in _fields(model) if number == 2]
    return int(dict(_fields(trainers[-1])).get(3, 1)) if trainers else 1


# Protobuf's wire format: a varint key (field number << 3 | wire type), then the value.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values: int for varints, bytes for all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a varint of more than 64 bits")

    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError("a wire type that is not known")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if size > len(data) - at:
            raise ValueError("a field that is longer than the message")
        yield key >> 3, data[at : at + size]
        at += size
