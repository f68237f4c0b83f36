"""A terminal for tests: what a program writes, as a person would see it, and a person's keys."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Self

from rich.cells import cell_len

_SEQUENCE = re.compile(
    r"\x1b\[(?P<args>[?>]?[\d;]*)(?P<kind>[A-Za-z])"  # CSI
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC
    r"|\x1b[=>78()][AB0]?"
    r"|(?P<other>[^\x1b])"
)


class Terminal:
    """A screen with its scrollback. Narrowing wraps lines anew, as nearly all terminals do."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.background = ""  # what it says its colour is, `rrrr/gggg/bbbb`; nothing: it does not
        self.lines: list[list[str]] = [[]]  # scrollback too; "" is a wide character's second cell
        self.top = 0  # the screen's first line
        self.x = self.y = 0  # y counts from the first line ever
        self.unknown: list[str] = []  # what no program of ours should send
        self._held = ""
        self._autowrap = True

    @property
    def text(self) -> str:
        """All lines, scrolled away or not, without spaces at their ends."""
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip("\n")

    @property
    def screen(self) -> str:
        """What is to be seen."""
        shown = self.lines[self.top : self.top + self.rows]
        return "\n".join("".join(line).rstrip() for line in shown)

    def feed(self, data: str) -> str:
        """Show `data`; what the terminal answers to it (where its cursor is, when asked)."""
        data, answer = self._held + data, ""
        self._held = ""
        at = 0
        while at < len(data):
            match = _SEQUENCE.match(data, at)
            if match is None:  # the rest of it is yet to come, or it is nothing known
                if len(data) - at < 32:
                    self._held = data[at:]
                    break
                self.unknown.append(data[at : at + 32])
                at += 1
                continue
            at = match.end()
            if match["kind"]:
                answer += self._control(match["kind"], match["args"])
            elif match["other"]:
                self._put(match["other"])
            elif match[0].startswith("\x1b]11;?") and self.background:
                answer += f"\x1b]11;rgb:{self.background}\x1b\\"
        return answer

    def _put(self, char: str) -> None:
        if char == "\n":
            self._down()
            self.x = 0  # as the line discipline has it
        elif char == "\r":
            self.x = 0
        elif char == "\b":
            self.x = max(0, self.x - 1)
        elif char == "\t":
            self.x = min(self.columns - 1, self.x // 8 * 8 + 8)
        elif ord(char) < 32 or 127 <= ord(char) < 160:
            self.unknown.append(char)
        else:
            cells = cell_len(char)
            if not cells and self.x and self.x <= len(self._line()):  # it joins what is there
                self._line()[self.x - 1] += char
                return
            if self.x + cells > self.columns:
                if not self._autowrap:
                    return
                self._down()
                self.x = 0
            line = self._line()
            line[self.x : self.x + max(1, cells)] = [char, ""] if cells == 2 else [char]
            self.x += cells

    def _line(self) -> list[str]:
        line = self.lines[self.y]
        line += [" "] * (self.x - len(line))
        return line

    def _down(self) -> None:
        self.y += 1
        if self.y == len(self.lines):
            self.lines.append([])
        self.top = max(self.top, self.y - self.rows + 1)

    def _control(self, kind: str, args: str) -> str:
        numbers = [int(n) if n else 0 for n in args.lstrip("?>").split(";")]
        n = max(1, numbers[0])
        if kind == "A":
            self.y = max(self.top, self.y - n)
        elif kind == "B":
            for _ in range(min(n, self.top + self.rows - 1 - self.y)):
                self._down()
        elif kind == "C":
            self.x = min(self.columns - 1, self.x + n)
        elif kind == "D":
            self.x = max(0, min(self.x, self.columns - 1) - n)
        elif kind == "G":
            self.x = n - 1
        elif kind == "K":
            line = self._line()
            if numbers[0] in (0, 2):
                del line[self.x :]
            if numbers[0] in (1, 2):
                line[: self.x + 1] = [" "] * min(len(line), self.x + 1)
        elif kind == "J" and numbers[0] == 0:
            del self._line()[self.x :]
            del self.lines[self.y + 1 :]
        elif kind == "c":
            return "\x1b[?62;22c"
        elif kind == "n" and numbers[0] == 6:
            return f"\x1b[{self.y - self.top + 1};{self.x + 1}R"
        elif kind in "hl" and args == "?7":
            self._autowrap = kind == "h"
        elif kind not in "mhlqtu":
            self.unknown.append(f"CSI {args}{kind}")
        return ""

    def resize(self, columns: int, rows: int) -> None:
        """Another size; lines that are too long for it are wrapped anew."""
        lines: list[list[str]] = []
        for number, line in enumerate(self.lines):
            if number == self.y:
                y = len(lines)
            parts = [line[i : i + columns] for i in range(0, len(line), columns)]
            lines += parts or [[]]
        self.lines, self.y, self.columns, self.rows = lines, y, columns, rows
        self.x = min(self.x, columns - 1)
        self.top = max(0, self.y - rows + 1)


class Program:
    """A program on a terminal of its own, which is also where its Ctrl-C comes from."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], columns: int = 80, rows: int = 24
    ) -> None:
        self.terminal = Terminal(columns, rows)
        self.raw = ""
        self._master, slave = pty.openpty()
        self._size(columns, rows)
        self.process = subprocess.Popen(
            list(command),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=dict(env),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self._master >= 0:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the terminal, as when its window is."""
        os.close(self._master)
        self._master = -1

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        self._size(columns, rows)
        self.terminal.resize(columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, seen: str | Callable[[str], bool], seconds: float = 25.0) -> str:
        """Read until `seen` is in all that was shown (or says so of it); the text then."""
        found = (lambda text: seen in text) if isinstance(seen, str) else seen
        end = time.monotonic() + seconds
        while not found(self.terminal.text):
            if time.monotonic() > end or not self._read(end - time.monotonic()):
                raise AssertionError(f"waited for {seen!r}; there is:\n{self.terminal.text}")
        return self.terminal.text

    @property
    def as_found(self) -> bool:
        """Whether the terminal shows what is typed, and gives it to programs by the line."""
        local = termios.tcgetattr(self._master)[3]
        return bool(local & termios.ECHO and local & termios.ICANON)

    def end(self, seconds: float = 25.0) -> int:
        """Read until the program is over; its exit code."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and self._read(limit - time.monotonic()):
            pass
        return self.process.wait(seconds)  # its terminal is closed before it is gone

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, seconds))
        data = b""
        with suppress(OSError):  # Linux: EIO once the other side is closed
            data = os.read(self._master, 65536) if ready else b""
        text = data.decode(errors="replace")
        self.raw += text
        answer = self.terminal.feed(text.replace("\r\n", "\n"))
        if answer:
            self.send(answer)
        return bool(data)
