"""A trained model whose tensors llama.cpp's own quantizers wrote, in the types people have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from ggml_library import quantize
from gguf import GGMLQuantizationType as Type

from mlx_cerebrum import load
from mlx_cerebrum.decoding.stream import generate
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.gguf_blocks import BITS, REPACKED
from mlx_cerebrum.weights.gguf_file import GGUFFile

PROMPT = "The capital of France is"
TEXT = "The quick brown fox jumps over the lazy dog. It was"
# Rows of `ffn_down` divide by 256, the others of this model by 32: Q4_K_M of it has Q5_0 there.
EXACT = ["Q4_K", "Q5_K", "Q5_0", "Q5_1", "Q8_0"]
OTHERS = ["Q6_K", "Q3_K", "IQ4_NL", "IQ4_XS", "Q2_K"]


@pytest.fixture(scope="module")
def requantized(
    demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], Path]:
    """The demo with every fifth block's `ffn_down` in one of these types, as llama.cpp makes it."""
    file = GGUFFile.open(demo)
    folder = tmp_path_factory.mktemp("requantized")

    def make(kinds: list[str]) -> Path:
        path = folder / f"{kinds[0]}.gguf"
        if path.exists():
            return path
        changed = {f"blk.{5 * i}.ffn_down.weight": kind for i, kind in enumerate(kinds)}
        table = {t.name: (t.shape, changed.get(t.name, t.ggml_type)) for t in file.tensors.values()}
        with path.open("wb") as out:
            out.write(gguf_files.header(file.metadata, table))
            for tensor in file.tensors.values():
                data = file.read(tensor)
                if tensor.name in changed:
                    rows = data.reshape(tensor.shape[0], -1)
                    weights = gguf.quants.dequantize(rows, Type[tensor.ggml_type])
                    data = quantize(weights, changed[tensor.name]).reshape(-1)
                out.write(data.data)
                out.write(bytes(-out.tell() % 32))
        return path

    return make


def logits(model: Model, tokenizer: Tokenizer) -> np.ndarray[tuple[int, ...], Any]:
    ids = mx.array([tokenizer.encode(TEXT)])
    return np.array(model(ids)[0].astype(mx.float32))


def test_the_lists_hold_what_people_have() -> None:
    assert set(EXACT) <= set(BITS)
    assert set(OTHERS) <= set(REPACKED)


@pytest.mark.long
@pytest.mark.parametrize("kinds", [EXACT, OTHERS], ids=["moved", "repacked"])
def test_it_says_what_its_dequantized_weights_say(
    kinds: list[str], requantized: Callable[[list[str]], Path]
) -> None:
    path = requantized(kinds)
    held = load(path)
    if isinstance(held[0].model.layers[0].mlp.down_proj, nn.QuantizedLinear):
        pytest.skip("packed weights stay packed on a GPU")
    file = GGUFFile.open(path)
    for i, kind in enumerate(kinds):
        tensor = file.tensors[f"blk.{5 * i}.ffn_down.weight"]
        rows = file.read(tensor).reshape(tensor.shape[0], -1)
        found = np.array(held[0].model.layers[5 * i].mlp.down_proj.weight)
        assert np.array_equal(found, gguf.quants.dequantize(rows, Type[kind])), kind
    assert generate(*held, PROMPT, max_tokens=4).startswith(" Paris")
    # Apart from the order of additions, moved integers compute the same; 8 bits nearly so.
    exact, packed = logits(*held), logits(*load(path, dtype="float32"))
    assert np.abs(packed - exact).max() < (1e-4 if kinds is EXACT else 0.05) * exact.std()
    assert np.array_equal(packed.argmax(-1), exact.argmax(-1))


@pytest.mark.long
def test_another_quantization_would_show(
    demo: Path, requantized: Callable[[list[str]], Path]
) -> None:
    """The types differ by more than the tolerance above: that test can fail."""
    changed, as_it_was = (logits(*load(path)) for path in (requantized(EXACT), demo))
    assert np.abs(changed - as_it_was).max() > 0.1 * as_it_was.std()
