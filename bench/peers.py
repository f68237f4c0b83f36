"""Ours beside mlx-lm, transformers and llama.cpp: same weights, same token ids, in turns.

Another engine is a fair yardstick when it does the same work. So each gets the same prompt as
token ids and the weights in the form it reads, at settings that were fastest here; where it can
compute as ours does (float32 on a CPU, as stored on a GPU), it does, and the tokens it says are
compared with ours one by one. llama.cpp runs a second time in a quantized form of its own, as
its users run it: that is other arithmetic, marked so, and its tokens may differ.

Side B repeats blocks. The others know no layer map and read an unrolled copy, which takes its
full size in memory; ours runs B over the weights of A. What a token *reads* is the same.

Where a ratio is below 1, the figures beside it say why: the bytes that each reads a token, and
where our own time goes by kind of operation (`bench.step_profile`).
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from bench import engines, llama_cpp, process, step_profile
from bench.attempts import Attempt, Source, forget, in_turns, one_by_one, one_line
from bench.copies import Copies, main_type, nbytes
from bench.engines import Loaded, prompt_ids, required
from bench.pair import Pair
from bench.plots import Picture, bars
from bench.report import Spread, ratio, rounds, table
from bench.suite import Effort, Results
from mlx_cerebrum import device
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import GB, fits, human, require

OURS = "mlx-cerebrum"
PROMPT_TOKENS = 512
QUESTION = "The capital of France is"
_ROUNDS = 3  # at most: every round is as many generations as there are engines

Tunings = dict[bool, llama_cpp.Tuning]  # of llama.cpp, by whether its weights are exact


def measure(pair: Pair, effort: Effort, prompt_tokens: int = PROMPT_TOKENS) -> Results:
    """Raises MemoryBudgetError where not even ours fits."""
    effort = replace(effort, rounds=min(_ROUNDS, effort.rounds))
    most = pair.checkpoint().config.max_position_embeddings - effort.tokens
    prompt = prompt_ids(pair.checkpoint(), max(2, min(prompt_tokens, most)))
    tunings: Tunings = {}
    sides = {}
    for index, key in enumerate("ab"):
        sides[key] = _side(pair, index, effort, prompt, tunings)
        forget()
    effort.say("profile of our forward pass")
    for side, model in zip(sides.values(), pair.models(), strict=True):
        side["profile"] = step_profile.measure_short(model, prompt, 2)
    return {
        "prompt_tokens": len(prompt),
        "tokens": effort.tokens,
        "float32": pair.storage().dtype == mx.float32,
        "sides": sides,
    }


def _side(pair: Pair, index: int, effort: Effort, prompt: list[int], tunings: Tunings) -> Results:
    side, storage = pair.sides[index], pair.storage()
    sources: dict[str, Source] = {}
    failed: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory(dir=effort.work) as folder:
        copies = Copies(pair, side, Path(folder))
        size = human(side.config.executed_parameters * storage.dtype.size)
        for name, prepare in _sources(copies, prompt, effort.tokens, tunings).items():
            effort.say(f"{side.name}: the weights for {name}, up to {size} in {folder}")
            try:
                sources[name] = prepare()
            except Exception as error:
                failed[name] = one_line(error)
        start = _start(copies, effort)
        needed = storage.nbytes + storage.transient + sum(one.nbytes for one in sources.values())
        together = fits(needed)
        ours = Attempt(lambda: engines.ours(pair.models()[index]), prompt, effort.tokens)
        attempts = {OURS: ours}
        for name, source in sources.items():
            load = partial(_load, source, pair, index if together else None)
            attempts[name] = Attempt(load, prompt, effort.tokens, source.exact)
        effort.say(f"{side.name}: {', '.join(attempts)}")
        if together:
            in_turns(attempts, effort.rounds, 2 * effort.seconds)
        else:
            one_by_one(attempts, effort.rounds, effort.seconds, pair.release)
    failed |= {name: attempt.failure for name, attempt in attempts.items() if attempt.failure}
    if OURS in failed:
        raise CerebrumError(f"{OURS}: {failed[OURS]}")
    context = len(prompt) + effort.tokens // 2
    rows = {
        name: _row(attempt, ours, context, side.config)
        for name, attempt in attempts.items()
        if name not in failed
    }
    return {
        "name": side.name,
        "together": together,
        "rounds": len(ours.runs),
        "engines": rows | {name: {"failure": why} for name, why in failed.items()},
        "start": start,
    }


def _load(source: Source, pair: Pair, index: int | None) -> Loaded:
    """`index`: the side of ours that is loaded, to compare weights with."""
    require(source.nbytes, "loading it", "measure it on a machine with more memory")
    return source.open(None if index is None else pair.models()[index])


def _sources(
    copies: Copies, prompt: list[int], tokens: int, tunings: Tunings
) -> dict[str, Callable[[], Source]]:
    """How each peer's weights are made ready. Each raises a one-line reason where they can't."""
    config = copies.side.config

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
        path = copies.gguf(kind) if copies.native is None or exact else copies.native

        def load(_: Model | None) -> Loaded:
            if exact not in tunings:
                tunings[exact] = llama_cpp.tune(path, exact, prompt)
            float32, context = exact and kind == "F32", len(prompt) + tokens + 1
            return llama_cpp.open_engine(
                path, config, tunings[exact], exact=float32, context=context
            )

        return Source(nbytes(path), load, exact)

    found: dict[str, Callable[[], Source]] = {"mlx-lm": mlx_lm, "transformers": transformers}
    if copies.dense:
        found[f"llama.cpp {copies.kind}"] = partial(llama, copies.kind, True)
    quantized = "Q8_0" if copies.native is None else main_type(copies.native)
    found[f"llama.cpp {quantized}"] = partial(llama, quantized, False)
    return found


def _start(copies: Copies, effort: Effort) -> Results:
    """Seconds of whole processes that print one token, by what they read."""
    pair, side = copies.pair, copies.side
    if pair.tokenizer() is None:
        return {"failure": "the model has no tokenizer"}
    pair.release()
    forget()
    window = [] if pair.window is None else ["--window", str(pair.window)]
    asked = ["--prompt", QUESTION, "--max-tokens", "1"]
    own = ["mlx_cerebrum.generate", *asked, "--raw", "--quiet"]
    try:
        unrolled = str(copies.directory())
        processes = {
            OURS: [*own, *pair.flags(side, copies.folder)],
            f"{OURS}, mlx-lm's directory": [*own, "--model", unrolled, *window],
            "mlx-lm": ["mlx_lm.generate", *asked, "--ignore-chat-template", "--model", unrolled],
        }
        effort.say(f"{side.name}: process start to first token")
        sides = {name: partial(process.seconds, words) for name, words in processes.items()}
        took = rounds(sides, effort.rounds, seconds=effort.seconds)
    except CerebrumError as error:
        return {"failure": one_line(error)}
    return {
        "rounds": len(took[OURS]),
        "seconds": {name: Spread.of(found).as_json() for name, found in took.items()},
        # Theirs over ours, for above 1 to mean that ours is faster here too.
        "ratios": {n: ratio(took["mlx-lm"], took[n]).as_json() for n in took if n != "mlx-lm"},
    }


def _row(attempt: Attempt, ours: Attempt, context: int, config: ModelConfig) -> Results:
    """An engine's figures, and ours over them round by round."""
    engine = attempt.engine
    assert engine is not None
    paces, our_paces = (
        {
            "prefill": [run.prefill_tps for run in one.runs],
            "decode": [run.decode_tps for run in one.runs],
        }
        for one in (attempt, ours)
    )
    row: Results = {name: Spread.of(pace).as_json() for name, pace in paces.items()}
    # Multiplications and additions of a prompt token in the blocks' matrices.
    work = 2 * config.num_positions * config.block_parameters
    nbytes = engine.token_bytes(context)
    row |= {
        "version": engine.version,
        "settings": engine.settings,
        "exact": attempt.exact,
        "weights": engine.weights,
        "token_bytes": nbytes,
        "first": Spread.of([run.first for run in attempt.runs]).as_json(),
        "same_weights": engine.same_weights,
        "gb_s": row["decode"]["median"] * nbytes / GB,
        "gflop_s": row["prefill"]["median"] * work / 1e9,
    }
    if attempt is not ours:
        shared = min(len(attempt.runs), len(ours.runs))
        row["ratios"] = {
            name: ratio(our_paces[name][:shared], pace[:shared]).as_json()
            for name, pace in paces.items()
        }
        row |= agreement(ours.runs[0].tokens, attempt.runs[0].tokens, config.eos_token_ids)
    return row


def agreement(ours: Sequence[int], theirs: Sequence[int], ends: Sequence[int]) -> Results:
    """How many tokens agree before the first that differs, of how many.

    Up to our first end-of-text token: llama.cpp can't say one when it is not to stop there.
    """
    end = next((i for i, token in enumerate(ours) if token in ends), len(ours))
    pairs = list(zip(ours[:end], theirs, strict=False))
    agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {"agreeing": agreeing, "compared": end, "equal": agreeing == end}


def text(results: Results) -> list[str]:
    near = "" if results["float32"] else "; rounding to 16 bits can turn near ties"
    parts = [
        f"The same {results['prompt_tokens']} prompt tokens for every engine,"
        f" {results['tokens']} generated; median (lowest-highest) of the rounds. Ratios are ours"
        " over theirs, round by round: above 1 ours is faster. Other tokens than ours on the same"
        f" weights are a finding{near}; from quantized weights they are not."
    ]
    versions = defaultdict(list)
    for side in results["sides"].values():
        parts += _side_text(side)
        for name, row in _measured(side).items():
            versions[f"- {name}: {row['version']}; {row['settings']}"].append(side["name"])
    said = [f"{line} ({', '.join(names)})" for line, names in versions.items()]
    return [*parts, "Versions and settings:", "\n".join(said)]


def _measured(side: Results) -> dict[str, Results]:
    return {name: row for name, row in side["engines"].items() if "failure" not in row}


def _side_text(side: Results) -> list[str]:
    rows = _measured(side)
    how = (
        "all engines loaded, in turns"
        if side["together"]
        else "one engine after another, since they do not fit in memory together: not in turns"
    )
    paces = [
        [name, *_pace(row, "prefill"), *_pace(row, "decode"), _weights(row), _same(row)]
        for name, row in rows.items()
    ]
    costs = [
        [
            name,
            Spread.read(row["first"]).text(2),
            f"{row['weights'] / GB:.3f}",
            f"{row['token_bytes'] / GB:.3f}",
            f"{row['token_bytes'] / rows[OURS]['token_bytes']:.2f}",
            f"{row['gb_s']:.2f}",
            f"{row['gflop_s']:.1f}",
        ]
        for name, row in rows.items()
    ]
    header = ["engine", "prefill, tokens/s", "ours/its", "decode, tokens/s", "ours/its"]
    read = ["read a token, GB", "of ours", "decode, GB/s", "prefill, GFLOP/s"]
    missing = [
        f"- {name}: not measured: {row['failure']}"
        for name, row in side["engines"].items()
        if "failure" in row
    ]
    return [
        f"**{side['name']}**; rounds: {side['rounds']}; {how}.",
        table([*header, "its weights", "same tokens"], paces),
        table(["engine", "first token, s", "weights, GB", *read], costs),
        _start_text(side["start"]),
        *(["\n".join(missing)] if missing else []),
        f"Where our time goes, each kind of operation alone, {side['name']}:",
        *step_profile.text_short(side["profile"]),
    ]


def _pace(row: Results, phase: str) -> list[str]:
    share = row.get("ratios", {}).get(phase)
    return [Spread.read(row[phase]).text(), Spread.read(share).text(2) if share else ""]


def _weights(row: Results) -> str:
    if not row["exact"]:
        return "quantized"
    return {True: "ours, bit for bit", False: "NOT ours", None: ""}[row["same_weights"]]


def _same(row: Results) -> str:
    if "equal" not in row:
        return ""
    return "yes" if row["equal"] else f"NO, {row['agreeing']} of {row['compared']}"


def _start_text(start: Results) -> str:
    if "failure" in start:
        return f"Process start to first token: not measured ({start['failure']})."
    rows = []
    for name, took in start["seconds"].items():
        share = start["ratios"].get(name)
        rows.append([name, Spread.read(took).text(2), Spread.read(share).text(2) if share else ""])
    what = f"process start to first token (rounds: {start['rounds']})"
    return table([what, "s", "mlx-lm's/its"], rows)


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    sides = results["sides"].values()
    pictures = {}
    for phase in ("prefill", "decode"):
        groups: dict[str, dict[str, float]] = defaultdict(dict)
        for side in sides:
            for name, row in _measured(side).items():
                groups[name][side["name"]] = row[phase]["median"]
        running = " and ".join(side["name"] for side in sides)
        alt = f"{phase.title()} pace of {', '.join(groups)}, each running {running}."
        title = f"{phase.title()} by engine"
        pictures[f"peers-{phase}"] = bars(groups, alt, y="tokens/s", title=title)
    return pictures
