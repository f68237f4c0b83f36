"""The flags of `python -m mlx_cerebrum.chat`."""

from pathlib import Path

from mlx_cerebrum import cli
from mlx_cerebrum.chat.session import Settings
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.flags import add_model_flags, add_plans_flag, add_sampling_flags
from mlx_cerebrum.model.cache import KV_BITS
from mlx_cerebrum.weights import hub


def parser() -> cli.ArgumentParser:
    default = Settings()
    p = cli.ArgumentParser(
        prog="python -m mlx_cerebrum.chat",
        description="Talk with Cerebrum, or another Mistral or Llama model, at the terminal.",
    )
    add_model_flags(p, f"{hub.DEFAULT_REPO}, as the 12.25B and as the 7B")
    add_plans_flag(p)
    p.add_argument("--system", metavar="TEXT", help="system text (default: the template's own)")
    p.add_argument(
        "--load",
        type=Path,
        metavar="FILE.json",
        help="go on with a saved conversation (default: a new one)",
    )
    add_sampling_flags(p, default.max_tokens)
    p.add_argument(
        "--seed",
        type=cli.seed,
        help="of the random draws; answer number n, counted from 0, draws with SEED + n, so the"
        " same lines give the same conversation (default: a new one every time)",
    )
    p.add_argument(
        "--draft",
        choices=("none", "ngram", "auto"),
        default=default.draft,
        help="guess several tokens, check them at once: from the text itself (ngram), or also with"
        f" a shorter model where that should pay (auto) (default: {default.draft})",
    )
    p.add_argument(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        help="bits a cached key or value (default: as the activations)",
    )
    p.add_argument(
        "--prefill-step-size",
        type=int,
        default=prefill_step(),
        metavar="TOKENS",
        help=f"prompt tokens computed at once (default: {prefill_step()})",
    )
    p.add_argument(
        "--plain",
        action="store_true",
        help="plain text only: no Markdown, colours, line editor or redrawing (default: so on a"
        " pipe and a dumb terminal)",
    )
    p.add_argument(
        "--no-history",
        action="store_true",
        help="remember no questions for the Up key (default: in a file only you can read)",
    )
    p.add_debug()
    return p
