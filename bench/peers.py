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
from bench.attempts import Attempt, Load, forget, in_turns, one_line
from bench.copies import Copies, main_type, nbytes
from bench.engines import Run, prompt_ids, required
from bench.pair import Pair
from bench.report import Spread, columns, ratio, rounds
from bench.suite import Effort, Results
from mlx_cerebrum import device
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import GB, fits, human

OURS = "mlx-cerebrum"
PHASES: dict[str, Callable[[Run], float]] = {
    "prefill": lambda run: run.prefill_tps,
    "decode": lambda run: run.decode_tps,
}
PROMPT_TOKENS = 512
QUESTION = "The capital of France is"


def measure(pair: Pair, effort: Effort, prompt_tokens: int = PROMPT_TOKENS) -> Results:
    """Raises MemoryBudgetError where not even ours fits."""
    # A round is as many generations as there are engines.
    effort = replace(effort, rounds=min(3, effort.rounds), seconds=2 * effort.seconds)
    most = pair.checkpoint().config.max_position_embeddings - effort.tokens
    prompt = prompt_ids(pair.checkpoint(), max(2, min(prompt_tokens, most)))
    sides = {}
    for index, key in enumerate("ab"):
        sides[key] = _side(pair, index, effort, prompt)
    effort.say("profile of our forward pass")
    for side, model in zip(sides.values(), pair.models(), strict=True):
        side["profile"] = step_profile.measure_short(model, prompt, 2)
    return {
        "prompt_tokens": len(prompt),
        "tokens": effort.tokens,
        "float32": pair.storage().dtype == mx.float32,
        "sides": sides,
    }


def _side(pair: Pair, index: int, effort: Effort, prompt: list[int]) -> Results:
    side, storage = pair.sides[index], pair.storage()
    with tempfile.TemporaryDirectory(dir=effort.work) as folder:
        copies = Copies(pair, side, Path(folder))
        attempts = _peers(copies, prompt, effort.tokens)
        size = human(side.config.executed_parameters * storage.dtype.size)
        for name, attempt in attempts.items():
            effort.say(f"{side.name}: the weights for {name}, up to {size} in {folder}")
            attempt.prepare()
        start = _start(copies, effort)
        needed = storage.nbytes + storage.transient
        together = fits(needed + sum(attempt.nbytes for attempt in attempts.values()))
        ours = Attempt(lambda: (0, lambda _: engines.ours(pair.models()[index])))
        ours.prepare()
        attempts = {OURS: ours} | attempts
        effort.say(f"{side.name}: {', '.join(attempts)}")
        model = pair.models()[index] if together else None
        for group in [attempts] if together else [{n: one} for n, one in attempts.items()]:
            in_turns(group, prompt, effort, model)
            pair.release()
            forget()
    if ours.failure is not None:
        raise CerebrumError(f"{OURS}: {ours.failure}")
    context = len(prompt) + effort.tokens // 2
    return {
        "name": side.name,
        "together": together,
        "rounds": len(ours.runs),
        "engines": {n: _row(one, ours, context, side.config) for n, one in attempts.items()},
        "start": start,
    }


def _peers(copies: Copies, prompt: list[int], tokens: int) -> dict[str, Attempt]:
    config = copies.side.config

    def mlx_lm() -> tuple[int, Load]:
        path = copies.directory()
        return nbytes(path), lambda ours: engines.mlx_lm(path, config, prompt, ours)

    def transformers() -> tuple[int, Load]:
        for package in ("transformers", "torch"):  # before anything is written for them
            required(package, "oracle")
        path = copies.directory()
        # Twice: it loads on the CPU and then moves what it loaded.
        size = nbytes(path) * (2 if device.on_gpu() else 1)
        return size, lambda _: engines.transformers(path, config, prompt)

    def llama(kind: str, exact: bool) -> tuple[int, Load]:
        required("xllamacpp", "bench")
        if device.on_gpu() and not llama_cpp.on_gpu():
            raise RequestError("this xllamacpp computes on the CPU only; install its GPU wheel")
        path = copies.gguf(kind) if copies.native is None or exact else copies.native

        float32, context = exact and kind == "F32", len(prompt) + tokens + 1
        return nbytes(path), lambda _: llama_cpp.open_engine(path, config, prompt, float32, context)

    found = {"mlx-lm": Attempt(mlx_lm), "transformers": Attempt(transformers)}
    if copies.dense:
        found[f"llama.cpp {copies.kind}"] = Attempt(partial(llama, copies.kind, True))
    kind = "Q8_0" if copies.native is None else main_type(copies.native)
    found[f"llama.cpp {kind}"] = Attempt(partial(llama, kind, False), exact=False)
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
    if engine is None or attempt.failure is not None:
        return {"failure": attempt.failure}
    runs, our_runs = attempt.runs, ours.runs
    spread = {"first": Spread.of([run.first for run in runs]).as_json()}
    spread |= {name: Spread.of([*map(pace, runs)]).as_json() for name, pace in PHASES.items()}
    # Multiplications and additions of a prompt token in the blocks' matrices.
    work = 2 * config.num_positions * config.block_parameters
    token_bytes = engine.token_bytes(context)
    row: Results = spread | {
        "version": engine.version,
        "settings": engine.settings,
        "exact": attempt.exact,
        "weights": engine.weights,
        "token_bytes": token_bytes,
        "same_weights": engine.same_weights,
        "gb_s": spread["decode"]["median"] * token_bytes / GB,
        "gflop_s": spread["prefill"]["median"] * work / 1e9,
    }
    if attempt is not ours:
        both = list(zip(our_runs, runs, strict=False))  # as many as both had time for
        row["ratios"] = {
            name: Spread.of([pace(a) / pace(b) for a, b in both]).as_json()
            for name, pace in PHASES.items()
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
    read = rows[OURS]["token_bytes"]
    how = (
        "all engines loaded, in turns"
        if side["together"]
        else "one engine after another, since they do not fit in memory together: not in turns"
    )
    missing = [
        f"- {name}: not measured: {row['failure']}"
        for name, row in side["engines"].items()
        if "failure" in row
    ]
    return [
        f"**{side['name']}**; rounds: {side['rounds']}; {how}.",
        columns(
            rows.items(),
            ("engine", lambda of: of[0]),
            ("prefill, tokens/s", lambda of: Spread.read(of[1]["prefill"]).text()),
            ("ours/its", lambda of: _ratio(of[1].get("ratios", {}).get("prefill"))),
            ("decode, tokens/s", lambda of: Spread.read(of[1]["decode"]).text()),
            ("ours/its", lambda of: _ratio(of[1].get("ratios", {}).get("decode"))),
            ("its weights", lambda of: _weights(of[1])),
            ("same tokens", lambda of: _same(of[1])),
        ),
        columns(
            rows.items(),
            ("engine", lambda of: of[0]),
            ("first token, s", lambda of: Spread.read(of[1]["first"]).text(2)),
            ("weights, GB", lambda of: f"{of[1]['weights'] / GB:.3f}"),
            ("read a token, GB", lambda of: f"{of[1]['token_bytes'] / GB:.3f}"),
            ("of ours", lambda of: f"{of[1]['token_bytes'] / read:.2f}"),
            ("decode, GB/s", lambda of: f"{of[1]['gb_s']:.2f}"),
            ("prefill, GFLOP/s", lambda of: f"{of[1]['gflop_s']:.1f}"),
        ),
        _start_text(side["start"]),
        *(["\n".join(missing)] if missing else []),
        f"Where our time goes, each kind of operation alone, {side['name']}:",
        *step_profile.text_short(side["profile"]),
    ]


def _ratio(found: Results | None) -> str:
    return Spread.read(found).text(2) if found else ""


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
    return columns(
        start["seconds"].items(),
        (f"process start to first token (rounds: {start['rounds']})", lambda of: of[0]),
        ("s", lambda of: Spread.read(of[1]).text(2)),
        ("mlx-lm's/its", lambda of: _ratio(start["ratios"].get(of[0]))),
    )
