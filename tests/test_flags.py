"""Numbers on the command line: whatever they are, one line says so, or they work."""

import argparse
import importlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, slow

from mlx_cerebrum import cli
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.flags import (
    add_machines_flags,
    add_max_tokens_flag,
    add_sampling_flags,
    add_seed_flag,
    asked_sampling,
    machines,
)

ROOT = Path(__file__).parent.parent
# Every command line of the package, of convert and of bench; one only picks another, and one is
# only for a process of doctor's own.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ("mlx_cerebrum", "convert", "bench")
    for path in (ROOT / room).rglob("*.py")
    if "def main(" in path.read_text(encoding="utf-8")
} - {"mlx_cerebrum.__main__", "mlx_cerebrum.doctor.alone"}
HOSTILE = ["1e300", "1e400", "inf", "-inf", "nan", "10" * 20, "-" + "1" * 40, "1" * 5000, "", "x"]


class _ParserError(Exception):
    pass


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch) -> cli.ArgumentParser:
    """The parser that a module's `main` parses its flags with."""
    found: list[cli.ArgumentParser] = []

    def note(parser: cli.ArgumentParser, *_: Any) -> None:
        found.append(parser)
        raise _ParserError

    main = importlib.import_module(module).main
    with monkeypatch.context() as patched:
        patched.setattr(cli.ArgumentParser, "parse_args", note)
        with pytest.raises(_ParserError):
            main([])
    return found[0]


def numbers(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (a for a in parser._actions if a.type in (int, float, cli.seed) and a.option_strings)


def given(action: argparse.Action, value: str) -> list[str]:
    return [f"{action.option_strings[-1]}={value}"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_number_that_overflows_is_refused_in_one_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of(module, monkeypatch)
    for action in numbers(parser):
        for value in HOSTILE:
            if action.type is cli.seed and value.strip("-").isdecimal() and len(value) < 100:
                continue  # checked where it is used: it may have 64 bits
            with pytest.raises(SystemExit) as ended:
                parser.parse_args(given(action, value))
            _, err = capsys.readouterr()
            assert ended.value.code == 2
            assert err.startswith(f"error: argument {'/'.join(action.option_strings)}: ")
            assert err.count("\n") == 1
            assert len(err) < 300


SOME = ["0", "-1", str(2**31 - 1), "1e17"]
MORE = ["1", "-1e17", "99999999", str(2**64), str(10**18)]


@pytest.mark.parametrize("values", [SOME, pytest.param(MORE, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("mlx_cerebrum.generate", ["--prompt", "x", "--quiet"]),
        ("mlx_cerebrum.chat.__main__", []),
        ("mlx_cerebrum.server.__main__", ["--quiet", "--port=0"]),
    ],
)
@slow
def test_a_number_that_is_taken_works(
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    flags: list[str],
    values: list[str],
) -> None:
    """The answer comes, or one line that says why not: nothing overflows on the way."""
    from mlx_cerebrum.server import listening

    def serve(server: Any, sockets: Any) -> None:
        server.config.timeout_graceful_shutdown.__index__()

    monkeypatch.setattr(listening.Server, "run", serve)
    main: Callable[[list[str]], int] = importlib.import_module(module).main
    base = ["--model", str(checkpoint(num_hidden_layers=1)), "--dtype", "float32", *flags]
    needs = {
        "seed": ["--temp=1"],
        "top_k": ["--temp=1"],
        "repetition_context": ["--repetition-penalty=2"],
        "draft_tokens": ["--draft=ngram"],
        "q_group_size": [],
    }
    for action in numbers(parser_of(module, monkeypatch)):
        if action.choices is not None:
            continue
        for value in values:
            monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n" * (value != "1")))
            more = [] if action.dest == "max_tokens" else ["--max-tokens=2"]
            argv = [*base, *more, *needs.get(action.dest, []), *given(action, value)]
            try:
                code = main(argv)
            except SystemExit as ended:
                code = int(ended.code or 0)
            _, err = capsys.readouterr()
            assert "Traceback" not in err
            said = [line for line in err.splitlines() if line.startswith("error: ")]
            chat_goes_on = "chat" in module and code == 2  # a question was refused
            assert code == 0 or len(said) == 1 or chat_goes_on, (argv[-1], err)


def sampling_asked(*argv: str) -> Sampling:
    parser = cli.ArgumentParser()
    add_sampling_flags(parser)
    add_seed_flag(parser)
    add_max_tokens_flag(parser, 100)
    return asked_sampling(parser.parse_args(argv))


def test_the_flags_of_sampling() -> None:
    assert sampling_asked() == Sampling(top_k=0)
    drawn = ["--temp=0.0001", "--top-p=0.9", "--min-p=0.1", "--top-k=40", "--seed=3"]
    assert sampling_asked(*drawn) == Sampling(0.0001, 0.9, 0.1, 3, 40)
    changed = ["--repetition-penalty=1.1", "--repetition-context=64", "--frequency-penalty=-0.5"]
    changed += ["--presence-penalty=0.5", "--logit-bias=7=-100", "--logit-bias", "9=1.5"]
    assert sampling_asked(*changed, "--min-tokens=8") == Sampling(
        top_k=0,
        repetition_penalty=1.1,
        repetition_context=64,
        frequency_penalty=-0.5,
        presence_penalty=0.5,
        logit_bias=((7, -100.0), (9, 1.5)),
        min_tokens=8,
    )
    assert sampling_asked("--ignore-eos") == Sampling(top_k=0, ignore_eos=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-k=40"], "change nothing at temp 0"),
        (["--repetition-context=40"], "changes nothing without --repetition-penalty"),
        (["--repetition-penalty=0"], "repetition-penalty must be above 0"),
        (["--frequency-penalty=3"], "frequency-penalty must be from -2 to 2"),
        (["--logit-bias=7=101"], "logit-bias must be from -100 to 100"),
        (["--logit-bias=7=nan"], "logit-bias must be from -100 to 100"),
        (["--logit-bias=-7=1"], "logit-bias must name a token id, not -7"),
        (["--logit-bias=7=1", "--logit-bias=7=2"], "logit-bias names a token twice"),
        (["--min-tokens=101"], "min-tokens is 101, and max-tokens 100; raise max-tokens"),
    ],
)
def test_sampling_that_cannot_be(argv: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        sampling_asked(*argv)


@pytest.mark.parametrize("flag", ["--split=3", "--tensor-parallel", "--patience=60", "--follow"])
def test_what_is_for_several_machines(flag: str) -> None:
    p = cli.ArgumentParser()
    add_machines_flags(p)
    assert machines(p.parse_args([])) is None
    with pytest.raises(RequestError, match=f"^{flag.partition('=')[0]} is for several machines"):
        machines(p.parse_args([flag]))


def test_a_launcher_may_start_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks of several holds for it alone too; a part of the positions does not."""
    (tmp_path / "hosts.json").touch()  # as `mlx.launch -n 1` leaves it
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    p = cli.ArgumentParser()
    add_machines_flags(p)
    assert machines(p.parse_args(["--tensor-parallel", "--patience=60"])) is None
    for flag in ("--split=3", "--follow"):
        with pytest.raises(RequestError, match="is for several machines"):
            machines(p.parse_args([flag]))


@pytest.mark.parametrize("bias", ["", "7", "7=", "=1", "x=1", "7=x", "7:1", "1" * 5000 + "=1"])
def test_what_is_no_bias(bias: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sampling_asked(f"--logit-bias={bias}")
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: argument --logit-bias: .{2,100} such as 42=-5 .*\n", err)


def test_a_flag_of_several_commands_is_one_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same type, choices and words; a default and what it does there besides may differ."""
    different = {"--plan", "--quiet"}  # one order or several; the answer alone, or no log
    seen: dict[str, tuple[object, ...]] = {}
    shared = set()
    for command in ("generate", "chat.__main__", "server.__main__"):
        for action in parser_of(f"mlx_cerebrum.{command}", monkeypatch)._actions:
            for flag in set(action.option_strings) - different:
                words = re.split(r";| \(default", action.help or "")[0]
                told = (action.type, action.choices, action.metavar, words)
                shared |= {flag} & seen.keys()
                assert seen.setdefault(flag, told) == told, f"{command} {flag}"
    assert {"--model", "--seed", "--draft", "--kv-bits", "--prefill-step-size"} <= shared
