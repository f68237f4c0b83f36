"""The JSON files around a tokenizer: which tokens are special, BOS, the chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cerebrum import json_file
from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.foreign import stand_in
from mlx_cerebrum.vocabulary import AddedToken

# Every file a tokenizer is read from, and `Tokenizer.save` copies.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a checkpoint directory says about its tokenizer, besides the vocabulary.

    special_tokens: `bos_token` and so on -> text. control_tokens: those and the unnamed ones.
    add_bos: the explicit setting; None where the files are silent.
    model_vocab_size: rows of the model's embedding (config.json), 0 if not said.
    """

    special_tokens: dict[str, str]
    control_tokens: frozenset[str]
    added_tokens: tuple[AddedToken, ...]
    add_bos: bool | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    model_vocab_size: int

    @classmethod
    def read(cls, path: Path) -> "TokenizerFiles":
        """Raises TokenizerError naming the file (and key) that cannot be used."""
        where = path / "tokenizer_config.json"
        config = read_object(where)
        tokens_map = read_object(path / "special_tokens_map.json")
        special = {}
        for name in _NAMED:
            value = config.get(name) or tokens_map.get(name)
            if value is not None:
                special[name] = _text(value, name, where)
        others = config.get("additional_special_tokens") or []
        if not isinstance(others, list):
            raise TokenizerError(f"{where}: additional_special_tokens must be a list")
        unnamed = (_text(value, "additional_special_tokens", where) for value in others)
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool | None):
            raise TokenizerError(f"{where}: add_bos_token must be true or false, not {add_bos!r}")
        rows = read_object(path / "config.json").get("vocab_size")
        return cls(
            special_tokens=special,
            control_tokens=frozenset(special.values()).union(unnamed),
            added_tokens=_added_tokens(path, config),
            add_bos=add_bos,
            eos_ids=_eos_ids(path / "generation_config.json"),
            chat_template=_chat_template(path, config),
            model_vocab_size=rows if isinstance(rows, int) else 0,
        )


def read_bytes(path: Path) -> bytes:
    """Raises TokenizerError for what can't be read, or is not what its name says."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    if problem := stand_in(path, data):
        raise TokenizerError(problem)
    return data


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    return json_file.read_object(path, TokenizerError) if path.exists() else {}


def _text(value: Any, name: str, where: Path) -> str:
    """A token's text, written as a string or as {"content": ...}."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{where}: {name} must be a token's text, not {value!r}")
    return content


def _added_tokens(path: Path, config: dict[str, Any]) -> tuple[AddedToken, ...]:
    """Tokens that a tokenizer.model does not know: `added_tokens_decoder`, added_tokens.json."""
    tokens = {}
    for content, token in read_object(path / "added_tokens.json").items():
        if not isinstance(token, int) or token < 0:
            raise TokenizerError(f"{path / 'added_tokens.json'}: {content!r} has no token id")
        tokens[token] = AddedToken(token, content)
    where = path / "tokenizer_config.json"
    for key, value in (config.get("added_tokens_decoder") or {}).items():
        if not key.isdecimal() or not isinstance(value, dict):
            raise TokenizerError(f"{where}: added_tokens_decoder has a bad entry {key!r}")
        flags = (bool(value.get(flag, False)) for flag in ("special", "lstrip", "rstrip"))
        content = _text(value, "added_tokens_decoder", where)
        tokens[int(key)] = AddedToken(int(key), content, *flags)
    return tuple(tokens[token] for token in sorted(tokens))


def _eos_ids(path: Path) -> tuple[int, ...]:
    value = read_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise TokenizerError(f"{path}: eos_token_id must be a token id or a list, not {value!r}")
    return tuple(ids)


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """A file of its own goes before tokenizer_config.json, as in transformers."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return read_bytes(file).decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file} is not UTF-8: {error}") from None
    where = path / "chat_template.json"
    template = read_object(where).get("chat_template")
    if template is None:
        where = path / "tokenizer_config.json"
        template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if entry}
        if "default" not in named:
            raise TokenizerError(f"{where}: none of its chat templates is named 'default'")
        template = named["default"]
    if not isinstance(template, str | None):
        raise TokenizerError(f"{where}: chat_template must be text, not {template!r:.60}")
    return template
