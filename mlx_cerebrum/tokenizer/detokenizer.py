"""Token ids back to text, piece by piece, each character as soon as it is final.

A token is not a piece of text: an emoji may be four byte tokens, and a token may end in
the middle of a character. Every piece here is therefore one of two kinds:

- `bytes`: raw UTF-8 that joins with the bytes around it (byte-level BPE; byte fallback);
- `str`: whole text, in SentencePiece's spelling with U+2581 for a space. It ends
  any run of bytes before it, complete or not.

`decode` of a whole sequence is the same machine run to its end, so streamed pieces joined
are the decoded text by construction.
"""

import codecs
from collections.abc import Callable, Iterable

from mlx_cerebrum.errors import TokenizerError

SPACE_MARK = "\u2581"

# How the two families spell bytes that are not UTF-8. SentencePiece writes one U+FFFD a
# byte; byte-level BPE one per maximal broken sequence, which is also Python's "replace".
PER_BYTE = "surrogateescape"
PER_SEQUENCE = "replace"

_ESCAPED = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")


class StreamingDetokenizer:
    """`add(token)` gives the text that became final, `finish()` what was still held back.

    piece: token id -> bytes or str as above.
    limit: ids from here on are not the model's; `add` raises TokenizerError for them.
    errors: PER_BYTE or PER_SEQUENCE.
    strip_space: the first piece of text loses its space mark (SentencePiece's dummy prefix).
    """

    def __init__(
        self,
        piece: Callable[[int], str | bytes],
        limit: int,
        errors: str,
        strip_space: bool = False,
    ) -> None:
        self._piece = piece
        self._limit = limit
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = strip_space

    def add(self, token: int) -> str:
        if not 0 <= token < self._limit:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self._limit}")
        piece = self._piece(token)
        if isinstance(piece, bytes):
            return self._decode(piece)
        text = self._decode(b"", final=True)
        if self._at_start and piece.startswith(SPACE_MARK):
            self._at_start = False
            piece = piece[1:]
        text += piece.replace(SPACE_MARK, " ")
        self._at_start &= not text
        return text

    def finish(self) -> str:
        """The rest: an incomplete character comes out as U+FFFD."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool = False) -> str:
        text = self._bytes.decode(data, final).translate(_ESCAPED)
        self._at_start &= not text
        return text


def decode(detokenizer: StreamingDetokenizer, tokens: Iterable[int]) -> str:
    """All of `tokens` through a fresh detokenizer."""
    return "".join(map(detokenizer.add, tokens)) + detokenizer.finish()
