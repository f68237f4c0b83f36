"""Tiny checkpoints, made where a test wants them."""

import gc
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from tiny import Weights, tiny_config, tiny_weights
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.hub import DEMO_COMMAND, demo_path

# Started in the background or by nohup, programs would inherit signals as ignored. What is caught
# here is theirs by default, and the run itself still outlives its terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _signum in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, lambda signum, frame: None)

# Each worker fills one core: a second thread of its BLAS would only take another's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# So is MLX's own: each operation is handed to it, which costs most from one core to another. Where
# there are no more cores than workers, each worker keeps to one, with all that it starts.
if _worker := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"):
    _workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    _cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if 0 < len(_cores) <= _workers:
        os.sched_setaffinity(0, {_cores[int(_worker) % len(_cores)]})


# The shelf of whoever runs the suite is not the tests': theirs is a folder that is not there.
os.environ["MLX_CEREBRUM_MODELS"] = os.devnull + "/models"


# For tests that take over half a second each: one in sixteen of them all.
slow = pytest.mark.one_in(16)


@pytest.hookimpl(tryfirst=True)  # before `-m` leaves any out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases that share a mark `one_in(n)`, each n-th is quick and the others are long. Where
    pytest-randomly has shuffled them, a run draws its own: its seed gives the same again."""
    cases: Counter[int] = Counter()
    for item in items:
        if mark := item.get_closest_marker("one_in"):
            if cases[id(mark)] % mark.args[0]:
                item.add_marker(pytest.mark.long)
            cases[id(mark)] += 1


def pytest_collection_finish() -> None:
    """What is held to the end of the run, thousands of tests, is not garbage to look for."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _the_same_draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn without a seed is a test's own, and the same in each run of it."""
    own = Random(request.node.nodeid)
    mx.random.seed(own.getrandbits(32))
    monkeypatch.setattr("secrets.randbits", own.getrandbits)


def resting() -> int:
    """Bytes of live arrays, once those of other tests are gone; the peak is counted from here."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def parameters(model: Model) -> dict[str, mx.array]:
    """Every array of a model by name, a fused matrix under its fused name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def config_of(path: Path) -> dict[str, Any]:
    """A directory's config.json."""
    raw: dict[str, Any] = json.loads((path / "config.json").read_text())
    return raw


def tensors(path: Path) -> dict[str, mx.array]:
    """Every tensor of a directory's safetensors files."""
    found: dict[str, mx.array] = {}
    for file in sorted(path.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= loaded
    return found


MakeCheckpoint = Callable[..., Path]
INTERLEAVED_8 = "0-4,2-6,4-8"  # 12 positions over 8 blocks
SMALL = {"num_hidden_layers": 8, "vocab_size": 260}


def byte_tokenizer(directory: Path) -> None:
    """A `tokenizer.json` of the 256 bytes plus <s>, </s> and <unk>, which adds BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(
    directory: Path, config: dict[str, Any], weights: Weights, shards: int = 1
) -> Path:
    """A Hugging Face directory: config, tokenizer, one or several safetensors files."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer(directory)
    if shards == 1:
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {k: v for i, (k, v) in enumerate(weights.items()) if i % shards == shard}
        save_file(part, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """`checkpoint(name, shards=1, dtype=np.float32, **config)` writes an 8-block model."""

    def make(
        name: str = "source", shards: int = 1, dtype: Any = np.float32, **changes: Any
    ) -> Path:
        config = tiny_config(**(SMALL | {"torch_dtype": np.dtype(dtype).name} | changes))
        weights = {k: v.astype(dtype) for k, v in tiny_weights(config, seed=3).items()}
        return write_checkpoint(tmp_path / name, config, weights, shards)

    return make


def plan_yaml(ranges: str, scale: str = "", dtype: str | None = None) -> str:
    """mergekit YAML for `"0-4,2-6"`, half-open; `scale` is a `parameters:` flow mapping."""
    lines = ["merge_method: passthrough", *([f"dtype: {dtype}"] if dtype else []), "slices:"]
    for part in ranges.split(","):
        start, end = part.split("-")
        lines += ["- sources:", "  - model: source", f"    layer_range: [{start}, {end}]"]
        lines += [f"    parameters: {scale}"] if scale else []
    return "\n".join(lines) + "\n"


@pytest.fixture
def plan_file(tmp_path: Path) -> Callable[..., Path]:
    def make(ranges: str = INTERLEAVED_8, scale: str = "", dtype: str | None = None) -> Path:
        path = tmp_path / "plan.yml"
        path.write_text(plan_yaml(ranges, scale, dtype))
        return path

    return make


def mistral_model() -> Path:
    """Mistral's real 32000-piece tokenizer.model. `make test` puts it beside the environment's
    packages: where transformers finds the package it comes from, it wants to use it."""
    data = Path(sys.prefix) / "test-data"
    found = data / "mistral_common" / "data" / "tokenizer.model.v1"
    if not found.exists():
        pytest.fail(f"needs: pip install --no-deps --target {data} mistral-common==1.13.1")
    return found


@pytest.fixture(scope="session")
def demo() -> Path:
    """The trained demo model's file. `make test` installs it."""
    try:
        return demo_path()
    except Exception as error:
        pytest.fail(f"{error}; or run the suite with: make test ({DEMO_COMMAND})")
