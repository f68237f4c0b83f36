"""The flags of which model to run and how to draw from it, the same for every command."""

import argparse

from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.chat_formats import NAMES, read_format
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import ModelSpec
from mlx_cerebrum.weights.quantize import AFFINE_BITS, AFFINE_GROUPS
from mlx_cerebrum.weights.storage import DTYPES


def add_model_flags(p: argparse.ArgumentParser, default: str) -> None:
    """Add --model and how to hold it; `default` says what runs without --model."""
    p.add_argument(
        "--model",
        metavar="DIR|FILE.gguf|HUBID|demo",
        help=f"what to run (default: {default})",
    )
    p.add_argument("--revision", help="hub branch, tag or commit (default: main)")
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
        help="of activations and dense weights (default: auto, the checkpoint's own on a GPU)",
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
        help=f"how conversations are written: a Jinja file, or {NAMES} (default: the"
        " checkpoint's own; without one Cerebrum's for a Cerebrum, else what its vocabulary"
        " suggests, which is said)",
    )
    p.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="refuse what would take more, 10^9 bytes (default: what is free)",
    )


def add_plans_flag(p: argparse.ArgumentParser) -> None:
    """Add --plan for commands that answer with several orders of the blocks (`views`)."""
    p.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="a further order to lay the same weights out in: a named plan or mergekit YAML; may be"
        " repeated (default: none more)",
    )


def add_sampling_flags(
    p: argparse.ArgumentParser | argparse._ArgumentGroup, max_tokens: int
) -> None:
    """Add --max-tokens (`max_tokens` by default), --temp, --top-p and --min-p."""
    p.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"tokens an answer, at most (default: {max_tokens})",
    )
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


def asked_sampling(args: argparse.Namespace) -> Sampling:
    """How the flags say to draw. Raises RequestError for what is out of range or without effect."""
    sampling = Sampling(args.temp, args.top_p, args.min_p, args.seed)
    sampling.check_used()
    return sampling


def model_spec(args: argparse.Namespace, plan: str | None = None) -> ModelSpec:
    """The model that the flags of `add_model_flags` name, its blocks in the order of `plan`.

    Raises a CerebrumError for what can't be honoured.
    """
    if args.q_bits is None and args.q_group_size is not None:
        raise RequestError("--q-group-size only means something with --q-bits")
    return ModelSpec(
        hub.DEFAULT_REPO if args.model is None else args.model,
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
