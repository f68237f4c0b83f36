"""Golden values of the trained demo model (SmolLM2-135M-Instruct, GGUF): `demo.json`."""

import hashlib
from pathlib import Path
from typing import Any

import gguf
import mutants
import numpy as np
import oracle
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MAX_TOKENS = 64
EOS = 2
PLANS = {
    "base": list(range(30)),
    "demo-interleaved": [*range(17), *range(13, 30)],
}

_STORY = (
    "The lighthouse at the end of the harbour had been dark for eleven years when Mara came "
    "back to the village. She remembered it as a child remembers things: taller than the sky, "
    "white as salt, with a voice that rolled over the water on foggy nights. Now the paint hung "
    "from the walls in long strips, and gulls nested where the great lamp used to turn. Her "
    "grandfather had kept the light for forty years. He had taught her to read the weather in "
    "the colour of the sea, to tie nine kinds of knot, and to write everything down in the log: "
    "the wind, the ships, the hour at which the lamp was lit and the hour at which it was put "
    "out."
)

RAW = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "import json\n\n\ndef read_config(path):\n",
    "SELECT name, COUNT(*) FROM orders",
    "12 + 30 = 42\n7 + 8 = 15\n25 + 17 =",
    "1, 2, 3, 4, 5, 6,",
    "Water boils at 100 degrees Celsius because",
    "# Shopping list\n\n- apples\n- bread\n",
    "La capitale de l'Italie est",
    "naïve café — “quoted” … 日本語のテキスト 👩‍👩‍👧 ok",
    _STORY,
)

Conversation = list[tuple[str, str]]  # (role, content)

CHAT: tuple[Conversation, ...] = (
    [("user", "What is the capital of France?")],
    [("user", "Write a haiku about autumn rain.")],
    [("user", "Write a Python function that reverses a string.")],
    [("user", "What is 17 plus 25? Answer with the number only.")],
    [("user", "Explain in two sentences why the sky is blue.")],
    [("system", "You answer with one word."), ("user", "What colour is a ripe banana?")],
    [
        ("user", "My name is Ada. Say hello."),
        ("assistant", "Hello Ada, nice to meet you!"),
        ("user", "What is my name?"),
    ],
    [("user", "Summarise this in one sentence.\n\n" + _STORY)],
)

# Only encoded: digits after whitespace, runs of spaces, contractions, scripts, no text at all.
TEXTS = (
    "",
    " ",
    "a  2",
    "In  2024,\n\n1. don't\t\t42km",
    "  two  spaces   ",
    "x²+½=٣४",
    "👩‍👩‍👧 🇫🇷 é e\u0301",
    "日本語とหลายภาษา и русский",
    "\r\n\r\n  \u00a0\u3000end",
)

# Asked of the interleaved model too, by their place in RAW + CHAT.
INTERLEAVED = (0, 4, 12, 14, 18)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, oracle.Floats]]:
    """Config and float32 weights under Hugging Face names."""
    reader = gguf.GGUFReader(path)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    heads = field("llama.attention.head_count")
    config = {
        "model_type": "llama",
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "vocab_size": field("llama.vocab_size"),
        "max_position_embeddings": field("llama.context_length"),
        # Written as float32, so it reads back as 9.999999747378752e-06.
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": field("llama.rope.freq_base"),
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }
    kinds = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    weights: dict[str, oracle.Floats] = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = outside.get(tensor.name)
        if name is None:
            _, block, kind, _ = tensor.name.split(".")
            name = f"model.layers.{block}.{kinds[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                value = _unpermuted(value, config["head_dim"])
        weights[name] = np.ascontiguousarray(value)
    return config, weights


def _unpermuted(value: oracle.Floats, head_dim: int) -> oracle.Floats:
    """Undo llama.cpp's row order, in which the rows that RoPE pairs lie side by side."""
    rows, columns = value.shape
    split = value.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer from the GGUF, with the pre-tokenizer `smollm` names.

    transformers ignores that name and splits as GPT-2 does; SmolLM2 also takes every digit
    by itself (the difference shows in whitespace before a digit).
    """
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def make(folder: Path, gguf_path: Path) -> dict[str, dict[str, float]]:
    """Write `demo.json`; return the measured figures by plan."""
    config, weights = read_gguf(gguf_path)
    tokenizer = read_tokenizer(gguf_path)
    asked_all: list[str | Conversation] = [*RAW, *CHAT]
    prompts = [_prompt(tokenizer, item) for item in asked_all]
    cases: list[dict[str, Any]] = []
    figures: dict[str, dict[str, float]] = {}
    for plan, layer_map in PLANS.items():
        model = oracle.build(config, weights, layer_map)
        asked = prompts if plan == "base" else [prompts[i] for i in INTERLEAVED]
        gaps = []
        for prompt in asked:
            ids = prompt["prompt_ids"]
            output, logits, gap = oracle.checked_greedy(model, ids, MAX_TOKENS, EOS)
            gaps.append(gap)
            if not cases:
                exact = mutants.logits(config, weights, layer_map, [ids + output])
                error = float(np.abs(logits - exact).max())
            stopped = output[-1] == EOS
            margins = oracle.margins(logits, len(ids))
            places = (len(ids) // 2, len(ids) - 1, len(ids) + len(output) - 1)
            cases.append(
                {"plan": plan}
                | prompt
                | {
                    "output_ids": output,
                    "text": tokenizer.decode(output[:-1] if stopped else output),
                    "finish_reason": "stop" if stopped else "length",
                    "margins": margins,
                    "min_margin": min(margins),
                    "logits": [_row(logits, place) for place in places],
                }
            )
        mine = cases[-len(asked) :]
        figures[plan] = {
            "prompts": len(asked),
            "ended by EOS": sum(c["finish_reason"] == "stop" for c in mine),
            "greedy steps": sum(len(c["output_ids"]) for c in mine),
            "smallest greedy margin": min(c["min_margin"] for c in mine),
            "cached against uncached": max(gaps),
        }
    figures["base"]["float32 against float64, first prompt"] = error
    document = {
        "versions": oracle.versions(),
        "gguf": gguf_path.name,
        "gguf_sha256": hashlib.sha256(gguf_path.read_bytes()).hexdigest(),
        "config": config,
        "eos_token_id": EOS,
        "max_tokens": MAX_TOKENS,
        "plans": PLANS,
        "figures": oracle.rounded(figures),
        "encodings": encodings(tokenizer),
        "cases": cases,
    }
    oracle.write_json(folder / "demo.json", document)
    return figures


def encodings(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    return [
        {"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
        for text in TEXTS
    ]


def _prompt(tokenizer: PreTrainedTokenizerBase, item: str | Conversation) -> dict[str, Any]:
    """A raw prompt as it is, or a conversation through the GGUF's own chat template."""
    prompt: dict[str, Any] = {"mode": "raw", "prompt": item}
    if not isinstance(item, str):
        messages = [{"role": role, "content": content} for role, content in item]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = {"mode": "chat", "messages": messages, "prompt": text}
    ids = tokenizer(prompt["prompt"], add_special_tokens=False)["input_ids"]
    return prompt | {"prompt_ids": ids}


def _row(logits: oracle.Floats, place: int) -> dict[str, Any]:
    """What is kept of the 49152 logits that follow the token at `place` of prompt + output."""
    row = logits[place].astype(np.float64)
    top = row.max()
    return {
        "position": place,
        "first32": [round(float(x), 6) for x in row[:32]],
        "argmax": int(row.argmax()),
        "max": round(float(top), 6),
        "logsumexp": round(float(top + np.log(np.exp(row - top).sum())), 6),
    }
