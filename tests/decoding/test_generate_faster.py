"""The flags for guessing, prompt caches, packed caches and memory: what they do and refuse."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import run
from conftest import slow

from mlx_cerebrum import load
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.speculative import speculation
from mlx_cerebrum.decoding.stream import stream_generate
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.generate import parser
from mlx_cerebrum.model import memory

ROOT = Path(__file__).parents[2]
MakeCheckpoint = Callable[..., Path]
PLAN = """
slices:
- sources: [{model: x, layer_range: [0, 2]}]
- sources: [{model: x, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
"""


@pytest.fixture
def directory(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint(num_hidden_layers=4, sliding_window=512)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yml"
    path.write_text(PLAN)
    return path


def answer(capsys: pytest.CaptureFixture[str], *args: Any) -> dict[str, Any]:
    code, out, err = run(capsys, *args, "--json", "--max-tokens", 24)
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    code, out, err = run(capsys, *args)
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


@pytest.mark.parametrize(
    "flags",
    [
        ["--draft", "ngram"],
        ["--draft", "auto"],
        ["--draft", "auto", "--draft-tokens", "3"],
        ["--draft-bits", "4"],
        ["--draft-bits", "8", "--draft", "auto"],
        ["--draft-plan", "FEWER", "--temp", "1", "--seed", "3"],
        ["--draft", "ngram", "--temp", "1", "--seed", "3"],
    ],
)
@pytest.mark.one_in(10)
def test_guessing_changes_no_answer(
    flags: list[str],
    directory: Path,
    plan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fewer = tmp_path / "fewer.yml"
    fewer.write_text(PLAN.replace("[1, 4]", "[3, 4]"))
    flags = [str(fewer) if flag == "FEWER" else flag for flag in flags]
    drawn = flags[flags.index("--temp") :] if "--temp" in flags else []
    asked = ["--model", directory, "--plan", plan, "--prompt", "abcabcabcabc", "--raw"]
    plain = answer(capsys, *asked, *drawn)
    found = answer(capsys, *asked, *flags)
    assert found["token_ids"] == plain["token_ids"]
    assert plain["draft"] is None
    assert found["draft"]["passes"] * found["draft"]["tokens_per_pass"] >= 24 - 0.1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--draft-tokens", "3"], "--draft-tokens only means something"),
        (["--draft", "auto", "--draft-tokens", "0"], "from 1 to 63, not 0"),
        (["--draft", "auto", "--draft-tokens", "64"], "from 1 to 63, not 64"),
        (["--draft", "ngram", "--draft-bits", "4"], "--draft ngram uses no model"),
        (["--draft", "none", "--draft-plan", "cerebrum-7b"], "--draft none uses no model"),
        (["--draft-plan", "cerebrum-7b"], "cerebrum-7b"),
        (["--draft-plan", "nowhere.yml"], "nowhere.yml"),
        (["--plan", "PLAN", "--draft-plan", "PLAN"], "would read as much as the model does"),
        (["--memory-limit", "nan"], "--memory-limit: 'nan' is not a number"),
        (["--memory-limit", "inf"], "--memory-limit: 'inf' is too large"),
        (["--memory-limit", "0"], "above 0, not 0"),
        (["--prompt-cache", "talk.json"], "must be named *.safetensors"),
        (["--prompt-cache", "nowhere/talk.safetensors"], "does not exist"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused_before_weights_are_read(
    flags: list[str],
    said: str,
    directory: Path,
    plan: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = [str(plan) if flag == "PLAN" else flag for flag in flags]
    monkeypatch.setattr("mlx_cerebrum.weights.opening.load_model", None)
    assert said in refused(capsys, "--model", directory, "--prompt", "hi", *named)


def test_a_draft_that_reads_as_much_is_refused(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = ["--model", directory, "--prompt", "hi", "--q-bits", 4, "--draft-bits", 8]
    assert "would read as much as the model does" in refused(capsys, *packed, "--quiet")


@slow
def test_a_packed_draft_counts_before_anything_is_read(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--model", directory, "--prompt", "hi", "--max-tokens", 4, "--quiet"]
    free = 0
    for free in range(500_000, 10_000_000, 20_000):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        if run(capsys, *asked)[0] == 0:
            break
    monkeypatch.setattr("mlx_cerebrum.weights.opening.load_model", None)
    assert "the model (" in refused(capsys, *asked, "--draft-bits", 8)


def test_a_prompt_cache_is_resumed_and_refused(
    directory: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.safetensors"
    asked = ["--model", directory, "--prompt", "abcdefgh", "--raw"]
    plain = answer(capsys, *asked)
    first = answer(capsys, *asked, "--prompt-cache", file)
    again = answer(capsys, *asked, "--prompt-cache", file, "--draft", "ngram")
    assert plain["token_ids"] == first["token_ids"] == again["token_ids"]
    assert first["cached_tokens"] == 0
    assert again["cached_tokens"] == again["prompt_tokens"] - 1
    before = file.read_bytes()
    for flags, said in (
        (["--plan", plan], "layer plan"),
        (["--window", 100], "window"),
        (["--q-bits", 8], "quantization"),
        (["--kv-bits", 8], "kv-bits"),
        (["--dtype", "bfloat16"], "dtype"),
    ):
        if said == "kv-bits":
            continue  # heads of 16 can't be packed
        assert f"another {said}" in refused(capsys, *asked, "--prompt-cache", file, *flags)
    assert file.read_bytes() == before


def test_objects_of_another_model_are_refused(directory: Path) -> None:
    model, tokenizer = load(directory)
    other = model.view((0, 1, 2, 3))
    with pytest.raises(RequestError, match="another model"):
        next(stream_generate(other, tokenizer, "ab", prompt_cache=PromptCache(model)))
    with pytest.raises(RequestError, match="another model"):
        next(stream_generate(other, tokenizer, "ab", speculation=speculation(model)))
    used = speculation(model)
    list(stream_generate(model, tokenizer, "ab", max_tokens=3, speculation=used))
    with pytest.raises(RequestError, match="one request"):
        next(stream_generate(model, tokenizer, "ab", speculation=used))


def test_every_turn_is_checked_against_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(directory)
    cache = PromptCache(model)
    list(stream_generate(model, tokenizer, "ab", max_tokens=2, prompt_cache=cache))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(Exception, match="the cache for"):
        next(stream_generate(model, tokenizer, "ab" * 150, max_tokens=2, prompt_cache=cache))


def test_the_help_says_what_was_measured_of_packed_entries() -> None:
    file = ROOT / "bench" / "results" / "linux-epyc-2-demo" / "kv-bits.json"
    models = json.loads(file.read_text())["results"].values()
    said = next(a.help or "" for a in parser()._actions if a.dest == "kv_bits")
    costs = re.findall(r"([\d.]+) to ([\d.]+)%%", said)
    for form, (low, high) in zip(("8 bits", "4 bits"), costs, strict=True):
        nats = [model["quality"][form]["difference"]["value"] for model in models]
        more = [100 * math.expm1(max(0.0, one)) for one in nats]
        assert float(low) == pytest.approx(min(more), abs=0.5)
        assert float(high) == pytest.approx(max(more), abs=0.5)
