"""Loading, converting and verifying agree on what is sound, whatever was done to a checkpoint."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint
from damage import flip, hub_copy
from safetensors.numpy import load_file, save_file

from convert.__main__ import main as convert
from convert.verify import verify
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.weights.opening import load_tokenizer, open_checkpoint
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX

FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
WEIGHT = "model.layers.3.mlp.up_proj.weight"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
Change = Callable[[Path], object]


def edit(name: str, **changes: Any) -> Change:
    """Keys of a JSON file set, or removed with `...`."""

    def change(path: Path) -> None:
        raw = json.loads((path / name).read_text()) if (path / name).exists() else {}
        kept = {k: v for k, v in (raw | changes).items() if v is not ...}
        (path / name).write_text(json.dumps(kept))

    return change


def indexed(**changes: Any) -> Change:
    """The index's weight_map changed likewise, `_` standing for a dot."""

    def change(path: Path) -> None:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        renamed = {name.replace("__", "."): file for name, file in changes.items()}
        kept = {k: v for k, v in (weight_map | renamed).items() if v is not ...}
        edit(INDEX, weight_map=kept)(path)

    return change


def tensors(change: Callable[[dict[str, Any]], object], file: str = FIRST) -> Change:
    def rewrite(path: Path) -> None:
        found: dict[str, Any] = dict(load_file(path / file))
        change(found)
        save_file(found, path / file, {"format": "pt"})

    return rewrite


def written(name: str, data: bytes | str) -> Change:
    return lambda path: (path / name).write_bytes(data.encode() if isinstance(data, str) else data)


def copied(name: str, to: str) -> Change:
    return lambda path: (path / to).write_bytes((path / name).read_bytes())


def removed(name: str) -> Change:
    return lambda path: (path / name).unlink()


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


def first_of(found: dict[str, Any]) -> str:
    return next(name for name in found if name.endswith("up_proj.weight"))


def replaced(value: Any) -> Change:
    return tensors(lambda found: found.update({first_of(found): value}))


PLACES = {"model__norm__weight": ...}
SOUND: dict[str, Change] = {
    "as it is": lambda path: None,
    "an old shard": copied(FIRST, "model-00007-of-00007.safetensors"),
    "Mistral's own file": copied(FIRST, "consolidated.safetensors"),
    "a tensor that the index leaves out": indexed(**PLACES),
    "a buffer": tensors(lambda found: found.update({BUFFER: np.ones(8, np.float32)})),
    "a buffer in the index only": indexed(**{BUFFER.replace(".", "__"): FIRST}),
    "a total size that is wrong": edit(INDEX, metadata={"total_size": 12}),
    "a total size that is none": edit(INDEX, metadata=7),
    "code that is not there": edit("config.json", model_file="model.py"),
    "an end token past the rows": edit("config.json", eos_token_id=9999),
    "provenance of a file that is gone": edit("config.json", provenance={"sha256": {"x": "0"}}),
    "provenance that is none": edit("config.json", provenance=[1, {}]),
    "provenance with odd values": edit(
        "config.json", provenance={"sha256": {FIRST: 3}, "plan": 7, "notes": {}, "source": []}
    ),
    "a card that is no text": written("README.md", b"---\nlicense: [\xff\n---\n"),
    "a card that is no mapping": written("README.md", "---\n- a\n---\n"),
    "a tied head that is another": edit("config.json", tie_word_embeddings=True),
    "two dtypes": replaced(np.ones((128, 64), np.float16)),
    "all zero": replaced(np.zeros((128, 64), np.float32)),
    "a stray folder": lambda path: (path / "model.d").mkdir(),
    "no model type": edit("config.json", model_type=...),
}
UNSOUND: dict[str, Change] = {
    "no config": removed("config.json"),
    "no tokenizer": removed("tokenizer.json"),
    "no index": removed(INDEX),
    "no shard": removed(SECOND),
    "a link to nothing": both(
        removed(SECOND), lambda path: (path / SECOND).symlink_to("../blobs/gone")
    ),
    "a shard that is a folder": both(removed(SECOND), lambda path: (path / SECOND).mkdir()),
    "a shard that is a pipe": both(removed(SECOND), lambda path: os.mkfifo(path / SECOND)),
    "a shard cut by a byte": lambda path: os.truncate(
        path / SECOND, (path / SECOND).stat().st_size - 1
    ),
    "a shard with a byte more": lambda path: os.truncate(
        path / SECOND, (path / SECOND).stat().st_size + 1
    ),
    "an empty shard": written(SECOND, b""),
    "an adapter": written("adapter_config.json", "{}"),
    "an index that is a list": written(INDEX, "[]"),
    "an index without a map": edit(INDEX, weight_map=...),
    "an index of numbers": indexed(model__norm__weight=7),
    "an index that points out": indexed(model__norm__weight="../x.safetensors"),
    "an index that points into a folder": indexed(model__norm__weight="x/y.safetensors"),
    "an index of what is not there": indexed(model__extra__weight=FIRST),
    "a whole file beside the index": copied(FIRST, "model.safetensors"),
    "a tensor in two files": both(
        tensors(lambda found: found.update({"model.norm.weight": np.ones(64, np.float32)})),
        tensors(lambda f: f.update({"model.norm.weight": np.ones(64, np.float32)}), SECOND),
    ),
    "a tensor less": both(
        tensors(lambda found: found.pop(WEIGHT, None)),
        tensors(lambda found: found.pop(WEIGHT, None), SECOND),
        indexed(**{WEIGHT.replace(".", "__"): ...}),
    ),
    "a tensor more": tensors(lambda found: found.update({"model.extra": np.ones(3, np.float32)})),
    "a bias": tensors(
        lambda f: f.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)})
    ),
    "a shape turned over": replaced(np.ones((64, 128), np.float32)),
    "a matrix of integers": replaced(np.ones((128, 64), np.int32)),
    "a matrix in 64 bits": replaced(np.ones((128, 64), np.float64)),
    "a matrix of no values": replaced(np.ones((0, 64), np.float32)),
    "scales without a config": tensors(
        lambda f: f.update({first_of(f).replace("weight", "scales"): np.ones((128, 2), np.float32)})
    ),
    "quantization nobody did": both(
        edit("config.json", quantization={"bits": 7, "group_size": 64}),
        tensors(
            lambda f: f.update(
                {first_of(f).replace("weight", "scales"): np.ones((128, 2), np.float32)}
            )
        ),
    ),
    "GPTQ": edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "no heads": edit("config.json", num_attention_heads=0),
    "more layers than there are": edit("config.json", num_hidden_layers=9),
    "fewer layers than there are": edit("config.json", num_hidden_layers=7),
    "more tokens than rows": edit("config.json", vocab_size=200),
    "no architecture": edit("config.json", model_type=..., architectures=...),
    "half a tokenizer": lambda path: os.truncate(
        path / "tokenizer.json", (path / "tokenizer.json").stat().st_size // 2
    ),
    "a tokenizer of another shape": written("tokenizer.json", '{"model": 3}'),
    "a template that is a number": edit("tokenizer_config.json", chat_template=3),
    "a token map that is a list": written("special_tokens_map.json", "[]"),
    "an end token nobody knows": edit("tokenizer_config.json", eos_token="<|no|>"),
}
# What only reading the values shows: loading does not look.
VALUES: dict[str, Change] = {
    "NaN": tensors(lambda found: found[first_of(found)].reshape(-1).__setitem__(5, np.nan)),
    "an infinity": tensors(lambda f: f[first_of(f)].reshape(-1).__setitem__(-1, -np.inf)),
    "another hash than its provenance's": edit(
        "config.json", provenance={"sha256": {FIRST: "0" * 64}}
    ),
}


def verdicts(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[bool, bool, bool]:
    """Whether loading, converting and verifying take the checkpoint; one line where not."""
    line = ""
    try:
        load_tokenizer(open_checkpoint(path))
    except CerebrumError as error:
        line = str(error)
    assert len(line.splitlines()) <= 1
    capsys.readouterr()
    code = convert(["--hf-path", str(path), "--mlx-path", f"{path}-out", "--quiet"])
    err = capsys.readouterr().err
    assert code in (0, 2), err
    assert not code or (err.startswith("error: ") and err.count("\n") == 1)
    try:
        sound = verify(path)["sound"]
    except CerebrumError:
        sound = False
    if code == 0:
        assert verify(Path(f"{path}-out"))["sound"]
    return not line, code == 0, sound


@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
@pytest.mark.one_in(4)
def test_all_three_take_it(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], change: Change
) -> None:
    source = checkpoint(shards=2)
    change(source)
    assert verdicts(source, capsys) == (True, True, True)


@pytest.mark.parametrize("change", UNSOUND.values(), ids=UNSOUND)
def test_all_three_refuse_it(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], change: Change
) -> None:
    source = checkpoint(shards=2)
    change(source)
    assert verdicts(source, capsys) == (False, False, False)


@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
def test_the_two_that_read_all_refuse_it(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], change: Change
) -> None:
    source = checkpoint(shards=2)
    change(source)
    assert verdicts(source, capsys) == (True, False, False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", SECOND])
def test_a_download_that_changed_since(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    snapshot = hub_copy(checkpoint(shards=2), tmp_path)
    file = (snapshot / name).resolve()
    if name.endswith(".json"):
        file.write_bytes(file.read_bytes() + b" ")
    else:
        flip(file, file.stat().st_size - 4)
    assert verdicts(snapshot, capsys) == (True, False, False)


@pytest.mark.parametrize("cut", [0, 1, 3, 100])
@pytest.mark.one_in(3)
def test_gguf(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    path = tmp_path / "x.gguf"
    argv = ["--hf-path", str(checkpoint()), "--mlx-path", str(path), "--quiet", "--gguf", "F16"]
    assert convert(argv) == 0
    os.truncate(path, path.stat().st_size - cut)
    assert verdicts(path, capsys) == ((True,) * 3 if cut == 0 else (False,) * 3)
