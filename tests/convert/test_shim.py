"""Stock mlx-lm runs a folded directory through the shim: our tokens, weights stored once."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint, mistral_model, parameters, slow
from mlx_lm.convert import convert as mlx_lm_convert
from mlx_lm.generate import generate_step as mlx_lm_generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, load_prompt_cache, save_prompt_cache
from mlx_lm.utils import get_total_parameters, load_tokenizer
from mlx_lm.utils import load_model as mlx_lm_load

from convert.layout import SHIM, Options
from convert.pipeline import convert
from mlx_cerebrum import load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import read_json
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.quantize import Packing

WINDOW = 12  # of the tiny checkpoints
POSITIONS = 12  # of the plan, over 8 blocks
PROMPT = [5, 80, 44, 120, 7, 99, 201, 5, 17, 42, 9, 30, 77, 150, 3, 6]
LONG = "a text longer than any window of twelve, " * 3
SCALE = "{scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.7071}, {value: 1.0}]}"
Folded = Callable[..., Path]


@pytest.fixture
def folded(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """`folded(scale="", source={}, **options of convert)`: a folded directory with the shim."""

    def make(scale: str = "", source: dict[str, Any] | None = None, **options: Any) -> Path:
        plan = resolve(str(plan_file(scale=scale)))
        out = tmp_path / "folded"
        wanted = Options(plan=plan, shim=True, **options)
        convert(open_checkpoint(checkpoint(**(source or {}))), out, wanted)
        return out

    return make


def stock(path: Path) -> Any:
    return mlx_lm_load(path, trust_remote_code=True)[0]


def ours(path: Path, prompt: list[int] = PROMPT, count: int = 48, **options: Any) -> list[int]:
    model, _ = load(path, dtype="float32", **options)
    return list(generate_step(prompt, model, max_tokens=count))


def theirs(model: Any, prompt: list[int] = PROMPT, count: int = 48, **options: Any) -> list[int]:
    steps = mlx_lm_generate_step(mx.array(prompt), model, max_tokens=count, **options)
    return [token for token, _ in steps]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": Packing(4, 32)},
        pytest.param({"packing": Packing(4, 32, "mxfp4")}, marks=pytest.mark.long),
        {"scale": SCALE},
        pytest.param({"window": 0}, marks=pytest.mark.long),
        pytest.param({"source": {"tie_word_embeddings": True}}, marks=pytest.mark.long),
    ],
    ids=["dense", "4-bit", "mxfp4", "scaled", "windowless", "tied"],
)
@pytest.mark.one_in(4)
def test_same_tokens_as_ours_past_the_window(folded: Folded, options: dict[str, Any]) -> None:
    path = folded(**options)
    expected, model = ours(path), stock(path)
    assert len(PROMPT) + len(expected) > 5 * WINDOW
    assert theirs(model) == expected
    assert theirs(model, prefill_step_size=5) == expected  # chunks that end inside a window
    ids = mx.array([PROMPT * 3])
    assert mx.allclose(model(ids), load(path, dtype="float32")[0](ids), atol=1e-5)  # no cache


@pytest.mark.long
def test_the_tokens_compared_depend_on_window_map_and_scales(folded: Folded) -> None:
    path = folded(scale=SCALE)
    expected = theirs(stock(path))
    raw = read_json(path / "config.json")
    layer_map = raw["layer_map"]
    changes: list[dict[str, Any]] = [
        {"sliding_window": WINDOW + 1},
        {"sliding_window": None},
        {"layer_map": [*layer_map[:4], layer_map[5], layer_map[4], *layer_map[6:]]},
        {"residual_scales": None},
        {"residual_scales": [pair[::-1] for pair in raw["residual_scales"]]},
    ]
    for change in changes:
        (path / "config.json").write_text(json.dumps(raw | change))
        assert theirs(stock(path)) != expected, change


@pytest.mark.parametrize("window", [WINDOW, 0])
def test_weights_belong_to_blocks_and_caches_to_positions(folded: Folded, window: int) -> None:
    path = folded(window=window)
    model, (reference, _) = stock(path), load(path)
    assert parameters(model).keys() == open_checkpoint(path).shapes.keys()  # each once, as stored
    assert get_total_parameters(model) == reference.config.stored_parameters
    # mlx-lm splits a prompt cache shared with a draft model at this length.
    assert len(model.layers) == POSITIONS
    caches = model.make_cache()
    assert len(caches) == POSITIONS
    if window:
        assert {type(cache) for cache in caches} == {RotatingKVCache}
        assert {(cache.max_size, cache.keep) for cache in caches} == {(WINDOW, 0)}
    else:
        assert {type(cache) for cache in caches} == {KVCache}


@slow
def test_mlx_lm_converts_it_with_bits_by_module(folded: Folded, tmp_path: Path) -> None:
    """Quantized by mlx-lm itself: still folded, still with the shim, and ours reads it too."""

    def bits(path: str, _: Any) -> bool | dict[str, Any]:
        eight = "down_proj" in path or path == "lm_head"
        return {"bits": 8, "group_size": 32} if eight else "layers.3." not in path

    path, out = folded(), tmp_path / "mixed"
    mlx_lm_convert(
        str(path), str(out), quantize=True, q_group_size=32, quant_predicate=bits,
        trust_remote_code=True,
    )  # fmt: skip
    model = stock(out)
    assert model.model.layers[2].mlp.down_proj.bits == 8
    assert model.model.layers[2].mlp.up_proj.bits == 4
    assert not hasattr(model.model.layers[3].mlp.up_proj, "bits")
    assert get_total_parameters(model) == load(path)[0].config.stored_parameters
    assert (out / SHIM).read_bytes() == (path / SHIM).read_bytes()
    assert theirs(model) == ours(out)


@slow
def test_a_saved_prompt_cache_goes_on_past_the_window(folded: Folded, tmp_path: Path) -> None:
    path, file = folded(), str(tmp_path / "cache.safetensors")
    model = stock(path)
    cache = model.make_cache()
    for _ in mlx_lm_generate_step(mx.array(PROMPT), model, max_tokens=0, prompt_cache=cache):
        pass
    save_prompt_cache(file, cache)
    rest = [9, 8, 7]
    got = theirs(model, rest, prompt_cache=load_prompt_cache(file))
    assert got == ours(path, PROMPT + rest)
    with pytest.raises(ValueError, match="longer than"):  # another model's cache
        theirs(model, rest, prompt_cache=load_prompt_cache(file) + model.make_cache())


@slow
def test_mlx_lm_reads_the_same_token_ids(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    """With a tokenizer class whose own rules differ from those of its tokenizer.json."""
    source, out = checkpoint(vocab_size=32000), tmp_path / "folded"
    (source / "tokenizer.json").unlink()
    shutil.copyfile(mistral_model(), source / "tokenizer.model")
    config = read_json(source / "tokenizer_config.json") | {"tokenizer_class": "LlamaTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    convert(open_checkpoint(source), out, Options(plan=resolve(str(plan_file())), shim=True))
    stock_tokenizer, (_, tokenizer) = load_tokenizer(out), load(out)
    for text in ("The capital of France is", "  two  spaces", "a\n\tb", "Zürich 東京 🙂 x"):
        assert stock_tokenizer.encode(text) == tokenizer.encode(text)
    kept = read_json(out / "tokenizer_config.json") | {"tokenizer_class": "LlamaTokenizer"}
    assert kept == config


# The stock command lines, as processes of their own.

ENV = os.environ | {"HF_HUB_OFFLINE": "1"}


@slow
def test_mlx_lm_generate(folded: Folded) -> None:
    path = folded()
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(path), "--prompt", LONG]
    command += ["--max-tokens", "48", "--ignore-chat-template", "--verbose", "False"]
    done = subprocess.run([*command, "--trust-remote-code"], capture_output=True, env=ENV)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    _, tokenizer = load(path)
    expected = ours(path, tokenizer.encode(LONG, add_bos=False))  # tokenizer.json adds none
    assert done.stdout.decode().removesuffix("\n") == tokenizer.decode(expected)


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """`mlx_lm.server` on a free port; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(path), "--port", str(port)]
    log = path.parent / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--trust-remote-code"], stderr=file, env=ENV)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        process.terminate()
        process.wait()


def ask(address: str, prompt: str) -> tuple[list[int], int]:
    """The tokens a greedy request gets, and how many of its prompt were cached already."""
    body = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "logprobs": True}
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    tokens = [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]
    return tokens, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.long
def test_mlx_lm_server_with_requests_at_once_and_cached_prompts(folded: Folded) -> None:
    path = folded(packing=Packing(4, 32))
    model, tokenizer = load(path, dtype="float32")

    def expected(prompt: str) -> list[int]:
        ids = tokenizer.encode(prompt, add_bos=False)
        return list(generate_step(ids, model, max_tokens=48))

    prompts = ["Hi", "Hello there", "x" * WINDOW, "y" * (WINDOW + 1), LONG]
    with serving(path) as address:
        with ThreadPoolExecutor(len(prompts)) as pool:  # lengths around the window, one batch
            answers = list(pool.map(lambda prompt: ask(address, prompt)[0], prompts))
        assert answers == [expected(prompt) for prompt in prompts]
        longer = "Hello there, and more than the window holds"
        tokens, cached = ask(address, longer)
        assert tokens == expected(longer)
        assert cached > 0
        tokens, _ = ask(address, LONG[:-20])  # a prefix of what a rotated cache has seen
        assert tokens == expected(LONG[:-20])


# What the file is, and what is refused.


def test_the_file_stands_alone(folded: Folded) -> None:
    text = (folded() / SHIM).read_text()
    assert "Apache-2.0" in text.splitlines()[0]
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(str(node.module).split(".")[0])
    assert roots == {"dataclasses", "typing", "mlx", "mlx_lm"}


def test_ours_never_runs_it(folded: Folded) -> None:
    path = folded()
    expected = ours(path, count=8)
    (path / SHIM).write_text("raise SystemExit('the shim ran')\n")
    with pytest.raises(SystemExit, match="the shim ran"):
        stock(path)
    assert ours(path, count=8) == expected
    (path / SHIM).unlink()
    assert ours(path, count=8) == expected


def test_mlx_lm_asks_for_trust_first(folded: Folded) -> None:
    with pytest.raises(ValueError, match="trust"):
        mlx_lm_load(folded())


def test_the_config_says_what_mlx_lm_would_guess(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Keys that may be absent, as our reader takes them and as mlx-lm does not."""
    source = checkpoint(num_attention_heads=16, num_key_value_heads=8, head_dim=4)
    raw = read_json(source / "config.json")
    for key in ("rms_norm_eps", "rope_theta", "sliding_window", "tie_word_embeddings", "head_dim"):
        del raw[key]
    del raw["num_key_value_heads"]
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (source / "config.json").write_text(json.dumps(raw))
    plan = resolve(str(plan_file()))
    convert(open_checkpoint(source), tmp_path / "f", Options(plan=plan, shim=True))
    written = read_json(tmp_path / "f" / "config.json")
    assert written["model_file"] == SHIM
    assert written["rms_norm_eps"] == 1e-6
    assert written["rope_theta"] == 5000.0
    assert written["sliding_window"] == 4096
    assert written["tie_word_embeddings"] is False
    assert written["head_dim"] == 4
    assert written["num_key_value_heads"] == 8


def test_a_plain_directory_needs_no_shim(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain mistral") as refused:
        convert(open_checkpoint(checkpoint()), tmp_path / "f", Options(shim=True))
    assert "\n" not in str(refused.value)
