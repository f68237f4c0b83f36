"""What can be set while talking: the flags that say how an answer is drawn, under their names."""

import argparse
import copy
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import NoReturn

from mlx_cerebrum import cli
from mlx_cerebrum.chat.session import DecodingOptions
from mlx_cerebrum.errors import RequestError, shown
from mlx_cerebrum.flags import (
    add_draft_flag,
    add_max_tokens_flag,
    add_sampling_flags,
    add_seed_flag,
    add_stop_flag,
    sampling_of,
)

DEFAULTS = DecodingOptions()
SEEDED = (
    "; answer number n, counted from 0, draws with SEED + n, so the same lines give the same"
    " conversation"
)
# What other programs call them: Ollama, llama.cpp, transformers.
_ELSEWHERE = {
    **dict.fromkeys(("temperature", "t"), "temp"),
    **dict.fromkeys(("num-predict", "n-predict", "max-new-tokens", "predict", "n"), "max-tokens"),
    **dict.fromkeys(("repeat-penalty", "penalty"), "repetition-penalty"),
    **dict.fromkeys(("repeat-last-n", "repetition-context-size"), "repetition-context"),
    "logit-biases": "logit-bias",
    "eos": "ignore-eos",
    "speculation": "draft",
}
# What they can change and a running chat can't, and how it is had here.
_AT_START = {
    **dict.fromkeys(("num-ctx", "ctx-size", "context", "ctx", "window"), "--window TOKENS"),
    **dict.fromkeys(("kv-bits", "cache-type"), "--kv-bits"),
    **dict.fromkeys(("prefill-step-size", "batch", "num-batch"), "--prefill-step-size"),
    "template": "--template",
}
_RESET = ("default", "reset", "-")
_SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


class _Parser(cli.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(message.removeprefix("argument --"))


def add_drawing_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that `/set` changes."""
    add_max_tokens_flag(p, DEFAULTS.max_tokens)
    add_sampling_flags(p)
    add_stop_flag(p)
    add_seed_flag(p, SEEDED)
    add_draft_flag(p, DEFAULTS.draft, DEFAULTS.draft)


def options_of(args: argparse.Namespace) -> DecodingOptions:
    """What the flags ask for. Raises RequestError for what is out of range."""
    return DecodingOptions(
        max_tokens=args.max_tokens,
        sampling=sampling_of(args, args.seed),
        draft=args.draft,
        kv_bits=args.kv_bits,
        prefill_step_size=args.prefill_step_size,
        stop=tuple(args.stop),
    )


class Settings:
    """The flags as they are now.

    args: those of the command line, which stay as they are.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = copy.copy(args)
        self._parser = _Parser(prog="/set", add_help=False)
        add_drawing_flags(self._parser)
        self._flags = {action.option_strings[0][2:]: action for action in self._parser._actions}

    def __iter__(self) -> Iterator[str]:
        return iter(self._flags)

    def about(self, name: str) -> str:
        """A flag's help, as `--help` has it."""
        return (self._flags[name].help or "").replace("%%", "%")

    def brief(self, name: str) -> str:
        """The beginning of its help, for a list."""
        return re.split(r"[;:]| \(default", self.about(name), maxsplit=1)[0]

    def value(self, name: str) -> str:
        """What a flag is set to, as it would be typed."""
        value = getattr(self._args, self._flags[name].dest)
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, list):
            pairs = (f"{one[0]}={one[1]:g}" if isinstance(one, tuple) else one for one in value)
            return " ".join(map(str, pairs)) or "none"
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    def find(self, typed: str) -> str:
        """The flag that is meant. Raises RequestError where there is none."""
        name = typed.lower().lstrip("-").replace("_", "-")
        name = _ELSEWHERE.get(name, name)
        if name in self._flags:
            return name
        if name in _AT_START:
            raise RequestError(f"{shown(typed)} is chosen at the start: {_AT_START[name]}")
        near = get_close_matches(name, [*self._flags, *_ELSEWHERE, "system"], 1)
        near = [_ELSEWHERE.get(one, one) for one in near]
        hint = f"did you mean {near[0]}?" if near else "/set lists them"
        raise RequestError(f"{shown(typed)} is no setting; {hint}")

    def set(self, name: str, text: str, vocabulary: int) -> DecodingOptions:
        """Set a flag; the options with it. Raises RequestError, and then nothing has changed.

        text: as typed, `default` for what holds without the flag.
        vocabulary: the model's tokens.
        """
        action, args = self._flags[name], copy.copy(self._args)
        if text.lower() in _RESET or (text.lower() == "none" and action.choices is None):
            setattr(args, action.dest, copy.copy(action.default))
        elif action.nargs == 0:
            if text.lower() not in _SWITCH:
                raise RequestError(f"{name}: {shown(text)} is neither on nor off")
            setattr(args, action.dest, _SWITCH[text.lower()])
        else:
            self._parser.parse_args([f"--{name}={text}"], args)
        options = options_of(args)
        options.sampling.check_vocabulary(vocabulary)
        self._args = args
        return options
