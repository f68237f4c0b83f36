"""Whose text it is: a person's never becomes a control token, the template's does; and a template
sees messages as they are."""

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja_reference import VARIABLES, jinja

from mlx_cerebrum.tokenizer.template import ChatTemplate, Segment
from mlx_cerebrum.tokenizer.vocabulary import AddedToken

CONTROLS = {
    name: AddedToken(number, name)
    for number, name in enumerate(("<s>", "</s>", "<think>", "</think>", "<|user|>"))
}
BOS, EOS, THINK, THOUGHT, USER = CONTROLS.values()


@lru_cache
def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, CONTROLS, VARIABLES)


def render(source: str, *contents: str) -> list[Segment]:
    """The contents are a person's and the model's in turn."""
    messages = [
        {"role": ("user", "assistant")[at % 2], "content": content}
        for at, content in enumerate(contents)
    ]
    segments = template(source).render(messages)
    text = "".join(part if isinstance(part, str) else part.content for part in segments)
    assert text == jinja(source, messages)  # what Jinja prints, to the letter
    return segments


ANSWER = "<think>\nIs it?\n</think>\n\nYes.</think>"


@pytest.mark.parametrize(
    ("expression", "kept"),
    [  # as DeepSeek's distills, Qwen3, QwQ and others drop earlier reasoning
        ("c.split('</think>')[-1]", ""),
        ("c.split('</think>', 1)[1]", "\n\nYes.</think>"),
        ("c.rsplit('</think>', 1)[0]", "<think>\nIs it?\n</think>\n\nYes."),
        ("c.split('</think>')[1].lstrip('\\n')", "Yes."),
        ("(c.split('</think>')|last) if '</think>' in c else 'unseen'", ""),
        ("c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n')", "Is it?"),
        ("c[c.find('</think>') + 8:]|trim", "Yes.</think>"),
        ("c.partition('</think>')[2].strip()", "Yes.</think>"),
        ("c.replace('</think>', '')", "<think>\nIs it?\n\n\nYes."),
        ("c|replace('</think>', '|')", "<think>\nIs it?\n|\n\nYes.|"),
        ("'seen' if c.startswith('<think>') and c.endswith('</think>') else 'unseen'", "seen"),
        ("'seen' if '<think>' in c and not '<s>' in c else 'unseen'", "seen"),
        ("c.count('</think>')", "2"),
        ("'seen' if c[:7] == '<think>' else 'unseen'", "seen"),
        ("c.removeprefix('<think>').removesuffix('</think>')|trim", "Is it?\n</think>\n\nYes."),
    ],
)
def test_a_template_finds_the_markers_of_earlier_answers(expression: str, kept: str) -> None:
    source = f"{{% set c = messages[1].content %}}{{{{ {expression} }}}}"
    assert render(source, "q", ANSWER) == [kept] * (kept != "")


def test_what_the_template_writes_for_a_marker_is_one() -> None:
    source = (
        "{% set c = messages[1].content %}{{ '<think>' ~ c.split('</think>')[0][7:] }}"
        "{{ '</think>' + c.split('</think>')[1] }}{{ c|replace('Yes', '<s>') }}"
    )
    assert render(source, "q", "<think>hm</think>Yes") == [
        *(THINK, "hm", THOUGHT, "Yes<think>hm</think>", BOS)
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '<|' + messages[0].role + '|>' }}", [USER]),
        ("{{ '<|' ~ messages[0]['role'] ~ '|>' ~ eos_token }}", [USER, EOS]),
        ("{{ '<%s|>' % '|user' }}", [USER]),
        ("{{ '{}s{}'.format('<', '>') }}", [BOS]),
        ("{{ '</S>'|lower }}{{ ' <s> '.strip() }}{{ ['<', 's>']|join }}", [EOS, BOS, BOS]),
        ("{{ '>s<'[::-1] }}{{ '<s>,</s>'.split(',')[1] }}", [BOS, EOS]),
        ("{% for c in '<s>' %}{{ c }}{% endfor %}", [BOS]),
        ("{% set x %}<{% endset %}{{ x }}s>{% filter trim %} <s> {% endfilter %}", [BOS, BOS]),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m('s') }}", [BOS]),
        ("{{ namespace(a='<s>').a }}{{ {'a': ['<s>']}.a[0] }}{{ 2 * '<s>' }}", [BOS] * 4),
        ("{{ '<s>' if true }}{{ none or '<s>' }}{{ undefined|default('<s>') }}", [BOS] * 3),
        ("{{ '<s>x'|replace('x', '') }}{{ '<s>xy'|truncate(3, true, '', 0) }}", [BOS] * 2),
        ("{{ '<s>'|indent }}{{ '<s>'.splitlines()[0] }}{{ '<s>'|center(3) }}", [BOS] * 3),
        ("{{ '<s>'|e }}{{ '<s>'|tojson }}{{ ['<s>'] }}", ["&lt;s&gt;\"<s>\"['<s>']"]),
    ],
)
def test_what_the_template_builds_of_its_own_words(source: str, expected: list[Segment]) -> None:
    assert render(source, "q") == expected


# Somebody's words among the template's, which alone spell no control token here.
MIXED = [
    "{{ '<' ~ c ~ 's>' }}",
    "{{ '<s' + c + '>' }}",
    "{{ '</' ~ c ~ d ~ 's>' }}",
    "{{ c ~ d }}",
    "{{ d ~ c ~ d }}",
    "{{ c|upper|lower }}",
    "{{ c.title() }}{{ d|title }}",
    "{{ c.swapcase().swapcase() }}",
    "{{ c|trim ~ d|trim }}",
    "{{ c.strip('x') ~ d.lstrip(' ') ~ c.rstrip() }}",
    "{{ [c, d]|join }}",
    "{{ c.join(['<', 's>']) }}",
    "{{ ['<', 's>']|join(c) }}",
    "{{ '%s%s' % (c, d) }}",
    "{{ '<%s>' % c }}",
    "{{ '<%-3s>%5s' % (c, d) }}",
    "{{ '{}{}'.format(c, d) }}",
    "{{ '<{a:>3}{b!s}s>'.format(a=c, b=d) }}",
    "{{ '<%ss>'|format(c) }}",
    "{% for x in c %}{{ x }}{% endfor %}",
    "{% for x in c %}{{ d }}{{ x }}{% endfor %}",
    "{{ c[::-1] ~ d|reverse }}",
    "{{ c[0] ~ d[-1] ~ c[1:] ~ d[:2] ~ c[::2] }}",
    "{{ c|first ~ d|last ~ c|list|join ~ d|list|last }}",
    "{{ c|tojson }}{{ d|tojson(indent=1) }}{{ messages|tojson }}",
    "{{ [c, d] }}{{ (c,) }}{{ {c: d} }}{{ messages|string }}",
    "{{ c|replace('x', '') ~ d.replace('/', '') }}",
    "{{ c.replace('', '/') ~ d|replace('<', '<<') }}",
    "{{ '<abc>'.replace('b', c) }}",
    "{{ c.split('x')|join ~ d.rsplit(' ', 1)|join('<') }}",
    "{{ c.split()|join ~ d.split(none, 1)|join ~ c.splitlines()|join }}",
    "{{ c.partition('s')|join('/') ~ d.rpartition('<')|last }}",
    "{% set x %}<{{ c }}{% endset %}{{ x }}>{{ x|length }}",
    "{% macro m(a, b=d) %}<{{ a }}{{ b }}>{% endmacro %}{{ m(c) }}",
    "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}{{ c }}{% endcall %}",
    "{% filter replace('x', '') %}{{ c }}{{ d }}{% endfilter %}",
    "{{ (c ~ d)[1:] ~ (c * 2) ~ (d ~ '<') }}",
    "{{ c.center(9) ~ d.ljust(5) ~ c.rjust(6, '<') ~ d.zfill(4) ~ c|center(12) }}",
    "{{ c|indent(1) ~ d|indent(2, true, true) ~ c|e }}",
    "{{ c|truncate(2, true, '<', 0) ~ d|truncate(3, false, '') }}",
    "{{ [d, c, '<']|sort|join ~ [c, d]|unique|join ~ [c, d]|max }}",
    "{{ c|batch(1)|map('join')|join ~ {'k': d}.items()|list|map('last')|join }}",
    "{{ messages|map(attribute='content')|join }}",
    "{{ namespace(a=c).a ~ dict(a=d).a ~ {c: 1}|list|first ~ (c or d) }}",
    "{{ c.removeprefix('<') ~ d.removesuffix('>') ~ c|capitalize ~ d.casefold() }}",
]


@settings(deadline=None, max_examples=40)
@given(
    contents=st.lists(
        st.text(st.sampled_from("</s> x\n\ue000"), min_size=1)
        | st.sampled_from(["<s>", "a</s>", "<", "</", "s>x", "/s>", ">", "s", "/", "think>"]),
        min_size=2,
        max_size=2,
    )
)
def test_text_never_becomes_a_control_token(contents: list[str]) -> None:
    for source in MIXED:
        set_up = "{% set c, d = messages[0].content, messages[1].content %}{{ bos_token }}"
        segments = render(set_up + source, *contents)
        assert [part for part in segments if isinstance(part, AddedToken)] == [BOS], source


def test_white_space_of_either_belongs_to_a_token_that_takes_it() -> None:
    greedy = {"<|end|>": AddedToken(5, "<|end|>", lstrip=True, rstrip=True)}
    source = "{{ messages[0].content }}<|end|>{{ messages[0].content }}"
    prompt = ChatTemplate(source, greedy, {}).render([{"role": "user", "content": " x \n"}])
    assert prompt == [" x", greedy["<|end|>"], "x \n"]


def test_a_space_in_a_name_is_the_template_s_too() -> None:
    spaced = {"<a b>": AddedToken(5, "<a b>")}
    template = ChatTemplate("<a{{ messages[0].content }}b><a b>", spaced, {})
    assert template.render([{"role": "user", "content": " "}]) == ["<a b>", spaced["<a b>"]]
