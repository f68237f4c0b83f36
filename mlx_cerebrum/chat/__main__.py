"""`python -m mlx_cerebrum.chat`: a conversation with one or several orders of the same blocks."""

import argparse
import io
import sys
from pathlib import Path

from mlx_cerebrum import cli  # isort: skip  # first: it says what is not installed
import mlx.core as mx

from mlx_cerebrum.chat.about import about
from mlx_cerebrum.chat.chat import SYNONYMS, Chat
from mlx_cerebrum.chat.commands import COMMANDS
from mlx_cerebrum.chat.filing import resume_at_start
from mlx_cerebrum.chat.keeper import Keeper
from mlx_cerebrum.chat.kept import Kept, conversations
from mlx_cerebrum.chat.prompt import (
    CommandCompleter,
    EditingReader,
    PlainReader,
    history_path,
    open_history,
)
from mlx_cerebrum.chat.screen import FullScreen, PlainScreen, Rows, Screen, is_full
from mlx_cerebrum.chat.session import DecodingOptions, Session
from mlx_cerebrum.chat.settings import Settings, add_drawing_flags, options_of
from mlx_cerebrum.chat.signals import ends_at, orderly_end
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.flags import (
    add_kv_bits_flag,
    add_machines_flags,
    add_model_flags,
    add_plans_flag,
    add_prefill_flag,
    add_system_flag,
    machines,
    memory_limit,
    model_spec,
    say_assumed,
)
from mlx_cerebrum.model.entries import check_kv_bits
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.progress import progress
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import Opened, open_model
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
    if args.resume and (args.load is not None or args.system is not None):
        raise RequestError("--resume goes on with a kept conversation: no --load or --system too")
    if sys.stdin is None:
        raise RequestError("standard input is closed; there is nobody to talk with")
    spec, memory = model_spec(args), memory_limit(args)
    loaded = None if args.load is None else _loaded(args.load)
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8 costs a line, not the chat
        sys.stdin.reconfigure(errors="surrogateescape")
    several = machines(args)
    with orderly_end(), limits(memory, wiring=not args.no_wire):
        if several is not None and several.follows:
            return several.follow(spec, args.plan)
        opened = open_model(spec) if several is None else several.open(spec, args.plan)
        if several is None:
            return _talk(args, opened, options, loaded)
        with several.led(), ends_at(several.links.watch):
            return _talk(args, opened, options, loaded)


def _talk(
    args: argparse.Namespace, opened: Opened, options: DecodingOptions, loaded: Kept | None
) -> int:
    screen = FullScreen() if is_full(args.plain) else PlainScreen()
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
    if loaded is not None:
        chat.load(loaded, str(args.load))
    elif args.resume:
        resume_at_start(chat)
    return chat.run()


def _loaded(path: Path) -> Kept:
    """The conversation of --load. Raises RequestError for a file of several."""
    found = conversations(path)
    if len(found) > 1:
        raise RequestError(f"{path} holds {len(found)} conversations; /load lets you choose one")
    return found[0]


def _chat(session: Session, screen: Screen, args: argparse.Namespace, rows: Rows) -> Chat:
    settings, asks = Settings(args), sys.stdin.isatty()
    keeper = Keeper(session, screen.notice) if asks and not args.no_keep else None
    more = rows, keeper, not args.no_save
    if isinstance(screen, PlainScreen):
        return Chat(session, screen, PlainReader(), COMMANDS, settings, asks, *more)
    takes = {
        "plan": lambda: dict.fromkeys(session.models, ""),
        "set": lambda: {name: settings.brief(name) for name in settings},
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
    return Chat(session, screen, reader, COMMANDS, settings, asks, *more)


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
    add_machines_flags(p)
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on with a conversation that is kept: asks which, on a pipe takes the newest"
        " (default: a new one)",
    )
    p.add_argument(
        "--no-keep",
        action="store_true",
        help="keep no conversations (default: each in a file only you can read, for /resume;"
        " none of a pipe's)",
    )
    p.add_argument(
        "--no-save",
        action="store_true",
        help="leave without offering to save what is kept nowhere (default: it is offered once)",
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


if __name__ == "__main__":
    sys.exit(main())
