"""A small GGUF file of random weights, and changes that know its structure."""

import struct
from pathlib import Path
from random import Random
from typing import Any

from .mutate import TEXTS, mutated_bytes

# Value types of metadata, with how struct writes them.
_CODES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
# ggml's type numbers: elements in a block, bytes of a block.
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}
_BLOCKS |= {20: (32, 18), 30: (1, 2)}
_WIDE = {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)}
_WIDE |= {23: (256, 136)}
_ALIGNMENT = 32

Pair = list[Any]  # key, type, value; an array's value is [item type, items]
Tensor = list[Any]  # name, dimensions (innermost first), type, offset


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> Any:
    """`value` as metadata has it; bytes go as they are."""
    if isinstance(value, bytes):
        return bytes(value)
    if kind == STRING:
        return _text(str(value))
    if kind == ARRAY:
        item, items = value
        return struct.pack("<IQ", item, len(items)) + b"".join(_value(item, one) for one in items)
    code = _CODES.get(kind, "I")
    if code in "fd":
        return struct.pack("<" + code, float(value))
    if code == "?":
        return struct.pack("<?", bool(value))
    size = struct.calcsize(code)
    return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")


def _metadata(hidden: int, byte_level: bool) -> list[Pair]:
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["\u2581", "h", "i", "\u2581h", "\u2581hi"]
    types = [2, 3, 3, *[6] * 256, *[1] * 5]
    if byte_level:
        letters = [*map(chr, range(33, 127)), *(chr(0x100 + i) for i in range(33))]
        tokens = ["<s>", "</s>", *letters, "hi"]
        types = [3, 3, *[1] * (len(tokens) - 2)]
    pairs: list[Pair] = [
        ["general.architecture", STRING, "llama"],
        ["general.alignment", U32, _ALIGNMENT],
        ["llama.block_count", U32, 1],
        ["llama.context_length", U32, 512],
        ["llama.embedding_length", U32, hidden],
        ["llama.feed_forward_length", U32, hidden],
        ["llama.attention.head_count", U32, 2],
        ["llama.attention.head_count_kv", U32, 1],
        ["llama.attention.layer_norm_rms_epsilon", F32, 1e-5],
        ["llama.rope.freq_base", F32, 10000.0],
        ["llama.rope.dimension_count", U32, hidden // 2],
        ["tokenizer.ggml.model", STRING, "gpt2" if byte_level else "llama"],
        ["tokenizer.ggml.tokens", ARRAY, [STRING, tokens]],
        ["tokenizer.ggml.token_type", ARRAY, [I32, types]],
        ["tokenizer.ggml.bos_token_id", U32, 0 if byte_level else 1],
        ["tokenizer.ggml.eos_token_id", U32, 1 if byte_level else 2],
        ["tokenizer.ggml.unknown_token_id", U32, 0],
        ["tokenizer.ggml.padding_token_id", U32, 0],
        ["tokenizer.ggml.add_bos_token", BOOL, True],
        ["tokenizer.chat_template", STRING, "{{ bos_token }}{{ messages[0].content }}"],
    ]
    if byte_level:
        pairs.append(["tokenizer.ggml.pre", STRING, "gpt-2"])
        pairs.append(["tokenizer.ggml.merges", ARRAY, [STRING, ["h i"]]])
    else:
        pairs.append(
            ["tokenizer.ggml.scores", ARRAY, [F32, [-float(i) for i in range(len(tokens))]]]
        )
    return pairs


def _tensors(
    hidden: int, vocabulary: int, random: Random, kinds: dict[int, tuple[int, int]]
) -> tuple[list[Tensor], int]:
    """The table of a one-block model and the bytes of its data."""
    half = hidden // 2
    shapes: dict[str, list[int]] = {
        "token_embd.weight": [hidden, vocabulary],
        "blk.0.attn_norm.weight": [hidden],
        "blk.0.attn_q.weight": [hidden, hidden],
        "blk.0.attn_k.weight": [hidden, half],
        "blk.0.attn_v.weight": [hidden, half],
        "blk.0.attn_output.weight": [hidden, hidden],
        "blk.0.ffn_norm.weight": [hidden],
        "blk.0.ffn_gate.weight": [hidden, hidden],
        "blk.0.ffn_up.weight": [hidden, hidden],
        "blk.0.ffn_down.weight": [hidden, hidden],
        "output_norm.weight": [hidden],
        "output.weight": [hidden, vocabulary],
    }
    one = random.choice(sorted(kinds))
    tensors: list[Tensor] = []
    at = 0
    for name, dimensions in shapes.items():
        kind = (
            0 if len(dimensions) == 1 else random.choice((one, one, random.choice(sorted(kinds))))
        )
        elements, nbytes = kinds[kind]
        size = nbytes * dimensions[0] // elements
        for dimension in dimensions[1:]:
            size *= dimension
        tensors.append([name, dimensions, kind, at])
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return tensors, at


_NUMBERS = (0, 1, 2, 3, -1, 31, 33, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_FLOATS = (0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"))
_LIES = (
    struct.pack("<Q", 2**63),
    struct.pack("<Q", 2**40),
    struct.pack("<IQ", U32, 2**60),
    struct.pack("<IQ", ARRAY, 2**20) * 30,
    struct.pack("<IQ", ARRAY, 1) * 5000,
    b"",
)


def _change_pairs(pairs: list[Pair], random: Random) -> None:
    at = random.randrange(len(pairs))
    pair, change = pairs[at], random.randrange(9)
    if change == 0:
        del pairs[at]
    elif change == 1:
        pairs.insert(at, list(pair))
    elif change == 2:
        pair[1] = random.choice((*_CODES, STRING, ARRAY, 13, 2**31))
        if pair[1] == STRING:
            pair[2] = random.choice(TEXTS)
        elif pair[1] == ARRAY:
            pair[2] = [random.choice((U32, F32, STRING)), list(range(random.choice((0, 1, 300))))]
        else:
            pair[2] = random.choice(_NUMBERS)
    elif change == 3:
        pair[2] = random.choice(_LIES)
    elif change == 4:
        pair[0] = random.choice((*TEXTS, *(other[0] for other in pairs)))
    elif isinstance(pair[2], bytes):
        pair[2] = mutated_bytes(pair[2], random)
    elif pair[1] == ARRAY:
        item, items = pair[2]
        items = list(items)
        for _ in range(random.choice((1, 1, 3, 50))):
            place = random.randrange(len(items) + 1)
            kind = random.randrange(4)
            new = random.choice(TEXTS if item == STRING else _FLOATS if item == F32 else _NUMBERS)
            if kind == 0:
                items.insert(place, new)
            elif kind == 1 and place < len(items):
                del items[place]
            elif place < len(items):
                items[place] = random.choice((new, *items[:3])) if kind == 2 else new
        pair[2] = [item, items] if random.random() < 0.9 else [random.choice((*_CODES, 8)), []]
    elif pair[1] == STRING:
        pair[2] = random.choice((*TEXTS, "x" * 100_000, "gpt2", "llama", "{{ range(10**9) }}"))
    else:
        pair[2] = random.choice(_FLOATS if pair[1] in (F32, 12) else _NUMBERS)


def _change_tensors(tensors: list[Tensor], random: Random) -> None:
    at = random.randrange(len(tensors))
    tensor, change = tensors[at], random.randrange(6)
    if change == 0:
        del tensors[at]
    elif change == 1:
        tensors.insert(at, list(tensor))
    elif change == 2:
        tensor[0] = random.choice((*TEXTS, "rope_freqs.weight", "blk.1.attn_q.weight"))
    elif change == 3:
        sizes = (0, 1, 16, 31, 32, 33, 2**31, 2**32, 2**63, 2**64 - 1)
        tensor[1] = [random.choice(sizes) for _ in range(random.choice((0, 1, 2, 4, 5, 200)))]
    elif change == 4:
        tensor[2] = random.choice((*range(42), 2**32 - 1))
    else:
        tensor[3] = random.choice((0, 1, 32, 2**31, 2**63, 2**64 - 32, 2**64 - 1))


NAME = "model.gguf"


def prepare(folder: Path) -> None:
    pairs = _metadata(32, byte_level=False)
    tensors, size = _tensors(32, 264, Random(0), {0: _BLOCKS[0]})
    (folder / NAME).write_bytes(_head(pairs, tensors) + bytes(size))


def _head(
    pairs: list[Pair], tensors: list[Tensor], version: int = 3, counts: list[int] | None = None
) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or [len(tensors), len(pairs)]))
    for key, kind, value in pairs:
        head += _text(key) + struct.pack("<I", kind) + _value(kind, value)
    for name, dimensions, kind, offset in tensors:
        sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += _text(name) + sizes + struct.pack("<IQ", kind, offset)
    return head + b"\0" * (-len(head) % _ALIGNMENT)


def change(folder: Path, random: Random) -> dict[str, bytes]:
    hidden = random.choice((32, 32, 32, 64, 256))
    pairs = _metadata(hidden, byte_level=random.random() < 0.4)
    vocabulary = len(next(pair[2][1] for pair in pairs if pair[0].endswith("ggml.tokens")))
    kinds = _BLOCKS | (_WIDE if hidden % 256 == 0 else {})
    tensors, size = _tensors(hidden, vocabulary, random, kinds)
    where = random.random()
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        if where < 0.7:
            _change_pairs(pairs, random)
        else:
            _change_tensors(tensors, random)
    counts = [len(tensors), len(pairs)]
    if random.random() < 0.05:
        counts[random.randrange(2)] = random.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    version = 3 if random.random() < 0.97 else random.choice((0, 1, 2, 4, 3 << 24))
    head = _head(pairs, tensors, version, counts)
    if random.random() < 0.15:
        head = mutated_bytes(head, random)
        head += b"\0" * (-len(head) % _ALIGNMENT)
    data = random.randbytes(size) if random.random() < 0.3 else bytes(size)
    if random.random() < 0.05:
        data = data[: random.randrange(size)]
    return {NAME: head + data}
