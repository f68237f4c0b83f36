"""The peers suite on tiny models. Needs mlx-lm, gguf and xllamacpp; torch is not needed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, slow

from bench import bandwidth, copies, engines, llama_cpp, machine, peers, process, step_profile
from bench.attempts import Attempt, in_turns
from bench.engines import Loaded, Run
from bench.pair import Pair, open_pair
from bench.suite import Effort, Results
from convert.__main__ import main as convert
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.weights.opening import load_tokenizer

PROMPT = [5 + (7 * i) % 200 for i in range(24)]
TOKENS = 6


START = peers._start  # which the tests below do without


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions in this process; neither torch nor llama.cpp; no processes to time."""

    def run(arguments: Sequence[str]) -> float:
        assert arguments[0] == "convert"
        assert convert(list(arguments[1:])) == 0
        return 0.5

    found = machine.version
    absent = ("torch", "xllamacpp")
    monkeypatch.setattr(machine, "version", lambda p: None if p in absent else found(p))
    monkeypatch.setattr(process, "seconds", run)
    monkeypatch.setattr(peers, "_start", lambda *_: {"failure": "not asked for"})


@pytest.fixture
def pair(checkpoint: MakeCheckpoint, plan_file: Callable[..., Path]) -> Pair:
    """8 blocks in 12 positions, its window wider than any prompt here."""
    path = checkpoint(sliding_window=256)
    # llama.cpp asks for at least one merge, which the fixture's tokenizer has not.
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["model"]["vocab"]["th"] = 259
    raw["model"]["merges"] = [["t", "h"]]
    (path / "tokenizer.json").write_text(json.dumps(raw))
    return open_pair(str(path), plan_b=str(plan_file()))


@pytest.fixture
def settings(tmp_path: Path) -> Effort:
    work = tmp_path / "work"
    work.mkdir()
    return Effort(work=work, rounds=2, seconds=5.0, tokens=TOKENS, say=lambda line: None)


def measured(pair: Pair, settings: Effort) -> Results:
    with pytest.MonkeyPatch.context() as patch:
        # llama.cpp says ids as text: those of a random model must be whole characters.
        ids = load_tokenizer(pair.checkpoint()).encode("Alice was beginning to get very tired")
        patch.setattr(peers, "prompt_ids", lambda checkpoint, count: ids[:count])
        results = peers.measure(pair, settings, len(PROMPT))
    assert json.loads(json.dumps(results)) == results
    return results


@pytest.mark.long
def test_every_engine_says_what_ours_says(
    pair: Pair, settings: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "version", lambda p: None if p == "torch" else "1.0")
    # More threads, and settings tried first, would take their time on a busy machine.
    monkeypatch.setattr(llama_cpp, "tune", lambda *_: llama_cpp.Tuning(1, True))
    results = measured(pair, settings)
    assert results["prompt_tokens"] == len(PROMPT)
    assert not list(settings.work.iterdir())
    for side, model in zip(results["sides"].values(), pair.models(), strict=True):
        rows = side["engines"]
        names = ["mlx-cerebrum", "mlx-lm", "transformers", "llama.cpp F32", "llama.cpp Q8_0"]
        assert set(rows) == set(names)
        assert side["together"]
        assert side["rounds"] == 2
        assert "pip install -e '.[oracle]'" in rows["transformers"]["failure"]
        for name in ("mlx-lm", "llama.cpp F32"):
            assert "failure" not in rows[name], rows[name]
            assert (rows[name]["agreeing"], rows[name]["compared"]) == (TOKENS, TOKENS)
            assert rows[name]["equal"]
        assert rows["mlx-lm"]["same_weights"] is True
        context = len(PROMPT) + TOKENS // 2
        expected = bandwidth.token_bytes(model, context)
        assert rows["mlx-cerebrum"]["token_bytes"] == expected
        # llama.cpp keeps one more table, RoPE's frequencies, in some files.
        for name in ("mlx-lm", "llama.cpp F32"):
            assert rows[name]["token_bytes"] == pytest.approx(expected, rel=0.01)
        assert rows["llama.cpp Q8_0"]["token_bytes"] < 0.4 * expected
        row = rows["mlx-lm"]
        assert row["gb_s"] == pytest.approx(row["decode"]["median"] * row["token_bytes"] / GB)
    a, b = (side["engines"] for side in results["sides"].values())
    assert a["mlx-cerebrum"]["weights"] == b["mlx-cerebrum"]["weights"]  # a view takes nothing
    assert a["mlx-lm"]["weights"] < b["mlx-lm"]["weights"]
    said = "\n".join(peers.text(results))
    assert "ours, bit for bit" in said
    assert "transformers: not measured: torch is not installed" in said


def test_other_weights_are_seen(pair: Pair, settings: Effort) -> None:
    a, b = pair.models()
    config = pair.a.config
    # The stored directory is what mlx-lm reads already: no copy of side A is written.
    assert copies.Copies(pair, pair.a, settings.work).directory() == pair.path
    peer = engines.mlx_lm(pair.path, config, PROMPT, a)
    assert peer.same_weights is True
    assert peer.generate(PROMPT, TOKENS).tokens == [*generate_step(PROMPT, a, max_tokens=TOKENS)]
    for other in (a.view((0, 2, 1, *range(3, 8))), b):
        assert engines.mlx_lm(pair.path, config, PROMPT, other).same_weights is False


def fails(*args: Any) -> Loaded:
    raise ValueError("no\nluck")


@slow
def test_one_failing_engine_costs_only_its_row(
    pair: Pair, settings: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "mlx_lm", fails)
    results = measured(pair, settings)
    rows = results["sides"]["a"]["engines"]
    assert rows["mlx-lm"] == {"failure": "ValueError: no luck"}
    missing = "xllamacpp is not installed; pip install -e '.[bench]'"
    assert rows["llama.cpp F32"] == {"failure": missing}
    assert rows["mlx-cerebrum"]["decode"]["median"] > 0
    assert f"llama.cpp Q8_0: not measured: {missing}" in "\n".join(peers.text(results))


@slow
def test_a_disagreeing_peer_is_reported(
    pair: Pair, settings: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = engines.mlx_lm

    def other(*args: Any) -> Loaded:
        engine = load(*args)

        def generate(prompt: Sequence[int], max_tokens: int) -> Run:
            run = engine.generate(prompt, max_tokens)
            return replace(run, tokens=[*run.tokens[:3], 0, *run.tokens[4:]])

        return replace(engine, generate=generate)

    monkeypatch.setattr(engines, "mlx_lm", other)
    results = measured(pair, settings)
    row = results["sides"]["b"]["engines"]["mlx-lm"]
    assert (row["equal"], row["agreeing"], row["compared"]) == (False, 3, TOKENS)
    said = "\n".join(peers.text(results))
    assert f"NO, 3 of {TOKENS}" in said


def test_agreement_ends_where_ours_ends() -> None:
    assert peers.agreement([5, 6, 2, 7], [5, 6, 9, 9], (2,)) == {
        "agreeing": 2,
        "compared": 2,
        "equal": True,
    }
    assert not peers.agreement([5, 6, 7], [5, 6], ())["equal"]


@pytest.mark.long
def test_engines_that_do_not_fit_run_one_after_another(
    pair: Pair, settings: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "fits", lambda needed: False)
    results = measured(pair, settings)
    side = results["sides"]["b"]
    assert not side["together"]
    assert side["engines"]["mlx-lm"]["equal"]
    assert side["engines"]["mlx-lm"]["same_weights"] is None  # never in memory with ours
    assert "one engine after another" in "\n".join(peers.text(results))


def test_attempts_stop_at_their_failure(settings: Effort) -> None:
    calls: list[str] = []

    def attempt(name: str, lives: int) -> Attempt:
        def generate(prompt: Sequence[int], max_tokens: int) -> Run:
            calls.append(name)
            if calls.count(name) > lives:
                raise OSError("gone")
            return Run([1, 2], 1.0, 1.0, len(prompt))

        made = Attempt(lambda: (0, lambda _: Loaded("1", "", 0, 0, 0, generate)))
        made.prepare()
        return made

    three = replace(settings, rounds=3)
    attempts = {name: attempt(name, lives) for name, lives in {"good": 9, "bad": 2}.items()}
    in_turns(attempts, PROMPT, three, None)
    assert [len(attempt.runs) for attempt in attempts.values()] == [3, 1]
    assert attempts["bad"].failure == "OSError: gone"
    assert calls == ["good", "bad", "good", "bad", "bad", "good", "good"]
    assert not hasattr(attempts["good"].engine, "generate")  # let go of


def test_memory_is_asked_for_before_loading() -> None:
    attempt = Attempt(lambda: (10**15, fails))
    attempt.prepare()
    attempt.start(None, PROMPT, TOKENS)
    assert "loading it needs 1000000.00 GB" in str(attempt.failure)


def test_reads() -> None:
    tied = {"model.embed_tokens.weight": 10, "model.layers.0": 5}
    assert engines.reads(tied) == 15
    assert engines.reads(tied | {"lm_head.weight": 10}) == 15


def test_the_fastest_settings_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(tuning: llama_cpp.Tuning, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        slow = 2.0 if tuning.flash_attention else 1.0
        return {"timings": {"prompt_ms": slow, "predicted_ms": 8.0 / tuning.threads}}

    monkeypatch.setattr(llama_cpp, "serve", lambda path, tuning, *_: tuning)
    monkeypatch.setattr(llama_cpp, "_ask", ask)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert llama_cpp.tune(Path("x"), True, PROMPT) == llama_cpp.Tuning(4, False)


def test_process_starts(pair: Pair, settings: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def seconds(arguments: Sequence[str]) -> float:
        asked.append(list(arguments))
        return {"convert": 0.1, "mlx_lm.generate": 3.0}.get(arguments[0], 2.0)

    monkeypatch.setattr(process, "seconds", seconds)
    found = START(copies.Copies(pair, pair.b, settings.work), settings)
    assert found["rounds"] == 2
    assert found["seconds"]["mlx-lm"]["median"] == 3.0
    assert {name: each["median"] for name, each in found["ratios"].items()} == {
        "mlx-cerebrum": 1.5,
        "mlx-cerebrum, mlx-lm's directory": 1.5,
    }
    assert any("--plan" in words and str(pair.path) in words for words in asked)


def test_profile_counts_what_a_token_reads(pair: Pair) -> None:
    matrices = ("qkv", "o", "gate_up", "down")
    for model in pair.models():
        results = step_profile.measure_short(model, PROMPT, 1)

        def done(phase: str, *kinds: str, found: Results = results) -> float:
            every = [found[phase]["kinds"][kind] for kind in kinds]
            return float(sum(kind["seconds"] * kind["rate"] for kind in every)) * GB

        read = done("decode", *matrices, "attention", "head")
        assert read == pytest.approx(bandwidth.token_bytes(model, len(PROMPT)), rel=0.05)
        for phase in ("decode", "prefill"):
            total = sum(kind["seconds"] for kind in results[phase]["kinds"].values())
            assert total == pytest.approx(results[phase]["total"], rel=0.01)
        blocks = 2 * len(PROMPT) * len(model.config.layer_map) * model.config.block_parameters
        # All but the last position's o and mlp.
        assert 0.85 * blocks < done("prefill", *matrices) < blocks
        assert len(step_profile.text_short(results)) == 2
