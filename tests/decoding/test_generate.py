"""The command line and the text stream: what is printed, what is refused, when it stops."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from command import run
from conftest import MakeCheckpoint, mistral_model, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from talker import talker
from terminal import Program
from tiny import tiny_config

from mlx_cerebrum import load
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.stream import generate, stream_generate
from mlx_cerebrum.decoding.text import StopText
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.generate import main
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.storage import choose_storage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(demo: Path) -> tuple[Model, Tokenizer]:
    return load(demo)


# Stop strings.


@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.data(),
)
@settings(deadline=None, max_examples=300)
def test_stop_text_is_cut_at_the_first_match(text: str, stop: list[str], data: Any) -> None:
    """Whatever the chunking, what comes out is the text up to the first stop completed."""
    scanner, out, at, stopped = StopText(stop), "", 0, False
    while at < len(text) and not stopped:
        size = data.draw(st.integers(1, 3))
        final, stopped = scanner.feed(text[at : at + size])
        out, at = out + final, at + size
    if not stopped:
        assert not any(s in text for s in stop)
        assert out + scanner.held == text
    else:
        assert text.startswith(out)
        assert any(text.startswith(s, len(out)) for s in stop)
        assert not any(s in text[: len(out)] for s in stop)


def test_stop_text_lets_go_as_soon_as_it_can() -> None:
    scanner = StopText(["\nUser:"])
    assert scanner.feed("Hello\nU") == ("Hello", False)
    assert scanner.feed("niverse") == ("\nUniverse", False)
    assert scanner.feed("\nUser") == ("", False)
    assert scanner.feed(": hi") == ("", True)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        StopText(["a", ""])


# The stream.


@slow
def test_paris(trained: tuple[Model, Tokenizer]) -> None:
    text = generate(*trained, "The capital of France is", max_tokens=8)
    assert text.startswith(" Paris")


@slow
def test_streamed_text_is_the_whole_text(trained: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = trained
    responses = list(stream_generate(model, tokenizer, "Once upon a time", max_tokens=20))
    ids = [r.token for r in responses]
    assert "".join(r.text for r in responses) == tokenizer.decode(ids)
    assert [r.finish_reason for r in responses] == [None] * 19 + ["length"]
    assert [r.generation_tokens for r in responses] == list(range(1, 21))
    last = responses[-1]
    assert last.prompt_tokens == len(tokenizer.encode("Once upon a time"))
    assert last.generation_tps > 0
    assert last.prompt_tps > 0
    assert 0 < last.time_to_first_token < 60
    assert last.peak_memory > 0


@slow
def test_stops_on_eos_without_printing_it(trained: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = trained
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    responses = list(stream_generate(model, tokenizer, ids, max_tokens=60))
    assert responses[-1].finish_reason == "stop"
    assert responses[-1].token in tokenizer.eos_token_ids
    text = "".join(r.text for r in responses)
    assert "Paris" in text
    assert "<|im_end|>" not in text


@pytest.mark.parametrize(("joined", "text"), [(False, "To"), (True, " To")])
def test_a_text_that_joins_the_prompt_keeps_its_space(
    tmp_path: Path, joined: bool, text: str
) -> None:
    """Mistral's word pieces begin with a space, which a text that stands alone does not have."""
    shutil.copy(mistral_model(), tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_directory(tmp_path)
    size = {"vocab_size": 32_000, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 4}
    model = Model(ModelConfig.from_dict(tiny_config(**size, num_hidden_layers=1)))
    (token,) = tokenizer.encode("To", add_bos=False)
    (response,) = stream_generate(
        model, tokenizer, "Go", max_tokens=1, sampler=lambda *_: mx.array([token]), joined=joined
    )
    assert response.text == text


@slow
def test_stop_string_across_tokens(trained: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = trained
    whole = generate(model, tokenizer, "One, two, three,", max_tokens=12)
    stop = whole[7:13]
    responses = list(
        stream_generate(model, tokenizer, "One, two, three,", max_tokens=12, stop=[stop])
    )
    assert "".join(r.text for r in responses) == whole[: whole.index(stop)]
    assert responses[-1].finish_reason == "stop"


@pytest.mark.parametrize("step", [1, 3, 64])
@pytest.mark.one_in(4)
def test_prefill_step_size_does_not_change_the_text(checkpoint: MakeCheckpoint, step: int) -> None:
    small, prompt = load(checkpoint()), "A list of colours: red, green, blue, yellow, orange"
    expected = generate(*small, prompt, max_tokens=40)
    assert generate(*small, prompt, max_tokens=40, prefill_step_size=step) == expected


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "empty"),
        ([1], {"max_tokens": 0}, "max-tokens"),
        ([1], {"max_tokens": 8192}, "8192 positions"),
        ([49152], {}, "token id 49152"),
        ([-1], {}, "token id -1"),
        ([1], {"prefill_step_size": 0}, "prefill-step-size"),
        ([1], {"stop": [""]}, "stop string"),
    ],
)
@slow
def test_requests_that_cannot_be_honoured(
    trained: tuple[Model, Tokenizer], prompt: list[int], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        next(stream_generate(*trained, prompt, **options))


# The command line.


@slow
def test_answers_and_closes_with_the_figures(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "--model", demo, "--prompt", "What is the capital of France?")
    assert code == 0
    assert "Paris" in out
    for word in ("[stop]", "tokens at", "first token after", "peak memory", "30 positions"):
        assert word in err


@slow
def test_json_is_one_object_and_nothing_else(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", demo, "--prompt", "The capital of France is", "--raw", "--max-tokens", 5]
    code, out, err = run(capsys, *args, "--json", "--plan", "demo-interleaved", "--window", 64)
    assert code == 0
    assert err == ""
    answer = json.loads(out)
    assert answer["text"].startswith(" Paris")
    assert len(answer["token_ids"]) == answer["generation_tokens"] == 5
    assert answer["finish_reason"] == "length"
    assert answer["window"] == 64
    assert answer["positions"] == 34
    assert answer["plan"] == "demo-interleaved"


def test_an_answer_cut_by_its_length_says_how_to_get_more(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ("--prompt", "Count to twenty.", "--template", "plain")
    asked = ("--model", checkpoint(), *prompt, "--max-tokens", 3)
    code, _, err = run(capsys, *asked)
    assert code == 0
    assert err.splitlines()[-1] == "note: cut at 3 tokens; --max-tokens N lets it go on"
    for flag in ("--quiet", "--json"):
        assert run(capsys, *asked, flag)[2] == ""


@slow
def test_an_answer_that_ends_by_itself_has_no_such_note(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", demo, "--prompt", "What is the capital of France?")
    assert "note:" not in run(capsys, *asked)[2]


@slow
def test_quiet_prints_the_answer_only(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", demo, "--prompt", "The capital of France is", "--raw", "--max-tokens", 2]
    assert run(capsys, *args, "--quiet") == (0, " Paris.\n", "")


def test_messages_file_is_the_prompt_with_system(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    file = tmp_path / "m.json"
    file.write_text(json.dumps(messages))
    common = ["--model", checkpoint(), "--max-tokens", 8, "--json"]
    _, one, _ = run(capsys, *common, "--messages", file)
    _, two, _ = run(capsys, *common, "--system", "Be brief.", "--prompt", "Hi!")
    assert json.loads(one)["token_ids"] == json.loads(two)["token_ids"]
    _, three, _ = run(capsys, *common, "--prompt", "Hi!")
    assert json.loads(one)["prompt_tokens"] != json.loads(three)["prompt_tokens"]


@slow
def test_an_answer_that_a_file_ends_with_is_continued(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.json"
    common = ["--model", demo, "--max-tokens", 2, "--quiet", "--messages", file]
    question = {"role": "user", "content": "What is the capital of France?"}
    for begun, text in (("The capital of France is", " Paris."), ("", "The capital")):
        file.write_text(json.dumps([question, {"role": "assistant", "content": begun}]))
        assert run(capsys, *common) == (0, f"{text}\n", "")


@slow
def test_prompt_from_standard_input(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("The capital of France is"))
    args = ["--model", demo, "--prompt", "-", "--raw", "--max-tokens", 2, "--quiet"]
    assert run(capsys, *args)[1] == " Paris.\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "x", "--temp", "-1"], "temp"),
        (["--prompt", "x", "--temp", "hot"], "--temp"),
        (["--prompt", "x", "--top-p", "0.5"], "temp 0"),
        (["--prompt", "x", "--bogus"], "--bogus"),
        (["--prompt", "x", "--max-tok", "5"], "--max-tok"),
        (["--prompt", "x", "--max-tokens", "0"], "max-tokens"),
        (["--prompt", "x", "--max-tokens", "512"], "512 positions"),
        (["--prompt", "x", "--template", "vicuna"], "nor one of chatml, llama-2, mistral"),
        (["--prompt", "x", "--template", "README.md/x"], "neither a chat template's file"),
        (["--prompt", "x", "--raw", "--template", "chatml"], "--raw takes no template"),
        (["--prompt", "x", "--q-bits", "7"], "--q-bits"),
        (["--prompt", "x", "--plan", "nowhere"], "nowhere"),
        (["--prompt", "x", "--plan", "cerebrum-12.25b"], "past the model"),
        (["--prompt", "x", "--window", "-2"], "negative"),
        (["--prompt", "x", "--prefill-step-size", "0"], "prefill-step-size"),
        (["--prompt", "x", "--stop", ""], "stop string"),
        (["--prompt", "x", "--revision", "main"], "--revision"),
        (["--prompt", "x", "--q-group-size", "32"], "--q-bits"),
        (["--prompt", "x", "--temp", "1", "--seed", "-1"], "seed"),
        (["--prompt", "x", "--temp", "-1"], "temp must be"),
        (["--prompt", "x", "--logit-bias", "999999=1"], "logit-bias: token id 999999 is not below"),
        (["--prompt", "x", "--model", ""], "empty"),
        (["--prompt", "x", "--model", "~nosuchuser/x"], "does not exist"),
        ([], "--prompt"),
        (["--prompt", "x", "--messages", "m.json"], "m.json"),
        (["--messages", "nowhere.json"], "nowhere.json"),
        (["--prompt", "x", "--raw", "--system", "y"], "--system"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    code, out, err = run(capsys, "--model", checkpoint(), *flags)
    assert code == 2
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    ["{", '{"role": "user"}', "[]", '[{"role": "robot", "content": "x"}]', '[{"role": "user"}]'],
)
def test_bad_messages_file(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    file = tmp_path / "m.json"
    file.write_text(content)
    code, _, err = run(capsys, "--model", checkpoint(), "--messages", file)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_memory_is_asked_for_before_loading(
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for the weights and a short answer's cache, not for a long one's."""
    path = checkpoint()
    source = open_checkpoint(path)
    weights = choose_storage(source, None, "auto").nbytes
    short, long = (Workload(source.config, 4, 2, n, 512).cache_bytes for n in (2, 400))
    assert short < long
    room = int((weights + (short + long) / 2) / 0.95)
    monkeypatch.setattr("mlx_cerebrum.model.memory.available_bytes", lambda: room)
    monkeypatch.setattr("mlx_cerebrum.weights.opening.load_model", None)
    common = ["--model", path, "--prompt", "x", "--raw", "--max-tokens"]
    with pytest.raises(TypeError, match="not callable"):  # it fits, and loading is reached
        run(capsys, *common, 2)
    code, _, err = run(capsys, *common, 400)
    assert code == 2
    assert "are free" in err
    assert "--q-bits 4" in err
    assert err.count("\n") == 1


def test_the_api_asks_for_the_caches_memory(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(checkpoint())
    monkeypatch.setattr("mlx_cerebrum.model.memory.available_bytes", lambda: 10_000)
    with pytest.raises(MemoryBudgetError, match=r"cache for 3 \+ 50 tokens"):
        next(stream_generate(model, tokenizer, "ab", max_tokens=50))


def test_ctrl_c_while_importing_is_one_line() -> None:
    code = "import mlx_cerebrum.cli; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "interrupted\n"
    assert done.returncode in (130, -signal.SIGINT)


def test_builtin_template_stops_at_the_user_line_unless_raw(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cerebrum's template brings its stop string."""
    import mlx_cerebrum.decoding.stream

    stops: list[list[str]] = []
    real = mlx_cerebrum.decoding.stream.stream_generate

    def spy(*args: Any, **options: Any) -> Iterator[Any]:
        stops.append(list(options["stop"]))
        return real(*args, **options)

    monkeypatch.setattr(sys.modules["mlx_cerebrum.generate"], "stream_generate", spy)
    common = ["--model", str(checkpoint()), "--prompt", "x", "--max-tokens", "2", "--quiet"]
    assert main([*common, "--stop", "END", "--template", "cerebrum"]) == 0
    assert main([*common, "--raw"]) == 0
    assert stops == [["END", "\nUser:"], []]


@slow
def test_without_a_hub_the_error_names_the_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "mlx_cerebrum.generate", "--prompt", "x"],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "AetherResearch/Cerebrum-1.0-7b" in done.stderr
    assert "the model `demo`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_c_keeps_what_was_generated(tmp_path: Path) -> None:
    model = talker(tmp_path, max_position_embeddings=100_000)
    args = ["--model", str(model), "--prompt", "Tell me a long story.", "--max-tokens", "90000"]
    code = (  # a suite run in the background hands down an ignored SIGINT
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"from mlx_cerebrum.generate import main; sys.exit(main({args!r}))"
    )
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 20
    assert "[interrupted]" in err
    assert "Traceback" not in err
    assert (first + out).endswith("\n")


@slow
def test_a_signal_keeps_the_prompt_cache(tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    model = talker(tmp_path, max_position_embeddings=100_000)
    command = [sys.executable, "-m", "mlx_cerebrum.generate", "--model", str(model)]
    command += ["--prompt", "Tell me a very long story.", "--prompt-cache", str(kept)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--max-tokens", "90000"], cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        process.stdout.read(20)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "[interrupted]" in err
    again = subprocess.run(
        [*command, "--max-tokens", "1", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert json.loads(again.stdout)["cached_tokens"] > 5


@slow
def test_a_closed_terminal_keeps_the_prompt_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new one, and one that is there; of the answer as far as it was written."""
    kept = tmp_path / "kept.safetensors"
    asked = ["--model", str(talker(tmp_path, max_position_embeddings=100_000)), "--prompt", "x"]
    command = [sys.executable, "-m", "mlx_cerebrum.generate", *asked, "--prompt-cache", str(kept)]
    for _ in range(2):
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        with Program([*command, "--max-tokens", "90000"], dict(os.environ)) as program:
            program.until(lambda text: len(text.rpartition("tokens")[2]) > 200, 60)
            program.hang_up()
            program.process.wait(60)
        assert kept.stat().st_mtime_ns > before
    answers = []
    for more in ([], ["--prompt-cache", str(kept)]):
        assert main([*asked, *more, "--max-tokens", "24", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    wanted, found = answers
    assert found["cached_tokens"] > 1
    assert found["token_ids"] == wanted["token_ids"]


def test_a_conversation_goes_on_from_its_prompt_cache(
    checkpoint: MakeCheckpoint,
) -> None:
    model, tokenizer = load(checkpoint())
    cache = PromptCache(model)
    first = list(stream_generate(model, tokenizer, "ab", max_tokens=3, prompt_cache=cache))
    assert (first[0].prompt_tokens, first[0].cached_tokens) == (3, 0)  # BOS and two bytes
    assert len(cache.tokens) == 3 + 2  # the last token yielded has not been computed
    prompt = [*cache.tokens, first[-1].token, *tokenizer.encode("cd", add_bos=False)]
    more = next(stream_generate(model, tokenizer, prompt, max_tokens=3, prompt_cache=cache))
    assert (more.prompt_tokens, more.cached_tokens) == (3 + 3 + 2, 5)


def test_the_cursor_stays_while_a_model_is_loaded() -> None:
    """It could not be shown again by a program that was stopped or killed."""
    script = "from mlx_cerebrum.progress import progress\n"
    script += "with progress('loading', True) as report: report(1, 2)"
    with Program([sys.executable, "-c", script], dict(os.environ) | {"TERM": "xterm"}) as program:
        assert program.end() == 0
    assert "loading" in program.raw
    assert "\x1b[?25l" not in program.raw


@slow
def test_closed_streams_are_one_line(demo: Path) -> None:
    command = f"{sys.executable} -m mlx_cerebrum.generate --model {demo} --prompt -"
    done = subprocess.run(
        ["bash", "-c", f"{command} <&-"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        ["bash", "-c", f"{command} >&-"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed; redirect it to /dev/null\n"
    for closed in ("2>&-", ">&- 2>&-"):  # nowhere to say it
        done = subprocess.run(
            ["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, cwd=ROOT
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@slow
def test_ctrl_z_and_fg(tmp_path: Path) -> None:
    """The shell gets its terminal as it was, and the answer goes on where it was stopped."""
    shell = ["sh", "-c", 'set -m; "$@"; stty -a; echo "is stopped"; read line; fg; exit $?', "sh"]
    command = [sys.executable, "-m", "mlx_cerebrum.generate", "--model", str(talker(tmp_path))]
    command += ["--quiet", "--prompt", "Tell me a very long story.", "--max-tokens", "600"]
    alone = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    with Program([*shell, *command], dict(os.environ), columns=4000) as program:
        program.until(lambda text: len(text) > 20)
        program.send("\x1a")
        found = program.until("is stopped").split()
        assert {"echo", "icanon"} <= set(found)
        program.send("\n")
        assert program.end(60) == 0
        assert program.as_found
        before, stopped, after = program.terminal.text.partition("^Z")
    assert stopped
    assert alone.startswith(before)
    assert after.endswith(alone.rstrip()[len(before) + 1 :][-40:])
    assert len(before) < len(alone) / 2


def test_progress_is_shown_to_a_person(tmp_path: Path) -> None:
    """On a terminal the load draws a line and takes it away again."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "mlx_cerebrum.generate", "--model", str(talker(tmp_path))]
    command += ["--prompt", "Hi", "--max-tokens", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, cwd=ROOT)
    os.close(follower)
    drawn, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            data = os.read(leader, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not data:
            break
        drawn += data
    process.communicate(timeout=60)
    os.close(leader)
    assert process.returncode == 0
    assert b"loading" in drawn
    assert b"[length]" in drawn


def test_help_gives_every_flag_a_unit_or_default(capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_cerebrum.generate import parser

    for action in parser()._actions:
        assert action.help, action
        if action.nargs != 0 and action.option_strings not in (["--prompt"], ["--messages"]):
            assert "(default:" in action.help, action.option_strings


@slow
def test_the_assumed_template_is_said_in_one_line(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["--model", str(checkpoint()), "--prompt", "x", "--max-tokens", "2"]
    told = "note: the model has no chat template: plain is assumed, which only continues the text;"
    told += " to choose: --template FILE, or one of chatml, llama-2, mistral, alpaca, zephyr,"
    assert main([*common, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == f"{told} cerebrum, plain\n"
    assert json.loads(out)["prompt_tokens"] == 2  # BOS and one letter
    (tmp_path / "mine.jinja").write_text("<{{ messages[0].content }}>")
    for more in (["--quiet"], ["--raw", "--json"], ["--template", "zephyr", "--json"]):
        assert main([*common, *more]) == 0
        assert capsys.readouterr().err == ""
    assert main([*common, "--json", "--template", str(tmp_path / "mine.jinja")]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 4
