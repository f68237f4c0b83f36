"""Colours on the backgrounds of terminals that people use."""

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.color import Color
from rich.console import Console

from mlx_cerebrum.chat import palette
from mlx_cerebrum.chat.palette import CUBE, GREYS, LEAST, contrast, styles
from mlx_cerebrum.chat.prompt import MENU
from mlx_cerebrum.chat.render import AnswerMarkdown

BACKGROUNDS = {
    "white": "ffffff",
    "black": "000000",
    "macOS Basic dark": "1e1e1e",
    "GNOME dark": "241f31",
    "VS Code dark": "181818",
    "Solarized light": "fdf6e3",
    "Solarized dark": "002b36",
    "Dracula": "282a36",
    "Nord": "2e3440",
    "Gruvbox light": "fbf1c7",
    "Gruvbox dark": "282828",
    "One Light": "fafafa",
    "One Dark": "282c34",
    "Catppuccin Latte": "eff1f5",
    "Catppuccin Mocha": "1e1e2e",
    "Tokyo Night": "1a1b26",
    "Ubuntu": "300a24",
    "Homebrew": "0a0a0a",
    "grey": "808080",
    "navy": "000080",
}
MARKDOWN = """# A
## B
### C
#### D
`b` [c](http://d.e) *i* **s** ~~t~~
> f

```python
@name
class K:
    def g(self): return 1, 'h', True  # i
```

1. j
- k

---

| a | b |
|---|---|
| 1 | 2 |
"""


def rgb(text: str) -> palette.Rgb:
    return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)


def drawn(ground: palette.Rgb | None) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="256", width=80)
    console.print(AnswerMarkdown(MARKDOWN, styles(ground)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def codes(text: str) -> list[list[int]]:
    return [[int(n or 0) for n in one.split(";")] for one in re.findall(r"\x1b\[([\d;]*)m", text)]


def test_the_palettes_are_xterms() -> None:
    """Rich knows what the numbers stand for, and so do we."""
    for number, value in {**CUBE, **GREYS}.items():
        assert tuple(Color.from_ansi(number).get_truecolor()) == value
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_all_that_is_coloured_can_be_read(name: str) -> None:
    """No ground of its own, none of the sixteen colours that themes change, and enough contrast."""
    ground = rgb(BACKGROUNDS[name])
    coloured = set()
    for code in codes(drawn(ground)):
        while code:
            first = code.pop(0)
            assert first in (0, 1, 3, 4, 9, 38), first
            if first == 38:
                assert code.pop(0) == 5
                coloured.add(code.pop(0))
    values = {**CUBE, **GREYS}
    assert all(contrast(values[number], ground) >= LEAST for number in coloured)
    assert len(coloured) >= (1 if name == "grey" else 6)
    for name, style in styles(ground).items():
        color = style.color
        assert color is None or contrast(values[color.number or 0], ground) >= LEAST, name
        assert style.bgcolor is None


def test_without_a_known_background_there_is_no_colour() -> None:
    """Bold, italic and underlined are the terminal's own colour; dim is grey on some."""
    text = drawn(None)
    assert {n for code in codes(text) for n in code} <= {0, 1, 3, 4, 9}
    assert re.search(r"\x1b\[1mb\x1b\[0m", text)  # code is not as the text around it


def test_the_menus_pairs_can_be_read() -> None:
    for rule in MENU.values():
        found = re.search(r"bg:#(\w{6}) #(\w{6})", rule)
        assert found is None or contrast(rgb(found[1]), rgb(found[2])) >= LEAST, rule


@contextmanager
def terminal(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A terminal as standard input and output that answers so when it is asked."""
    master, slave = pty.openpty()
    asked: list[bytes] = []

    def reply() -> None:
        while not asked or not asked[-1].endswith(b"c"):
            asked.append(b"".join(asked[-1:]) + os.read(master, 100))
        os.write(master, answer)

    talking = threading.Thread(target=reply, daemon=True)
    talking.start()
    with os.fdopen(slave, "r") as stdin, os.fdopen(os.dup(slave), "w") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        yield asked
    os.close(master)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"\x1b]11;rgb:ffff/8080/0000\x07\x1b[?62;22c", (255, 128, 0)),
        (b"\x1b]11;rgb:1e/1e/2e\x1b\\\x1b[?1;2c", (0x1E, 0x1E, 0x2E)),
        (b"\x1b]11;rgba:0000/0000/0000/ffff\x1b\\\x1b[?6c", (0, 0, 0)),
        (b"\x1b[?62c", None),
    ],
)
def test_a_terminal_is_asked(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, found: palette.Rgb | None
) -> None:
    with terminal(answer, monkeypatch) as asked:
        assert palette.background() == found
        assert asked[-1] == b"\x1b]11;?\x1b\\\x1b[c"


def test_one_that_does_not_answer_costs_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palette, "PATIENCE", 0.05)
    with terminal(b"", monkeypatch):
        assert palette.background() is None


def test_no_color_and_few_colours_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palette, "background", lambda: pytest.fail("asked"))
    for settings in ({"no_color": True, "color_system": "256"}, {"color_system": "standard"}):
        console = Console(file=io.StringIO(), force_terminal=True, **settings)
        assert palette.of_terminal(console) == palette.PLAIN
