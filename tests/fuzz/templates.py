"""Chat templates: public shapes with their text moved about, and expressions at random."""

from pathlib import Path
from random import Random

from mlx_cerebrum.tokenizer.chat_formats import CEREBRUM_TEMPLATE

from .mutate import TEXTS, mutated_bytes, mutated_text

_SEEDS = (
    CEREBRUM_TEMPLATE,
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{%- set ns = namespace(last=0) -%}\n{%- for message in messages -%}\n"
    "{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}\n"
    "{%- endfor -%}\n{{- bos_token }}{{ messages[ns.last].content | trim }}{{ eos_token -}}",
    "{% macro turn(m, i=0) %}\n[INST] {{ m.content.split('</think>')[-1] }}{% endmacro %}\n"
    "{% for m in messages[1:] %}{{ turn(m, loop.index) }}{% endfor %}\n"
    "{{ messages | map(attribute='role') | join(',') | tojson }}",
)
_WORDS = (
    *("{{", "}}", "{%", "%}", "{#", "#}", "|", "(", ")", "endfor", "endif", "else", "messages"),
    *("{% for a in b %}", "{% endfor %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    *("{% include 'x' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}", "{% block b %}"),
    *("{% call m() %}", "{% filter upper %}", "{% raw %}", "{% set x = 1 %}", "{% continue %}"),
    *("{% generation %}", "{% endgeneration %}", "{% break %}", "{% do x %}", "{% autoescape %}"),
)
_NAMES = (
    *(
        "messages",
        "bos_token",
        "add_generation_prompt",
        "tools",
        "range",
        "lipsum",
        "cycler",
        "dict",
    ),
    *(
        "joiner",
        "namespace",
        "raise_exception",
        "strftime_now",
        "messages[0]",
        "messages[0].content",
    ),
    *(
        "loop",
        "self",
        "caller",
        "varargs",
        "true",
        "none",
        "undefined_name",
        "messages[-1]['role']",
    ),
)
_VALUES = ("0", "1", "-1", "10**9", "2**31", "10**9*10**9", "1e308", "'x'", "''", "[]", "{}", "()")
_FILTERS = (
    *(
        "abs",
        "batch(10**9, 'x')",
        "batch(0)",
        "capitalize",
        "center(10**9)",
        "count",
        "default('x')",
    ),
    *("dictsort", "escape", "filesizeformat", "first", "float", "forceescape", "format('a', 1)"),
    *(
        "groupby('role')",
        "indent(10**8)",
        "int",
        "items",
        "join('x' * 1000)",
        "last",
        "length",
        "list",
    ),
    *(
        "lower",
        "map('upper')",
        "map(attribute='content')",
        "max",
        "min",
        "pprint",
        "random",
        "reject",
    ),
    *("rejectattr('role')", "replace('', 'xxxxxxxxxx')", "replace('a', 'b' * 10**6)", "reverse"),
    *(
        "round(400)",
        "safe",
        "select('string')",
        "selectattr('role', 'equalto', 'user')",
        "slice(10**8)",
    ),
    *("sort", "string", "striptags", "sum", "sum(start=10**99)", "title", "tojson(indent=10**8)"),
    *("trim", "truncate(5)", "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap(1)"),
    *("xmlattr", "tojson", "nosuchfilter"),
)
_CALLS = (
    *(".format(1)", ".split()", ".split('')", ".join(messages)", ".strip()", ".__class__", "()"),
    *(
        "(10**9)",
        "(n=10**9)",
        "[0]",
        "[::-1]",
        "[10**12:]",
        ".append(1)",
        ".items()",
        ".ljust(10**9)",
    ),
    *(
        ".zfill(10**9)",
        ".expandtabs(10**9)",
        ".replace('', 'x'*999)",
        ".encode('utf-8')",
        "('%Y' * 10**6)",
    ),
    *(
        ".mro()",
        ".translate({1:2})",
        ".center(10**9)",
        ".copy()",
        ".update({1:1})",
        ".next()",
        ".content",
    ),
)
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "and", "or", "in", "is", "if")
_FORMATS = (
    "'%1000000000d' % 1",
    "'%s' * 10**8",
    "'{:>1000000000}'.format(1)",
    "'%.1000000000f' % 1",
)


def _expression(random: Random, depth: int) -> str:
    kind = random.randrange(9 if depth else 3)
    if kind == 0:
        return random.choice(_NAMES)
    if kind == 1:
        return random.choice(_VALUES)
    if kind == 2:
        return random.choice((repr(random.choice(TEXTS)), random.choice(_FORMATS)))
    inner = _expression(random, depth - 1)
    if kind in (3, 4):
        return f"({inner} {random.choice(_OPERATORS)} {_expression(random, depth - 1)})"
    if kind in (5, 6):
        return f"({inner} | {random.choice(_FILTERS)})"
    if kind == 7:
        return f"({inner}){random.choice(_CALLS)}"
    return f"[{inner}, {_expression(random, depth - 1)}]"


def _statement(random: Random, depth: int) -> str:
    expression = _expression(random, 3)
    kind = random.randrange(6 if depth else 2)
    if kind < 2:
        return f"{{{{ {expression} }}}}"
    body = _statement(random, depth - 1)
    if kind == 2:
        return f"{{% for m in {expression} %}}{body}{{% endfor %}}"
    if kind == 3:
        return f"{{% if {expression} %}}{body}{{% endif %}}"
    if kind == 4:
        return f"{{% set x = {expression} %}}{body}{{{{ x }}}}"
    return f"{{% macro f(a={expression}) %}}{body}{{{{ f(a) }}}}{{% endmacro %}}{{{{ f() }}}}"


def change(folder: Path, random: Random) -> dict[str, bytes]:
    kind = random.randrange(4)
    if kind < 2:
        data = mutated_text(random.choice(_SEEDS), random, _WORDS)
    elif kind == 2:
        data = "\n".join(_statement(random, 2) for _ in range(3)).encode("utf-8", "replace")
    else:
        data = mutated_bytes(random.choice(_SEEDS).encode(), random, random.choice(_SEEDS).encode())
    return {"template.jinja": data}
