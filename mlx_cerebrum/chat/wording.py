"""Answers in a few words."""

from mlx_cerebrum.chat.session import Answer
from mlx_cerebrum.text import one_line


def figures(answer: Answer) -> str:
    """How many tokens an answer has, and how fast they came."""
    if answer.last is None:
        return "reading the question"
    pace = f", {answer.pace:.1f}/s" if answer.pace else ""
    return f"{counted(answer.last.generation_tokens, 'token')}{pace}"


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def first_difference(texts: tuple[str, str], done: tuple[bool, bool]) -> int | None:
    """Where two growing texts first differ; None while that is not known."""
    shortest = min(map(len, texts))
    for index in range(shortest):
        if texts[0][index] != texts[1][index]:
            return index
    ended = any(len(text) == shortest and over for text, over in zip(texts, done, strict=True))
    return shortest if ended and len(texts[0]) != len(texts[1]) else None


def difference(first: Answer, second: Answer) -> str:
    """How long two answers agree."""
    at = first_difference((first.text, second.text), (True, True))
    if at is None:
        return "both say the same"
    same = one_line(first.text[:at])
    return f"they first differ after: {same[-40:]}" if same else "they differ from the start"


def shorten(text: str, most: int = 50) -> str:
    """One line of at most `most` characters."""
    return one_line(text, most)
