"""What newcomers type, coming from Ollama, llama.cpp or mlx-lm: one line that they can act on."""

import io
import shlex
import sys
from pathlib import Path

import pytest

from mlx_cerebrum.__main__ import main
from mlx_cerebrum.shelf.places import meant

MODEL, SEVEN = "did you mean cerebrum-12.25b?", "did you mean cerebrum-7b?"
HUB = "https://huggingface.co/AetherResearch/Cerebrum-1.0-7b"
TYPED = [
    # Names of models.
    ("chat", "which model? mlx-cerebrum chat NAME: cerebrum-12.25b, cerebrum-7b, demo"),
    ("chat cerebrum", MODEL),
    ("chat cerebrum-12b", MODEL),
    ("chat cerebrum12.25b", MODEL),
    ("chat 12.25b", MODEL),
    ("chat 7b", SEVEN),
    ("chat cerebrum-1.0-7b", SEVEN),
    ("chat demos", "did you mean demo?"),
    (f"chat {HUB}", "did you mean AetherResearch/Cerebrum-1.0-7b?"),
    ("chat hf.co/mistralai/Mistral-7B-v0.1", "did you mean mistralai/Mistral-7B-v0.1?"),
    ("chat cerebrum-12.25b-4bit", "did you mean cerebrum-12.25b:4bit?"),
    ("chat cerebrum-12.25b:q4_0", "did you mean cerebrum-12.25b:4bit?"),
    ("chat cerebrum-12.25B:3bit", "in 4, 8 or 16 bits a weight, not 3"),
    ("chat ./nowhere", "./nowhere does not exist, and is neither"),
    ("chat ~nosuchuser/x", "~nosuchuser/x does not exist"),
    ("chat /etc/passwd", "is not a checkpoint: name its directory, or a GGUF file"),
    ("chat demo --model x", "demo and --model x: name one model"),
    ("pull", "required: NAME[:BITS]|HUBID|demo (see mlx-cerebrum pull --help)"),
    ("pull cerebrum", MODEL),
    ("pull llama3", "'llama3' is neither cerebrum-12.25b nor cerebrum-7b nor a hub id"),
    (f"pull {HUB}/tree/main", "did you mean AetherResearch/Cerebrum-1.0-7b?"),
    ("pull cerebrum-12.25b:q4_0", "'cerebrum-12.25b:q4_0' is neither"),
    ("pull cerebrum-12.25b cerebrum-7b", "cerebrum-7b; name one model at a time"),
    ("pull cerebrum-12.25b --bits q4", "argument --bits: 'q4' is not a whole number"),
    ("pull cerebrum-12.25b --bits 6", "argument --bits: invalid choice: 6 (choose from 16, 8, 4)"),
    ("pull -f cerebrum-12.25b", "unrecognized arguments: -f; did you mean --yes?"),
    ("pull demo --bits 4", "the demo is one GGUF file, kept as it is: drop the flags"),
    ("show nothing", "nothing is not on the shelf"),
    ("show a b", "unrecognized arguments: b; name one model at a time"),
    ("list demo", "of one model, `show NAME` says more"),
    ("rm cerebrum-7b", "cerebrum-7b is not on the shelf"),
    ("rm -f cerebrum-7b", "unrecognized arguments: -f; nothing is asked here"),
    ("verify nothing", "nothing does not exist, and is neither on the shelf"),
    ("plan cerebrum", "named plans: cerebrum-12.25b, cerebrum-7b"),
    # Questions.
    ("chat demo hello", "ask when it runs, or one question with `generate NAME --prompt TEXT`"),
    ("chat demo --prompt hi", "for one question: `generate NAME --prompt TEXT`"),
    ("generate demo", "give the question as --prompt TEXT (or -), or as --messages FILE.json"),
    ("generate demo hello", "did you mean --prompt 'hello'?"),
    ("generate demo -p hello", "did you mean --prompt hello?"),
    ("generate demo --prompt", "argument --prompt: expected one argument"),
    ("generate 'Why is the sky blue?'", "give the question as --prompt TEXT"),
    ("generate demo --prompt x --messages nothing.json", "nothing.json does not exist"),
    # Flags.
    ("chat demo --temp hot", "argument --temp: 'hot' is not a number"),
    ("chat demo --temp -1", "temp must be 0 (greedy) or above, not -1.0"),
    ("chat demo --top-p 2", "top-p must be above 0 and at most 1, not 2.0"),
    ("chat demo --max-tokens 0", "max-tokens must be at least 1, not 0"),
    ("chat demo --tokens 5", "did you mean --max-tokens 5?"),
    ("chat demo --verbose", "unrecognized arguments: --verbose; --debug shows"),
    ("chat demo --ctx-size 4096", "did you mean --window 4096?"),
    ("generate demo --prompt x --stream", "--stream; answers are shown as they come"),
    ("generate demo --prompt x -ngl 99", "-ngl; the GPU is used by itself"),
    ("generate demo --prompt x --max-new-tokens=5", "did you mean --max-tokens=5?"),
    ("serve demo -p 8000", "did you mean --port 8000?"),
    ("serve demo --port http", "argument --port: 'http' is not a whole number"),
    ("serve demo --host 0.0.0.0", "0.0.0.0 can be reached by others: set an API key"),
    ("convert demo", "required: --mlx-path (see mlx-cerebrum convert --help)"),
    ("convert x --mlx-path y", "the source is --hf-path, what is written --mlx-path"),
    ("convert --hf-path demo -o x", "did you mean --mlx-path x?"),
    # Commands.
    ("CHAT demo", "did you mean `mlx-cerebrum chat`?"),
    ("lsit", "did you mean `mlx-cerebrum list`?"),
    ("ps", "did you mean `mlx-cerebrum list`?"),
    ("create x -f Modelfile", "did you mean `mlx-cerebrum convert`?"),
    ("push x", "did you mean `mlx-cerebrum convert --upload-repo`?"),
    ("demo", "did you mean `mlx-cerebrum chat demo`?"),
    ("bench", "did you mean `mlx-cerebrum doctor`?"),
    ("login", "'login' is not a command; there are chat, "),
    ("--verbose chat demo", "--verbose stands after the command: mlx-cerebrum chat ... --verbose"),
]


@pytest.mark.parametrize(("typed", "says"), TYPED, ids=[typed for typed, _ in TYPED])
def test_one_line_says_what_to_do(
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: str,
    says: str,
) -> None:
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    try:
        code = main(shlex.split(typed))
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert "python -m" not in err


@pytest.mark.parametrize("typed", ["help chat", "--help chat", "version", "-v", "-V"])
def test_help_and_version_by_other_words(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    code: object = None
    try:
        code = main(typed.split())
    except SystemExit as ended:  # argparse's own way of showing help
        code = ended.code
    assert code == 0
    out = capsys.readouterr().out
    assert out.startswith(("usage: mlx-cerebrum chat ", "mlx-cerebrum 0."))


@pytest.mark.parametrize(
    "name", ["", "/", ":", "x" * 100_000, "cerebrum-12.25b", "a/b", "\0", "-4"]
)
def test_nothing_is_meant_by_what_is_near_nothing(name: str) -> None:
    assert meant(name) in (None, "cerebrum-12.25b")
