"""The engines of a comparison on one footing: token ids in, token ids out, two times.

Each engine is called as a library, greedily, with the settings that its own library knows and
that were fastest here; where there was a choice it was tried before anything was timed, and the
engine says which it is. Nothing stops at an end-of-text token: all decode the same number.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench import bandwidth, machine
from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.tensors import FUSED
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.opening import load_tokenizer
from mlx_cerebrum.weights.storage import dtype_name

# A prompt that says nothing twice: continuing a repetition would say little of an engine.
PROSE = Path(__file__).parent / "data" / "austen.txt"


@dataclass(frozen=True)
class Run:
    """One generation: its tokens, and the seconds to the first and from there to the last."""

    tokens: list[int]
    first: float
    rest: float
    prompt_tokens: int

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second, until the first new token was there."""
        return self.prompt_tokens / self.first

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / self.rest


Generate = Callable[[Sequence[int], int], Run]  # prompt ids, tokens wanted


@dataclass
class Loaded:
    """An engine with a model, and what a reader must know to judge its figures."""

    version: str
    settings: str
    weights: int  # bytes its weights take
    reads: int  # bytes of weights that a decoded token reads
    kv: int  # bytes of keys and values that it reads besides, for each token before it
    generate: Generate
    same_weights: bool | None = None  # as ours, bit for bit; None: not compared

    def token_bytes(self, context: int) -> int:
        return self.reads + self.kv * context


def required(package: str, extra: str) -> str:
    """The installed version. Raises RequestError, saying how to get the package."""
    version = machine.version(package)
    if version is None:
        raise RequestError(f"{package} is not installed; pip install -e '.[{extra}]'")
    return version


def timed(steps: Iterator[int], prompt_tokens: int) -> Run:
    """Runs `steps` to its end; what it does before its first token counts for that token."""
    started = time.perf_counter()
    tokens = [next(steps)]
    first = time.perf_counter()
    tokens += steps
    return Run(tokens, first - started, time.perf_counter() - first, prompt_tokens)


def ours(model: Model) -> Loaded:
    def generate(prompt: Sequence[int], max_tokens: int) -> Run:
        return timed(generate_step(prompt, model, max_tokens=max_tokens), len(prompt))

    dtype = model.dtype
    weights = sum(_sizes(model).values())
    kv = model.config.kv_values_per_token() * dtype.size
    settings = f"{dtype_name(dtype)} activations, prefill in chunks of {prefill_step()}"
    version = machine.version("mlx-cerebrum") or ""
    return Loaded(version, settings, weights, bandwidth.token_bytes(model), kv, generate)


def mlx_lm(
    directory: Path, config: ModelConfig, sample: Sequence[int], reference: Model | None
) -> Loaded:
    """mlx-lm's own `generate_step`, greedy. Its weights are compared with those of `reference`.

    Prefill runs in the faster of its default chunks and ours, tried on `sample`.
    """
    from mlx_lm.generate import generate_step as peer_step
    from mlx_lm.utils import load_model as peer_load

    model, _ = peer_load(directory)

    def way(**chunks: int) -> Generate:
        def generate(prompt: Sequence[int], max_tokens: int) -> Run:
            steps = peer_step(mx.array(list(prompt)), model, max_tokens=max_tokens, **chunks)
            return timed((int(token) for token, _ in steps), len(prompt))

        return generate

    step = prefill_step()
    ways = {"its default chunks": way(), f"chunks of {step}": way(prefill_step_size=step)}
    way()(sample, 2)  # to warm up
    how = min(ways, key=lambda how: ways[how](sample, 1).first)
    sizes = _sizes(model)
    dtype = model.model.norm.weight.dtype
    return Loaded(
        version=machine.version("mlx-lm") or "",
        settings=f"{dtype_name(dtype)} activations, prefill in {how}",
        weights=sum(sizes.values()),
        reads=reads(sizes),
        kv=config.kv_values_per_token() * dtype.size,
        generate=ways[how],
        same_weights=None if reference is None else same_weights(reference, model),
    )


def transformers(directory: Path, config: ModelConfig, sample: Sequence[int]) -> Loaded:
    """A plain loop over a transformers model's forward pass and its own cache, greedy.

    Attention is the faster of sdpa and eager, tried on `sample`.
    """
    version = f"{required('transformers', 'oracle')}, torch {required('torch', 'oracle')}"
    torch: Any = import_module("torch")
    library: Any = import_module("transformers")
    library.utils.logging.disable_progress_bar()
    mps = torch.backends.mps.is_available()
    place = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device.on_gpu() and place == "cpu":
        raise RequestError("this torch computes on the CPU only; install one for this GPU")
    model = library.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", local_files_only=True
    )
    model = model.to(place).eval()

    def steps(prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        ids, cache = torch.tensor([list(prompt)], device=place), None
        for _ in range(max_tokens):
            with torch.inference_mode():
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                token = int(ids.item())
            yield token

    def generate(prompt: Sequence[int], max_tokens: int) -> Run:
        return timed(steps(prompt, max_tokens), len(prompt))

    def took(attention: str) -> float:
        model.set_attn_implementation(attention)
        generate(sample[:8], 2)
        run = generate(sample[:128], 8)
        return run.first + run.rest

    attention = min(("sdpa", "eager"), key=took)
    model.set_attn_implementation(attention)
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}  # tied: once
    threads = f", threads: {torch.get_num_threads()}" if place == "cpu" else ""
    dtype = str(model.dtype).rpartition(".")[2]
    return Loaded(
        version=version,
        settings=f"{dtype} on {place}{threads}, attention {attention}, a loop over forward passes",
        weights=sum(sizes.values()),
        reads=reads(sizes),
        kv=config.kv_values_per_token() * model.dtype.itemsize,
        generate=generate,
    )


def reads(sizes: dict[str, int]) -> int:
    """Bytes of tensors that a token reads: all but the embedding, unless it is the head too."""
    untied = any(name.startswith(("lm_head.", "output.")) for name in sizes)
    unread = ("model.embed_tokens.", "token_embd.") if untied else ()
    return sum(nbytes for name, nbytes in sizes.items() if not name.startswith(unread))


def same_weights(model: Model, peer: nn.Module) -> bool:
    """Whether `peer`, unrolled, holds the numbers ours runs, bit for bit. Ours may be fused."""
    theirs: dict[str, mx.array] = dict(tree_flatten(peer.parameters()))
    layer_map = model.config.layer_map
    for name, array in dict(tree_flatten(model.parameters())).items():
        kind = name.split(".")[-2]
        block = int(name.split(".")[2]) if ".layers." in name else None
        positions = [p for p, b in enumerate(layer_map) if b == block]
        places = [name.replace(f".{block}.", f".{p}.", 1) for p in positions]
        for place in [name] if block is None else places:
            sources = FUSED.get(kind, (kind,))
            parts = [theirs.pop(place.replace(kind, part), None) for part in sources]
            found = [part for part in parts if part is not None]
            if len(found) < len(parts) or not mx.array_equal(array, mx.concatenate(found)).item():
                return False
    return not theirs


def prompt_ids(checkpoint: Checkpoint, count: int) -> list[int]:
    """`count` ids of English prose; of noise for a checkpoint that has no tokenizer."""
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CerebrumError:
        return random.Random(0).choices(range(checkpoint.config.vocab_size), k=count)
    text = PROSE.read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    while len(ids) < count:
        ids += tokenizer.encode(text, add_bos=False)
    return ids[:count]


def _sizes(model: nn.Module) -> dict[str, int]:
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {name: array.nbytes for name, array in arrays.items()}
