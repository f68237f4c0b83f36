"""The flags that several commands have, each defined once, and what they ask for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.errors import RequestError, shown
from mlx_cerebrum.model.entries import KV_BITS
from mlx_cerebrum.model.limits import NO_WIRE
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.ranks import backend, by_launcher
from mlx_cerebrum.shelf.places import BITS, split
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.chat_formats import NAMES, read_format
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import ModelSpec
from mlx_cerebrum.weights.quantize import AFFINE_BITS, AFFINE_GROUPS
from mlx_cerebrum.weights.storage import DTYPES

if TYPE_CHECKING:
    from mlx_cerebrum.ranks.machines import Machines

# What one machine alone can do, and what to do instead on several.
_ALONE_ONLY = {
    "draft_plan": "--draft ngram guesses from the text",
    "draft_bits": "--draft ngram guesses from the text",
    "prompt_cache": "what prompts computed is kept in memory only; leave it out",
    "unload_after": "the weights stay; leave it out",
}

MOST_TEMP = 2  # as OpenAI's API has it

Flags = argparse.ArgumentParser | argparse._ArgumentGroup  # what flags are added to


def add_model_flags(p: Flags, default: str) -> None:
    """Add the model's name and how to hold it; `default` says what runs without one."""
    p.add_argument(
        "name", nargs="?", metavar="NAME", help="what to run, as --model (default: that of --model)"
    )
    p.add_argument(
        "--model",
        metavar="NAME|DIR|FILE.gguf|HUBID|demo",
        help=f"what to run (default: {default})",
    )
    p.add_argument(
        "--bits",
        type=int,
        choices=BITS,
        help="which of a name's variants on the shelf, in bits a weight (default: the last used)",
    )
    p.add_argument(
        "--yes",
        action="store_true",
        help="`mlx-cerebrum` fetches a model that is not here without asking (default: it asks)",
    )
    add_revision_flag(p)
    p.add_argument(
        "--q-bits",
        type=int,
        choices=AFFINE_BITS,
        help="bits a weight to quantize to while loading (default: as stored)",
    )
    p.add_argument(
        "--q-group-size",
        type=int,
        choices=AFFINE_GROUPS,
        help="weights per quantization group (default: 64)",
    )
    p.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of activations and dense weights (default: auto, which is the checkpoint's on a GPU,"
        " but on an M1 or M2 float16 for bfloat16)",
    )
    p.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="sliding window in tokens, 0 for none (default: the checkpoint's)",
    )
    p.add_argument(
        "--template",
        metavar="FILE|NAME",
        help=f"chat template: a Jinja file, or {NAMES} (default: the checkpoint's own; if it has"
        " none, Cerebrum's for a Cerebrum, else a guess from the vocabulary, with a note)",
    )
    p.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="refuse what would take more, 10^9 bytes (default: what is free)",
    )
    p.add_argument(
        "--no-wire",
        action="store_true",
        help="let macOS page weights out, also those that nearly fill what Metal allows (default:"
        f" those are wired, unless {NO_WIRE} is set)",
    )


def add_machines_flags(p: Flags) -> None:
    """Add how a model is shared out where `mlx.launch` starts this on several machines."""
    several = p.add_argument_group("several machines (mlx.launch)")
    several.add_argument(
        "--split",
        metavar="N,N,...",
        help="positions at which the plan is cut, or with --tensor-parallel key/value heads for"
        " each machine (default: by the plan and each machine's memory; heads evenly)",
    )
    several.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="every machine runs a part of each block; pays only over RDMA (default: each runs"
        " blocks of its own)",
    )
    several.add_argument(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="end where another machine says nothing for so long (default: 60)",
    )
    several.add_argument(
        "--follow",
        action="store_true",
        help="be one of the machines that serve the one with MLX_RANK=0, where that is started by"
        " hand (default: as MLX_RANK says)",
    )


def machines(args: argparse.Namespace) -> "Machines | None":
    """The machines that a launcher has set up; None where this one works alone.

    Raises RequestError for flags that can't be honoured, MachineError where the others don't come.
    """
    launched, patience = backend(), args.patience
    if patience is not None and not 1 <= patience <= 86_400:
        raise RequestError(f"patience must be from 1 to 86400 seconds, not {patience:g}")
    if launched is None:
        given: tuple[str, ...] = ("split", "follow")
        if not by_launcher():  # else the others hold for one machine as well
            given += ("tensor_parallel", "patience")
        if flag := next((f for f in given if getattr(args, f) not in (None, False)), ""):
            flag = flag.replace("_", "-")
            raise RequestError(
                f"--{flag} is for several machines, started by mlx.launch or with MLX_RANK and"
                " MLX_HOSTFILE: see docs/several-machines.md"
            )
        return None
    for name, instead in _ALONE_ONLY.items():
        if getattr(args, name, None):
            flag = name.replace("_", "-")
            raise RequestError(f"--{flag} is not there on several machines: {instead}")
    # Imported here: a machine that works alone needs none of it.
    from mlx_cerebrum.ranks.links import PATIENCE, Links
    from mlx_cerebrum.ranks.machines import Machines

    # Where one is missing, this waits and says so.
    links = Links(launched, PATIENCE if patience is None else patience)
    if args.follow and links.rank == 0:
        raise RequestError("--follow is for the others; this is machine 0, which leads")
    return Machines(links, args.split, args.tensor_parallel)


def add_revision_flag(p: Flags) -> None:
    """Add --revision: which state of a hub repository."""
    p.add_argument("--revision", help="hub branch, tag or commit (default: main)")


def add_plan_flag(p: Flags, default: str) -> None:
    """Add --plan, which takes one order of the blocks; `default` says which runs without it."""
    p.add_argument(
        "--plan",
        metavar="NAME|FILE",
        help=f"layer plan: a named one or mergekit YAML (default: {default})",
    )


def add_plans_flag(p: Flags) -> None:
    """Add --plan for commands that answer with several orders of the blocks (`views`)."""
    p.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="a further order to lay the same weights out in: a named plan or mergekit YAML; may be"
        " repeated (default: none more)",
    )


def add_system_flag(p: Flags) -> None:
    """Add --system."""
    p.add_argument("--system", metavar="TEXT", help="system text (default: the template's own)")


def add_max_tokens_flag(p: Flags, default: int) -> None:
    """Add --max-tokens."""
    p.add_argument(
        "--max-tokens",
        type=int,
        default=default,
        metavar="N",
        help=f"tokens an answer, at most (default: {default})",
    )


def add_sampling_flags(p: Flags) -> None:
    """Add how the next token is chosen: all of `Sampling` but the seed."""
    p.add_argument("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default: 0)")
    p.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass to draw from (default: 1, all)"
    )
    p.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="least probability, as a share of the best token's (default: 0)",
    )
    p.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="TOKENS",
        help="draw from this many of the likeliest tokens, 0 for all (default: 0)",
    )
    p.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="make tokens that were there a little before less likely: their logits are divided by"
        " this, or multiplied where below 0 (default: 1, none)",
    )
    p.add_argument(
        "--repetition-context",
        type=int,
        default=20,
        metavar="TOKENS",
        help="how far --repetition-penalty looks back over prompt and answer (default: 20 tokens)",
    )
    p.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="LOGITS",
        help="subtracted from a token's logit for each time it is in the answer, -2 to 2"
        " (default: 0)",
    )
    p.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="LOGITS",
        help="subtracted once from a token's logit if it is in the answer, -2 to 2 (default: 0)",
    )
    p.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="add this, -100 to 100, to the logit of a token id; may be repeated (default: none)",
    )
    p.add_argument(
        "--min-tokens",
        type=int,
        default=0,
        metavar="N",
        help="no end of text before the answer has so many tokens (default: 0)",
    )
    p.add_argument(
        "--ignore-eos",
        action="store_true",
        help="no end of text at all: answer until --max-tokens, or a stop string"
        " (default: end where the model does)",
    )


def add_stop_flag(p: Flags) -> None:
    """Add --stop."""
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated (default: the template's)",
    )


def _bias(text: str) -> tuple[int, float]:
    """The type of a --logit-bias; `Sampling` says which numbers it may have."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        message = f"{shown(text)} is not a token id and a number, such as 42=-5"
        raise argparse.ArgumentTypeError(message) from None


def add_seed_flag(p: Flags, more: str = "") -> None:
    """Add --seed; `more` says what else it decides."""
    p.add_argument(
        "--seed",
        type=cli.seed,
        help=f"seed of random sampling{more} (default: a new one every run)",
    )


def _none_where_off(word: str) -> str:
    return "none" if word == "off" else word


def add_draft_flag(p: Flags, default: str | None, told: str) -> None:
    """Add --draft; `told` says in words what `default` does."""
    p.add_argument(
        "--draft",
        type=_none_where_off,
        choices=("none", "auto", "ngram"),
        default=default,
        help="guess several tokens, check them at once: from the text itself (ngram), or also with"
        " a shorter model where that should pay (auto); the answer stays the same"
        f" (default: {told})",
    )


def add_kv_bits_flag(p: Flags) -> None:
    """Add --kv-bits."""
    p.add_argument(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        help="keep cached keys and values in this many bits; 8 costs the demo model 0 to 0.5%% of"
        " perplexity, 4 costs it 8 to 10%% (default: as the activations)",
    )


def add_prefill_flag(p: Flags, more: str = "") -> None:
    """Add --prefill-step-size; `more` says what else it decides."""
    p.add_argument(
        "--prefill-step-size",
        type=int,
        default=prefill_step(),
        metavar="TOKENS",
        help=f"prompt tokens computed at once{more} (default: {prefill_step()})",
    )


def sampling_of(args: argparse.Namespace, seed: int | None = None) -> Sampling:
    """How the flags say to choose tokens. Raises RequestError for what is out of range."""
    if args.temp > MOST_TEMP:
        raise RequestError(
            f"temp must be from 0 to {MOST_TEMP}, not {args.temp:g}: 0 is greedy, 0.7 usual, and"
            " above 1.5 answers fall apart"
        )
    if args.min_tokens > args.max_tokens:
        raise RequestError(
            f"min-tokens is {args.min_tokens}, and max-tokens {args.max_tokens}; raise max-tokens"
        )
    return Sampling(
        temp=args.temp,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=seed,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        repetition_context=args.repetition_context,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        logit_bias=tuple(args.logit_bias),
        min_tokens=args.min_tokens,
        ignore_eos=args.ignore_eos,
    )


def asked_sampling(args: argparse.Namespace) -> Sampling:
    """As `sampling_of`, with --seed; also raises RequestError for what would change nothing."""
    sampling = sampling_of(args, args.seed)
    sampling.check_used()
    return sampling


def asked_model(args: argparse.Namespace) -> str | None:
    """The name of the model that is asked for, if one is. Raises RequestError for two."""
    if args.name is not None and args.model is not None:
        raise RequestError(f"{args.name} and --model {args.model}: name one model")
    name: str | None = args.name or args.model
    if args.bits is None:
        return name
    if name is None:
        raise RequestError("--bits goes with the name of a model on the shelf")
    if name == "demo":
        raise RequestError("--bits is for names on the shelf; the demo is packed already: drop it")
    if Path(name).exists():
        raise RequestError(f"--bits is for names on the shelf; {name}: try --q-bits {args.bits}")
    base, bits = split(name)
    if bits not in (None, args.bits):
        raise RequestError(f"{name} and --bits {args.bits} say different things; drop one")
    return f"{base}:{args.bits}bit"


def model_spec(args: argparse.Namespace, plan: str | None = None) -> ModelSpec:
    """The model that the flags of `add_model_flags` name, its blocks in the order of `plan`.

    Raises a CerebrumError for what can't be honoured.
    """
    if args.q_bits is None and args.q_group_size is not None:
        raise RequestError("--q-group-size only means something with --q-bits")
    name = asked_model(args)
    return ModelSpec(
        hub.DEFAULT_REPO if name is None else name,
        args.revision,
        plan,
        args.q_bits,
        args.q_group_size or 64,
        args.dtype,
        args.window,
        None if args.template is None else read_format(args.template),
    )


def memory_limit(args: argparse.Namespace) -> int | None:
    """--memory-limit in bytes, if there is one. Raises RequestError for one that can't be."""
    memory = args.memory_limit
    if memory is None:
        return None
    if not 0 < memory < 1e9:
        raise RequestError(f"memory-limit must be a number of GB above 0, not {memory}")
    return int(memory * GB)


def say_assumed(tokenizer: Tokenizer) -> None:
    """One line on stderr where nobody said how conversations are written."""
    if tokenizer.format.assumed:
        tell(
            f"note: the model has no chat template: {tokenizer.format.assumed};"
            f" to choose: --template FILE, or one of {NAMES}"
        )
