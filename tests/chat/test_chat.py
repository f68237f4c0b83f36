"""The commands of the chat, without a terminal; and the chat on a pipe."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from command import run
from conftest import slow
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from talker import LETTERS, talker, talkers

from mlx_cerebrum.chat import kept
from mlx_cerebrum.chat.__main__ import main, parser
from mlx_cerebrum.chat.about import bits
from mlx_cerebrum.chat.chat import SYNONYMS, Chat
from mlx_cerebrum.chat.commands import COMMANDS
from mlx_cerebrum.chat.keeper import Keeper
from mlx_cerebrum.chat.kept import Turn
from mlx_cerebrum.chat.prompt import CommandCompleter, history_path, open_history
from mlx_cerebrum.chat.quotes import is_open
from mlx_cerebrum.chat.screen import PlainScreen
from mlx_cerebrum.chat.session import AnswerStream, DecodingOptions, Session
from mlx_cerebrum.chat.settings import Settings, options_of
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import Storage

Views = tuple[Mapping[str, Model], Tokenizer]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Views:
    return talkers(tmp_path_factory.mktemp("talker"))


ABOUT = (("model", "talker"), ("weights", "4 bits"))


class Script:
    """A person who types these lines, and gives these answers when asked."""

    def __init__(self, lines: Sequence[str], answers: Sequence[str] = ()) -> None:
        self.lines, self.answers = list(lines), list(answers)
        self.offered: list[str] = []

    def read(self, prompt: str, default: str | None = None) -> str:
        if default is not None:
            self.offered.append(default)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def ask(self, question: str) -> str:
        if not self.answers:
            raise EOFError  # Ctrl-D is no answer
        return self.answers.pop(0)


def talk(
    views: Views,
    lines: Sequence[str],
    answers: Sequence[str] = (),
    asks: bool = True,
    keeps: bool = False,
    offers: bool = True,
) -> tuple[Chat, int]:
    args = parser().parse_args(["--max-tokens", "12"])
    session = Session(*views, options_of(args))
    screen = PlainScreen()
    keeper = Keeper(session, screen.notice) if keeps else None
    more = (COMMANDS, Settings(args), asks, ABOUT, keeper, offers)
    chat = Chat(session, screen, Script(lines, answers), *more)
    return chat, chat.run()


def test_a_conversation(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    chat, code = talk(views, ["How are you?", "", "  ", "//help is a command?"])
    assert code == 0
    assert [e.question for e in chat.session.exchanges] == ["How are you?", "/help is a command?"]
    out, _ = capsys.readouterr()
    assert out == "\n\n".join(e.answer.text for e in chat.session.exchanges) + "\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/hlep", "/hlep is not a command; did you mean /help?"),
        ("/exti", "did you mean /exit?"),
        ("/set temp 5", "temp must be from 0 to 2, not 5"),
        ("/set temp hot", "temp: 'hot' is not a number"),
        ("/set temprature 1", "'temprature' is no setting; did you mean temp?"),
        ("/set parameter top_k 1.5", "top-k: '1.5' is not a whole number"),
        ("/set parameter num_ctx 4096", "'num_ctx' is chosen at the start: --window TOKENS"),
        ("/set ignore-eos 7", "ignore-eos: '7' is neither on nor off"),
        ("/set logit-bias 999999=1", "logit-bias: token id 999999 is not below"),
        ("/set min-tokens 99", "min-tokens is 99, and max-tokens 12"),
        ("/set verbose", "'verbose' is no setting"),
        ("/show license", "/show info, parameters or system, not 'license'"),
        ("/help me", "there is no /me"),
        ("exit", '/quit leaves; """exit""" says that to the model'),
        (":wq", "/quit leaves"),
        ("/sta", "did you mean /stats?"),
        ("/usr/bin is what?", "// begins a message with a slash"),
        ("/", "/help lists them"),
        ("/save", "/save needs FILE"),
        ("/undo 2", "/undo takes nothing after it"),
        ("/plan 13b", "'13b' is none of the models here: talker, talker@twice"),
        ("/retry hot", "/retry takes a temperature like 0.7, not 'hot'"),
        ("/retry -1", "temp must be 0 (greedy) or above, not -1.0"),
        ("/retry nan", "temp must be 0 (greedy) or above, not nan"),
        ("/retry", "the answer would be the same; try /retry 0.7, /edit, or /plan"),
        ("/load nowhere.json", "nowhere.json does not exist"),
        ("/save nowhere/talk.json", "nowhere is not a directory"),
        ("/load .", "Is a directory"),
        ("\udcff", "not valid UTF-8"),
        ("/save ''", "'' can't be a file's name"),
        ("/save a\0b", "can't be a file's name"),
        ("/save /dev/null", "/dev/null is no file; give another name"),
        ("/" + "x" * 5000, "x... is not a command"),
    ],
)
@slow
def test_what_is_wrong_costs_a_line_and_nothing_else(
    views: Views, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    chat, code = talk(views, ["Q?"])
    before = chat.session.messages()
    capsys.readouterr()
    chat.handle(line)
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1
    assert chat.session.messages() == before
    assert code == 0
    chat.handle("And now?")
    assert len(chat.session.exchanges) == 2


@pytest.mark.parametrize("line", ["/retry", "/edit", "/undo", "/compare", "/save x.json"])
def test_commands_before_any_question(
    views: Views, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    chat, _ = talk(views, [line])
    assert "nothing" in (err := capsys.readouterr().err) or "no question" in err
    assert chat.session.messages() == []


def test_help_names_every_command(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    talk(views, ["/help"])
    err = capsys.readouterr().err
    wanted = "help set show system plan compare continue retry edit undo save load export resume"
    assert list(COMMANDS) == [*wanted.split(), "delete", "stats", "clear", "quit"]
    assert all(f"/{name}" in err for name in COMMANDS)
    assert "Alt+Enter" in err


def test_plan_system_stats_and_quit(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["Q?", "/plan twice", "/plan", "/system Be brief.", "/system", "/stats", "/quit", "no"]
    chat, _ = talk(views, lines)
    err = capsys.readouterr().err
    assert chat.session.current == "talker@twice"
    assert "* talker@twice  12 positions over 8 blocks, 0 tokens cached" in err
    assert "\nBe brief.\n" in err
    assert chat.session.system == "Be brief."
    assert "12 generated at" in err
    assert f"1 exchange, {chat.session.tokens} of 4096 positions" in err
    assert chat.session.tokens == len("<[system]Be brief.\n[user]Q?\n[assistant]\n") + 12
    assert len(chat.session.exchanges) == 1  # /quit came first
    chat.handle("/system -")
    assert chat.session.system is None


def test_retry_edit_and_undo(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = talk(views, ["One?", "Two?", "/retry 0.9", "/edit", "Three?", "/edit Four?", "/undo"])
    assert isinstance(chat.reader, Script)
    assert chat.reader.offered == ["Two?"]
    assert [e.question for e in chat.session.exchanges] == ["One?", "Three?"]
    assert "the answer before is back, to: Three?" in capsys.readouterr().err
    chat.handle("/undo")
    chat.handle("/undo")
    assert [e.question for e in chat.session.exchanges] == ["One?", "Two?"]
    chat.handle("/undo")
    assert "dropped: Two? (1 exchange left)" in capsys.readouterr().err
    chat.handle("/clear")
    chat.handle("/undo")
    assert [e.question for e in chat.session.exchanges] == ["One?"]


def test_an_edit_given_up_changes_nothing(views: Views) -> None:
    chat, _ = talk(views, ["One?", "/edit", ""])
    assert [e.question for e in chat.session.exchanges] == ["One?"]


@pytest.mark.parametrize(
    ("answer", "kept"), [("", "talker"), ("1", "talker"), ("2", "talker@twice"), ("x", "talker")]
)
def test_compare_keeps_one(
    views: Views, capsys: pytest.CaptureFixture[str], answer: str, kept: str
) -> None:
    chat, _ = talk(views, ["One?", "/compare Two?"], [answer])
    out, err = capsys.readouterr()
    assert [e.question for e in chat.session.exchanges] == ["One?", "Two?"]
    assert chat.session.exchanges[-1].answer.model == kept
    assert chat.session.current == "talker"
    assert "1 talker:" in err
    assert "2 talker@twice:" in err
    assert "they " in err
    assert len(out.split("\n\n")) == 3


def test_a_question_typed_ahead_is_no_choice(views: Views) -> None:
    chat, _ = talk(views, ["/compare Two?"], ["And the next question", "2"])
    assert chat.session.exchanges[-1].answer.model == "talker@twice"


class Impatient(PlainScreen):
    """Somebody presses Ctrl-C when the answers are there."""

    def notice(self, text: str) -> None:
        super().notice(text)
        if "first after" in text or "differ" in text:
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_loses_no_answer(views: Views) -> None:
    for line in ("One?", "/compare One?"):
        session = Session(*views, DecodingOptions(max_tokens=12))
        settings = Settings(parser().parse_args([]))
        Chat(session, Impatient(), Script([line]), COMMANDS, settings, asks=True).run()
        assert session.question == "One?"
        assert session.unanswered is None


def test_a_fault_costs_an_answer_and_not_the_conversation(
    views: Views, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, _ = talk(views, ["One?"])

    def fails(stream: AnswerStream, before: str | None) -> None:
        next(stream)
        raise RuntimeError("no more memory, says the driver")

    monkeypatch.setattr(chat.screen, "show", fails)
    chat.handle("Two?")
    monkeypatch.undo()
    err = capsys.readouterr().err
    assert "no more memory, says the driver" in err
    assert "the conversation is still here, /save FILE keeps it" in err
    assert chat.session.cached("talker") == (0, 0)
    assert [m["content"] for m in chat.session.messages()][::2] == ["One?", "Two?"]
    chat.handle("/retry")
    assert len(chat.session.exchanges) == 2
    chat.asks = False
    monkeypatch.setattr(chat.screen, "show", fails)
    with pytest.raises(RuntimeError):  # a script must see it
        chat.handle("Three?")


def test_an_edit_stopped_at_once_leaves_the_question(
    views: Views, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, _ = talk(views, ["One?"])
    before = chat.session.messages()
    monkeypatch.setattr(chat.screen, "show", lambda stream, before: stream.close())
    chat.handle("/edit Two?")
    assert "stopped before the answer began; the question is as it was" in capsys.readouterr().err
    assert chat.session.messages() == before
    chat.handle("Two?")
    assert "stopped before the answer began; /retry asks again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("//usr/bin is what?", "/usr/bin is what?"),
        ("// a comment\nint main();", "// a comment\nint main();"),
        ("/// Documents it.", "/// Documents it."),
        ("a // b", "a // b"),
    ],
)
def test_two_slashes(views: Views, line: str, asked: str) -> None:
    assert talk(views, [line])[0].session.question == asked


def test_an_argument_may_begin_on_the_next_line(views: Views) -> None:
    chat, _ = talk(views, ["/system\nBe brief.\nBe kind.", "/PLAN\ttwice"])
    assert chat.session.system == "Be brief.\nBe kind."
    assert chat.session.current == "talker@twice"


def test_compare_of_the_last_question_replaces_its_answer(views: Views) -> None:
    chat, _ = talk(views, ["One?", "/compare"], ["2"])
    assert [(e.question, e.answer.model) for e in chat.session.exchanges] == [
        ("One?", "talker@twice")
    ]
    alone, _ = talk(({"talker": views[0]["talker"]}, views[1]), [])
    alone.handle("/compare Q?")
    assert alone.session.messages() == []


@pytest.mark.parametrize(
    ("packed", "dequantized", "says"),
    [
        ([4, None], False, "4 bits in bfloat16"),
        ([8, 4, 4], False, "4 and 8 bits in bfloat16"),
        ([None], False, "bfloat16"),
        ([4], True, "bfloat16"),
    ],
)
def test_the_bits_of_the_header(packed: list[int | None], dequantized: bool, says: str) -> None:
    held = {str(n): None if b is None else Packing(b, 64) for n, b in enumerate(packed)}
    assert bits(Storage(mx.float16, held, dequantized, 0, 0), mx.bfloat16) == says


# Settings.


def test_set_changes_what_the_flags_do(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/set temperature 0.7", "/set parameter top_k 20", "/set seed=3", "/set stop 'a b'"]
    lines += ["/set num_predict 5", "/set repeat_penalty 1.5", "/set logit-bias 5=-2.5", "Q?"]
    chat, _ = talk(views, [*lines, "/set ignore_eos on", "/set draft ngram"])
    options, sampling = chat.session.options, chat.session.options.sampling
    assert (sampling.temp, sampling.top_k, sampling.seed) == (0.7, 20, 3)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, ((5, -2.5),))
    assert (options.max_tokens, options.stop, options.draft) == (5, ("a b",), "ngram")
    assert sampling.ignore_eos
    assert len(chat.session.exchanges[0].answer.said) == 5
    err = capsys.readouterr().err
    assert "temp 0.7, from the next answer on" in err
    assert not chat.failed
    for name in chat.settings:
        chat.handle(f"/set {name} default")
    assert chat.session.options == options_of(parser().parse_args([]))


def test_every_flag_of_an_answer_can_be_set(
    views: Views, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, _ = talk(views, ["/set top-p 0.9", "/set"])
    err = capsys.readouterr().err
    assert "top-p 0.9, from the next answer on; as it is now, top-p, min-p" in err
    flags = set(chat.settings)
    known = {action.dest.replace("_", "-") for action in parser()._actions}
    assert flags <= known
    assert flags >= {"temp", "top-p", "min-p", "top-k", "seed", "max-tokens", "stop", "draft"}
    rows = err.split("\n")
    assert all(any(row.startswith(f"{name} ") for row in rows) for name in flags)
    assert any(row.startswith("system ") and "template's own" in row for row in rows)
    chat.handle("/show parameters")
    assert "\ntop-p 0.9 " in capsys.readouterr().err
    chat.handle("/set min-p")
    assert "min-p 0  least probability" in capsys.readouterr().err


def test_ollamas_names(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['/set system "Be brief."', "/show system", "/show", "/?", "/? set", "/? shortcuts"]
    chat, code = talk(views, [*lines, "/bye", "no"])
    err = capsys.readouterr().err
    assert chat.session.system == "Be brief."
    assert "\nBe brief.\n" in err
    assert "4 bits" in err
    assert "Alt+Enter" in err.rpartition("/set [NAME VALUE]")[2]
    assert chat.session.question is None
    assert (code, chat.failed) == (0, False)
    chat.handle('/set system ""')
    assert chat.session.system == ""
    chat.handle("/set system -")
    assert chat.session.system is None


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ('"""one\ntwo"""', "one\ntwo"),
        ('"""\none\n\ntwo\n"""', "one\n\ntwo"),
        ('"""one"""', "one"),
        ('"""\n/help\n"""', "/help"),
        ('"""Doc."""\nimport x', '"""Doc."""\nimport x'),
        ('"""Doc."""\nx = """y"""', '"""Doc."""\nx = """y"""'),
        ('"""', '"""'),
        ('say """x"""', 'say """x"""'),
    ],
)
def test_triple_quotes(views: Views, typed: str, asked: str) -> None:
    assert talk(views, [typed])[0].session.question == asked


def test_triple_quotes_after_a_command(views: Views) -> None:
    assert is_open('/set system """')
    assert is_open('"""one\ntwo')
    assert not is_open('"""one\ntwo"""\nthree')
    assert not is_open('what is """')
    chat, _ = talk(views, ['/set system """Be brief.\nBe kind.\n"""', '""""""', '"""\n"""'])
    assert chat.session.system == "Be brief.\nBe kind."
    assert chat.session.question is None


# An answer that was cut.


def test_continue_is_as_if_it_had_not_been_cut(
    views: Views, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = talk(views, ["/set max-tokens 30", "One?"])
    capsys.readouterr()
    chat, _ = talk(views, ["One?", "/continue", "/set max-tokens 6", "/continue", "/undo"])
    out, err = capsys.readouterr()
    shown = whole.session.exchanges[0].answer.text
    assert chat.session.exchanges[0].answer.text == shown[:24]
    assert out == f"{shown[:12]}\n{shown[12:24]}\n{shown[24:]}\n"
    assert err.count("stopped at 12 tokens; /continue goes on") == 2
    assert chat.session.exchanges[0].question == "One?"


@pytest.mark.parametrize("lines", [["/continue"], ["One?", "/undo", "/continue"]])
def test_nothing_to_continue(
    views: Views, capsys: pytest.CaptureFixture[str], lines: list[str]
) -> None:
    chat, _ = talk(views, lines)
    assert chat.failed
    assert "there is no answer to go on with" in capsys.readouterr().err


# Files.


def test_saved_conversations_are_read_by_generate_and_load(
    views: Views, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a talk.json"
    chat, _ = talk(views, ["/system Be brief.", "One?", f"/save '{file}'"])
    messages = json.loads(file.read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    messages.append({"role": "user", "content": "Two?"})
    file.write_text(json.dumps(messages))
    capsys.readouterr()
    checkpoint = talker(tmp_path / "model")
    code, out, _ = run(
        capsys, "--model", checkpoint, "--messages", file, "--max-tokens", 12, "--quiet"
    )
    generated = out.rstrip("\n")
    loaded, _ = talk(views, [f"/load {file}", "/retry"])
    assert code == 0
    assert "Two? is not answered yet, /retry asks it" in capsys.readouterr().err
    assert loaded.session.exchanges[-1].answer.text == generated
    assert chat.session.messages() == messages[:3]


@pytest.mark.parametrize(("answer", "written"), [("y", True), ("n", False), ("", False)])
def test_save_never_overwrites_unasked(
    views: Views, tmp_path: Path, answer: str, written: bool
) -> None:
    file = tmp_path / "talk.json"
    file.write_text("precious")
    talk(views, ["One?", f"/save {file}"], [answer])
    assert (file.read_text() != "precious") == written


@pytest.mark.parametrize("asks", [True, False])
def test_what_this_chat_wrote_it_writes_again_unasked(
    views: Views, tmp_path: Path, asks: bool
) -> None:
    file = tmp_path / "talk.json"
    _, code = talk(views, ["One?", f"/save {file}", "Two?", f"/save {file}"], asks=asks)
    assert (code, len(json.loads(file.read_text()))) == (0, 4)


@pytest.mark.parametrize("typed", ["{}/a talk.json", "'{}/a talk.json'", "{}/a\\ talk.json"])
def test_a_files_name_as_it_is_or_as_a_shell_quotes_it(
    views: Views, tmp_path: Path, typed: str
) -> None:
    talk(views, ["One?", f"/save {typed.format(tmp_path)}"])
    assert [p.name for p in tmp_path.iterdir()] == ["a talk.json"]


def test_a_file_at_home(views: Views, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    talk(views, ["One?", "/save ~/it's.json"])
    assert [p.name for p in tmp_path.iterdir()] == ["it's.json"]


@pytest.mark.parametrize(("answer", "left"), [("y", True), ("", False)])
def test_load_asks_before_it_leaves_what_is_not_saved(
    views: Views, tmp_path: Path, answer: str, left: bool
) -> None:
    file = tmp_path / "talk.json"
    file.write_text('[{"role": "user", "content": "Other?"}]')
    chat, _ = talk(views, ["One?", f"/load {file}"], [answer])
    assert chat.session.question == ("Other?" if left else "One?")
    saved, _ = talk(views, ["One?", f"/save {tmp_path}/one.json", f"/load {file}"])
    assert saved.session.question == "Other?"


@pytest.mark.parametrize("text", ["{", "{}", "[]", '[{"role": "robot", "content": "A"}]'])
def test_files_that_hold_no_conversation(
    views: Views, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    file.write_text(text)
    chat, _ = talk(views, ["One?", f"/load {file}"], ["y"], offers=False)
    assert chat.session.question == "One?"
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_history_is_for_its_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_path()
    history = open_history(path)
    history.store_string("one\ntwo")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert list(open_history(path).load_history_strings()) == ["one\ntwo"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for i in range(300):
        history.store_string(f"{i} " + "x" * 5000)
    kept = list(open_history(path).load_history_strings())
    assert path.stat().st_size < 1_000_000
    assert kept[0].startswith("299 ")
    assert all(text.split()[0].isdigit() and text.endswith("x" * 5000) for text in kept)
    assert open_history(None) is not None


def test_history_that_cannot_be_written_stops_no_question(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history = open_history(path)
    path.unlink()
    path.mkdir()
    history.append_string("one")
    assert history.get_strings() == ["one"]


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(OSError, match="home directory"):
        history_path()


def test_a_history_linked_to_nowhere_leaves_the_device_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fchmod", lambda *_: pytest.fail("a device's rights"))
    path = tmp_path / "history"
    path.symlink_to("/dev/null")
    open_history(path).store_string("one")


def completions(text: str) -> list[str]:
    names = {"cerebrum-7b": "", "other": ""}
    completer = CommandCompleter(
        dict.fromkeys(COMMANDS, ""), SYNONYMS, {"plan": lambda: names, "set": lambda: {"temp": "x"}}
    )
    return [c.text for c in completer.get_completions(Document(text), CompleteEvent())]


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("[]")
    assert completions("/") == list(COMMANDS)
    assert completions("/s") == ["set", "show", "system", "save", "stats"]
    assert completions("/by") == ["bye"]
    assert completions("/set ") == ["temp"]
    assert completions("/set temp ") == []
    assert completions("/plan ") == ["cerebrum-7b", "other"]
    assert completions("/plan c") == ["cerebrum-7b"]
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]
    assert completions("//s") == completions("hello /s") == completions("/help ") == []


# The command line.


def chat_on_a_pipe(folder: Path, text: bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
    checkpoint = talker(folder)
    command = [sys.executable, "-m", "mlx_cerebrum.chat", "--model", str(checkpoint)]
    return subprocess.run(
        [*command, "--max-tokens", "8", *flags],
        input=text,
        capture_output=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state")},
    )


@slow
def test_on_a_pipe_each_line_is_a_question(tmp_path: Path) -> None:
    """Answers only to standard output; nothing asked, nothing overwritten, nothing remembered."""
    precious = tmp_path / "precious.json"
    precious.write_text("precious")
    script = (
        f"Hi\nTwo \\\nlines?\n/compare Q?\n/save {tmp_path}/talk.json\n/save {precious}\n\xff\n"
    )
    flags = ("--plan", str(tmp_path / "twice.yml"))
    done = chat_on_a_pipe(tmp_path, script.encode("latin-1"), *flags)
    answers = done.stdout.decode().rstrip("\n").split("\n\n")
    assert len(answers) == 4
    assert all(len(answer) == 8 and set(answer) <= set(LETTERS) for answer in answers)
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in saved[::2]] == ["Hi", "Two \nlines?", "Q?"]
    assert [m["content"] for m in saved[1::2]] == answers[:3]  # the current model's is kept
    assert precious.read_text() == "precious"
    notices = done.stderr.decode()
    assert "8 blocks" in notices
    assert "precious.json exists and stays as it is" in notices
    assert "not valid UTF-8" in notices
    assert b"\x1b" not in done.stdout + done.stderr
    assert done.returncode == 2  # a line could not be honoured
    assert not (tmp_path / "state").exists()


@slow
def test_triple_quotes_on_a_pipe(tmp_path: Path) -> None:
    done = chat_on_a_pipe(
        tmp_path,
        b'"""one\n/two"""\n/set system """\nBe brief.\n"""\nexit\n'
        b"/save " + os.fsencode(tmp_path) + b'/talk.json\n"""\nopen\nto the end',
    )
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved[0] == {"role": "system", "content": "Be brief."}
    assert [m["content"] for m in saved if m["role"] == "user"] == ["one\n/two", "exit"]
    assert done.stdout.count(b"\n\n") == 2  # the third is asked, though nothing closed it
    assert done.returncode == 0
    assert not (tmp_path / ".local").exists()


@slow
def test_resume_on_a_pipe_takes_the_newest_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("a", "b"):
        kept.keep(name, "", [Turn("user", f"{name}?"), Turn("assistant", f"{name}.")])
    before = kept.path_of("b").read_bytes()
    done = chat_on_a_pipe(tmp_path, b"Then?\n/save %s/t.json\n" % os.fsencode(tmp_path), "--resume")
    assert done.returncode == 0
    saved = json.loads((tmp_path / "t.json").read_text())
    assert [m["content"] for m in saved[:3]] == ["b?", "b.", "Then?"]
    assert kept.path_of("b").read_bytes() == before
    assert len(list(kept.folder().iterdir())) == 2


@slow
def test_odd_lines_on_a_pipe(tmp_path: Path) -> None:
    """CRLF, NUL, a line longer than the model's positions, and no end of the last line."""
    done = chat_on_a_pipe(
        tmp_path,
        b"Hi\r\n \t\r\na\0b\n" + b"x" * 100_000 + b"\n/undo\n"
        b"/save " + os.fsencode(tmp_path) + b"/talk.json\r\nend \\",
    )
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in saved[::2]] == ["Hi", "a\0b"]
    assert done.stdout.count(b"\n\n") == 2
    assert b"no longer fits the model's 4096 positions" in done.stderr
    assert done.returncode == 2


@slow
def test_on_a_pipe_that_ends_well(tmp_path: Path) -> None:
    done = chat_on_a_pipe(tmp_path, b"Hi\nAnd?")
    assert (done.returncode, done.stdout.count(b"\n\n")) == (0, 1)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", "3"], "change nothing at temp 0"),
        (["--logit-bias", "999999=1"], "logit-bias: token id 999999 is not below"),
        (["--max-tokens", "0"], "max-tokens must be at least 1"),
        (["--prefill-step-size", "0"], "prefill-step-size must be at least 1"),
        (["--plan", "nowhere.yml"], "neither a file nor a named plan"),
        (["--plan", "cerebrum-12.25b"], "blocks"),
        (["--load", "nowhere.json"], "does not exist"),
        (["--resume", "--load", "x.json"], "no --load or --system too"),
        (["--kv-bits", "8"], "16"),
        (["--loud"], "unrecognized arguments: --loud"),
        (["--q-group-size", "32"], "only means something with --q-bits"),
    ],
)
def test_flags_that_cannot_be_honoured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    checkpoint = talker(tmp_path)
    try:
        code = main(["--model", str(checkpoint), *flags])
    except SystemExit as exit_:
        code = int(str(exit_.code))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_every_flag_has_its_default_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    flags = [part for part in text.split(" --")[1:] if "default" in part]
    assert len(flags) >= 17


def test_plain_reader_edits_nothing() -> None:
    from mlx_cerebrum.chat.prompt import PlainReader

    with pytest.raises(RequestError, match="/edit followed by the new text"):
        PlainReader().read("edit> ", "text")
