"""`python -m mlx_cerebrum.chat`: a conversation with one or several orders of the same blocks."""

import argparse
import io
import sys
from pathlib import Path

import mlx.core as mx

from mlx_cerebrum import cli
from mlx_cerebrum.chat.about import about
from mlx_cerebrum.chat.chat import SYNONYMS, Chat
from mlx_cerebrum.chat.commands import COMMANDS
from mlx_cerebrum.chat.prompt import (
    CommandCompleter,
    EditingReader,
    PlainReader,
    history_path,
    open_history,
)
from mlx_cerebrum.chat.screen import FullScreen, PlainScreen, Rows, Screen, is_full
from mlx_cerebrum.chat.session import DecodingOptions, Messages, Session
from mlx_cerebrum.chat.settings import Settings, add_drawing_flags, options_of
from mlx_cerebrum.chat.signals import orderly_end
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.flags import (
    add_kv_bits_flag,
    add_model_flags,
    add_plans_flag,
    add_prefill_flag,
    add_system_flag,
    memory_limit,
    model_spec,
    say_assumed,
)
from mlx_cerebrum.model.entries import check_kv_bits
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.progress import progress
from mlx_cerebrum.tokenizer.conversation import read_messages
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import load_views


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    # Everything that can be refused is, cheapest first, before weights are read.
    options = options_of(args)
    options.sampling.check_used()
    if args.load is not None and args.system is not None:
        raise RequestError("--load is a whole conversation: no --system with it, use /system")
    if sys.stdin is None:
        raise RequestError("standard input is closed; there is nobody to talk with")
    spec, memory = model_spec(args), memory_limit(args)
    messages = None if args.load is None else read_messages(args.load)
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8 costs a line, not the chat
        sys.stdin.reconfigure(errors="surrogateescape")
    with orderly_end(), limits(memory):
        return _talk(args, spec, options, messages)


def _talk(
    args: argparse.Namespace, spec: ModelSpec, options: DecodingOptions, messages: Messages | None
) -> int:
    screen = FullScreen() if is_full(args.plain) else PlainScreen()
    opened = open_model(spec)
    check_kv_bits(opened.config, args.kv_bits)
    options.sampling.check_vocabulary(opened.config.vocab_size)
    with progress("loading", show=is_full(args.plain)) as report:
        models, tokenizer = load_views(opened, args.plan, report)
    say_assumed(tokenizer)
    session = Session(models, tokenizer, options)
    if args.system is not None:
        session.set_system(args.system)
    chat = _chat(session, screen, args, about(opened, models))
    _header(chat)
    if messages is not None:
        chat.load(messages, str(args.load))
    return chat.run()


def _chat(session: Session, screen: Screen, args: argparse.Namespace, rows: Rows) -> Chat:
    settings = Settings(args)
    if isinstance(screen, PlainScreen):
        return Chat(session, screen, PlainReader(), COMMANDS, settings, sys.stdin.isatty(), rows)
    takes = {
        "plan": lambda: dict.fromkeys(session.models, ""),
        "set": lambda: {name: settings.about(name) for name in settings},
        "show": lambda: {"info": "the model", "parameters": "what is set", "system": "its text"},
        "help": lambda: {name: command.help for name, command in COMMANDS.items()},
    }
    completer = CommandCompleter({n: c.help for n, c in COMMANDS.items()}, SYNONYMS, takes)
    try:
        history = open_history(None if args.no_history else history_path())
    except OSError as error:
        history = open_history(None)
        screen.notice(f"questions are not remembered: {cli.describe(error)}")
    reader = EditingReader(history, completer)
    return Chat(session, screen, reader, COMMANDS, settings, True, rows)


def _header(chat: Chat) -> None:
    facts = dict(chat.about)
    held = f"{human(mx.get_active_memory())} held"
    shown = [facts["model"], facts["orders"], facts["weights"], held, facts["window"]]
    if facts["orders"].startswith(f"{facts['model'].lower()} ("):  # said once is enough
        shown.pop(0)
    chat.screen.notice(", ".join(shown))
    several = len(chat.session.models) > 1
    chat.screen.notice(f"{'/plan switches, /compare asks two, ' * several}/help lists the commands")


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m mlx_cerebrum.chat",
        description="Talk with Cerebrum, or another Mistral or Llama model, at the terminal.",
    )
    add_model_flags(p, f"{hub.DEFAULT_REPO}, as the 12.25B and as the 7B")
    add_plans_flag(p)
    add_system_flag(p)
    p.add_argument(
        "--load",
        type=Path,
        metavar="FILE.json",
        help="go on with a saved conversation (default: a new one)",
    )
    add_drawing_flags(p)
    add_kv_bits_flag(p)
    add_prefill_flag(p)
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


if __name__ == "__main__":
    sys.exit(main())
