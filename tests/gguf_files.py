"""GGUF files of any tensor types, of random blocks, for tests of what reads them."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers

from mlx_cerebrum.weights.gguf_file import GGML_TYPES

SIZES = {name: (elements, nbytes) for name, elements, nbytes in GGML_TYPES.values()}
# Where a block has its float16 scales: byte offsets. MXFP4, NVFP4 and IQ1_M have others.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ2_XXS"), (0,)),
    **dict.fromkeys(("IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
Bytes = npt.NDArray[np.uint8]


def random_blocks(kind: str, rows: int, width: int, seed: int = 0) -> Bytes:
    """`[rows, bytes of a row]` of blocks whose weights are of a model's size, about 0.02."""
    rng = np.random.default_rng([seed, sum(kind.encode())])
    elements, nbytes = SIZES[kind]
    blocks = rng.integers(0, 256, (rows * width // elements, nbytes), dtype=np.uint8)
    if kind == "IQ1_M":  # the scale is in the high bits of the last four pairs
        blocks[:, -7::2] = np.array([0, 0, 0, 0x20], np.uint8) | (blocks[:, -7::2] & 0x0F)
    elif kind == "MXFP4":
        blocks[:, 0] = rng.integers(118, 122, len(blocks))
    elif kind == "NVFP4":
        blocks[:, :4] = rng.integers(1, 16, (len(blocks), 4))
    elif kind in ("F32", "F16", "BF16"):
        weights = rng.standard_normal((rows, width)).astype(np.float32) * 0.02
        floats: Bytes = gguf.quants.quantize(weights, Type[kind]).view(np.uint8)
        return floats
    else:
        for offset in HALVES[kind]:
            scale = 0.02 / _UNIT.get(kind, 8) * (1 + rng.random(len(blocks)))
            half = scale.astype(np.float16)[:, None].view(np.uint8)
            blocks[:, offset : offset + 2] = half
        if kind in ("Q4_1", "Q5_1"):  # minima lie below zero
            blocks[:, 3] |= 0x80
    return blocks.reshape(rows, -1)


# What a scale is multiplied by to give a usual weight.
_UNIT = {"Q8_0": 64, "Q4_K": 200, "Q5_K": 400, "Q6_K": 800, "Q3_K": 40, "Q2_K": 12, "IQ4_NL": 60}
_UNIT |= {"IQ4_XS": 800, "Q5_0": 16, "Q5_1": 16, "TQ1_0": 1, "TQ2_0": 1, "IQ3_S": 100}
_UNIT |= {"IQ2_XXS": 80, "IQ2_XS": 80, "IQ2_S": 80, "IQ3_XXS": 200}


@dataclass(frozen=True)
class Geometry:
    """A Llama's sizes."""

    hidden: int = 256
    mlp: int = 512
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    vocab: int = 260

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order llama.cpp writes them."""
        D, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, D)}
        for i in range(self.layers):
            block = {
                **{"attn_norm": (D,), "attn_q": (D, D), "attn_k": (kv, D), "attn_v": (kv, D)},
                **{"attn_output": (D, D), "ffn_norm": (D,), "ffn_gate": (self.mlp, D)},
                **{"ffn_up": (self.mlp, D), "ffn_down": (D, self.mlp)},
            }
            found |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        return found | {"output_norm.weight": (D,), "output.weight": (self.vocab, D)}


SMALL = Geometry()
MISTRAL_7B = Geometry(4096, 14336, 32, 8, 32, 32000)


def q4_k_m(name: str, layers: int) -> str:
    """The type llama.cpp's Q4_K_M gives a matrix: half of v and down, and the head, in Q6_K."""
    if name.startswith("output."):
        return "Q6_K"
    if "attn_v" in name or "ffn_down" in name:
        layer, eighth = int(name.split(".")[1]), layers // 8
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return "Q6_K" if more else "Q4_K"
    return "Q4_K"


def metadata(geometry: Geometry, **changes: Any) -> dict[str, Any]:
    """What a whole Llama's file says; a byte-level vocabulary, so that any text has ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet]
    tokens += [f"<pad{i}>" for i in range(geometry.vocab - len(tokens))]
    said = {
        "general.architecture": "llama",
        "llama.block_count": geometry.layers,
        "llama.context_length": 4096,
        "llama.embedding_length": geometry.hidden,
        "llama.feed_forward_length": geometry.mlp,
        "llama.attention.head_count": geometry.heads,
        "llama.attention.head_count_kv": geometry.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": geometry.hidden // geometry.heads,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": geometry.vocab,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 256 + [5] * (len(tokens) - 259),
        "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    tokens[-1] = "!!" if geometry.vocab > 259 else tokens[-1]
    return {k: v for k, v in (said | changes).items() if v is not None}


def header(said: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], str]]) -> bytes:
    """A GGUF header, padded to where the data begin, for `{name: (shape, type)}`."""
    numbers = {name: number for number, (name, _, _) in GGML_TYPES.items()}
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(said))
    for key, value in said.items():
        out += _text(key) + _value(value)
    offset = 0
    for name, (shape, kind) in tensors.items():
        out += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += struct.pack("<IQ", numbers[kind], offset)
        offset += -(-nbytes(shape, kind) // 32) * 32
    return out + bytes(-len(out) % 32)


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    elements, block = SIZES[kind]
    return int(np.prod(shape)) // elements * block


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    kind, code = (6, "f") if isinstance(value[0], float) else (5, "i")
    return struct.pack("<IIQ", 9, kind, len(value)) + struct.pack(f"<{len(value)}{code}", *value)


def table(geometry: Geometry, kind: Callable[[str], str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """The geometry's tensors, `kind` deciding how each matrix is stored."""
    return {
        name: (shape, "F32" if len(shape) == 1 else kind(name))
        for name, shape in geometry.tensors().items()
    }


def write(
    path: Path,
    kind: str | Callable[[str], str] = "Q4_K",
    geometry: Geometry = SMALL,
    **changes: Any,
) -> Path:
    """A whole model of random blocks; `changes` to the metadata, None removes a key."""
    tensors = table(geometry, kind if callable(kind) else lambda _: str(kind))
    with path.open("wb") as file:
        file.write(header(metadata(geometry, **changes), tensors))
        for seed, (shape, stored) in enumerate(tensors.values()):
            for piece in _data(shape, stored, seed):
                file.write(np.ascontiguousarray(piece).data)
            file.write(bytes(-file.tell() % 32))
    return path


def write_split(
    folder: Path, name: str, count: int, kind: str, geometry: Geometry = SMALL, **changes: Any
) -> list[Path]:
    """`write`'s model in parts, as llama-gguf-split makes them: all metadata are in the first."""
    tensors = list(table(geometry, lambda _: kind).items())
    paths = []
    for number in range(count):
        own = tensors[number * len(tensors) // count : (number + 1) * len(tensors) // count]
        said = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        said |= changes
        if number == 0:
            said = metadata(geometry, **({"general.name": "model"} | said))
        paths.append(folder / f"{name}-{number + 1:05d}-of-{count:05d}.gguf")
        with paths[-1].open("wb") as file:
            file.write(header(said, dict(own)))
            for tensor, (shape, stored) in own:
                for piece in _data(shape, stored, list(geometry.tensors()).index(tensor)):
                    file.write(np.ascontiguousarray(piece).data)
                file.write(bytes(-file.tell() % 32))
    return paths


def write_hole(path: Path, kind: Callable[[str], str], geometry: Geometry) -> Path:
    """A file whose header is whole and whose data are a hole: it takes no space on the disk."""
    tensors = table(geometry, kind)
    with path.open("wb") as file:
        file.write(header(metadata(geometry), tensors))
        file.truncate(file.tell() + sum(nbytes(*entry) for entry in tensors.values()))
    return path


def _data(shape: tuple[int, ...], kind: str, seed: int) -> Iterator[Bytes]:
    if len(shape) == 1:
        yield np.ones(shape, np.float32).view(np.uint8)
        return
    rows, width = shape
    step = max(1, (1 << 22) // width)
    for start in range(0, rows, step):
        yield random_blocks(kind, min(step, rows - start), width, seed + start)
