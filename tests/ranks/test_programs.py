"""The server and generate on several machines, as people meet them."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import slow, write_checkpoint
from ranks_ring import SIZES, end, host_file, run, start
from tiny import tiny_config, tiny_weights

from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.weights.opening import load

NAMES = ("cerebrum-7b", "cerebrum-12.25b")
PROMPT = "a b a b a b a b a c"
TOKENS = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 tiny blocks, called a Cerebrum: both of its orders answer."""
    config = tiny_config(vocab_size=260, **SIZES)
    return write_checkpoint(
        tmp_path_factory.mktemp("tiny") / "cerebrum-tiny", config, tiny_weights(config, 3)
    )


@pytest.fixture(scope="module")
def alone(path: Path) -> dict[str, str]:
    """What each order says on one machine."""
    model, tokenizer = load(path, dtype="float32")
    found = {}
    for name in NAMES:
        view = model.view(resolve(name).layer_map(32))
        said = list(generate_step(tokenizer.encode(PROMPT), view, max_tokens=TOKENS))
        found[name] = tokenizer.decode(said)
    return found


@pytest.fixture(scope="module")
def server(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. It is one machine's of two."""
    hosts = host_file(tmp_path_factory.mktemp("two") / "hosts.json", 2)
    words = ["-m", "mlx_cerebrum.server", str(path), "--port", "0", "--dtype", "float32"]
    words += ["--quiet", "--batch", "4"]
    both = [start(words, rank, hosts) for rank in (0, 1)]
    assert both[0].stdout is not None
    address = both[0].stdout.readline().split()[0]
    yield address
    both[0].terminate()
    ended = [end(each) for each in both]
    assert [(each.code, each.err) for each in ended] == [(0, ""), (0, "")]


def ask(address: str, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS} | more
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@slow
def test_both_models_answer_together(server: str, alone: dict[str, str]) -> None:
    said: dict[tuple[str, int], str] = {}

    def one(model: str, number: int) -> None:
        said[model, number] = ask(server, model)["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(m, n)) for m in NAMES for n in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert said == {(model, number): alone[model] for model in NAMES for number in range(2)}


@slow
def test_a_prompt_that_begins_alike_is_not_read_again(server: str) -> None:
    longer = f"{PROMPT} and then some more of it, past the window"
    first = ask(server, NAMES[1], prompt=longer)
    again = ask(server, NAMES[1], prompt=longer)
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 20


@slow
def test_a_client_that_leaves_costs_the_others_nothing(server: str, alone: dict[str, str]) -> None:
    body = {"model": NAMES[0], "prompt": PROMPT, "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{server}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    assert ask(server, NAMES[0])["choices"][0]["text"] == alone[NAMES[0]]


def test_no_other_model_is_loaded(server: str) -> None:
    assert httpx.get(f"{server}/shelf", timeout=60).status_code == 404


@slow
def test_generate_says_the_same(path: Path, alone: dict[str, str], tmp_path: Path) -> None:
    words = ["-m", "mlx_cerebrum.generate", str(path), "--plan", NAMES[1], "--raw", "--json"]
    words += ["--prompt", PROMPT, "--max-tokens", str(TOKENS), "--dtype", "float32"]
    first, second = run([*words, "--draft", "ngram"], 2, tmp_path)
    assert (first.code, first.err, second) == (0, "", type(second)(0, "", ""))
    assert json.loads(first.out)["text"] == alone[NAMES[1]]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt-cache", "x.safetensors"], "--prompt-cache is not there on several machines"),
        (["--draft-bits", "4"], "--draft-bits is not there on several machines"),
        (["--patience", "0"], "patience must be from 1"),
        (["--prompt", "-"], "a launcher hands on no end of input"),
        (["--follow"], "--follow is for the others"),
    ],
)
@slow
def test_what_is_not_there_is_refused_by_name(
    flags: list[str], says: str, path: Path, tmp_path: Path
) -> None:
    words = ["-m", "mlx_cerebrum.generate", str(path), "--prompt", "Hi"]
    first = run([*words, *flags], 2, tmp_path)[0]
    assert first.code == 2
    assert says in first.err
    assert first.err.count("\n") == 1
