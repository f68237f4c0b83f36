"""What reaches a terminal: nothing a file, a model or a client wrote is obeyed there."""

import ast
import io
import json
import logging
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, slow
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from talker import talker
from terminal import Program

from mlx_cerebrum import cli, errors
from mlx_cerebrum.text import clean, one_line, say, tell, tell_traceback
from mlx_cerebrum.tokenizer.sentencepiece_model import write_model

ROOT = Path(__file__).parent.parent
TITLE, CLIPBOARD, CLEAR = "\x1b]0;pwned\x07", "\x1b]52;c;aGk=\x1b\\", "\x1b[2J"
C1, BACK = "\x9b31m\x90q\x9d0;x\x9c", "rm -rf /\rls -l   \b\b\b\x7f"
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
HOSTILE = f"{TITLE}{CLIPBOARD}{CLEAR}{C1}{BACK}{DIRECTIONS}\ufeff\u2028\u2029\x0b\x0c\x85[red]"
OBEYED = {*map(chr, range(32)), *map(chr, range(127, 160)), *DIRECTIONS, "\ufeff"} - {"\n"}


def obeyed(text: str) -> set[str]:
    return {char for char in text if char in OBEYED or char in "\u2028\u2029"}


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert clean(TITLE + "\u202e") == "\u241b]0;pwned\u2407\ufffd"
    assert clean("a\r\nb\tc\rd\u2028e") == "a\nb\tcd\ne"
    assert not obeyed(clean(HOSTILE))
    assert one_line("a\r\n b\tc\x0bd\u2029e\x85f") == "a b c d e f"
    # Joiners and an emoji flag's tags: languages need them.
    kept = "\u0646\u200c\u0645 \U0001f468\u200d\U0001f469 \U0001f3f4\U000e0067\U000e007f caf\u00e9"
    assert clean(kept) == kept


@given(st.text(st.sampled_from(HOSTILE + "ab \n\t\u6f22")), st.integers(0, 40))
def test_pieces_are_as_harmless_as_the_whole(text: str, cut: int) -> None:
    assert clean(text[:cut]) + clean(text[cut:]) == clean(text)
    assert not obeyed(clean(text)) - {"\t"}
    assert clean(clean(text)) == clean(text)
    assert not obeyed(one_line(text))
    assert "\n" not in one_line(text)


@given(st.text())
def test_any_text(text: str) -> None:
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in clean(text))


class _Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_a_pipe_gets_the_bytes_a_terminal_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        out, err = _Stream(terminal), _Stream(False)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        say(HOSTILE, end="")
        tell(HOSTILE)
        tell_traceback(ValueError(HOSTILE))
        assert out.getvalue() == (clean(HOSTILE) if terminal else HOSTILE)
        assert not obeyed(err.getvalue())


WRITES = {("sys", "stdout", "write"), ("sys", "stderr", "write")}


def _names(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Attribute):
        return (*_names(node.value), node.attr)
    return (node.id,) if isinstance(node, ast.Name) else ("",)


@slow
def test_nothing_prints_past_it() -> None:
    """No print, no stream written to, no traceback printed; a console of rich only where its text
    is cleaned before (and markup is off)."""
    consoles = {"progress.py", "show.py", "demo.py", "screen.py"}
    for path in (
        p for room in ("mlx_cerebrum", "convert", "bench") for p in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path.name in ("text.py", "log.py"):
                continue
            called = _names(node.func)
            assert called != ("print",), f"{path}:{node.lineno}: say or tell"
            assert called not in WRITES, f"{path}:{node.lineno}"
            assert called[-1] not in ("print_exc", "print_exception", "showwarning"), path
            if called[-1] in ("Console", "Live"):
                assert path.name in consoles, f"{path}:{node.lineno}"


@pytest.mark.parametrize("kind", [errors.CerebrumError, OSError, RuntimeError])
def test_an_error_is_clean_with_and_without_its_traceback(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise kind(HOSTILE)

    for debug in (False, True):
        if kind is RuntimeError:  # the program's own fault: the interpreter's last word
            with pytest.raises(RuntimeError) as raised:
                cli.run(fail, debug)
            sys.excepthook(RuntimeError, raised.value, raised.value.__traceback__)
        else:
            assert cli.run(fail, debug) == 2
        _, err = capsys.readouterr()
        assert "pwned" in err
        assert not obeyed(err)


def test_what_argparse_says_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_cerebrum.__main__ import main
    from mlx_cerebrum.generate import parser

    for flags in (
        ["demo", HOSTILE],
        ["--temp", HOSTILE],
        ["--draft", HOSTILE],
        ["demo", f"--{HOSTILE}"],
    ):
        with pytest.raises(SystemExit):
            parser().parse_args(flags)
    assert main([HOSTILE]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 5
    assert not obeyed(err)


def in_a_tensors_name(path: Path) -> None:
    weights = dict(load_file(path / "model.safetensors"))
    save_file(weights | {HOSTILE: np.zeros(4, np.float32)}, path / "model.safetensors")


def in_the_index(path: Path) -> None:
    index = {"weight_map": {HOSTILE: "model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def in_a_files_name(path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": HOSTILE}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def in_a_templates_message(path: Path) -> None:
    text = json.dumps(HOSTILE)
    (path / "chat_template.jinja").write_text(f"{{{{ raise_exception({text}) }}}}")


def in_a_templates_error(path: Path) -> None:
    (path / "chat_template.jinja").write_text(f"{{{{ messages | {HOSTILE} }}}}")


def in_a_piece(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(write_model([("<unk>", 0.0, 2), (HOSTILE, 0.0, 6)]))


def in_a_token(path: Path) -> None:
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][HOSTILE] = 10**9
    tokenizer["added_tokens"].append({"id": 7, "content": HOSTILE})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def in_the_config(key: str, value: Any = HOSTILE) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {key: value}))

    return write


def in_a_key_of_the_config(path: Path) -> None:
    text = (path / "config.json").read_text().rstrip().removesuffix("}")
    key = json.dumps(HOSTILE, ensure_ascii=False)
    (path / "config.json").write_text(f"{text}, {key}: 1, {key}: 2}}")


PLACES = [
    in_a_tensors_name,
    in_the_index,
    in_a_files_name,
    in_a_templates_message,
    in_a_templates_error,
    in_a_piece,
    in_a_token,
    in_a_key_of_the_config,
    *(in_the_config(key) for key in ("model_type", "hidden_size", "hidden_act", "rope_scaling")),
    in_the_config("rope_scaling", {"type": HOSTILE}),
    in_the_config("quantization", {HOSTILE: HOSTILE}),
    in_the_config("layer_map", [HOSTILE]),
]


@pytest.mark.parametrize("place", PLACES)
def test_no_file_of_a_model_reaches_the_terminal_raw(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: Callable[[Path], None],
) -> None:
    from convert.__main__ import main as convert
    from convert.verify import main as verify
    from mlx_cerebrum.chat.__main__ import main as chat
    from mlx_cerebrum.generate import main as generate
    from mlx_cerebrum.plan.show import main as plan

    path = checkpoint(num_hidden_layers=1)
    place(path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    ended = [
        generate(["--model", str(path), "--prompt", "x", "--max-tokens", "1"]),
        chat(["--model", str(path), "--max-tokens", "1", "--plain"]),
        convert(["--hf-path", str(path), "--mlx-path", str(tmp_path / "out")]),
        verify([str(path)]),
        plan([str(path)]),
        plan(["cerebrum-7b", "--config", str(path)]),
    ]
    out, err = capsys.readouterr()
    assert any(ended)
    assert not obeyed(err)
    assert not obeyed(out)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "text",
    [
        f"slices: [{{sources: [{{model: {json.dumps(HOSTILE)}, layer_range: [0, 32]}}]}}]\n"
        "merge_method: passthrough",
        f"{json.dumps(HOSTILE)}: 1",
        HOSTILE,
    ],
)
def test_no_plan_reaches_the_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    from mlx_cerebrum.plan.show import main as plan

    file = tmp_path / f"{HOSTILE.replace('/', '')}.yml"
    file.write_text(text)
    plan([str(file)])
    plan([str(tmp_path / TITLE)])
    assert not obeyed("".join(capsys.readouterr()))


def test_a_line_has_an_end(checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the length of what a file names: a tensor, or another file."""
    from convert.verify import main as verify
    from mlx_cerebrum.generate import main as generate

    source, name = checkpoint(num_hidden_layers=1), "x" * 100_000
    weights = load_file(source / "model.safetensors")
    save_file(weights | {name: np.zeros(1)}, source / "model.safetensors")
    assert verify([str(source)]) == 1
    index = {"weight_map": {"x": f"{name}.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert generate(["--prompt", "x", "--model", str(source)]) == 2
    lines = "".join(capsys.readouterr()).splitlines()
    assert max(map(len, lines)) < 1100
    assert sum(" ... " in line for line in lines) == 2


def test_a_prompt_cache_and_a_conversation(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_cerebrum.generate import main as generate

    kept = tmp_path / "kept.safetensors"
    base = ["--model", str(checkpoint(num_hidden_layers=1)), "--max-tokens", "1"]
    assert generate([*base, "--prompt", "x", "--prompt-cache", str(kept)]) == 0
    raw = kept.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for key in json.loads(raw[8 : 8 + size])["__metadata__"]:
        header = json.loads(raw[8 : 8 + size])
        header["__metadata__"][key] = HOSTILE
        text = json.dumps(header).encode()
        kept.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
        assert generate([*base, "--prompt", "x", "--prompt-cache", str(kept)]) == 2
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps([{"role": HOSTILE, "content": "x"}]))
    assert generate([*base, "--messages", str(talk)]) == 2
    talk.write_text(f'[{{"{HOSTILE}": 1}}]')
    assert generate([*base, "--messages", str(talk)]) == 2
    assert generate(["--prompt", "x", "--model", f"{tmp_path}/{TITLE}"]) == 2
    assert not obeyed(capsys.readouterr().err)


@slow
def test_generate_on_a_terminal_and_on_a_pipe(tmp_path: Path) -> None:
    """What the model says is shown on a terminal, and comes as it is through a pipe."""
    path = talker(tmp_path, "\x1b[2J\x07\x08\x7fa")
    command = [sys.executable, "-m", "mlx_cerebrum.generate", "--model", str(path)]
    command += ["--prompt", "hi", "--max-tokens", "80", "--quiet"]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert obeyed(piped) >= {"\x1b", "\x07"}
    for flags in ([], ["--json"]):
        with Program([*command, *flags], dict(os.environ) | {"PYTHONPATH": str(ROOT)}) as program:
            assert program.end() == 0
            assert not obeyed(program.raw.replace("\r\n", "\n"))
            if not flags:
                shown = program.terminal.text.replace("\n", "")
                assert shown == clean(piped).replace("\n", "")


def test_what_the_servers_engine_logs_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_cerebrum.server import log

    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        found = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "x", 1, HOSTILE, (), found)
    for write in (lambda: log.write(HOSTILE), lambda: log.Handler().handle(record)):
        write()
        log.flush(10)
        _, err = capsys.readouterr()
        assert "pwned" in err
        assert not obeyed(err)
