"""What a recipe's bits buy: every recipe against the dense model, at equal sizes.

Every side is a directory that `python -m convert` writes, in a process of its own, so what is
measured is what a user gets. `uniform` and `gptq, all 4` have 4 bits everywhere; `plan`, `gptq` and
`dwq` spend as many, and then those of mixed_4_6 and of dynamic_quant, matrix by matrix. Sides named
`mlx-lm` are its own functions (bench/mlx_lm_quant.py) on the same text and the merge unrolled: a
layer for every position. `gptq, base's order` was packed before it was laid out by the plan, on
twice the text: no block has met what goes into its second run. `dwq, from code` has read this
program in place of prose.

Two texts are public-domain prose (bench/data), the third is what the dense model answers to
chat_prompts, drawn as often as it takes: no recipe reads any of them. Losses are differences to the
dense model on the same tokens, and KL is from its distribution to the side's, nats a token;
intervals are 95%, from blocks of 32 tokens.

What is shown of a small model is a rank of methods at most: measure your own.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx

import mlx_cerebrum
from bench import perplexity, process
from bench.bootstrap import Interval
from bench.chat_prompts import GROUNDED, OPEN
from bench.likelihood import Ids, compare, figures, log_probs, strided, text_ids
from bench.repetition import continuations
from bench.report import parser, run, table
from bench.suite import Results
from mlx_cerebrum import cli
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import load, open_checkpoint

DENSE, UNIFORM, MIXED = "dense", "uniform", "mixed_4_6"
_PEER = "mlx-lm "  # a side's name, before its method's
DYNAMIC = f"{_PEER}dynamic_quant"
BASE = "gptq, base's order"
TEMPERATURE = 0.7  # that answers are drawn at
LONGEST = 512  # tokens of one


class BitsOf(str):
    """The bits a weight of another side, by its name."""


def main(argv: list[str] | None = None) -> int:
    return run(command_line(), _measure, text, argv)


def command_line() -> cli.ArgumentParser:
    p = parser("recipes", "Loss and divergence of a model quantized by each recipe.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help="which")
    p.add_argument("--plan", metavar="NAME|FILE", help="a layer plan")
    p.add_argument("--calibrate", metavar="FILE", help="text to read (default: convert's own)")
    p.add_argument("--calibrate-tokens", type=int, default=16384, metavar="N", help="of it")
    p.add_argument("--sides", nargs="+", metavar="NAME", help="these only, beside dense, uniform")
    keep = "keep the sides here, and use those that the same flags made before, by whatever version"
    keep += " of this program (default: neither)"
    p.add_argument("--keep", type=Path, metavar="DIR", help=keep)
    perplexity.add_text(p)
    return p


def _measure(args: argparse.Namespace) -> Results:
    kept = None if args.keep is None else nullcontext(str(args.keep))
    with kept or tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        made: Results = {}
        chosen = wanted(sides(args, Path(folder)), args.sides)
        for number, (name, flags) in enumerate(chosen.items(), 1):
            tell(f"side {number} of {len(chosen)}: {name}")  # made, or kept
            spent = [str(made[f]["bits_per_weight"]) if isinstance(f, BitsOf) else f for f in flags]
            took = once(args, path := Path(folder, name), spent)
            made[name] = {"bits_per_weight": perplexity.stored_bits(open_checkpoint(path)), **took}
        score(args, Path(folder), made)
    return made


def score(args: argparse.Namespace, folder: Path, made: Results) -> None:
    """Add what each side says of the texts, and note it too; or what an earlier run noted."""
    how, new = [*map(str, args.text), args.tokens, args.context], []
    for name, side in made.items():
        scored = _noted(folder / name).get("scored")
        if scored is not None and scored["how"] == how:
            side["texts"] = scored["texts"]
        elif name != DENSE:
            new.append(name)
    if not new:
        return
    tell(f"scoring {DENSE}, and drawing its answers")
    dense, tokenizer = load(folder / DENSE)
    texts = {
        name: [(ids, count, list(log_probs(dense, ids[:-1]))) for ids, count in windows]
        for name, windows in _windows(dense, tokenizer, args)
    }
    mx.eval([said for seen in texts.values() for _, _, said in seen])
    del dense  # before the next is loaded
    for number, name in enumerate(new, 1):
        tell(f"scoring {number} of {len(new)}: {name}")
        model = load(folder / name)[0]
        made[name]["texts"] = {text: _compared(model, seen) for text, seen in texts.items()}
        scored = {"how": how, "texts": made[name]["texts"]}
        _note(folder / name, _noted(folder / name) | {"scored": scored})
        del model


def wanted(every: dict[str, list[str]], names: Sequence[str] | None) -> dict[str, list[str]]:
    """Those asked for, with dense and uniform. Raises RequestError for a name that is none, and for
    one that spends the bits of a side that was left out."""
    if names is None:
        return every
    if unknown := [name for name in names if name not in every]:
        raise RequestError(f"--sides: {unknown[0]!r} is none of {'; '.join(every)}")
    found = {name: every[name] for name in every if name in (DENSE, UNIFORM, *names)}
    for name, flags in found.items():
        for flag in flags:
            if isinstance(flag, BitsOf) and flag not in found:
                raise RequestError(f"--sides: {name!r} has the bits of {flag!r}, so give it too")
    return found


def sides(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """What is told to `convert`, or to mlx-lm's function, for each side."""
    tokens = ["--calibrate-tokens", str(args.calibrate_tokens)]
    read = [*tokens, "--calibrate", args.calibrate] if args.calibrate else tokens
    plan, gptq, dwq = (["-q", "--q-recipe", recipe] for recipe in ("plan", "gptq", "dwq"))
    # The last one counts; convert reads no more.
    twice = ["--calibrate-tokens", str(min(2 * args.calibrate_tokens, 65_536))]
    gptq, dwq, code = gptq + read, dwq + read, [*dwq, *tokens, "--calibrate", str(_code(folder))]
    equal, mixed, dynamic = (["--q-budget", BitsOf(side)] for side in (UNIFORM, MIXED, DYNAMIC))
    return {
        DENSE: [],
        UNIFORM: ["-q", "--q-bits", "4"],
        "plan": plan + equal,
        f"{_PEER}gptq": [],
        f"{_PEER}awq": [],
        f"{_PEER}dwq": [],
        "gptq, all 4": [*gptq, "--q-bits", "4"],
        "gptq": gptq + equal,
        **({} if args.plan is None else {BASE: gptq + equal + twice}),
        "dwq": dwq + equal,
        "dwq, from code": code + equal,
        MIXED: ["-q", "--q-recipe", MIXED],
        f"plan, bits of {MIXED}": plan + mixed,
        f"gptq, bits of {MIXED}": gptq + mixed,
        f"dwq, bits of {MIXED}": dwq + mixed,
        DYNAMIC: [],
        "plan, bits of dynamic_quant": plan + dynamic,
        "gptq, bits of dynamic_quant": gptq + dynamic,
        "dwq, bits of dynamic_quant": dwq + dynamic,
    }


def _code(folder: Path) -> Path:
    """A text of another domain than those that are scored: this program."""
    path = folder / "code.txt"
    files = sorted(Path(mlx_cerebrum.__file__).parent.rglob("*.py"))
    path.write_text("".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
    return path


def once(args: argparse.Namespace, path: Path, flags: list[str]) -> Results:
    """Make a side, and note beside it how and what that took; or what an earlier run noted."""
    how = [args.model, args.plan, args.calibrate, args.calibrate_tokens, *flags]
    if (found := _noted(path)).get("how") == how:
        return dict(found["took"])
    _note(path, {})
    shutil.rmtree(path, ignore_errors=True)  # made another way, or not to its end
    if path.name.startswith(_PEER):
        took = _peer(args, path.name.removeprefix(_PEER), path, flags)
    elif path.name == BASE:
        took = _laid_out(args, path, flags)
    else:
        took = _converted(args, path, flags)
    _note(path, {"how": how, "took": took._asdict()})
    return took._asdict()


def _noted(path: Path) -> Results:
    """What is known of a side: nothing, if it was never made."""
    note = path.with_name(f"{path.name}.json")
    return dict(json.loads(note.read_text(encoding="utf-8"))) if note.exists() else {}


def _note(path: Path, known: Results) -> None:
    path.with_name(f"{path.name}.json").write_text(json.dumps(known), encoding="utf-8")


def _converted(args: argparse.Namespace, path: Path, flags: list[str]) -> process.Cost:
    """Run the converter into `path`, in a process of its own: as users start it.

    Raises CerebrumError with its message.
    """
    words = ["convert", "--hf-path", args.model, "--mlx-path", str(path)]
    words += ["--quiet", "--dtype", "bfloat16", *flags]
    words += [] if args.plan is None else ["--plan", args.plan]
    if open_checkpoint(hub.resolve(args.model)).config.quantization is not None:
        words.append("--dequantize")
    return process.cost(words)


def _laid_out(args: argparse.Namespace, path: Path, flags: list[str]) -> process.Cost:
    """Pack the model as it is, and lay that out by the plan."""
    base = path.with_name(f"{path.name}, before")
    took = once(argparse.Namespace(**vars(args) | {"plan": None}), base, flags)
    process.cost(["convert", "--hf-path", str(base), "--mlx-path", str(path), "--plan", args.plan])
    return process.Cost(**took)


def _peer(args: argparse.Namespace, method: str, path: Path, flags: list[str]) -> process.Cost:
    """What mlx-lm's function makes of the merge unrolled."""
    dense = path.with_name("unrolled")
    once(args, dense, ["--layout", "unrolled"])
    words = ["bench.mlx_lm_quant", method, str(dense), str(path), *flags]
    words += ["--tokens", str(args.calibrate_tokens)]
    words += ["--calibrate", args.calibrate] if args.calibrate else []
    return process.cost(words)


def _windows(
    model: Model, tokenizer: Tokenizer, args: argparse.Namespace
) -> Iterator[tuple[str, list[tuple[Ids, int]]]]:
    """Of each text its windows, and how many of a window's last tokens are scored."""
    for file in args.text:
        found = strided(*text_ids(tokenizer, file), args.context, args.tokens)
        yield file.stem, [(window, len(window) - 1) for window in found]
    asked = [*GROUNDED.values(), *OPEN.values()]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in asked]
    answers: list[tuple[Ids, int]] = []
    for seed in range(0, 100 * len(prompts), len(prompts)):
        if sum(count for _, count in answers) >= args.tokens:
            break
        draw = Sampling(temp=TEMPERATURE, seed=seed)
        written = continuations(model, tokenizer, prompts, LONGEST, draw)
        answers += [(p + w, len(w)) for p, w in zip(prompts, written, strict=True) if w]
    yield "answers", answers


def _compared(model: Model, seen: Sequence[tuple[Ids, int, list[mx.array]]]) -> Results:
    """Against what the dense model said of the same windows (see likelihood.figures)."""
    found = [compare(said, log_probs(model, ids[:-1]), ids)[:, -n:] for ids, n, said in seen]
    return figures(found)


def text(results: Results) -> list[str]:
    """The tables for a person."""
    sides = {name: side for name, side in results.items() if name != DENSE}
    texts = next(iter(sides.values()))["texts"]
    header = ["model", "bits per weight", *texts]

    def rows(key: str, sign: bool) -> list[list[str]]:
        return [
            [name, f"{side['bits_per_weight']:.3f}"]
            + [Interval.from_json(one[key]).text(3, sign=sign) for one in side["texts"].values()]
            for name, side in sides.items()
        ]

    agreed = [
        [name, f"{side['bits_per_weight']:.3f}"]
        + [f"{one['agreement']['value']:.1%}" for one in side["texts"].values()]
        for name, side in sides.items()
    ]
    counts = ", ".join(f"{one['tokens']} of {name}" for name, one in texts.items())
    losses = ", ".join(f"{one['loss_a']:.3f} on {name}" for name, one in texts.items())
    return [
        f"Tokens scored: {counts}. The dense model's loss, nats a token: {losses}.",
        "Nats a token more than the dense model:",
        table(header, rows("difference", True)),
        "KL from the dense model, nats a token:",
        table(header, rows("kl", False)),
        "The same token would be written:",
        table(header, agreed),
        *_costs(sides),
    ]


def _costs(sides: Results) -> list[str]:
    rows = [
        [name, f"{side['seconds'] / 60:.1f}", human(side["peak_memory"])]
        for name, side in sides.items()
        if "seconds" in side  # not in runs of before
    ]
    if not rows:
        return []
    return ["What making each took:", table(["model", "minutes", "memory at most"], rows)]


if __name__ == "__main__":
    sys.exit(main())
