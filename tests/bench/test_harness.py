"""Accuracy through lm-evaluation-harness. Needs lm-eval[api] and mistral-common (a data file)."""

import json
import math
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from conftest import mistral_model, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from server_room import serving

from bench import harness
from bench.data import make_arithmetic
from bench.harness import Adapter, cerebrum_lm, evaluate
from mlx_cerebrum import load
from mlx_cerebrum.decoding.stream import generate
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.tokenizer.chat_formats import BUILT_IN
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.views import describe

CHATML = (
    "{% for m in messages %}{{ bos_token + m['role'] + '\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)
Loaded = tuple[Model, Tokenizer]


@pytest.fixture
def tiny(checkpoint: Callable[..., Path]) -> Loaded:
    """8 blocks, a window of 12, a token a byte, the built-in Cerebrum template."""
    path = checkpoint(max_position_embeddings=400)
    return load(path, dtype="float32", template="cerebrum")


@pytest.fixture
def chatml(checkpoint: Callable[..., Path]) -> Loaded:
    """The same with a template of its own, which writes control tokens around each message."""
    path = checkpoint("chatml", max_position_embeddings=400)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return load(path, dtype="float32")


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Mistral's real tokenizer: 32000 pieces, BOS, the built-in template."""
    path = tmp_path_factory.mktemp("mistral")
    (path / "tokenizer.model").write_bytes(mistral_model().read_bytes())
    tokenizer = Tokenizer.from_directory(path)
    tokenizer.use_format(BUILT_IN["cerebrum"])
    return tokenizer


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def alone(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One pair, in one forward pass without a cache, in float64."""
    ids = mx.array([context + continuation[:-1]])
    logits = np.array(model(ids)[0, len(context) - 1 :]).astype(np.float64)
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = chances[range(len(continuation)), continuation]
    return float(chosen.sum()), bool((logits.argmax(-1) == continuation).all())


def next_token(model: Model, ids: list[int]) -> int:
    return cast(int, mx.argmax(model(mx.array([ids]))[0, -1]).item())


# ---- likelihoods of token ids


@pytest.mark.parametrize("step", [7, 256])
@pytest.mark.one_in(4)
def test_scores_are_those_of_one_forward_pass(
    tiny: Loaded, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    monkeypatch.setattr("bench.likelihood.prefill_step", lambda: step)
    random = np.random.default_rng(1)
    long, other = random.integers(3, 260, (2, 350)).tolist()
    adapter = Adapter(model, tokenizer)
    # In order: a beginning shared, a turn just before the end, then back to where the window's
    # entries are long gone.
    begun = long[:20] + other[:10]
    for context in (begun, long, long[:-6] + long[:6], long[:5] + long[9:19], long, long[:2]):
        greedy: list[int] = []
        for _ in range(3):
            greedy.append(next_token(model, context + greedy))
        nearly = [*greedy[:-1], 3 + (greedy[-1] - 2) % 257]
        for continuation in (greedy, nearly, other[:9]):
            chance, written = adapter._score(context, continuation)
            assert chance == pytest.approx(alone(model, context, continuation)[0], abs=1e-4)
            assert written == (continuation == greedy)
    assert adapter._score([5, 6], []) == (0.0, True)


def test_a_shared_beginning_is_computed_once(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(checkpoint(sliding_window=None), dtype="float32")
    seen: list[int] = []
    call = Model.__call__

    def counted(self: Model, ids: mx.array, cache: Any) -> mx.array:
        seen.append(ids.size)
        return call(self, ids, cache)

    monkeypatch.setattr(Model, "__call__", counted)
    head = list(range(10, 110))
    questions = [head + [n] * (5 + n) for n in range(3, 9)]
    adapter = Adapter(model, tokenizer)
    for question in questions:
        for k in range(4):
            adapter._score(question, [20 + k, 30])
    # 100 in common once, what is left of each question but its last token, four choices of two.
    assert sum(seen) == 100 + sum(5 + n - 1 for n in range(3, 9)) + 6 * 4 * 2


# ---- prompts as text


def test_rendered_text_encodes_to_the_tokenizers_own_ids(
    tiny: Loaded, chatml: Loaded, mistral: Tokenizer
) -> None:
    tokenizers = [tiny[1], chatml[1], mistral]
    adapters = [Adapter(tiny[0], tokenizer) for tokenizer in tokenizers]

    @given(st.text(max_size=12) | st.sampled_from(["<s>", "x</s>", "  <s", "</s>\nUser: a"]))
    @settings(max_examples=60, deadline=None)
    def same(text: str) -> None:
        for tokenizer, adapter in zip(tokenizers, adapters, strict=True):
            if re.search("[\U00100000-\U0010ffff]", text):
                with pytest.raises(RequestError, match="stands for a token"):
                    adapter.apply_chat_template(user(text))
                continue
            messages = [{"role": "system", "content": "s"}, *user(text)]
            ids = adapter.encode(adapter.apply_chat_template(messages))
            assert ids == tokenizer.apply_chat_template(messages)
            assert adapter.encode(text) == tokenizer.encode(text)

    same()


def test_an_answer_begun_goes_on(tiny: Loaded, chatml: Loaded) -> None:
    messages = [*user("What is 1 + 1?"), {"role": "assistant", "content": "1 + 1 ="}]
    for model, tokenizer in (tiny, chatml):
        adapter = Adapter(model, tokenizer)
        text = adapter.apply_chat_template(messages, add_generation_prompt=False)
        whole = adapter.apply_chat_template(user("What is 1 + 1?"))
        assert text == whole + ("" if whole[-1].isspace() else " ") + "1 + 1 ="


def test_pairs_split_where_the_tokens_of_the_whole_do(tiny: Loaded, mistral: Tokenizer) -> None:
    adapter = Adapter(tiny[0], mistral)
    for context, continuation in [("The quick br", "own fox"), ("one  ", "two"), ("a\n", " b")]:
        before, after = adapter.encode_pair(context, continuation)
        whole = mistral.encode(context + continuation)
        assert before == mistral.encode(context.rstrip())
        assert after == whole[len(before) :]
    # A space belongs to the word after it.
    assert mistral.decode(adapter.encode_pair("one ", "two")[1]) == "two"
    assert adapter.encode_pair("one ", "two") == adapter.encode_pair("one", " two")


def test_a_prompt_that_ends_in_a_word_leaves_the_space_to_the_model(
    tiny: Loaded, chatml: Loaded, mistral: Tokenizer
) -> None:
    adapter = Adapter(tiny[0], mistral)
    prompt = adapter.apply_chat_template(user("What is 3 + 4?"))
    assert prompt.endswith("AI:")
    assert adapter.encode_pair(prompt, "To") == adapter.encode_pair(prompt, " To")
    assert adapter.encode_pair(prompt, "To")[1] == [mistral.encode("To", add_bos=False)[0]]
    # After a line's end, or in plain text, nothing is added.
    adapter = Adapter(*chatml)
    prompt = adapter.apply_chat_template(user("What is 3 + 4?"))
    assert adapter.encode_pair(prompt, "7")[1] == adapter.encode("\n7", add_bos=False)
    assert adapter.encode_pair("AI:", "7")[1] == adapter.encode("7", add_bos=False)


def test_a_choice_cannot_spell_a_token(chatml: Loaded) -> None:
    adapter = Adapter(*chatml)
    mark = adapter.apply_chat_template(user("Hi"))[0]
    with pytest.raises(RequestError, match="U\\+100000"):
        adapter.encode_pair("Hi", mark)


# ---- the harness's requests


def test_what_is_too_long_loses_its_beginning_and_says_so(
    checkpoint: Callable[..., Path],
) -> None:
    model, tokenizer = load(checkpoint(max_position_embeddings=32), dtype="float32")
    said: list[str] = []
    lm = cerebrum_lm(model, tokenizer, said.append)
    text = "x" * 20 + "abcdefghijklmnopqrstuvwxyz"
    found = lm.loglikelihood([request(text, " yes"), request("short", " yes")])
    ids = tokenizer.encode(text + " yes")
    assert found[0][0] == pytest.approx(alone(model, ids[-33:-4], ids[-4:])[0], abs=1e-4)
    answer = lm.generate_until([request(text, {"max_gen_toks": 8})])
    assert answer == [generate(model, tokenizer, tokenizer.encode(text)[-24:], max_tokens=8)]
    assert said[0] == "the beginning of a prompt of 47 tokens is left out: 29 fit"
    with pytest.raises(RequestError, match="32 positions"):
        lm.generate_until([request(text, {"max_gen_toks": 32})])
    with pytest.raises(RequestError, match="32 positions"):
        lm.loglikelihood([request("a", "b" * 40)])


@slow
def test_each_request_keeps_its_own_settings(tiny: Loaded) -> None:
    model, tokenizer = tiny
    lm = cerebrum_lm(model, tokenizer)
    prompt = lm.apply_chat_template(user("Go on."))
    ids = tokenizer.apply_chat_template(user("Go on."))
    text = generate(model, tokenizer, ids, max_tokens=20)
    requests = [
        request(prompt, {"max_gen_toks": 20, "temperature": 0.0, "do_sample": False}),
        request(prompt, {"until": text[3], "max_tokens": 20}),
        request(prompt, {"until": ["\n\n\n", text[1], ""], "max_new_tokens": 20}),
        request(prompt, {"until": [], "max_gen_toks": 2}),
    ]
    expected = [generate(model, tokenizer, ids, max_tokens=2)]
    expected = [text, text[: text.index(text[3])], text[: text.index(text[1])], *expected]
    assert lm.generate_until(requests) == expected
    assert tokenizer.stop_strings == ("\nUser:",)  # the template's own
    tokenizer.stop_strings = (text[2:4],)
    assert lm.generate_until(requests[:1]) == [text[: text.index(text[2:4])]]


@pytest.mark.parametrize(
    "wanted", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}], ids=str
)
def test_samples_and_beams_are_refused(tiny: Loaded, wanted: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="greedy"):
        Adapter(*tiny).generate_until([request("a", wanted)])


# ---- the harness's own client, through the server


def served_lm(url: str, tokenizer: Tokenizer, ids: bool, **settings: Any) -> Any:
    """The harness's `local-completions`, with our tokenizer in place of one of transformers.

    ids: whether prompts are sent as token ids, its default.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class Client(LocalCompletionsAPI):  # type: ignore[misc]
        def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
            return tokenizer.encode(string)

        def decode_batch(self, tokens: list[list[int]]) -> list[str]:
            return [tokenizer.decode(ids) for ids in tokens]

    settings = {"max_length": 400, "max_retries": 1, "eos_string": "</s>"} | settings
    client = Client(url, None, model="served", **settings)
    client.tokenizer, client.tokenized_requests = tokenizer, ids
    return client


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 64}, {"batch_size": 7, "num_concurrent": 3}], ids=str
)
@pytest.mark.one_in(10)
def test_likelihoods_through_the_server_are_the_adapter_s(
    tiny: Loaded, settings: dict[str, Any], ids: bool
) -> None:
    model, tokenizer = tiny
    contexts = ["The quick brown fox jumps over", "a", "One \u00e9, two:", "x" * 380]
    requests = [request(text, f" {more}") for text in contexts for more in ("dog", "1", "no, or")]
    for text in contexts[:3]:  # what the model would write
        likeliest = next_token(model, tokenizer.encode(text))
        requests.append(request(text, tokenizer.decode([likeliest])))
    expected = cerebrum_lm(model, tokenizer).loglikelihood(requests)
    assert {greedy for _, greedy in expected} == {True, False}
    engine = BatchEngine({"served": model}, tokenizer, max_batch=4, cache_bytes=10**7)
    with serving(engine, tokenizer, {"served": describe(model)}) as server:
        lm = served_lm(f"{server.url}/v1/completions", tokenizer, ids, **settings)
        found = lm.loglikelihood(requests)
    for (chance, greedy), (wanted, written) in zip(found, expected, strict=True):
        assert chance == pytest.approx(wanted, abs=1e-4)
        assert greedy == written


# ---- the questions


def test_the_script_makes_the_file() -> None:
    assert make_arithmetic.FILE.read_bytes() == make_arithmetic.text().encode()


def test_every_question_has_its_right_answer_once() -> None:
    rows = [json.loads(line) for line in make_arithmetic.FILE.read_text().splitlines()]
    assert len(rows) == len({row["question"] for row in rows}) == 60
    for row in rows:
        numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
        symbol = re.search("[+*]", row["question"])
        if symbol:
            assert row["start"] == row["question"][len("What is ") : -1] + " ="
            expected = sum(numbers) if symbol[0] == "+" else math.prod(numbers)
        elif len(numbers) == 2:
            expected = sum(numbers)
        else:
            expected = numbers[0] * numbers[1] - numbers[2]
        assert row["answer"] == row["choices"][row["label"]] == str(expected)
        assert len(set(row["choices"])) == 4
        assert {len(choice) for choice in row["choices"]} == {len(row["answer"])}
    assert [row["level"] for row in rows] == [1, 2, 3, 4, 5, 6] * 10


# ---- whole runs


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def expected_scores(model: Model, tokenizer: Tokenizer, count: int) -> list[list[float]]:
    """Of the default tasks, worked out without the harness: written, chosen."""
    written, chosen = [], []
    for line in make_arithmetic.FILE.read_text().splitlines()[:count]:
        row = json.loads(line)
        ids = tokenizer.apply_chat_template(user(row["question"]))
        ids += tokenizer.encode(row["start"], add_bos=False)
        text = generate(model, tokenizer, ids, max_tokens=8, stop=["\n"])
        number = re.search(r"-?\d[\d,]*", text)
        written.append(float(number is not None and number[0].replace(",", "") == row["answer"]))
        choices = [tokenizer.encode(f" {c}", add_bos=False) for c in row["choices"]]
        chances = [alone(model, ids, choice)[0] for choice in choices]
        chosen.append(float(np.argmax(chances) == row["label"]))
    return [written, chosen]


@pytest.mark.usefixtures("no_network")
@pytest.mark.long
def test_the_default_tasks(
    chatml: Loaded,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = chatml
    found = evaluate(model, tokenizer, limit=8, say=lambda line: None)
    written, chosen = expected_scores(model, tokenizer, 8)
    assert 0 < sum(chosen) < 8
    assert found == {
        "cerebrum_arithmetic": {"exact_match, first number": written},
        "cerebrum_arithmetic_choice": {"acc": chosen},
    }
    assert capsys.readouterr().out == ""


def write_task(folder: Path, name: str, **changes: Any) -> None:
    """A local task over a local JSON file; YAML takes JSON."""
    folder.mkdir(exist_ok=True)
    data = folder / "data.json"
    rows = [{"q": f"Say {word}.", "a": f" {word}"} for word in ("yes", "no", "perhaps")]
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task | changes))


MEAN = {"aggregation": "mean", "higher_is_better": True}


@pytest.mark.usefixtures("no_network")
@slow
def test_a_directory_of_local_tasks(tiny: Loaded, tmp_path: Path) -> None:
    model, tokenizer = tiny
    folder = tmp_path / "tasks"
    acc = [{"metric": "acc", **MEAN}]
    write_task(folder, "said", output_type="loglikelihood", metric_list=acc)
    found = evaluate(model, tokenizer, task_dir=folder)
    flags = [
        alone(
            model, tokenizer.apply_chat_template(user(f"Say {w}.")), tokenizer.encode(f" {w}")[1:]
        )
        for w in ("yes", "no", "perhaps")
    ]
    assert found == {"said": {"acc": [float(flag) for _, flag in flags]}}


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(CerebrumError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@slow
def test_what_cannot_be_run_is_named(
    tiny: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    folder = tmp_path / "tasks"
    write_task(folder, "far", dataset_path="nobody/nothing", dataset_kwargs={})
    write_task(folder, "odd", output_type="guess")
    words = [{"metric": "word_perplexity"}]
    write_task(folder, "told", output_type="loglikelihood_rolling", metric_list=words)
    write_task(folder, "drawn", generation_kwargs={"do_sample": True, "until": ["x"]})

    def run(*tasks: str, task_dir: Path | None = folder) -> str:
        return refusal(lambda: evaluate(model, tokenizer, tasks, task_dir, say=lambda _: None))

    # Reading the harness's own thousands of task files takes ten seconds.
    few = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda folders, everything=False: few(folders))
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("far").startswith("task far can't be loaded: Couldn't reach 'nobody/nothing'")
    assert "task odd can't be loaded: Got invalid output_type 'guess'" in run("odd")
    assert "greedy" in run("drawn")
    assert "python -m bench.perplexity" in run("told")
    assert "no task 'arc_chalenge'" in run("arc_chalenge", task_dir=None)
    assert "no task" in run(task_dir=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no task" in run(task_dir=tmp_path / "empty")
