"""What cache entries of 8 or 4 bits cost and save: perplexity, bytes, decode pace.

Attention reads, for every new token, the keys and values of all tokens it can see; at some length
they take more memory and time than the weights. `--kv-bits` packs them as `mx.quantize` packs
weights: 64 values of one head (32 where its width asks for that) share a scale and an offset.

How much the rounding matters is measured against the same model with dense entries on the same
tokens: difference in loss (nats a token, with its interval), KL from the dense distribution, and
how often both would write the same token. All that a token sees of the text is packed.

A pace is taken after a prompt that fills the cache: decode some tokens, take them back, and let
another form do the same. Ratios are of neighbours in time. They hold for one backend: where packed
entries can't be multiplied as they are (MLX's CPU backend), they are unpacked at every step.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from bench.bootstrap import Interval, Values
from bench.engines import prompt_ids, timed
from bench.likelihood import TEXTS, Ids, compare, figures, log_probs, strided, text_ids
from bench.pair import open_pair
from bench.report import Spread, parser, ratio, rounds, run, table
from bench.suite import Results
from mlx_cerebrum.decoding.decode import prefill, prefill_step
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.entries import KV_BITS, check_kv_bits, kv_group
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, require

FORMS: dict[str, int | None] = {"dense": None} | {f"{bits} bits": bits for bits in KV_BITS}
CONTEXT = 512  # tokens of a window of text
ROUNDS = 5
DECODED = 32  # tokens of a round; no more than a cache can always take back


def main(argv: list[str] | None = None) -> int:
    p = parser("kv_bits", "What cache entries of 8 or 4 bits cost and save.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help="which")
    p.add_argument("--plan", metavar="NAME|FILE", help="second model (default: the card's formula)")
    p.add_argument("--window", type=int, metavar="TOKENS", help="another sliding window; 0: none")
    tokens = "of text to score (default: 4096)"
    p.add_argument("--tokens", type=int, default=4096, metavar="N", help=tokens)
    prompts, lengths = "tokens before the pace is taken (default: 1024 4096)", [1024, 4096]
    p.add_argument("--prompts", type=int, nargs="*", default=lengths, metavar="N", help=prompts)
    return run(p, _measure, text, argv)


def _measure(args: argparse.Namespace) -> Results:
    """Both sides' figures by name. Raises a CerebrumError for a model that can't be measured."""
    if min([args.tokens, *args.prompts]) < 1:
        raise RequestError("--tokens and --prompts must be at least 1")
    pair = open_pair(args.model, None, args.plan, window=args.window)
    config, tokenizer = pair.checkpoint().config, pair.opened.tokenizer
    check_kv_bits(config, KV_BITS[0])
    tokens = args.tokens // len(TEXTS)
    chosen = [w for file in TEXTS for w in strided(*text_ids(tokenizer, file), CONTEXT, tokens)]
    lengths = sorted({min(n, config.max_position_embeddings - DECODED) for n in args.prompts})
    prompt = prompt_ids(pair.checkpoint(), max(lengths, default=0))
    return {
        name: {
            "quality": quality(model, chosen),
            "bytes_per_token": {form: token_bytes(model, bits) for form, bits in FORMS.items()},
            "decode": paces(model, prompt, lengths),
        }
        for name, model in zip(pair.names, pair.models(), strict=True)
    }


def quality(model: Model, chosen: list[Ids]) -> Results:
    """By form: packed entries against dense ones (see likelihood.figures)."""
    found: dict[str, list[Values]] = {form: [] for form, bits in FORMS.items() if bits}
    for window in chosen:
        dense = list(log_probs(model, window[:-1]))
        for form, each in found.items():
            packed = log_probs(model, window[:-1], model.make_cache(FORMS[form]))
            each.append(compare(dense, packed, window))
    return {form: figures(each) for form, each in found.items()}


def token_bytes(model: Model, bits: int | None) -> float:
    """Bytes of cache entries, all positions', that one token of context takes."""
    item_bytes = model.dtype.size
    packed = (bits or 0) / 8 + 2 * item_bytes / kv_group(model.config.head_dim)
    return model.config.kv_values_per_token() * (packed if bits else item_bytes)


def paces(
    model: Model, prompt: Sequence[int], lengths: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second after the first `length` tokens of `prompt`, by length and form."""
    if lengths:
        asked = model.config, model.dtype.size, len(prompt), DECODED, prefill_step()
        needed = sum(Workload(*asked, bits).cache_bytes for bits in FORMS.values())
        require(needed, f"entries of {len(prompt)} tokens", "give shorter --prompts")
    caches = {form: model.make_cache(bits) for form, bits in FORMS.items()}
    found = {}
    for length in lengths:
        for cache in caches.values():
            prefill(model, mx.array(list(prompt[cache[0].offset : length])), cache)
        sides = {form: partial(_decode, model, cache, prompt) for form, cache in caches.items()}
        found[str(length)] = rounds(sides, ROUNDS)
    return found


def _decode(model: Model, cache: Sequence[WindowedKVCache], prompt: Sequence[int]) -> float:
    """Tokens a second; `cache` is left as it was found."""
    before = cache[0].offset
    run = timed(generate_step(prompt[-1:], model, max_tokens=DECODED, cache=cache), 1)
    for layer_cache in cache:
        layer_cache.trim(layer_cache.offset - before)
    return run.decode_tps


def text(results: Results) -> list[str]:
    """A table of quality and one of paces."""
    header = ["entries", "perplexity", "more nats a token", "KL", "same token", "bytes a token"]
    rows, speeds, tokens = [], [], 0
    for name, found in results.items():
        for form, nbytes in found["bytes_per_token"].items():
            one = found["quality"].get(form)
            loss = one["loss_b"] if one else found["quality"]["8 bits"]["loss_a"]
            row = [f"{name}, {form}", f"{math.exp(loss):.3f}", *[""] * 3, f"{nbytes:.0f}"]
            if one:
                row[2] = Interval.from_json(one["difference"]).text(4, sign=True)
                row[3:5] = [f"{one['kl']['value']:.5f}", f"{one['agreement']['value']:.1%}"]
                tokens = one["tokens"]
            rows.append(row)
        for length, sides in found["decode"].items():
            for form, each in sides.items():
                pace, relative = Spread.of(each).text(), ratio(each, sides["dense"]).text(2)
                speeds.append([f"{name}, {length}, {form}", pace, relative])
    said = [f"Tokens scored: {tokens}.", table(header, rows)]
    if speeds:
        said.append(table(["model, prompt, entries", "decode, tokens/s", "of dense"], speeds))
    return said


if __name__ == "__main__":
    sys.exit(main())
