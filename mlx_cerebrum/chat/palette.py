"""Colours that can be read on this terminal's background, whatever its theme.

A theme gives the sixteen named colours any values it likes: cyan is 1.9 : 1 on white in xterm,
red 2.4 : 1 on black in macOS's Terminal. So none of them is used. Where the terminal says what its
background is, colours are taken from the 256's cube, whose values are the same everywhere; where
it does not, bold, italic and underlined text do, in the terminal's own colour.
"""

import colorsys
import os
import re
import select
import sys
import termios
import time
from collections.abc import Mapping
from types import MappingProxyType

from rich.console import Console
from rich.style import Style

Rgb = tuple[int, int, int]  # 0 to 255, sRGB

LEAST = 4.5  # contrast of text, as WCAG 2.2 asks for (1.4.3)
_AIM = 7.0  # of the allowed contrasts, about this one: the colour is still seen as one
PATIENCE = 1.0  # seconds that a terminal has to answer

# In degrees, 0 is red; None: a grey. And what goes with it, alone where there are no colours.
_HUES: dict[str, tuple[float | None, str]] = {
    "code": (183, "bold"),
    "link": (220, "underline"),
    "keyword": (300, "bold"),
    "string": (110, ""),
    "name": (183, ""),
    "number": (15, ""),
    "comment": (None, "italic"),
    "notice": (None, "italic"),
    "error": (0, "bold"),
}
_LEVELS = (0, 95, 135, 175, 215, 255)  # of the cube, as xterm has it
CUBE: dict[int, Rgb] = {
    16 + 36 * r + 6 * g + b: (_LEVELS[r], _LEVELS[g], _LEVELS[b])
    for r in range(6)
    for g in range(6)
    for b in range(6)
}
GREYS: dict[int, Rgb] = {232 + i: (8 + 10 * i,) * 3 for i in range(24)}


def luminance(colour: Rgb) -> float:
    """Relative luminance, 0 to 1 (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _unit(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Rgb, other: Rgb) -> float:
    """From 1, the same, to 21, black on white."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def styles(background: Rgb | None) -> Mapping[str, Style]:
    """How each kind of text is shown; without a background, in no colour."""
    found = {}
    for name, (hue, beside) in _HUES.items():
        style = Style.parse(beside or "none")
        number = None if background is None else _nearest(hue, background)
        found[name] = style if number is None else style + Style(color=f"color({number})")
    return MappingProxyType(found)


PLAIN = styles(None)


def _unit(colour: Rgb) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255


def _nearest(hue: float | None, background: Rgb) -> int | None:
    """The colour of this hue to be read there; None: there is none."""
    among = GREYS if hue is None else CUBE
    fits = {n: contrast(c, background) for n, c in among.items() if hue is None or _has(c, hue)}
    good = {n: value for n, value in fits.items() if value >= LEAST}
    return min(good, key=lambda n: abs(good[n] - _AIM) - 2 * _strength(among[n]), default=None)


def _strength(colour: Rgb) -> float:
    return colorsys.rgb_to_hsv(*_unit(colour))[1]


def _has(colour: Rgb, hue: float) -> bool:
    own, saturation, _ = colorsys.rgb_to_hsv(*_unit(colour))
    apart = abs(own * 360 - hue) % 360
    return saturation >= 0.35 and min(apart, 360 - apart) <= 15


def of_terminal(console: Console) -> Mapping[str, Style]:
    """The styles for the terminal that this program runs on."""
    many = console.color_system in ("256", "truecolor", "windows")
    return styles(background() if many and not console.no_color else None)


_REPORT = re.compile(rb"\x1b\]11;rgba?:([\da-fA-F]{1,4})/([\da-fA-F]{1,4})/([\da-fA-F]{1,4})")
_END = re.compile(rb"\x1b\[\?[\d;]*c")


def background() -> Rgb | None:
    """The terminal's background colour, if it says so.

    It is asked for that (OSC 11), then for what it is (DA1), which every terminal answers: so
    nothing of an answer is left to be taken for keys. What is typed ahead is never read.
    """
    handle = sys.stdin.fileno()
    if select.select([handle], [], [], 0)[0]:
        return None
    before = termios.tcgetattr(handle)
    quiet = termios.tcgetattr(handle)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    got, until = b"", time.monotonic() + PATIENCE
    try:
        termios.tcsetattr(handle, termios.TCSANOW, quiet)
        os.write(sys.stdout.fileno(), b"\x1b]11;?\x1b\\\x1b[c")
        while not _END.search(got) and len(got) < 4096:
            left = max(0.0, until - time.monotonic())
            piece = os.read(handle, 1024) if select.select([handle], [], [], left)[0] else b""
            if not piece:
                break
            got += piece
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, before)
    found = _REPORT.search(got)
    if found is None:
        return None
    red, green, blue = (round(int(c, 16) * 255 / (16 ** len(c) - 1)) for c in found.groups())
    return red, green, blue
