"""The JSON files around a tokenizer: which tokens are special, BOS, the chat template.

Not read: `additional_chat_templates/`, whose templates are for other uses, and the files of
other kinds of tokenizer (`tekken.json`, `vocab.json` with `merges.txt`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.files.foreign import stand_in
from mlx_cerebrum.tokenizer.tokenizer_json import ADDED_FLAGS, is_token_id
from mlx_cerebrum.tokenizer.vocabulary import MAX_ADDED, MAX_TOKENS, AddedToken

# Every file a tokenizer is read from: fetched from the hub, and copied by `Tokenizer.save`.
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

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
_UNNAMED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a checkpoint directory says about its tokenizer, besides the vocabulary.

    special_tokens: `bos_token` and so on -> text. control_tokens: those and the unnamed ones.
    added_tokens: those outside the vocabulary, `special` where a file says so; has_decoder:
        from tokenizer_config.json, which knows more of them than a tokenizer.json.
    add_bos: the explicit setting; None where the files are silent.
    llama_class: transformers reads it by its LlamaTokenizer, which has settings of its own.
    legacy, add_prefix_space: where text gets a space mark in front; None where not said.
    model_vocab_size: rows of the model's embedding (config.json), 0 if not said.
    """

    special_tokens: dict[str, str]
    control_tokens: frozenset[str]
    added_tokens: tuple[AddedToken, ...]
    add_bos: bool | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    model_vocab_size: int
    has_decoder: bool = False
    llama_class: bool = False
    legacy: bool | None = None
    add_prefix_space: bool | None = None

    @property
    def prefix(self) -> str:
        """Which text gets a space mark in front (see SentencePieceVocabulary)."""
        # Only LlamaTokenizer heeds add_prefix_space, and it defaults to legacy: false.
        if self.llama_class and self.add_prefix_space is False:
            return "never"
        legacy = not self.llama_class if self.legacy is None else self.legacy
        return "always" if legacy else "first"

    @classmethod
    def read(cls, path: Path) -> "TokenizerFiles":
        """Raises TokenizerError naming the file (and key) that cannot be used."""
        where = path / "tokenizer_config.json"
        config = read_object(where)
        map_file = path / "special_tokens_map.json"
        tokens_map = read_object(map_file)
        # As transformers: the older file counts only where the newer way is not used.
        sources = [(where, config), (map_file, tokens_map)]
        if "added_tokens_decoder" not in config:
            sources.reverse()
        special: dict[str, str] = {}
        unnamed: set[str] = set()
        for file, source in sources:
            for name in _NAMED:
                if source.get(name) is not None and source[name] != "":
                    special.setdefault(name, _text(source[name], name, file))
            for name in _UNNAMED:
                unnamed.update(_texts(source.get(name), name, file))
        controls = frozenset(special.values()) | unnamed
        model = read_object(path / "config.json")
        rows, model_type = model.get("vocab_size"), model.get("model_type")
        kind = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
        # A Mistral's files are taken as they are, whatever class they name.
        llama = model != {} and model_type in ("llama", None, "")
        return cls(
            special_tokens=special,
            control_tokens=controls,
            added_tokens=_added_tokens(path, config, controls),
            add_bos=_flag(config, "add_bos_token", where),
            eos_ids=_eos_ids(path / "generation_config.json"),
            chat_template=_chat_template(path, config),
            model_vocab_size=rows if type(rows) is int else 0,
            has_decoder="added_tokens_decoder" in config,
            llama_class=llama and kind in ("LlamaTokenizer", "LlamaTokenizerFast"),
            legacy=_flag(config, "legacy", where),
            add_prefix_space=_flag(config, "add_prefix_space", where),
        )


def read_bytes(path: Path) -> bytes:
    """Raises TokenizerError for what can't be read, or is not what its name says."""
    try:
        with path.open("rb") as file:
            data = file.read(json_file.MAX_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > json_file.MAX_BYTES:
        raise TokenizerError(f"{path} is larger than {json_file.MAX_BYTES >> 20} MiB: damaged")
    if problem := stand_in(path, data):
        raise TokenizerError(problem)
    return data


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    return json_file.read_object(path, TokenizerError) if path.exists() else {}


def _flag(config: dict[str, Any], name: str, where: Path) -> bool | None:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise TokenizerError(f"{where}: {name} must be true or false, not {value!r:.60}")
    return value


def _text(value: Any, name: str, where: Path) -> str:
    """A token's text, written as a string or as {"content": ...}."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{where}: {name} must be a token's text, not {value!r:.60}")
    return content


def _texts(value: Any, name: str, where: Path) -> list[str]:
    """Several tokens' texts, as a list or as an object of them."""
    values = list(value.values()) if isinstance(value, dict) else value or []
    if not isinstance(values, list):
        raise TokenizerError(f"{where}: {name} must be a list, not {value!r:.60}")
    return [_text(item, name, where) for item in values]


def _added_tokens(
    path: Path, config: dict[str, Any], controls: Iterable[str]
) -> tuple[AddedToken, ...]:
    """`added_tokens_decoder`, or what was used before it, added_tokens.json."""
    where = path / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder")
    if decoder is not None and not isinstance(decoder, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder must be an object of tokens by id")
    file = path / "added_tokens.json"
    # As the tokenizers library: a name that is special is special however it was added, and a word
    # of which no more is said is looked for in the normalized text.
    tokens = {
        content: AddedToken(
            _id(token, content, file),
            content,
            special=content in controls,
            normalized=content not in controls,
        )
        for content, token in read_object(file).items()
        if decoder is None and content
    }
    for key, value in (decoder or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10) or not isinstance(value, dict):
            raise TokenizerError(f"{where}: added_tokens_decoder has a bad entry {key!r:.40}")
        content = _text(value, "added_tokens_decoder", where)
        flags = {flag: value.get(flag, False) for flag in ADDED_FLAGS}
        for flag in flags:
            if not isinstance(flags[flag], bool):
                raise TokenizerError(f"{where}: {flag} of {content!r:.40} must be true or false")
        flags["special"] |= content in controls
        tokens[content] = AddedToken(_id(int(key), content, where), content, **flags)
    if len(tokens) > MAX_ADDED:
        raise TokenizerError(f"{path}: more than {MAX_ADDED:,} added tokens")
    return tuple(sorted(tokens.values(), key=lambda token: token.id))


def _id(value: Any, content: str, where: Path) -> int:
    if not is_token_id(value):
        raise TokenizerError(f"{where}: {content!r:.40} has no token id below {MAX_TOKENS:,}")
    return int(value)


def _eos_ids(path: Path) -> tuple[int, ...]:
    value = read_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(is_token_id, ids)):
        raise TokenizerError(
            f"{path}: eos_token_id must be a token id or a list of them, not {value!r:.60}"
        )
    return tuple(ids)


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """A file of its own goes before tokenizer_config.json, as in transformers."""
    file = path / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    where = path / "chat_template.json"
    template = read_object(where).get("chat_template")
    if template is None:
        where = path / "tokenizer_config.json"
        template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        entries = [entry for entry in template if isinstance(entry, dict)]
        if len(entries) < len(template) or not all(isinstance(e.get("name"), str) for e in entries):
            raise TokenizerError(f"{where}: a chat template of several must have a name")
        template = {entry["name"]: entry.get("template") for entry in entries}
    if isinstance(template, dict):
        if "default" not in template:
            raise TokenizerError(f"{where}: none of its chat templates is named 'default'")
        template = template["default"]
    if not isinstance(template, str | None):
        raise TokenizerError(f"{where}: chat_template must be text, not {template!r:.60}")
    return template
