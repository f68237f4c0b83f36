"""Every reader of a file or a request: a valid input, how to change it, and how it is read.

A read must end in a result or in the one line of an error a person can mend; anything else
that leaves `read` is a fault.
"""

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest
from conftest import byte_tokenizer, plan_yaml, write_checkpoint
from huggingface_hub import ModelInfo
from tiny import tiny_config, tiny_weights

from convert.destination import JOURNAL, Journal
from convert.examine import directory as examine
from convert.recipe import Sensitivity
from convert.repository import begun_with
from mlx_cerebrum.chat import kept
from mlx_cerebrum.chat.export import as_markdown
from mlx_cerebrum.decoding.grammar_text import Ask, Written
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.prompt_cache_file import load_prompt_cache, save_prompt_cache
from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError
from mlx_cerebrum.generate import main as generate
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.ranks import hosts
from mlx_cerebrum.server.answers import Layout
from mlx_cerebrum.server.bodies import (
    parse_body,
)
from mlx_cerebrum.server.intake import Defaults, Intake
from mlx_cerebrum.server.menu import LoadRequest
from mlx_cerebrum.server.responses import ResponsesRequest
from mlx_cerebrum.server.schema import (
    ChatRequest,
)
from mlx_cerebrum.server.spelling import Spelling
from mlx_cerebrum.server.typesetting import TypesetRequest
from mlx_cerebrum.shelf import listing, showing
from mlx_cerebrum.shelf.entries import PULLS, STATE, entries
from mlx_cerebrum.shelf.places import VARIABLE
from mlx_cerebrum.tokenizer.chat_formats import BUILT_IN, CEREBRUM_TEMPLATE
from mlx_cerebrum.tokenizer.conversation import read_messages, write_messages
from mlx_cerebrum.tokenizer.fitting import FittedTemplate, in_turns
from mlx_cerebrum.tokenizer.messages import check_messages, ends_with_answer, unknown_keys
from mlx_cerebrum.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Piece,
    write_model,
)
from mlx_cerebrum.tokenizer.template import ChatTemplate
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.network import explained
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.remote import Remote
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX

from . import gguf_seed, templates
from .mutate import TEXTS, mutated_bytes, mutated_json, mutated_text, value

CONFIG = tiny_config(
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=260,
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "h\u00e9llo <s>[INST] \u2028 \U0001f600"},
    {"role": "assistant", "content": "<think>Hm.</think>\nHi.</s>"},
    {"role": "user", "content": "And 17*23?"},
]
# What programs send besides.
WIDE_TALK: list[dict[str, Any]] = [
    *TALK[:2],
    {
        "role": "developer",
        "content": [{"type": "text", "text": "More."}, {"type": "input_text", "text": "b"}],
    },
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "\u4f60 <s>"},
    {"role": "assistant", "function_call": {"name": "g", "arguments": ""}, "name": "x"},
    {"role": "function", "name": "g", "content": "1"},
    {"role": "assistant", "content": "It is"},
]
TEXT = "Hello  world\n\tI've 12345 h\u00e9llo <s></s> \u2581 \u4f60\u597d \U0001f642 <0x41>\0"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Reader:
    """prepare: writes the valid files into an empty folder.
    change: the files to put in their place, from the folder's own and a random source.
    read: reads the folder.
    """

    prepare: Callable[[Path], object]
    change: Callable[[Path, Random], dict[str, bytes]]
    read: Callable[[Path], object]


def checkpoint(folder: Path, shards: int = 1, **changes: Any) -> None:
    folder.rmdir()
    config = CONFIG | changes
    write_checkpoint(folder, config, tiny_weights(config, seed=3), shards)


def two_shards(folder: Path) -> None:
    checkpoint(folder, shards=2)
    index = json.loads((folder / INDEX).read_text())
    total = 4 * sum(array.size for array in tiny_weights(CONFIG, seed=3).values())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": total}}))


def one_json(name: str) -> Callable[[Path, Random], dict[str, bytes]]:
    def change(folder: Path, random: Random) -> dict[str, bytes]:
        return {name: mutated_json(json.loads((folder / name).read_text()), random)}

    return change


def answered(path: Path) -> None:
    """The command line's answer, or its one line."""
    out, err = io.StringIO(), io.StringIO()
    flags = ["--prompt", "hi", "--max-tokens", "2", "--quiet", "--raw"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = generate(["--model", str(path), *flags])
    lines = err.getvalue().splitlines()
    if code:
        assert code == 2, code
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
        raise CerebrumError(lines[0])


# config.json, its extra keys among them.

_MORE_KEYS: dict[str, Any] = {
    "layer_map": [0, 1, 0, 1],
    "residual_scales": [[1, 1.0], [0.5, 2], [1, 1], [1, 1]],
    "quantization": {"bits": 4, "group_size": 32, "lm_head": {"bits": 8, "group_size": 32}},
    "quantization_config": {"bits": 8, "group_size": 64, "quant_method": "mlx"},
    "rope_scaling": {"type": "default", "rope_theta": 1e4},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "layer_types": ["full_attention", "full_attention"],
    "hidden_act": "silu",
    "is_causal": True,
    "format_version": 1,
    "partial_rotary_factor": 1.0,
    "eos_token_id": [2, 3],
    "model_type": "llama",
}


def change_config(folder: Path, random: Random) -> dict[str, bytes]:
    config = dict(CONFIG)
    for key in random.sample(list(_MORE_KEYS), random.choice((0, 1, 1, 2, 4))):
        config[key] = _MORE_KEYS[key]
    return {"config.json": mutated_json(config, random)}


def read_directory(folder: Path) -> None:
    with contextlib.suppress(CheckpointError):  # no safetensors at all
        examine(folder)
    positions = 0
    with contextlib.suppress(CerebrumError):
        positions = open_checkpoint(folder).config.num_positions
    if positions <= 1000:  # a longer map is sound, and its answer takes as long as it is
        answered(folder)


# Safetensors.


def split(data: bytes) -> tuple[Any, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def change_header(name: str, sign: bool = False) -> Callable[[Path, Random], dict[str, bytes]]:
    """sign: put the right checksum at the end, as a prompt cache has it."""

    def change(folder: Path, random: Random) -> dict[str, bytes]:
        whole = (folder / name).read_bytes()
        if random.random() < 0.25:
            cut = len(whole) if sign else min(len(whole), 3000)
            return {name: mutated_bytes(whole[:cut], random) + whole[cut:]}
        header, data = split(whole)
        if len(header) > 8 and random.random() < 0.5:  # most changes where they matter
            names = random.sample(sorted(header), 4)
            some = {n: header[n] for n in names}
            text = mutated_json(some, random)
            rest = json.dumps({n: e for n, e in header.items() if n not in some}).encode()
            text = text.rstrip()[:-1] + b"," + rest[1:] if text.endswith(b"}") else text
        else:
            text = mutated_json(header, random)
        length = len(text) if random.random() < 0.95 else random.choice((0, 1, 2**31, 2**63))
        changed = struct.pack("<Q", length) + text + data
        if sign:
            changed = changed[:-4] + struct.pack("<I", zlib.crc32(changed[:-4]))
        return {name: changed}

    return change


# Prompt caches.

CACHED = ModelConfig.from_dict(CONFIG | {"sliding_window": 8, "num_hidden_layers": 1})
IDENTITY = {"model weights": "w", "layer plan": "p"}
CACHE = "talk.safetensors"


def cached_model() -> Model:
    if not _models:
        model = Model(CACHED)
        mx.eval(model.parameters())
        _models.append(model)
    return _models[0]


_models: list[Model] = []


def prepare_cache(folder: Path) -> None:
    cache = PromptCache(cached_model())
    for length in (12, 30):
        ids = [3 + i % 200 for i in range(length)]
        mx.eval(cached_model()(mx.array([cache.begin(ids)]), cache.cache))
        cache.end(ids)
    save_prompt_cache(cache, folder / CACHE, IDENTITY)


def change_cache(folder: Path, random: Random) -> dict[str, bytes]:
    if random.random() < 0.5:
        return change_header(CACHE, sign=True)(folder, random)
    header, data = split((folder / CACHE).read_bytes())
    marks = mutated_json(json.loads(header["__metadata__"]["marks"]), random)
    header["__metadata__"]["marks"] = marks.decode("utf-8", "replace")
    text = json.dumps(header).encode()
    changed = struct.pack("<Q", len(text)) + text + data[:-4]
    return {CACHE: changed + struct.pack("<I", zlib.crc32(changed))}


def read_cache(folder: Path) -> None:
    cache = load_prompt_cache(folder / CACHE, cached_model(), IDENTITY)
    rest = cache.begin([3 + i % 200 for i in range(20)])
    mx.eval(cached_model()(mx.array([rest]), cache.cache))


# Tokenizers.


def pieces() -> list[Piece]:
    named: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    named += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "1", "<"]
    return named + [(word, -float(i), NORMAL) for i, word in enumerate(words)]


def exercised(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(TEXT), *tokenizer.encode("x" * 500)]
    tokenizer.decode(ids)
    tokenizer.decode([i % tokenizer.vocab_size for i in range(400)])
    tokenizer.apply_chat_template(TALK)


def read_tokenizer(folder: Path) -> None:
    exercised(Tokenizer.from_directory(folder))


def prepare_json(folder: Path) -> None:
    byte_tokenizer(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["merges"] = [["h", "e"], ["l", "l"], ["he", "ll"]]
    size = len(raw["model"]["vocab"])
    raw["model"]["vocab"] |= {w: size + i for i, w in enumerate(("he", "ll", "hell"))}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def change_tokenizer_json(folder: Path, random: Random) -> dict[str, bytes]:
    raw = json.loads((folder / "tokenizer.json").read_text())
    if random.random() < 0.3:  # the style SentencePiece models are converted to
        raw["normalizer"] = {"type": "Prepend", "prepend": "\u2581"}
        raw["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}
        raw["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        }
    vocab = raw["model"].pop("vocab")
    if random.random() < 0.3:
        raw["model"]["vocab"] = vocab
        return {"tokenizer.json": mutated_json(raw, random)}
    # Its hundreds of entries would take nearly every change.
    text = mutated_json(raw, random)
    return {"tokenizer.json": text.replace(b'"model":{', b'"model":{"vocab":%b,' % _dumped(vocab))}


def _dumped(thing: Any) -> bytes:
    return json.dumps(thing).encode()


def change_pieces(folder: Path, random: Random) -> dict[str, bytes]:
    if random.random() < 0.5:
        model = (folder / "tokenizer.model").read_bytes()
        return {"tokenizer.model": mutated_bytes(model, random, model[::-1])}
    listed: list[Any] = list(pieces())
    for _ in range(random.choice((1, 2, 5, 50))):
        at = random.randrange(len(listed))
        text, score, kind = listed[at]
        change = random.randrange(6)
        if change == 0:
            listed[at] = (random.choice(TEXTS), score, kind)
        elif change == 1:
            listed[at] = (text, random.choice((float("nan"), float("inf"), -1e38, 0.0)), kind)
        elif change == 2:
            listed[at] = (text, score, random.choice((0, 1, 2, 3, 4, 5, 6, 7, 2**31, 2**63 - 1)))
        elif change == 3 and len(listed) > 1:
            del listed[at]
        else:
            listed.insert(at, random.choice(listed))
    return {"tokenizer.model": write_model(listed, random.choice(("<s>", "", "no")))}


TOKENIZER_FILES: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>", "lstrip": False, "special": True},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "additional_special_tokens": ["<tool>", {"content": "<end>"}],
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True, "lstrip": False, "rstrip": False},
            "271": {"content": "<tool>", "special": True, "normalized": False},
            "272": {"content": "word", "special": False, "single_word": False},
        },
        "chat_template": [
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
            {"name": "tool_use", "template": "{{ tools }}"},
        ],
        "tokenizer_class": "LlamaTokenizer",
        "model_max_length": 10**30,
    },
    "special_tokens_map.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "additional_special_tokens": ["<tool>"],
    },
    "added_tokens.json": {"<tool>": 271, "<end>": 273},
    "generation_config.json": {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.7},
    "chat_template.json": {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
    "config.json": {"vocab_size": 280},
}


def prepare_files(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(write_model(pieces()))
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_text(json.dumps(TOKENIZER_FILES[name]))


def change_files(folder: Path, random: Random) -> dict[str, bytes]:
    name = random.choice((*["tokenizer_config.json"] * 3, *TOKENIZER_FILES))
    if random.random() < 0.05:
        return {"chat_template.jinja": mutated_bytes(CEREBRUM_TEMPLATE.encode(), random)}
    return {name: mutated_json(TOKENIZER_FILES[name], random)}


def read_gguf(folder: Path) -> None:
    answered(folder / gguf_seed.NAME)


# Templates, plans, conversations, requests.


def prepare_template(folder: Path) -> None:
    (folder / "template.jinja").write_text(CEREBRUM_TEMPLATE)


def read_template(folder: Path) -> None:
    source = (folder / "template.jinja").read_bytes().decode("utf-8", "replace")
    ChatTemplate(source, {}, {"bos_token": "<s>", "eos_token": "</s>"}).render(TALK)


PLAN = (
    plan_yaml(
        "0-4,2-6,4-8", "{scale: [{filter: o_proj, value: [0.5, 1e-1]}, {value: 1}]}", "float16"
    )
    + "parameters:\n  scale: 1.0\nbase_model: source\ntokenizer_source: base\n"
)
_YAML = (
    *(
        "&a",
        "*a",
        "&a [*a]",
        "<<: *a",
        "- - - -",
        "!!python/object:os.system",
        "!!binary aGk=",
        "|",
    ),
    *(".nan", ".inf", "1e999", "0x1F", "010", "1:30", "9" * 500, "-1", "4.0", "'4'", "null", "~"),
    *(
        "[" * 500,
        "{a: " * 500,
        "%YAML 1.1",
        "---",
        "...",
        "? a",
        "\t",
        "\u2028",
        "\0",
        "#",
        "@",
        "`",
    ),
    *("[0, 999999999999999999]", "[8, 4]", "[0]", "slices:", "models:", "modules:", "a: &a [1, 2]"),
    "a: &b [*a,*a,*a,*a,*a,*a,*a,*a]",
)


def read_plan(folder: Path) -> None:
    plan = LayerPlan.from_file(folder / "plan.yml")
    plan.layer_map(8)
    plan.residual_scales(8)


def prepare_plan(folder: Path) -> None:
    (folder / "plan.yml").write_text(PLAN)


# A format that mends nothing, one that mends all, and one that takes tools.
TEMPLATES = [
    FittedTemplate(ChatTemplate(source, {}, {"bos_token": "<s>", "eos_token": "</s>"}))
    for source in (
        BUILT_IN["chatml"].source,
        CEREBRUM_TEMPLATE,
        "{{ tools }}{% for m in messages %}{{ m|tojson }}{{ m.content }}{% endfor %}",
    )
]


def change_talk(folder: Path, random: Random) -> dict[str, bytes]:
    return {"talk.json": mutated_json(random.choice((TALK, WIDE_TALK)), random)}


def read_talk(folder: Path) -> None:
    messages = read_messages(folder / "talk.json")
    unknown_keys(json.loads((folder / "talk.json").read_bytes()))
    assert check_messages(messages) == messages
    for template in TEMPLATES:
        template.render(messages, continue_final_message=ends_with_answer(messages))
    assert [each["role"] for each in in_turns(messages)].count("system") < 2


def write_kept(folder: Path) -> None:
    node = {"id": "a", "parent": None, "role": "user", "content": "Q?", "at": 5, "state": "done"}
    said = node | {"id": "b", "parent": "a", "role": "assistant", "finish": "stop", "model": "m"}
    one = {"id": "x", "title": "Q?", "updated": 5, "system": "", "leaf": "b", "nodes": [node, said]}
    whole = {"format": kept.FORMAT, "version": kept.VERSION, "conversations": [one, one]}
    (folder / "kept.json").write_text(json.dumps(whole))


def read_kept(folder: Path) -> None:
    for one in kept.conversations(folder / "kept.json"):
        as_markdown(one.title, one.system, one.turns)
        assert all(turn.role in ("user", "assistant") for turn in one.turns)


CALLED = {"name": "f", "arguments": '{"a": 1}'}
FUNCTION = {
    "name": "f",
    "description": "Does it.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "strict": True,
}
NAMED_SCHEMA: dict[str, Any] = {"name": "x", "schema": FUNCTION["parameters"]}
REQUESTS: dict[str, dict[str, Any]] = {
    "chat": {
        "model": "x",
        "messages": [*TALK[:3], {"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["a", "b"],
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "metadata": {"a": "b"},
        "top_k": 5,
        "repetition_penalty": 1.1,
        "repetition_context_size": 20,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {"7": -100, "8": 0.5},
        "min_tokens": 2,
        "ignore_eos": False,
        "tools": [],
        "response_format": {"type": "text"},
    },
    "chat-call": {
        "messages": WIDE_TALK,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "continue_final_message": False,
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "n_predict": -1,
    },
    "chat-form": {
        "messages": [TALK[1], {"role": "assistant", "content": None, "refusal": "No."}],
        "response_format": {"type": "json_schema", "json_schema": NAMED_SCHEMA},
        "add_generation_prompt": True,
        "max_completion_tokens": 9,
    },
    "completion": {
        "prompt": ["a", "b"],
        "max_tokens": 5,
        "logprobs": 2,
        "stop": "x",
        "echo": False,
        "n": 1,
        "guided_choice": ["a", "b"],
    },
    "completion-form": {
        "prompt": [[5, 6], [7]],
        "structured_outputs": {"json": FUNCTION["parameters"], "whitespace_pattern": None},
        "return_token_ids": True,
    },
    "responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "function_call", "call_id": "c", **CALLED},
            {"type": "function_call_output", "call_id": "c", "output": "b"},
            {"type": "message", "role": "assistant", "content": "d"},
        ],
        "instructions": "Be brief.",
        "text": {"format": {"type": "json_schema", **NAMED_SCHEMA}, "verbosity": "low"},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "max_output_tokens": 5,
    },
    "responses-call": {
        "input": "a",
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "required",
    },
    "tokenize": {"messages": TALK, "return_token_strs": True, "add_special_tokens": False},
    "tokenize-text": {"prompt": "a", "add_special": True},
    "detokenize": {"tokens": [5, 6, 258]},
    "load": {"id": "cerebrum-7b:4bit"},
    "typeset": {"jobs": [["tex", "$x^2$"], ["code", "python", "x = 1"]]},
}


class OnlyWritten:
    """Grammars that are not compiled: that takes a process each."""

    def compile(self, ask: Ask) -> None:
        Written(ask)


@cache
def intake() -> Intake:
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_directory(Path(folder))
    tokenizer.use_format(BUILT_IN["cerebrum"])
    layout = Layout(
        positions=8, blocks=8, sliding_window=None, context_length=512, vocabulary_size=259
    )
    made = Intake(tokenizer, Spelling(tokenizer), {"x": layout}, "float32", Defaults())
    grammars: Any = OnlyWritten()
    made.models = {"x": replace(made.models["x"], grammars=grammars)}
    return made


def prepare_requests(folder: Path) -> None:
    for name, body in REQUESTS.items():
        (folder / f"{name}.json").write_text(json.dumps(body))


def change_request(folder: Path, random: Random) -> dict[str, bytes]:
    name = random.choice(sorted(REQUESTS))
    body = dict(REQUESTS[name])
    if random.random() < 0.2:
        body[random.choice(sorted(body))] = value(random)
    return {f"{name}.json": mutated_json(body, random)}


def read_request(folder: Path) -> None:
    for name in REQUESTS:
        body, kind = (folder / f"{name}.json").read_bytes(), name.partition("-")[0]
        if kind in ("chat", "responses"):
            intake().talk(ChatRequest if kind == "chat" else ResponsesRequest, body, "")
        elif kind == "typeset":
            parse_body(TypesetRequest, body)
        elif kind == "load":
            parse_body(LoadRequest, body)
        else:
            getattr(intake(), kind)(*[body, ""][: 1 + (kind == "completion")])


def read_sensitivity(folder: Path) -> None:
    table = Sensitivity.load(folder / "table.json")
    table.num_blocks  # noqa: B018


def prepare_journal(folder: Path) -> None:
    journal = Journal(folder, "print")
    journal.add("layer", "0" * 64)
    journal.close()


def change_journal(folder: Path, random: Random) -> dict[str, bytes]:
    lines = [{"fingerprint": "print"}, {"key": "a", "sha256": "0" * 64}, {"key": "b", "sha256": ""}]
    return {JOURNAL: b"\n".join(mutated_json(line, random) for line in lines)}


def read_journal(folder: Path) -> None:
    Journal(folder, "print").close()


SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "kind": {"const": "node"},
                "next": {"oneOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/leaf"}]},
                "some": {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 0},
            },
            "required": ["kind", "next"],
            "minProperties": 1,
        },
        "leaf": {
            "type": "object",
            "properties": {"kind": {"enum": ["leaf"]}, "at": {"type": "string", "format": "date"}},
            "required": ["kind"],
            "patternProperties": {"^x": {"uniqueItems": False}},
            "additionalProperties": {"anyOf": [{"type": "null"}, {"not": True}]},
        },
    },
}


def write_schema(directory: Path) -> None:
    (directory / "schema.json").write_text(json.dumps(SCHEMA))


def read_schema(directory: Path) -> None:
    text = (directory / "schema.json").read_bytes().decode(errors="surrogateescape")
    Written(Ask("json_schema", text))
    Written(Ask("call", f'[{{"name": "f", "parameters": {text}}}]'))


def write_table(folder: Path) -> None:
    (folder / "table.json").write_text(json.dumps(vars_of(Sensitivity.shipped())))


def vars_of(table: Sensitivity) -> dict[str, Any]:
    return {
        "bits": table.packing.bits,
        "group_size": table.packing.group_size,
        "layer_map": [0, 1],
        "outer": dict(table.outer),
        "blocks": {kind: list(row[:2]) for kind, row in table.blocks.items()},
        "run_exponent": table.run_exponent,
        "provenance": {},
    }


def sing(folder: Path) -> None:
    """Go wrong in every way that the fuzzer must notice, by the input's number."""
    song = (folder / "song").read_bytes()
    if song == b"1":
        os.abort()
    if song == b"2":
        bytearray(3 << 30)
    if song == b"3":
        raise GeneratorExit  # as tokenizers' panics, no Exception
    if song == b"4":
        raise ConfigError("x")
    if song == b"5":
        os._exit(0)
    if song == b"6":
        raise KeyError


CANARY = Reader(
    lambda folder: (folder / "song").write_bytes(b""),
    lambda folder, random: {"song": b"%d" % random.randrange(8)},
    sing,
)


def prepare_shelf(folder: Path) -> None:
    """The two files that a shelf's folders describe themselves with."""
    made = {"source": "x/y", "revision": "a" * 40, "tool": "z", "layout": "folded"}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"provenance": made}))
    state = {"name": "x/y", "bits": 8, "repo": "x/y", "commit": "a" * 40, "bytes": 5}
    (folder / STATE).write_text(json.dumps(state | {"files": {"config.json": "b" * 40}}))


def change_shelf(folder: Path, random: Random) -> dict[str, bytes]:
    return one_json(random.choice(("config.json", STATE)))(folder, random)


def read_shelf(folder: Path) -> None:
    copies = (("config.json", "mine"), ("config.json", "x-4bit"), (STATE, f"{PULLS}/x"))
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        for file, where in copies:
            Path(root, where).mkdir(parents=True)
            shutil.copyfile(folder / file, Path(root, where, file))
        patch.setenv(VARIABLE, root)
        with contextlib.redirect_stdout(io.StringIO()):
            assert listing.main([]) == listing.main(["--json"]) == showing.main(["x"]) == 0
        begun_with(Path(root, PULLS, "x"))
        for entry in entries():
            entry.provenance  # noqa: B018


def write_hosts(folder: Path) -> None:
    (folder / "hosts.json").write_text('[["10.0.0.1:5000", "a:1"], ["10.0.0.2:5000", "b:2"]]')


def read_hosts(folder: Path) -> None:
    hosts({"MLX_RANK": "1", "MLX_HOSTFILE": str(folder / "hosts.json")})


def change_info(folder: Path, random: Random) -> dict[str, bytes]:
    return one_json("info.json")(folder, random)


def prepare_info(folder: Path) -> None:
    """What the hub answers of a repository."""
    file = {"rfilename": "a.safetensors", "size": 9, "blobId": "b" * 40}
    lfs = {"sha256": "c" * 64, "size": 9, "pointerSize": 134}
    siblings = [file | {"lfs": lfs}, file | {"rfilename": "config.json"}]
    info = {"id": "x/y", "sha": "a" * 40, "siblings": siblings}
    (folder / "info.json").write_text(json.dumps(info))


def read_info(folder: Path) -> None:
    with explained("x/y", None):
        remote = Remote.of("x/y", ModelInfo(**json.loads((folder / "info.json").read_text())))
        assert all("/" not in name and file.nbytes >= 0 for name, file in remote.files.items())
        assert remote.commit.isalnum()


READERS: dict[str, Reader] = {
    "config": Reader(checkpoint, change_config, read_directory),
    "header": Reader(checkpoint, change_header(WEIGHTS), read_directory),
    "index": Reader(two_shards, one_json(INDEX), read_directory),
    "gguf": Reader(gguf_seed.prepare, gguf_seed.change, read_gguf),
    "tokenizer-model": Reader(prepare_files, change_pieces, read_tokenizer),
    "tokenizer-json": Reader(prepare_json, change_tokenizer_json, read_tokenizer),
    "tokenizer-files": Reader(prepare_files, change_files, read_tokenizer),
    "template": Reader(prepare_template, templates.change, read_template),
    "plan": Reader(
        prepare_plan, lambda _, random: {"plan.yml": mutated_text(PLAN, random, _YAML)}, read_plan
    ),
    "prompt-cache": Reader(prepare_cache, change_cache, read_cache),
    "conversation": Reader(
        lambda folder: write_messages(folder / "talk.json", TALK),
        change_talk,
        read_talk,
    ),
    "request": Reader(prepare_requests, change_request, read_request),
    "kept": Reader(write_kept, one_json("kept.json"), read_kept),
    "schema": Reader(write_schema, one_json("schema.json"), read_schema),
    "sensitivity": Reader(write_table, one_json("table.json"), read_sensitivity),
    "journal": Reader(prepare_journal, change_journal, read_journal),
    "shelf": Reader(prepare_shelf, change_shelf, read_shelf),
    "hosts": Reader(write_hosts, one_json("hosts.json"), read_hosts),
    "hub": Reader(prepare_info, change_info, read_info),
}
