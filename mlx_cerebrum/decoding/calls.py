"""The call of a function, as an answer spells it: `{"name": "f", "arguments": {...}}`.

The spelling around the arguments is fixed, so that they can be told apart while they come.
"""

import re

_HEAD = re.compile(r'\{"name": "([^"]*)", "arguments": ')


class CallText:
    """Splits such a text as it comes.

    name: the function's, once it is known. over: whether its arguments are whole.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._head = ""
        self._depth = 0  # of braces and brackets in the arguments
        self._in_string = self._escaped = self.over = False

    def add(self, text: str) -> str:
        """The piece of the arguments' JSON that the text adds."""
        if self.name is None:
            self._head += text
            if (head := _HEAD.match(self._head)) is None:
                return ""
            self.name, text = head[1], self._head[head.end() :]
        return text[: self._length(text)]

    def _length(self, text: str) -> int:
        """How much of it belongs to the arguments: up to the bracket that ends them."""
        if self.over:
            return 0
        for at, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.over = True
                    return at + 1
        return len(text)
