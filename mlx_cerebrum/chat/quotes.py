'''Texts of several lines between triple quotes, as people type them at other programs.

A message may begin with """, and so may the text of a command: it goes on until a line ends with
""". Where none does there is nothing quoted: Python begins its files so, too.
'''

import re

QUOTES = '"""'
_BEGINS = re.compile(r'\s*(/\S+\s+(?:\w+\s+)?)?"""')


def is_open(text: str) -> bool:
    """Whether more lines are to come before `text` is whole."""
    found = _BEGINS.match(text)
    if found is None:
        return False
    lines = text[found.end() :].split("\n")
    return not any(line.rstrip().endswith(QUOTES) for line in lines)


def unquoted(text: str) -> tuple[str, str] | None:
    """`(command before the quotes, text between them)`; None where nothing is quoted."""
    found, inner = _BEGINS.match(text), text.rstrip().removesuffix(QUOTES)
    if found is None or inner == text.rstrip() or not is_open(inner):
        return None
    return found[1] or "", inner[found.end() :].strip("\n")
