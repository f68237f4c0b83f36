"""The tokenizer of a checkpoint: text and conversations to ids, ids to text.

Three sources give the same object: a `tokenizer.json`, a `tokenizer.model` (SentencePiece),
or a GGUF file's metadata. The ids are those of transformers 5.24 for the same directory (so
the `tokenizer.json` is used where there are both), and llama.cpp's for the same GGUF, but:

- A BOS goes before a text where a `tokenizer.model` is not told otherwise, or where
  tokenizer_config.json asks for one and the `tokenizer.json` does not say. No EOS ever goes
  after one: the model is to go on from there.
- A `tokenizer.model` is cut up as SentencePiece does. (The LlamaTokenizer of transformers, which
  a `model_type` llama may name, takes merges in order of ids, not of scores.)
- What a chat template writes as a control token is one, whatever surrounds it. (transformers
  misses those that a "Prepend" normalizer has put a space mark into.)
- No text of a person becomes a control token, spelled or not.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import RequestError, TokenizerError
from mlx_cerebrum.tokenizer.chat_formats import ChatFormat, assumed_format, for_tokens, own_format
from mlx_cerebrum.tokenizer.detokenizer import StreamingDetokenizer, decode
from mlx_cerebrum.tokenizer.files import FILES, TokenizerFiles, read_bytes, read_text
from mlx_cerebrum.tokenizer.fitting import FittedTemplate
from mlx_cerebrum.tokenizer.gguf_vocabulary import gguf_flag, gguf_token_id, vocabulary_from_gguf
from mlx_cerebrum.tokenizer.messages import check_messages, check_tools
from mlx_cerebrum.tokenizer.sentencepiece_model import SentencePieceVocabulary
from mlx_cerebrum.tokenizer.template import ChatTemplate, Segment, strip_eos
from mlx_cerebrum.tokenizer.tokenizer_json import as_llama_class, parse, with_added
from mlx_cerebrum.tokenizer.vocabulary import (
    MAX_ADDED,
    AddedToken,
    TokenizersVocabulary,
    Vocabulary,
    all_types,
)


class Tokenizer:
    """Text in, ids out, and back. Make one with `from_directory` or `from_gguf`.

    special_tokens: `bos_token`, `eos_token`, ... -> text, as the template sees them.
    eos_ids: further end tokens (generation_config.json, config.json).
    model_vocab_size: rows of the model's embedding; ids past the vocabulary but below it
        are padding and decode to nothing.
    source: the directory `save` copies from; None writes new files.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        special_tokens: Mapping[str, str],
        add_bos: bool,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        model_vocab_size: int = 0,
        source: Path | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._special_tokens = dict(special_tokens)
        self.vocab_size = len(vocabulary)
        self._id_limit = max(self.vocab_size, model_vocab_size)
        self.bos_token_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        self._own_ends = frozenset(eos_ids) | (frozenset() if eos is None else {eos})
        if add_bos and self.bos_token_id is None:
            raise TokenizerError("the tokenizer is set to add a BOS token but names none")
        self.add_bos = add_bos
        self.chat_template = chat_template
        self._source = source
        self.use_format(
            assumed_format(self._is_token) if chat_template is None else own_format(chat_template)
        )

    def use_format(self, chosen: ChatFormat) -> None:
        """Write conversations so from here on, and end answers where that format does.

        At first it is the checkpoint's own template, else what its vocabulary suggests.
        """
        self.format = chosen = for_tokens(chosen, self._is_token)
        variables = dict(self._special_tokens)
        if chosen.built_in and not self.add_bos:
            variables["bos_token"] = ""
        ends = {text: self._vocabulary.token_id(text) for text in chosen.ends}
        # A token adds nothing to the text, so no text would stop there.
        self.eos_token_ids = self._own_ends.union(id for id in ends.values() if id is not None)
        self.stop_strings = tuple(text for text, token in ends.items() if token is None)
        self._vocabulary.reserve(chosen.source, self.eos_token_ids)
        controls = self._vocabulary.controls
        self._template = FittedTemplate(ChatTemplate(chosen.source, controls, variables))

    def _is_token(self, text: str) -> bool:
        return self._vocabulary.token_id(text) is not None

    def _special_id(self, name: str) -> int | None:
        content = self._special_tokens.get(name)
        if content is None:
            return None
        token = self._vocabulary.token_id(content)
        if token is None:
            raise TokenizerError(f"{name} {content!r} is not in the tokenizer's vocabulary")
        return token

    @classmethod
    def from_directory(cls, path: Path, extra_eos: Iterable[int] = ()) -> "Tokenizer":
        """Read a checkpoint directory's tokenizer. `extra_eos`: the end ids of its config.json.

        Raises TokenizerError naming the file that is missing, damaged or not understood.
        """
        files = TokenizerFiles.read(path)
        special = dict(files.special_tokens)
        vocabulary: Vocabulary
        if (file := path / "tokenizer.json").exists():
            raw = parse(read_text(file), str(file))
            if files.llama_class and "ByteLevel" not in all_types(raw["decoder"]):
                raw = as_llama_class(raw, files.prefix, own_added=not files.has_decoder)
            raw = with_added(raw, files.added_tokens, files.has_decoder)
            where = f"{file} is not a usable tokenizer.json"
            fast = TokenizersVocabulary(raw, where, files.control_tokens)
            vocabulary = fast
            if fast.prefix_token is not None:
                special.setdefault("bos_token", fast.prefix_token)
            # As transformers: the file's own post_processor, whatever tokenizer_config.json
            # says. But where it has none, what is said there counts.
            add_bos = fast.prefix_token == special.get("bos_token", "")
            if raw["post_processor"] is None:
                add_bos = files.add_bos or False
        elif (model := path / "tokenizer.model").exists():
            vocabulary = SentencePieceVocabulary(
                read_bytes(model),
                str(model),
                files.added_tokens,
                files.prefix,
                twice=files.prefix == "always" and not files.llama_class,
                renames=not files.llama_class,
            )
            for name, content in (("bos_token", "<s>"), ("eos_token", "</s>")):
                if vocabulary.token_id(content) is not None:
                    special.setdefault(name, content)
            add_bos = "bos_token" in special if files.add_bos is None else files.add_bos
        else:
            other = " (tekken.json is not read)" if (path / "tekken.json").exists() else ""
            raise TokenizerError(
                f"{path} has no tokenizer: tokenizer.json or tokenizer.model{other}"
            )
        return cls(
            vocabulary,
            special,
            add_bos,
            {*extra_eos, *files.eos_ids},
            files.chat_template,
            files.model_vocab_size,
            source=path,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer a GGUF file describes. metadata: its keys, arrays as lists."""
        vocabulary = vocabulary_from_gguf(metadata)
        sentencepiece = isinstance(vocabulary, SentencePieceVocabulary)
        defaults = {"bos": 1, "eos": 2} if sentencepiece else {}
        special: dict[str, str] = {}
        for name in ("bos", "eos", "unknown", "padding"):
            token = gguf_token_id(metadata, name, len(vocabulary))
            content = vocabulary.content(defaults.get(name, -1) if token is None else token)
            if content is not None:
                key = {"unknown": "unk", "padding": "pad"}.get(name, name)
                special[f"{key}_token"] = content
        # llama.cpp's defaults where the file does not say.
        llama = sentencepiece or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
        add_bos = gguf_flag(metadata, "add_bos_token", llama and "bos_token" in special)
        ends = (gguf_token_id(metadata, name, len(vocabulary)) for name in ("eot", "eom"))
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise TokenizerError("GGUF: tokenizer.chat_template must be text")
        eos_ids = [token for token in ends if token is not None]
        return cls(vocabulary, special, add_bos, eos_ids, template)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of plain text, a spelled-out `<s>` included. BOS as the tokenizer's own setting,
        unless `add_bos` says otherwise. Raises RequestError for text that is not Unicode."""
        bos = self.add_bos if add_bos is None else add_bos
        if bos and self.bos_token_id is None:
            raise RequestError("a BOS token was asked for but the tokenizer has none")
        start = [self.bos_token_id] if bos and self.bos_token_id is not None else []
        return start + self._encode(text)

    def _encode(self, text: str, at_start: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate at character {error.start}; it is not valid Unicode"
            ) from None
        return self._vocabulary.encode(text, at_start)

    @property
    def template_takes_tools(self) -> bool:
        """Whether the chat template looks at `tools`. If not, they are not in the prompt, and
        calls and results that are in the messages are written as text."""
        return self._template.takes_tools

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation, ready for the model to answer; exactly one BOS, if any.

        messages: as `check_messages` takes them; what the template does not is mended as far as
            can be (see fitting.py).
        continue_final_message: the prompt ends where the last message does, an assistant's, for
            the model to go on with; add_generation_prompt then says nothing.
        tools: for a template that takes them, as OpenAI's chat API has them.
        Raises RequestError for messages that are malformed or that the template refuses,
        TokenizerError for a template that fails.
        """
        return self.encode_segments(
            self.render(messages, add_generation_prompt, continue_final_message, tools)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment]:
        """The conversation as text and control tokens in turn; as `apply_chat_template`."""
        conversation = check_messages(messages)
        endings = [self._vocabulary.content(token) or "" for token in self.eos_token_ids]
        for message in conversation:
            if message["role"] == "assistant":
                message["content"] = strip_eos(message["content"], endings)
        return self._template.render(
            conversation, add_generation_prompt, continue_final_message, check_tools(tools)
        )

    def encode_segments(
        self, segments: Iterable[Segment], add_bos: bool | None = None
    ) -> list[int]:
        """Ids of text and control tokens in turn. No second BOS where they begin with one."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, AddedToken):
                ids.append(segment.id)
            else:
                ids += self._encode(segment, at_start=not ids)
        bos = self.add_bos if add_bos is None else add_bos
        # Most templates write the BOS themselves.
        if bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens and padding rows add nothing to it."""
        return decode(self.detokenizer(), ids)

    def only_added(self, start: int) -> bool:
        """Whether no text needs an id from `start` on: they are added tokens', or nobody's."""
        ids = range(start, self.vocab_size)
        return len(ids) <= MAX_ADDED and all(map(self._vocabulary.is_added, ids))

    def piece(self, token: int) -> str | bytes:
        """What one id adds to a text (see detokenizer.py); control tokens add nothing."""
        return self._vocabulary.piece(token)

    def content(self, token: int) -> str | None:
        """A token's own name in the vocabulary, such as `</s>`."""
        return self._vocabulary.content(token)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text becomes: control tokens, and the markers that a template writes."""
        return frozenset(token.id for token in self._vocabulary.controls.values())

    def detokenizer(self) -> StreamingDetokenizer:
        """A fresh streaming detokenizer: its pieces joined are `decode` of the whole."""
        return self._vocabulary.detokenizer(self._id_limit)

    def save(self, directory: Path) -> list[Path]:
        """Write the tokenizer's files into `directory`, for `from_directory`, transformers
        and mlx-lm to read the same ids back. Returns what was written.

        A directory's files are copied unchanged. What is missing for stock tools is added:
        a tokenizer.json beside a lone tokenizer.model, which transformers 5 misreads.
        """
        present = []
        if self._source is not None:
            present = [name for name in FILES if (self._source / name).is_file()]
            for name in present:
                shutil.copyfile(self._source / name, directory / name)
        made = self._made_files(present)
        for name, data in made.items():
            (directory / name).write_bytes(data)
        return [directory / name for name in (*present, *made)]

    def _made_files(self, present: Sequence[str]) -> dict[str, bytes]:
        """The files stock tools need and `present` lacks."""
        made = {}
        if isinstance(self._vocabulary, SentencePieceVocabulary):
            made["tokenizer.model"] = self._vocabulary.model
        if "tokenizer.json" not in present:
            bos = self._special_tokens.get("bos_token") if self.add_bos else None
            if (text := self._vocabulary.tokenizer_json(bos)) is not None:
                made["tokenizer.json"] = text.encode()
        config: dict[str, Any] = {
            # The class that takes tokenizer.json as it is.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._special_tokens,
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        made["tokenizer_config.json"] = _json(config)
        ends = {"bos_token_id": self.bos_token_id, "eos_token_id": sorted(self._own_ends)}
        made["generation_config.json"] = _json(ends)
        return {name: data for name, data in made.items() if name not in present}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
