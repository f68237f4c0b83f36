"""A SentencePiece `tokenizer.model`: use it, write one by hand, turn one into tokenizer.json.

The file is a protobuf message (sentencepiece_model.proto). Only its pieces and a few
settings matter here, and the wire format of those is thirty lines: no protobuf needed.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from mlx_cerebrum.detokenizer import PER_BYTE, SPACE_MARK, StreamingDetokenizer
from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.vocabulary import AddedToken, bos_processor, first_line

# Piece types; GGUF numbers them the same.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

Piece = tuple[str, float, int]  # text, score, type


class SentencePieceVocabulary:
    """A `tokenizer.model`, plus tokens that were added outside it."""

    def __init__(self, model: bytes, where: str, added: Iterable[AddedToken] = ()) -> None:
        # An empty model loads, and then complains on stderr at every use.
        if not model:
            raise TokenizerError(f"{where} is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise TokenizerError(
                f"{where} is not a SentencePiece model: {first_line(error)}"
            ) from None
        self.model = model
        sp = self._processor
        self._size: int = sp.vocab_size()
        self._added = {
            token.id: token
            for token in added
            if token.id >= self._size or sp.id_to_piece(token.id) != token.content
        }
        named = [i for i in range(self._size) if sp.is_control(i) or sp.is_unknown(i)]
        own = [AddedToken(i, sp.id_to_piece(i)) for i in named if i not in self._added]
        # Added tokens count as control even if not special: text must not become one.
        self.controls = {token.content: token for token in (*own, *self._added.values())}
        space = sp.piece_to_id(SPACE_MARK)
        self._strip_space = not sp.is_unknown(space) and sp.decode([space]) == ""

    def __len__(self) -> int:
        return max(self._size, 1 + max(self._added, default=-1))

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """SentencePiece's own ids; every stretch of text gets the dummy prefix."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def token_id(self, content: str) -> int | None:
        if content in self.controls:
            return self.controls[content].id
        token: int = self._processor.piece_to_id(content)
        return None if self._processor.is_unknown(token) else token

    def content(self, token: int) -> str | None:
        if token in self._added:
            return self._added[token].content
        return self._processor.id_to_piece(token) if 0 <= token < self._size else None

    def piece(self, token: int) -> str | bytes:
        added = self._added.get(token)
        if added is not None:
            return "" if added.special else added.content
        sp = self._processor
        if token >= self._size or sp.is_control(token):
            return ""
        if sp.is_unknown(token):
            return str(sp.decode([token]))
        piece: str = sp.id_to_piece(token)
        return bytes.fromhex(piece[3:5]) if sp.is_byte(token) else piece

    def detokenizer(self, limit: int) -> StreamingDetokenizer:
        return StreamingDetokenizer(self.piece, limit, PER_BYTE, self._strip_space)

    def tokenizer_json(self, bos_token: str | None) -> str:
        """The same vocabulary as a tokenizer.json, same ids.

        Why: transformers 5, given only the `tokenizer.model` of a mistral, drops the
        leading space mark; given this too, it does not.
        """
        pieces = read_pieces(self.model)
        added = [*self.controls.values()]
        added += [
            AddedToken(i, text, special=False)
            for i, (text, _, kind) in enumerate(pieces)
            if kind == USER_DEFINED and text not in self.controls
        ]
        prefix = {"type": "Prepend", "prepend": SPACE_MARK}
        mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
        unmark = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoders = [unmark, {"type": "ByteFallback"}, {"type": "Fuse"}]
        # SentencePiece matches its user-defined pieces after normalizing.
        raw: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [
                {**vars(token), "single_word": False, "normalized": not token.special}
                for token in sorted(added, key=lambda token: token.id)
            ],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [prefix, mark] if self._strip_space else [mark],
            },
            "pre_tokenizer": None,
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
                "vocab": {text: i for i, (text, _, _) in enumerate(pieces)},
                "merges": _merges(pieces),
            },
        }
        return json.dumps(raw, ensure_ascii=False)


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
    bpe = 2
    trainer = _int(3, bpe) + _int(35, bytes_in_use)
    trainer += b"".join(_bytes(45 + n, name.encode()) for n, name in enumerate((unknown, bos, eos)))
    normalizer = _bytes(1, b"identity") + _int(3, add_dummy_prefix) + _int(4, False) + _int(5, True)
    return bytes(out + _bytes(2, trainer) + _bytes(3, normalizer))


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces of a serialized model, in id order."""
    pieces = []
    for number, value in _fields(model):
        if number == 1:
            fields = dict(_fields(value))
            kind = fields.get(3, NORMAL)
            score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
            pieces.append((fields[1].decode(), score, kind))
    return pieces


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

    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        yield key >> 3, data[at : at + size]
        at += size
