"""The documentation, checked by running it."""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_cerebrum
from bench.__main__ import parser as bench_parser
from bench.plans import command_line as plans_parser
from bench.recipes import command_line as recipes_parser
from bench.render import command_line as render_parser
from convert.__main__ import parser as convert_parser
from convert.verify import parser as verify_parser
from mlx_cerebrum.__main__ import COMMANDS as SHELF
from mlx_cerebrum.chat.__main__ import parser as chat_parser
from mlx_cerebrum.generate import parser as generate_parser
from mlx_cerebrum.plan.show import parser as plan_parser
from mlx_cerebrum.server.__main__ import parser as server_parser
from mlx_cerebrum.shelf.places import SHORT

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS[ROOT / "README.md"]
BENCHES = [ROOT / "bench" / "README.md", ROOT / "bench" / "results" / "README.md"]


def commands(text: str) -> list[str]:
    return [
        line.partition("#")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", text, re.S)
        for line in block.splitlines()
        if line.startswith(("python -m", "mlx-cerebrum"))
    ]


FOUND = list(dict.fromkeys(c for text in TEXTS.values() for c in commands(text)))
MODELS = [command for command in FOUND if command.startswith("mlx-cerebrum")]
COMMANDS = [command for command in FOUND if command not in MODELS]
SERVER = next(command for command in COMMANDS if ".server " in command)
CURL = re.findall(r"^curl .*", README, re.M)
THE_BENCHS = [command for path in BENCHES for command in commands(path.read_text("utf-8"))]
# A sweep of minutes, made one of seconds, and a long answer made a short one.
QUICK = {
    "bench": ["--tokens", "40", "--starts", "5", "--widths", "5", "--repeats", "1"],
    "mlx_cerebrum.generate": ["--max-tokens", "8"],
}


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[ROOT / "docs" / page], re.S)


def run(command: str, cwd: Path) -> str:
    words = shlex.split(command)
    words += QUICK.get(words[2], [])
    done = subprocess.run(
        [sys.executable, *words[1:]],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # the bench runs from a checkout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5
    assert len(THE_BENCHS) >= 4


@pytest.mark.parametrize("command", [*COMMANDS, *THE_BENCHS, *MODELS])
def test_every_command_parses(command: str) -> None:
    """Also those that need the hub: their flags exist and are spelled right."""
    words = shlex.split(command)
    if words[0] == "mlx-cerebrum":
        words = ["", *words[3:]] if words[1] == "--models" else words
        importlib.import_module(SHELF[words[1]][0]).parser().parse_args(words[2:])
        return
    parsers = {
        "mlx_cerebrum.generate": generate_parser,
        "mlx_cerebrum.plan": plan_parser,
        "mlx_cerebrum.chat": chat_parser,
        "mlx_cerebrum.server": server_parser,
        "convert": convert_parser,
        "convert verify": verify_parser,
        "bench": bench_parser,
        "bench plans": plans_parser,
        "bench.recipes": recipes_parser,
        "bench render": render_parser,
    }
    two = " ".join(words[2:4])
    if two in parsers:
        parsers[two]().parse_args(words[4:])
    else:
        parsers[words[2]]().parse_args(words[3:])


def test_the_table_of_names_is_whole() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in SHORT)


VERIFIED = [c.split()[-1] for c in COMMANDS if " verify " in c]
LOCAL = [
    c
    for c in COMMANDS + THE_BENCHS
    if ("demo" in c or ".plan " in c)
    and ".server " not in c  # it does not end
    and not any(c.endswith(f"--mlx-path {made}") for made in VERIFIED)  # run before verify
]


# A few say that the documents are right; the long run takes them all.
LONG = ("--sweep", "--draft", "--kv-bits", "unrolled", "alpaca")
MARKED = [
    pytest.param(command, marks=[pytest.mark.long] if any(word in command for word in LONG) else [])
    for command in LOCAL
]


@pytest.mark.parametrize("command", MARKED)
def test_commands_that_need_no_hub_run(command: str, demo: Path, tmp_path: Path) -> None:
    if " verify " in command:  # of what another command wrote
        made = next(c for c in COMMANDS if c.endswith(f"--mlx-path {command.split()[-1]}"))
        run(made, tmp_path)
    run(command, tmp_path)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_server_answers_what_the_readme_asks(demo: Path) -> None:
    words = [sys.executable, *shlex.split(SERVER)[1:], "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            assert CURL
            for line in CURL:
                asked = shlex.split(line.replace("http://127.0.0.1:8080", address))
                said = json.loads(subprocess.run(asked, capture_output=True, text=True).stdout)
                assert said["choices"][0]["message"]["content"].strip()
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
        finally:
            server.kill()


def test_the_plan_shown_is_the_plan_printed(tmp_path: Path) -> None:
    def flat(text: str) -> list[str]:
        return [
            " ".join(line.split()) for line in re.sub("─+", "─", text).splitlines() if line.strip()
        ]

    printed = run("python -m mlx_cerebrum.plan cerebrum-12.25b", tmp_path)
    assert flat(blocks("text", "plans.md")[0]) == flat(printed)


def test_the_python_example_runs(demo: Path, tmp_path: Path) -> None:
    code = "\n".join(blocks("python", "python.md"))  # the later ones go on from the first
    ast.parse(code)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 2


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(TEXTS.values()), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_files_named_exist() -> None:
    for text in TEXTS.values():
        for name in re.findall(r"`((?:tests|bench|convert|mlx_cerebrum)/[\w./]*)`", text):
            assert (ROOT / name).exists(), name


def test_links_lead_somewhere() -> None:
    for page, text in TEXTS.items():
        for target, place in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", text):
            found = page if not target else page.parent / target
            assert found.exists(), f"{page.name}: {target}"
            if place:
                heads = re.findall(r"^#+ (.*)", found.read_text(encoding="utf-8"), re.M)
                names = ["#" + re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads]
                assert place in names, f"{page.name}: {target}{place}"
        for source in re.findall(r'<img [^>]*src="([^"]*)"', text):
            assert (page.parent / source).exists(), f"{page.name}: {source}"


def test_every_page_is_reached_from_the_first() -> None:
    linked = {name for text in TEXTS.values() for name in re.findall(r"\]\(([^)#:]*\.md)", text)}
    assert {page.name for page in PAGES} <= {Path(name).name for name in linked} | {"README.md"}


def test_the_first_page_stays_short() -> None:
    assert len(README.splitlines()) <= 200


def test_changelog_and_version_agree() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None
    assert heading[1] == mlx_cerebrum.__version__


def test_model_fits_on_two_screens() -> None:
    assert len((ROOT / "mlx_cerebrum" / "model" / "forward.py").read_text().splitlines()) <= 230
