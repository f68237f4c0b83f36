"""Ours beside mlx-lm, transformers and llama.cpp: same weights, same token ids, in turns.

Another engine is a fair yardstick when it does the same work. So each gets the same prompt as
token ids and the weights in the form it reads, at settings that were fastest here; where it can
compute as ours does (float32 on a CPU, as stored on a GPU), it does, and the tokens it says are
compared with ours one by one. llama.cpp runs a second time in a quantized form of its own, as
its users run it: that is other arithmetic, marked so, and its tokens may differ.

Side B repeats blocks. The others know no layer map and read an unrolled copy, which takes its
full size in memory; ours runs B over the weights of A. What a token *reads* is the same.

Read the ratios as ours over theirs: above 1 ours is faster, for every measure. Prefill is prompt
tokens over the time to the first token, decode what comes after. A ratio below 1 is explained
with figures: where the other reads fewer bytes a token, by these; else by where our time goes, in
matrix products and beside them, which `bench.step_profile` measures for each side.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from bench import engines, llama_cpp, process, step_profile
from bench.attempts import Attempt, Source, forget, in_turns, one_by_one, one_line
from bench.copies import Copies, main_type, nbytes
from bench.engines import Engine, prompt_ids, required
from bench.pair import Pair, Side
from bench.peers_report import OURS, plots, text
from bench.report import Spread, ratio, rounds
from bench.suite import Effort, Results
from mlx_cerebrum import device
from mlx_cerebrum.errors import CerebrumError, MemoryBudgetError, RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import GB, human, require

__all__ = ["measure", "plots", "text"]

PROMPT_TOKENS = 512
QUESTION = "The capital of France is"
_ROUNDS = 3  # at most: every round is as many generations as there are engines


def measure(pair: Pair, settings: Effort, prompt_tokens: int = PROMPT_TOKENS) -> Results:
    """Raises MemoryBudgetError where not even ours fits."""
    most = pair.checkpoint().config.max_position_embeddings - settings.tokens
    prompt = prompt_ids(pair.checkpoint(), max(2, min(prompt_tokens, most)))
    tunings: dict[bool, llama_cpp.Tuning] = {}  # by whether it is exact
    sides = {}
    for index, key in enumerate("ab"):
        sides[key] = _side(pair, index, settings, prompt, tunings)
    settings.say("profile of our forward pass")
    for side, model in zip(sides.values(), pair.models(), strict=True):
        side["profile"] = step_profile.measure_short(model, prompt, 2)
    return {
        "prompt_tokens": len(prompt),
        "tokens": settings.tokens,
        "float32": pair.storage().dtype == mx.float32,
        "sides": sides,
    }


def _side(
    pair: Pair,
    index: int,
    settings: Effort,
    prompt: list[int],
    tunings: dict[bool, llama_cpp.Tuning],
) -> Results:
    side = pair.sides[index]
    config = side.config
    with tempfile.TemporaryDirectory(dir=settings.work) as folder:
        copies = Copies(pair, side, Path(folder))
        context = len(prompt) + settings.tokens
        peers: dict[str, Source | str] = {}
        for name, prepare in _sources(copies, config, prompt, context, tunings).items():
            size = human(config.executed_parameters * pair.storage().dtype.size)
            settings.say(f"{side.name}: the weights for {name}, up to {size} in {folder}")
            try:
                peers[name] = prepare()
            except Exception as error:
                peers[name] = one_line(error)
        start = _start(pair, side, copies, settings)
        sources = {name: peer for name, peer in peers.items() if isinstance(peer, Source)}
        together = _fit_together(pair, list(sources.values()))
        attempts = _attempts(pair, index, sources, prompt, settings.tokens, together)
        settings.say(f"{side.name}: {', '.join(attempts)}")
        if together:
            in_turns(attempts, _most(settings), 2 * settings.seconds)
        else:
            one_by_one(attempts, _most(settings), settings.seconds, pair.release)
        ours = attempts[OURS]
        if ours.engine is None or ours.failure is not None:
            raise CerebrumError(f"{OURS}: {ours.failure}")
        found = {
            name: _row(attempt, ours, len(prompt) + settings.tokens // 2, config)
            for name, attempt in attempts.items()
        }
        failed = {name: {"failure": peer} for name, peer in peers.items() if name not in sources}
        names = [OURS, *peers]
        results = {
            "name": side.name,
            "together": together,
            "rounds": len(ours.runs),
            "engines": {name: (found | failed)[name] for name in names},
            "start": start,
        }
        del attempts, ours, sources, peers
        forget()
    return results


def _sources(
    copies: Copies,
    config: ModelConfig,
    prompt: list[int],
    context: int,
    tunings: dict[bool, llama_cpp.Tuning],
) -> dict[str, Callable[[], Source]]:
    """How each peer's weights are made ready. Each raises a one-line reason where they can't."""

    def mlx_lm() -> Source:
        path = copies.directory()
        return Source(nbytes(path), lambda ours: engines.mlx_lm(path, config, prompt, ours))

    def transformers() -> Source:
        for package in ("transformers", "torch"):  # before anything is written for them
            required(package, "oracle")
        path = copies.directory()
        # Twice: it loads on the CPU and then moves what it loaded.
        size = nbytes(path) * (2 if device.on_gpu() else 1)
        return Source(size, lambda _: engines.transformers(path, config, prompt))

    def llama(kind: str, exact: bool) -> Source:
        required("xllamacpp", "bench")
        if device.on_gpu() and not llama_cpp.on_gpu():
            raise RequestError("this xllamacpp computes on the CPU only; install its GPU wheel")
        path = copies.native if kind == "native" else copies.gguf(kind)
        assert path is not None

        def load(_: Model | None) -> Engine:
            if exact not in tunings:
                tunings[exact] = llama_cpp.tune(path, exact, prompt)
            return llama_cpp.open_engine(
                path, config, tunings[exact], exact=exact and kind == "F32", context=context + 1
            )

        return Source(nbytes(path), load, exact)

    found: dict[str, Callable[[], Source]] = {"mlx-lm": mlx_lm, "transformers": transformers}
    if copies.dense:
        found[f"llama.cpp {copies.kind}"] = partial(llama, copies.kind, True)
    if copies.native is not None:
        found[f"llama.cpp {main_type(copies.native)}"] = partial(llama, "native", False)
    else:
        found["llama.cpp Q8_0"] = partial(llama, "Q8_0", False)
    return found


def _start(pair: Pair, side: Side, copies: Copies, settings: Effort) -> Results:
    """Seconds of whole processes that print one token, by what they read."""
    if pair.tokenizer() is None:
        return {"failure": "the model has no tokenizer"}
    pair.release()
    forget()
    plan = [] if side.plan is None else ["--plan", str(side.plan_file(copies.folder))]
    window = [] if pair.window is None else ["--window", str(pair.window)]
    asked = ["--prompt", QUESTION, "--max-tokens", "1"]
    own = ["mlx_cerebrum.generate", *asked, "--raw", "--quiet"]
    try:
        unrolled = str(copies.directory())
        packed = [] if pair.packing is None else ["--q-bits", str(pair.packing.bits)]
        processes = {
            OURS: [*own, "--model", str(pair.path), *plan, *window, *packed],
            f"{OURS}, mlx-lm's directory": [*own, "--model", unrolled, *window],
            "mlx-lm": ["mlx_lm.generate", *asked, "--ignore-chat-template", "--model", unrolled],
        }
        settings.say(f"{side.name}: process start to first token")
        sides = {name: partial(process.seconds, words) for name, words in processes.items()}
        took = rounds(sides, _most(settings), seconds=settings.seconds)
    except CerebrumError as error:
        return {"failure": one_line(error)}
    return {
        "rounds": len(took[OURS]),
        "seconds": {name: Spread.of(found).as_json() for name, found in took.items()},
        # Theirs over ours, for above 1 to mean that ours is faster here too.
        "ratios": {n: ratio(took["mlx-lm"], took[n]).as_json() for n in took if n != "mlx-lm"},
    }


def _most(settings: Effort) -> int:
    return min(_ROUNDS, settings.rounds)


def _fit_together(pair: Pair, sources: Sequence[Source]) -> bool:
    storage = pair.storage()
    needed = storage.nbytes + storage.transient + sum(source.nbytes for source in sources)
    try:
        require(needed, "all engines at once", "")
    except MemoryBudgetError:
        return False
    return True


def _attempts(
    pair: Pair,
    index: int,
    sources: dict[str, Source],
    prompt: list[int],
    tokens: int,
    together: bool,
) -> dict[str, Attempt]:
    def load(source: Source) -> Engine:
        require(source.nbytes, "loading it", "measure it on a machine with more memory")
        return source.open(pair.models()[index] if together else None)

    attempts = {OURS: Attempt(lambda: engines.ours(pair.models()[index]), prompt, tokens)}
    for name, source in sources.items():
        attempts[name] = Attempt(partial(load, source), prompt, tokens, source.exact)
    return attempts


def _row(attempt: Attempt, ours: Attempt, context: int, config: ModelConfig) -> Results:
    """An engine's figures, and ours over them round by round."""
    engine = attempt.engine
    if engine is None or attempt.failure is not None:
        return {"failure": attempt.failure}
    runs, our_runs = attempt.runs, ours.runs
    paces = {
        "prefill": [run.prefill_tps for run in runs],
        "decode": [run.decode_tps for run in runs],
    }
    row: Results = {
        "version": engine.version,
        "settings": engine.settings,
        "exact": attempt.exact,
        "weights": engine.weights,
        "token_bytes": engine.token_bytes(context),
        "first": Spread.of([run.first for run in runs]).as_json(),
        "same_weights": engine.same_weights,
    }
    row |= {name: Spread.of(pace).as_json() for name, pace in paces.items()}
    row["gb_s"] = row["decode"]["median"] * row["token_bytes"] / GB
    # Multiplications and additions of a prompt token in the blocks' matrices.
    work = 2 * config.num_positions * config.block_parameters
    row["gflop_s"] = row["prefill"]["median"] * work / 1e9
    if attempt is not ours:
        shared = min(len(runs), len(our_runs))
        mine = {
            "prefill": [run.prefill_tps for run in our_runs],
            "decode": [run.decode_tps for run in our_runs],
        }
        row["ratios"] = {
            name: ratio(mine[name][:shared], pace[:shared]).as_json()
            for name, pace in paces.items()
        }
        row |= agreement(our_runs[0].tokens, runs[0].tokens, config.eos_token_ids)
    return row


def agreement(ours: Sequence[int], theirs: Sequence[int], ends: Sequence[int]) -> Results:
    """How many tokens agree before the first that differs, of how many.

    Up to our first end-of-text token: llama.cpp can't say one when it is not to stop there.
    """
    end = next((i for i, token in enumerate(ours) if token in ends), len(ours))
    pairs = list(zip(ours[:end], theirs, strict=False))
    agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {"agreeing": agreeing, "compared": end, "equal": agreeing == end}
