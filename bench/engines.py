"""The engines of a comparison on one footing: same directory, ids in, every token timed."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cerebrum.checkpoint import Checkpoint, open_checkpoint
from mlx_cerebrum.decode import generate_step
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.load import choose_storage, load_model, load_tokenizer
from mlx_cerebrum.model import Model

# Public domain: Lewis Carroll, Alice's Adventures in Wonderland (1865), its opening.
TEXT = """Alice was beginning to get very tired of sitting by her sister on the bank, and of
having nothing to do: once or twice she had peeped into the book her sister was reading, but
it had no pictures or conversations in it, "and what is the use of a book," thought Alice,
"without pictures or conversations?" So she was considering in her own mind (as well as she
could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making
a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly
a White Rabbit with pink eyes ran close by her. There was nothing so very remarkable in that;
nor did Alice think it so very much out of the way to hear the Rabbit say to itself, "Oh dear!
Oh dear! I shall be late!" """.replace("\n", " ")


@dataclass(frozen=True)
class Run:
    """One generation: its tokens, and when each was there (seconds after the start)."""

    tokens: list[int]
    times: list[float]
    prompt_tokens: int

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second, until the first new token was there."""
        return self.prompt_tokens / self.times[0]

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


Engine = Callable[[Sequence[int], int], Run]  # prompt ids, tokens wanted


def timed(steps: Iterator[int], prompt_tokens: int) -> Run:
    started = time.perf_counter()
    tokens, times = [], []
    for token in steps:
        times.append(time.perf_counter() - started)
        tokens.append(token)
    return Run(tokens, times, prompt_tokens)


def ours(directory: Path) -> tuple[Engine, Model]:
    checkpoint = open_checkpoint(directory)
    storage = choose_storage(checkpoint, None, "auto")
    model = load_model(checkpoint, checkpoint.config, storage)

    def run(prompt: Sequence[int], max_tokens: int) -> Run:
        return timed(generate_step(prompt, model, max_tokens=max_tokens), len(prompt))

    return run, model


def mlx_lm(directory: Path) -> tuple[Engine, nn.Module]:
    """mlx-lm as a library: its own `generate_step` with its own defaults, which are greedy."""
    from mlx_lm.generate import generate_step as peer_step
    from mlx_lm.utils import load_model as peer_load

    model, _ = peer_load(directory)

    def run(prompt: Sequence[int], max_tokens: int) -> Run:
        steps = peer_step(mx.array(list(prompt)), model, max_tokens=max_tokens)
        return timed((int(token) for token, _ in steps), len(prompt))

    return run, model


def same_weights(model: Model, peer: nn.Module) -> bool:
    """Whether both models hold the same numbers, bit for bit. Ours may be fused."""
    theirs: dict[str, mx.array] = dict(tree_flatten(peer.parameters()))
    fused = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    for name, array in dict(tree_flatten(model.parameters())).items():
        kind = name.split(".")[-2]
        parts = [theirs.pop(name.replace(kind, part)) for part in fused.get(kind, (kind,))]
        if not mx.array_equal(array, mx.concatenate(parts)).item():
            return False
    return not theirs


def prompt_ids(checkpoint: Checkpoint, count: int) -> list[int]:
    """`count` ids of English prose; of noise for a checkpoint that has no tokenizer."""
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CerebrumError:
        return random.Random(0).choices(range(checkpoint.config.vocab_size), k=count)
    ids = tokenizer.encode(TEXT)
    while len(ids) < count:
        ids += tokenizer.encode(TEXT, add_bos=False)
    return ids[:count]
