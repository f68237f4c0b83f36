"""What each token looks like on its own, for log-probabilities."""

from mlx_cerebrum.tokenizer.detokenizer import SPACE_MARK
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer


class Spelling:
    """What each token id of a tokenizer looks like on its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.detokenizer = tokenizer.detokenizer
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def __call__(self, token: int) -> tuple[str, bytes | None]:
        """`(text, its UTF-8)`; a piece of a character as `\\xe2\\x80`, a control token's name
        without bytes, since it adds none to a text."""
        if token not in self._known:
            self._known[token] = self._spelled(token)
        return self._known[token]

    def _spelled(self, token: int) -> tuple[str, bytes | None]:
        piece = self._tokenizer.piece(token)
        if isinstance(piece, str):
            piece = piece.replace(SPACE_MARK, " ").encode()
        if not piece:
            return self._tokenizer.content(token) or "", None
        try:
            return piece.decode(), piece
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in piece), piece
