"""How a conversation is written for a model whose checkpoint has no template, or by choice.

Each text is that of the format's own authors: Cerebrum's card, OpenAI's ChatML, Meta's Llama 2,
Mistral's instruct models (tokenizer V1, or V3 where `[INST]` is a token), Stanford's Alpaca,
Hugging Face's Zephyr. `plain` writes the messages alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import nodes

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer.jinja.run import LONGEST, parse, reason

# The model card's text.
DEFAULT_SYSTEM = (
    "A chat between a user and a thinking artificial intelligence assistant. The assistant "
    "describes its thought process and gives helpful and detailed answers to the user's questions."
)

# The card's format; earlier answers as the models' public users write them, without an EOS.
CEREBRUM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}"
    f"{{% set system = {DEFAULT_SYSTEM!r} %}}{{% set turns = messages %}}"
    "{% endif %}"
    "{{ bos_token + system.strip() + '\\n' }}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user, assistant, user, ...') }}"
    "{% endif %}"
    "{{ ('User: ' if message['role'] == 'user' else 'AI: ') + message['content'].strip() + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'AI:' }}{% endif %}"
)

# `system` (or none) and `turns`, which take turns.
_TURNS = (
    "{% set system = messages[0].content if messages[0].role == 'system' %}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for message in turns %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user, assistant, user, ...') }}"
    "{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)
_LLAMA_2 = (
    f"{_TURNS}"
    "{% for message in turns %}{% if message.role == 'user' %}"
    "{% set content = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' ~ message.content"
    " if loop.first and system else message.content %}"
    "{{ bos_token }}[INST] {{ content.strip() }} [/INST]"
    "{% else %} {{ message.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_V1 = (
    f"{_TURNS}{{{{ bos_token }}}}"
    "{% for message in turns %}{% if message.role == 'user' %}"
    "[INST] {% if loop.first and system %}{{ system }}\n\n{{ '' }}{% endif %}"
    "{{ message.content }} [/INST]"
    "{% else %} {{ message.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_V3 = (
    f"{_TURNS}{{{{ bos_token }}}}"
    "{% for message in turns %}{% if message.role == 'user' %}"
    "[INST] {% if loop.index0 >= turns|length - 2 and system %}"
    "{{ system }}\n\n{{ '' }}{% endif %}"
    "{{ message.content }}[/INST]"
    "{% else %} {{ message.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
_ALPACA = (
    f"{_TURNS}{{{{ bos_token }}}}"
    "{{ system|default('Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.') }}\n\n{{ '' }}"
    "{% for message in turns %}{% if message.role == 'user' %}"
    "### Instruction:\n{{ message.content }}\n\n{{ '' }}"
    "{% else %}### Response:\n{{ message.content.strip() }}{{ eos_token }}\n\n{{ '' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}"
    "<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{{ '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{ '' }}{% endif %}"
)
_PLAIN = "{{ messages|map(attribute='content')|join('\n\n') }}"


@dataclass(frozen=True)
class ChatFormat:
    """A way to write conversations.

    source: the Jinja template.
    ends: texts that end an answer, besides the tokenizer's own end tokens.
    built_in: one of BUILT_IN, which leave the BOS to the tokenizer's setting.
    assumed: why it was taken, where nobody named it.
    """

    source: str
    ends: tuple[str, ...] = ()
    built_in: str | None = None
    assumed: str | None = None


def _named(name: str, source: str, *ends: str) -> ChatFormat:
    return ChatFormat(source, ends, name)


# A model that runs on past its answer writes the user's next turn, which ends it too.
BUILT_IN: dict[str, ChatFormat] = {
    each.built_in: each
    for each in (
        _named("chatml", _CHATML, "<|im_end|>"),
        _named("llama-2", _LLAMA_2, "[INST]"),
        _named("mistral", _MISTRAL_V1, "[INST]"),
        _named("alpaca", _ALPACA, "\n### Instruction:"),
        _named("zephyr", _ZEPHYR, "<|user|>"),
        _named("cerebrum", CEREBRUM_TEMPLATE, "\nUser:"),
        _named("plain", _PLAIN),
    )
    if each.built_in
}
NAMES = ", ".join(BUILT_IN)
_MISTRAL_WITH_TOKENS = replace(BUILT_IN["mistral"], source=_MISTRAL_V3)


def own_format(source: str) -> ChatFormat:
    """A checkpoint's own template; if it is a built-in one, answers end as they do there."""
    known = (each for each in (*BUILT_IN.values(), _MISTRAL_WITH_TOKENS) if each.source == source)
    return next(known, ChatFormat(source))


def read_format(name: str | Path) -> ChatFormat:
    """A built-in format by its name, else a Jinja file. Raises TokenizerError for neither."""
    if (found := BUILT_IN.get(str(name))) is not None:
        return found
    path = Path(name)
    try:
        if not path.is_file():
            raise TokenizerError(
                f"{str(name)!r} is neither a chat template's file nor one of {NAMES}"
            )
        if path.stat().st_size > 4 * LONGEST:
            raise TokenizerError(f"{path} is too long for a chat template")
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise TokenizerError(f"{str(name)!r} cannot be read: {error}") from None
    try:
        tree = parse(source)
    except Exception as error:  # whatever Jinja's parser raises
        line = getattr(error, "lineno", None)
        where = path if line is None else f"{path}, line {line}"
        raise TokenizerError(f"{where} is not a chat template: {reason(error)}") from None
    if all(name.name != "messages" for name in tree.find_all(nodes.Name)):
        raise TokenizerError(f"{path} is not a chat template: it never looks at 'messages'")
    return own_format(source)


def assumed_format(is_token: Callable[[str], bool]) -> ChatFormat:
    """The format for a model without a template, by the tokens that its vocabulary has.

    Without a sign, the text is only continued: a format the model has never seen is worse.
    (llama.cpp takes ChatML for every such model.)
    """
    for name, signs in (
        ("chatml", ("<|im_start|>", "<|im_end|>")),
        ("mistral", ("[INST]", "[/INST]")),
    ):
        if all(map(is_token, signs)):
            reason = f"{name} is assumed, since {signs[0]} is a token of its vocabulary"
            return replace(BUILT_IN[name], assumed=reason)
    reason = "plain is assumed, which only continues the text"
    return replace(BUILT_IN["plain"], assumed=reason)


def for_tokens(chosen: ChatFormat, is_token: Callable[[str], bool]) -> ChatFormat:
    """The variant for a vocabulary: Mistral writes `[INST]` otherwise where it is a token."""
    if chosen.source == _MISTRAL_V1 and is_token("[INST]"):
        return replace(chosen, source=_MISTRAL_V3)
    return chosen
