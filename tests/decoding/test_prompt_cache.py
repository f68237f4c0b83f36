"""Conversations that go on, are edited and retried, in memory and from disk, as if begun anew."""

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import INTERLEAVED_8, MakeCheckpoint, slow
from safetensors.numpy import save_file
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum import load
from mlx_cerebrum.decoding import prompt_cache as room
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.prompt_cache_file import (
    check_destination,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_cerebrum.decoding.speculative import Speculation, speculation
from mlx_cerebrum.decoding.stream import stream_generate
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.identity import SAMPLES, identity_of
from mlx_cerebrum.weights.opening import open_checkpoint, planned_config
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import Storage, choose_storage

WINDOW = 20
MAP = (0, 1, 2, 1, 2, 3)
SCALES = "{scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.5}, {value: 1}]}"
MAKE_CACHE = Model.make_cache
HERE = {"model weights": "w", "layer plan": "p", "dtype": "float32", "chat template": "t"}


def tiny_model(window: int | None = WINDOW) -> Model:
    raw = tiny_config(num_hidden_layers=4, sliding_window=window, head_dim=32)
    model = Model(ModelConfig.from_dict(raw).with_map(MAP))
    model.load_weights([(k, mx.array(v)) for k, v in tiny_weights(raw, seed=5).items()])
    return model


MODEL = tiny_model()


def text(length: int, seed: int) -> list[int]:
    return tiny_prompt(tiny_config(), length, seed)


@pytest.fixture(autouse=True)
def quick_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers as tight as the tiny window, so that a few dozen tokens leave them behind."""

    def make_cache(model: Model, kv_bits: int | None = None) -> list[WindowedKVCache]:
        window = model.config.sliding_window
        return [WindowedKVCache(window, 2, 4, kv_bits) for _ in model.config.layer_map]

    monkeypatch.setattr(Model, "make_cache", make_cache)
    monkeypatch.setattr(room, "REWORD", 6)


def ask(
    cache: PromptCache, prompt: Sequence[int], most: int, model: Model = MODEL
) -> tuple[list[int], int]:
    """`(answer, prompt tokens computed)`, through the cache."""
    rest = cache.begin(prompt)
    assert list(prompt[len(cache.tokens) :]) == rest
    held(cache)
    steps = generate_step(rest, model, max_tokens=most, cache=cache.cache, prefill_step_size=8)
    answer = list(steps)
    cache.end([*prompt, *answer])
    held(cache)
    return answer, len(rest)


def held(cache: PromptCache) -> None:
    assert {c.offset for c in cache.cache} == {len(cache.tokens)}


def fresh(prompt: Sequence[int], most: int, model: Model = MODEL, bits: int | None = None) -> Any:
    return list(generate_step(prompt, model, max_tokens=most, cache=model.make_cache(bits)))


def last_logits(cache: PromptCache, prompt: Sequence[int]) -> mx.array:
    rest = cache.begin(prompt)
    return MODEL(mx.array([rest]), cache.cache)[0, -1]


@pytest.mark.parametrize("window", [WINDOW, None])
@slow
def test_a_conversation_computes_only_what_is_new(window: int | None) -> None:
    model = tiny_model(window)
    cache, said = PromptCache(model), text(30, seed=1)
    for turn in range(5):
        answer, computed = ask(cache, said, 17, model)
        assert answer == fresh(said, 17, model)
        # The last token that was yielded has not been seen by the model.
        assert computed == (30 if turn == 0 else 1 + 9)
        assert cache.tokens == [*said, *answer][:-1]
        said += answer + text(9, seed=10 + turn)


def test_logits_are_those_of_one_uninterrupted_prompt() -> None:
    cache, said = PromptCache(MODEL), text(70, seed=1)
    said += ask(cache, said, 50)[0] + text(12, seed=2)
    whole = MODEL(mx.array([said]))[0, -1]
    assert mx.allclose(last_logits(cache, said), whole, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.one_in(8)
def test_the_last_question_is_edited_far_past_the_window(bits: int | None) -> None:
    cache, said = PromptCache(MODEL, bits), text(60, seed=1)
    said += ask(cache, said, 25)[0]
    asked = [*said, *text(15, seed=2)]
    answer, _ = ask(cache, asked, 5 * WINDOW)
    assert min(c.rewindable() for c in cache.cache) < 5 * WINDOW  # only the marks hold it
    edited = [*said, *text(11, seed=3)]
    got, computed = ask(cache, edited, 40)
    assert computed == 11
    assert got == fresh(edited, 40, bits=bits)
    # And back again: the first wording was forgotten from where they differ.
    assert ask(cache, asked, 5 * WINDOW) == (answer, 15)


@pytest.mark.parametrize("first", [True, False])
@slow
def test_an_answer_is_tried_again_far_past_the_window(first: bool) -> None:
    cache, said = PromptCache(MODEL), text(60, seed=1)
    if not first:
        said += ask(cache, said, 30)[0] + text(3 * WINDOW, seed=2)
    answer, _ = ask(cache, said, 5 * WINDOW)
    assert ask(cache, said, 5 * WINDOW) == (answer, 1)
    assert ask(cache, said, 9) == (answer[:9], 1)


@slow
def test_the_end_of_a_long_text_is_put_in_other_words() -> None:
    cache, long = PromptCache(MODEL), text(90, seed=1)
    ask(cache, [*long, *text(6, seed=2)], 5 * WINDOW)
    prompt = [*long, *text(5, seed=3)]
    assert ask(cache, prompt, 30) == (fresh(prompt, 30), 5)


@slow
def test_a_prompt_that_differs_in_the_middle() -> None:
    cache, said = PromptCache(MODEL), text(40, seed=1)
    said += ask(cache, said, 60)[0]
    other = [*said[:70], *text(20, seed=2)]
    answer, computed = ask(cache, other, 30)
    assert answer == fresh(other, 30)
    # What was answered there has left the window; the prompt's end, which is marked, is nearest.
    assert computed == 90 - 39
    nothing = [said[0] + 1, *said[1:]]
    assert ask(cache, nothing, 30) == (fresh(nothing, 30), len(said))


def test_turns_close_together_keep_all_points_between() -> None:
    cache, said = PromptCache(MODEL), text(30, seed=1)
    for turn in range(6):
        said += ask(cache, said, 4)[0] + text(4, seed=2 + turn)
    ask(cache, said, 10)
    for back in range(1, WINDOW, 4):
        prompt = [*said[:-back], *text(1, seed=50 + back)]
        assert ask(cache, prompt, 3) == (fresh(prompt, 3), 1), back


def test_an_empty_or_repeated_prompt_leaves_a_token_to_compute() -> None:
    cache = PromptCache(MODEL)
    assert cache.begin([]) == []
    assert cache.begin([7]) == [7]
    cache.end([])
    prompt = text(10, seed=1)
    ask(cache, prompt, 3)
    assert cache.begin(prompt) == prompt[-1:]


def test_a_request_that_is_cut_short_stays_usable() -> None:
    cache, prompt = PromptCache(MODEL), text(50, seed=1)

    def interrupt(done: int, total: int) -> None:
        if done >= 24:
            raise KeyboardInterrupt

    steps = generate_step(
        cache.begin(prompt), MODEL, cache=cache.cache, prefill_step_size=8, progress=interrupt
    )
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    cache.end(prompt)
    assert cache.tokens == prompt[:24]
    assert ask(cache, prompt, 30) == (fresh(prompt, 30), 26)


def test_positions_that_can_go_back_differently_far_agree() -> None:
    cache, said = PromptCache(MODEL, max_bytes=0), text(66, seed=1)
    asked = [*said, *text(60, seed=2)]
    rest = cache.begin(asked)
    for position, c in enumerate(cache.cache):
        for mark in (30, 60) if position % 2 else (30, 45):
            c.mark(mark)
    list(generate_step(rest, MODEL, max_tokens=2, cache=cache.cache, prefill_step_size=8))
    cache.end(asked)
    assert [c.reachable(66) for c in cache.cache[:2]] == [45, 60]
    assert cache.cache[1].reachable(45) < 45
    prompt = [*said, *text(5, seed=3)]
    assert ask(cache, prompt, 9) == (fresh(prompt, 9), 71 - 30)


@slow
def test_with_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(self: Speculation, tokens: Sequence[int], most: int) -> Any:
        return ("model", "model", min(4, most)) if most else None

    monkeypatch.setattr(Speculation, "choose", choose)
    monkeypatch.setattr(Model, "make_cache", MAKE_CACHE)  # as many drafts as can be taken back
    cache, said = PromptCache(MODEL), text(200, seed=1)
    for turn in range(2):
        rest, held = cache.begin(said), len(cache.tokens)
        guesses = speculation(MODEL, [MODEL.view((0, 1, 2, 3))])
        steps = generate_step(
            rest, MODEL, speculation=guesses, max_tokens=90, cache=cache.cache, history=said[:held]
        )
        answer = list(steps)
        cache.end([*said, *answer])
        assert answer == fresh(said, 90)
        assert turn == 0 or len(rest) == 10
        said += answer + text(9, seed=5 + turn)
    assert sum(guesses.rounds.values()) < 90


@pytest.mark.parametrize("windows", [0, 1, 2, None])
@pytest.mark.one_in(8)
def test_memory_is_bounded_all_the_time(windows: int | None) -> None:
    """Long turns, each of which would keep two windows of its own."""
    entry = MODEL.config.kv_values_per_token() * 4
    live = WINDOW - 1 + 2 + 9
    cache, said = PromptCache(MODEL), text(5, seed=1)
    if windows is not None:
        cache._most = windows * WINDOW  # as max_bytes sets it
    for turn in range(3):
        said += text(2 * WINDOW, seed=turn)
        steps = generate_step(
            cache.begin(said), MODEL, max_tokens=50, cache=cache.cache, prefill_step_size=8
        )
        answer = []
        for token in steps:
            answer.append(token)
            assert cache.nbytes <= (live + cache._most) * entry
        cache.end([*said, *answer])
        assert cache.nbytes == sum(c.nbytes for c in cache.cache)
        kept = cache.nbytes - sum(c.keys.nbytes + c.values.nbytes for c in cache.cache)
        assert (kept > 0) == (windows != 0)
        said += answer


def test_marks_can_be_forgone_and_a_bound_has_room_for_the_rest() -> None:
    assert PromptCache(MODEL, max_bytes=0)._most == 0
    assert PromptCache(tiny_model(None))._most == 0
    full = MODEL.config.kv_values_per_token() * 4
    live = WINDOW - 1 + 64 + prefill_step() + 1
    assert PromptCache(MODEL, max_bytes=(live + 33) * full)._most == 33
    # 8 bits, and a scale and a bias of 32 for each 32 values: 40 for 128 bytes.
    assert PromptCache(MODEL, 8, max_bytes=(live + 33) * full * 40 // 128)._most == 33


def test_streaming_says_how_much_was_cached(checkpoint: MakeCheckpoint) -> None:
    model, tokenizer = load(checkpoint(sliding_window=WINDOW), dtype="float32")
    cache = PromptCache(model)
    first = list(stream_generate(model, tokenizer, "Hello", max_tokens=8, prompt_cache=cache))
    again = list(stream_generate(model, tokenizer, "Hello", max_tokens=8, prompt_cache=cache))
    assert [r.token for r in first] == [r.token for r in again]
    assert (first[-1].cached_tokens, again[-1].cached_tokens) == (0, first[0].prompt_tokens - 1)


# On disk


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "talk.safetensors"


@pytest.mark.parametrize(("bits", "length"), [(None, 3), (None, 60), (8, 60), (4, 60)])
@pytest.mark.one_in(8)
def test_a_saved_conversation_goes_on_as_if_never_stopped(
    file: Path, bits: int | None, length: int
) -> None:
    cache, said = PromptCache(MODEL, bits), text(length, seed=1)
    said += ask(cache, said, length)[0]
    save_prompt_cache(cache, file, HERE)
    loaded = load_prompt_cache(file, MODEL, HERE, bits)
    assert loaded.tokens == cache.tokens
    for turn in range(2):
        said += text(7, seed=2 + turn)
        expected = ask(cache, said, 25)
        assert ask(loaded, said, 25) == expected
        said += expected[0]
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_saved_conversation_can_be_edited_past_the_window(file: Path) -> None:
    cache, long = PromptCache(MODEL), text(90, seed=1)
    ask(cache, [*long, *text(6, seed=2)], WINDOW - 1)
    save_prompt_cache(cache, file, HERE)
    for seed in (3, 4):  # what was loaded can be saved
        prompt = [*long, *text(5, seed)]
        loaded = load_prompt_cache(file, MODEL, HERE)
        assert ask(loaded, prompt, 12) == (fresh(prompt, 12), 5)
        save_prompt_cache(loaded, file, HERE)
    assert loaded.nbytes <= 2 * cache.nbytes


def test_an_empty_conversation_is_saved_too(file: Path) -> None:
    save_prompt_cache(PromptCache(MODEL), file, HERE)
    prompt = text(30, seed=1)
    assert ask(load_prompt_cache(file, MODEL, HERE), prompt, 9) == (fresh(prompt, 9), 30)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@slow
def test_every_bit_comes_back(file: Path, dtype: mx.Dtype) -> None:
    model = tiny_model()
    model.set_dtype(dtype)
    cache = PromptCache(model)
    ask(cache, text(90, seed=1), 9, model)
    save_prompt_cache(cache, file, HERE)
    loaded = load_prompt_cache(file, model, HERE)
    for one, other in zip(cache.cache, loaded.cache, strict=True):
        whole = one.whole()
        assert (one.offset, whole.start) == (other.offset, other.whole().start)
        assert other.whole().keys.dtype == dtype
        assert mx.array_equal(whole.keys, other.whole().keys)
        assert mx.array_equal(whole.values, other.whole().values)


def saved(file: Path, bits: int | None = None) -> PromptCache:
    cache = PromptCache(MODEL, bits)
    ask(cache, text(50, seed=1), 9)
    save_prompt_cache(cache, file, HERE)
    return cache


def refused(what: str, action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError, match=re.escape(what)) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", HERE)
def test_another_identity_is_refused_by_name(file: Path, name: str) -> None:
    saved(file)
    other = HERE | {name: "changed"}
    message = refused(name, lambda: load_prompt_cache(file, MODEL, other))
    assert f"another {name} ({HERE[name]}, here changed)" in message
    assert str(file) in message
    assert not any(same in message for same in HERE if same != name)


def test_other_kv_bits_are_refused(file: Path) -> None:
    saved(file)
    refused("kv-bits (none, here 8)", lambda: load_prompt_cache(file, MODEL, HERE, 8))
    saved(file, 4)
    refused("kv-bits (4, here 8)", lambda: load_prompt_cache(file, MODEL, HERE, 8))


def test_another_model_under_the_same_identity_is_refused(file: Path) -> None:
    saved(file)
    refused(
        "6 positions, the model 4", lambda: load_prompt_cache(file, MODEL.view((0, 1, 2, 3)), HERE)
    )
    wide = Model(replace(MODEL.config, head_dim=64))
    refused("keys.0 is", lambda: load_prompt_cache(file, wide, HERE))
    half = tiny_model()
    half.set_dtype(mx.float16)
    refused("keys.0 is", lambda: load_prompt_cache(file, half, HERE))
    refused("lacks entries", lambda: load_prompt_cache(file, tiny_model(None), HERE))
    few = Model(replace(MODEL.config, vocab_size=9))
    refused("tokens the model has not", lambda: load_prompt_cache(file, few, HERE))


def test_no_file_and_foreign_files_are_refused(file: Path, tmp_path: Path) -> None:
    refused("talk.safetensors", lambda: load_prompt_cache(file, MODEL, HERE))
    save_file({"weight": np.zeros(3, np.float32)}, file)
    before = file.read_bytes()
    refused("not a prompt cache", lambda: load_prompt_cache(file, MODEL, HERE))
    refused("not a prompt cache", lambda: save_prompt_cache(PromptCache(MODEL), file, HERE))
    refused("not a prompt cache", lambda: check_destination(file))
    assert file.read_bytes() == before
    file.write_text("no safetensors at all")
    refused("talk.safetensors", lambda: load_prompt_cache(file, MODEL, HERE))
    refused("talk.safetensors", lambda: save_prompt_cache(PromptCache(MODEL), file, HERE))
    file.unlink()
    file.mkdir()
    refused("talk.safetensors", lambda: load_prompt_cache(file, MODEL, HERE))
    refused("talk.safetensors", lambda: save_prompt_cache(PromptCache(MODEL), file, HERE))
    refused("must be named", lambda: check_destination(tmp_path / "talk.bin"))
    refused("does not exist", lambda: check_destination(tmp_path / "no" / "talk.safetensors"))
    refused(
        "does not exist",
        lambda: save_prompt_cache(PromptCache(MODEL), tmp_path / "no" / "a.safetensors", HERE),
    )


def test_truncated_at_any_length(file: Path) -> None:
    saved(file)
    whole = file.read_bytes()
    for length in [0, 4, 8, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused("talk.safetensors", lambda: load_prompt_cache(file, MODEL, HERE))
    file.write_bytes(whole + b"\0")
    refused("talk.safetensors", lambda: load_prompt_cache(file, MODEL, HERE))


def test_any_flipped_bit_is_refused(file: Path) -> None:
    saved(file)
    whole = file.read_bytes()
    for at in [*range(0, 200, 7), *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        refused("talk.safetensors", lambda: load_prompt_cache(file, MODEL, HERE))


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The file with another header, and the checksum that goes with it."""
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length : -4]
    change(header)
    changed = json.dumps(header).encode()
    changed = struct.pack("<Q", len(changed)) + changed + data
    file.write_bytes(changed + struct.pack("<I", zlib.crc32(changed)))


def reshape(header: dict[str, Any]) -> None:
    header["keys.3"]["shape"] = header["keys.3"]["shape"][::-1]


def rename(header: dict[str, Any]) -> None:
    header["keys.9"] = header.pop("keys.3")


Change = Callable[[dict[str, Any]], None]


def metadata(**entries: Any) -> Change:
    return lambda header: header["__metadata__"].update(entries)


class Made(NamedTuple):
    change: Change
    said: str


MADE = {
    "shape": Made(reshape, "keys.3 is"),
    "name": Made(rename, "keys.3 is None"),
    "version": Made(metadata(version="2"), "has format 2, not 1"),
    "no version": Made(lambda header: header["__metadata__"].pop("version"), "format None"),
    "number": Made(metadata(dtype=3), "not text"),
    "marks": Made(metadata(marks="[[]]"), "marks"),
    "marks that are not there": Made(metadata(marks="7"), "marks"),
    "infinite marks": Made(metadata(marks="[Infinity]"), "marks"),
    "marks of NaN": Made(metadata(marks="[NaN, 1e999]"), "marks"),
    "nested marks": Made(metadata(marks="[" * 100_000), "marks"),
    "nested marks that end": Made(metadata(marks="[" * 900 + "]" * 900), "marks"),
    "truths for marks": Made(metadata(marks="[true]"), "marks"),
    "marks of 5000 digits": Made(metadata(marks=f"[{'9' * 5000}]"), "marks"),
    "an object of marks": Made(metadata(marks='{"1": 1}'), "marks"),
    "no marks": Made(lambda header: header["__metadata__"].pop("marks"), "marks"),
    "no metadata": Made(lambda header: header.pop("__metadata__"), "not a prompt cache"),
    "metadata is a list": Made(lambda h: h.update(__metadata__=[1]), "not text by name"),
    "tokens": Made(lambda header: header["tokens"].update(dtype="F32"), "no tokens"),
    "starts": Made(lambda header: header["starts"].update(dtype="U32"), "no starts"),
    "checksum": Made(lambda header: header["checksum"].update(dtype="F32"), "no checksum"),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.one_in(10)
def test_a_header_that_is_not_ours_is_refused(file: Path, made: Made) -> None:
    saved(file)
    rewrite(file, lambda header: None)
    load_prompt_cache(file, MODEL, HERE)  # what is not changed is fine
    rewrite(file, made.change)
    refused(made.said, lambda: load_prompt_cache(file, MODEL, HERE))


@pytest.mark.timeout(60)
@slow
def test_marks_of_no_use_cost_nothing(file: Path) -> None:
    """Out of reach, or a million times the same."""
    saved(file)
    kept = load_prompt_cache(file, MODEL, HERE).cache[0].marks
    assert kept
    useless = [-1, 10**30, 2**63, *range(10**6, 2 * 10**6)]
    rewrite(file, metadata(marks=json.dumps([*kept * 10_000, *useless])))
    assert load_prompt_cache(file, MODEL, HERE).cache[0].marks == kept


def test_more_tokens_than_positions_are_refused(file: Path) -> None:
    saved(file)
    short = Model(replace(MODEL.config, max_position_embeddings=3))
    refused("the model 3 at most", lambda: load_prompt_cache(file, short, HERE))


def test_stopped_while_writing_the_old_file_stays(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = saved(file)
    before = file.read_bytes()
    ask(cache, text(30, seed=2), 9)

    def stop(kind: type[BaseException], *arguments: Any) -> Callable[..., None]:
        def raising(*_: Any) -> None:
            raise kind(*arguments)

        return raising

    for name, action in (
        ("fsync", stop(KeyboardInterrupt)),
        ("fsync", stop(OSError, 28, "No space left on device")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, action)
            with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
                save_prompt_cache(cache, file, HERE)
        assert caught.type is KeyboardInterrupt or "No space left" in str(caught.value)
        assert file.read_bytes() == before
        assert [p.name for p in file.parent.iterdir()] == [file.name]
    (file.parent / ".talk.partial.safetensors").write_bytes(b"of a run that was killed")
    save_prompt_cache(cache, file, HERE)
    assert load_prompt_cache(file, MODEL, HERE).tokens == cache.tokens
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_disk_without_room_is_refused_before_writing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = saved(file)
    before, size = file.read_bytes(), file.stat().st_size

    class Usage(NamedTuple):
        free: int

    for free, fits in ((size + 2**20, True), (size + 2**20 - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free))
        if fits:
            save_prompt_cache(cache, file, HERE)
            assert file.read_bytes() == before
        else:
            refused("of disk", lambda: save_prompt_cache(cache, file, HERE))
            assert file.read_bytes() == before


def test_two_runs_do_not_write_one_file(file: Path) -> None:
    cache = saved(file)
    with replacing(file, file.with_name(f".{file.stem}.partial.safetensors")) as writing:
        writing.write(b"first")
        refused("another run is writing", lambda: save_prompt_cache(cache, file, HERE))
    assert file.read_bytes() == b"first"


def test_a_link_is_followed(file: Path, tmp_path: Path) -> None:
    cache = saved(file)
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    ask(cache, text(30, seed=2), 9)
    save_prompt_cache(cache, link, HERE)
    assert link.is_symlink()
    assert load_prompt_cache(file, MODEL, HERE).tokens == cache.tokens


# What it was made with


class Opened(NamedTuple):
    config: ModelConfig
    storage: Storage
    said: dict[str, str]


def described(path: Path, template: str = "t", **changes: Any) -> Opened:
    checkpoint = open_checkpoint(path)
    config = planned_config(checkpoint.config, changes.get("plan"), changes.get("window"))
    storage = choose_storage(checkpoint, changes.get("packing"), changes.get("dtype", "float32"))
    return Opened(config, storage, identity_of(checkpoint, config, storage, template))


def differing(one: Opened, other: Opened) -> set[str]:
    assert one.said.keys() == other.said.keys()
    return {name for name, value in one.said.items() if other.said[name] != value}


def test_each_setting_is_told_apart(checkpoint: MakeCheckpoint, plan_file: Any) -> None:
    path = checkpoint(sliding_window=WINDOW, hidden_size=64)
    base = described(path)
    assert not differing(base, described(path))
    assert all("\n" not in value and len(value) < 60 for value in base.said.values())
    plan = LayerPlan.from_file(plan_file(INTERLEAVED_8))
    scaled = LayerPlan.from_file(plan_file(INTERLEAVED_8, SCALES))
    assert differing(base, described(path, plan=plan)) == {"layer plan"}
    assert differing(described(path, plan=scaled), described(path, plan=plan)) == {"layer plan"}
    assert differing(base, described(path, window=WINDOW + 1)) == {"window"}
    assert differing(base, described(path, window=0)) == {"window"}
    assert differing(base, described(path, dtype="float16")) == {"dtype"}
    four = described(path, packing=Packing(4, 32))
    assert differing(base, four) == {"quantization"}
    assert differing(described(path, packing=Packing(8, 32)), four) == {"quantization"}
    assert differing(base, described(path, "{{ messages }}")) == {"chat template"}


def test_weights_are_told_apart_and_their_place_is_not(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = checkpoint()
    base = described(path)
    moved = path.rename(tmp_path / "elsewhere")
    assert not differing(base, described(moved))
    assert not differing(base, described(checkpoint("sharded", shards=3)))
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-40] ^= 1  # in the last tensor, which is small: all of it is read
    weights.write_bytes(data)
    assert differing(base, described(moved)) == {"model weights"}
    other = checkpoint("other", rms_norm_eps=1e-6)
    assert differing(base, described(other)) == {"model config"}
    half = checkpoint("half", dtype="float16")
    assert differing(base, described(half)) == {"model weights"}


def test_every_array_is_sampled_throughout(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = checkpoint(), []
    pread = os.pread

    def counted(descriptor: int, size: int, at: int) -> bytes:
        read.append((at, size))
        return pread(descriptor, size, at)

    monkeypatch.setattr(os, "pread", counted)
    described(path)
    found = open_checkpoint(path)
    extents = [e for n in found.shapes for e in found.extents(n.rpartition(".")[0]).values()]
    for extent in extents:
        inside = [(a, n) for a, n in read if extent.offset <= a < extent.offset + extent.nbytes]
        assert len(inside) == SAMPLES
        assert min(inside)[0] == extent.offset
        assert sum(max(inside)) == extent.offset + extent.nbytes
    assert len(read) == len(extents) * SAMPLES
