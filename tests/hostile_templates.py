"""Templates that would take for ever, or all memory, one a kind of operation; run as a script,
this renders them all under a limit of memory and says how each ended.

Some are harmless in themselves and only do a cheap thing very often.
"""

import json
import resource
import sys
import time
from pathlib import Path

# A million letters.
LONG = "{% set ns = namespace(s='a' * 2**20) %}"


def grown(expression: str, start: str = "'ab'", times: int = 60) -> str:
    """`ns.x` made anew from itself, time after time."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}"
        f"{{% set ns.x = {expression} %}}{{% endfor %}}{{{{ ns.x|length }}}}"
    )


def often(expression: str, before: str = "") -> str:
    return f"{before}{{% for i in range(99999) %}}{{{{ {expression} }}}}{{% endfor %}}"


def shared(expression: str, pair: str = "[{0}, {0}]") -> str:
    """Lists of twice themselves, 60 deep: small, but 2^60 to whoever walks them."""
    left, right = pair.format("ns.l"), pair.format("ns.m")
    return (
        "{% set ns = namespace(l=[1], m=[1]) %}{% for i in range(60) %}"
        f"{{% set ns.l = {left} %}}{{% set ns.m = {right} %}}{{% endfor %}}{{{{ {expression} }}}}"
    )


EXPRESSIONS = r"""
lipsum(n=10**9)
range(10**9)|list
range(10**18)|length
range(-10**30, 10**30)|list
'x' * 10**9
('x' * 10**5) * 10**5
10**9 * 'x'
[0] * 10**9
(0,) * 10**9
([0] * 1000) * 10**8
'%1000000000d' % 1
'%.1000000000f' % 1.5
'%*d' % (10**9, 1)
'%-999999999s' % 'a'
'%0999999999d'|format(1)
'{:>999999999}'.format(1)
'{:{w}}'.format(1, w=10**9)
'{:.999999999f}'.format(1.0)
'{0:>999999999}'.format('x')
'{0.__class__}'.format('a')
'a'|center(10**9)
'a'.center(10**9)
'a'.ljust(10**12)
'a'.rjust(10**9, 'b')
'1'.zfill(10**9)
'\t'.expandtabs(10**9)
('a\n' * 1000)|indent(10**9)
('a\n' * 100000)|indent(10**4)
'a'|wordwrap(10**9)
[1]|batch(10**9, 0)|list
[1]|slice(10**9)|list
[1]|slice(10**9, 'f')|list
range(99999)|map('string')|sum(start='')
range(99999)|groupby('real')|length
range(90000)|groupby(none)|length
9**9**9
9**999999999
2**64**64
9999999999999**64
1e308 * 10
(1e308 * 10)|int
1e300|int
5|round(10**9)
5|round(-10**9, 'floor')
1 / 0
('9' * 10**6)|int
('9' * 4000)|int
('9' * 10**6)|float
('f' * 10**6)|int(base=16)
strftime_now('%999999999Y')
strftime_now('%Y' * 10**6)
raise_exception('x' * 10**9)
raise_exception('x' * 10**6)
[[]]|map(*range(99999)|list)|list
messages|map('map', 'map', 'map', 'map')|list
('a,' * 10**5).split(',')|map('list')|list|length
('𝄞' * 3000000)|tojson(ensure_ascii=true)|length
['\x00' * 3000000]|string|length
('ß' * 3000000)|upper|length
[range(99999)|list] * 9999
([range(99999)|list] * 9999)|tojson
([range(99999)] * 99999)|map('list')|list|length
([range(99999)] * 99999)|map('sum')|list|length
([['a'] * 99999] * 99999)|map('join')|list|length
([messages] * 99999)|map('map', 'tojson')|list|length
range(99999)|list|tojson(indent=30)|length
range(99999)|list|tojson(indent=10**9)|length
messages|tojson(indent='x' * 10**6)
messages|tojson(separators=('x' * 10**6, 'x'))
messages.append(1)
''.__class__.__mro__[1].__subclasses__()
cycler.__init__.__globals__.os.popen('id').read()
namespace(**{'__class__': 1})
messages.nothing.there
"""

OF_LONG = r"""
ns.s|list|length
ns.s.split('a')|length
'a' in ns.s.split('b')|map('list')|list
ns.s.rfind('ab' ~ ns.s[:500000])
ns.s.rindex('ab' ~ ns.s[:500000])
ns.s.rsplit('ab' ~ ns.s[:500000])|length
ns.s.rpartition('ab' ~ ns.s[:500000])
ns.s.strip('b' * 1000000 ~ 'a')
ns.s|trim('b' * 1000000 ~ 'a')
ns.s.find(ns.s[:500000] ~ 'b')
ns.s.count(ns.s[:500000] ~ 'b')
ns.s.replace(ns.s[:500000] ~ 'b', '')|length
(ns.s[:500000] ~ 'b' ~ ns.s[:400000]) in ns.s
([ns.s, ns.s ~ ''] * 40000)|sort|length
([ns.s, ns.s ~ ''] * 40000)|sort(case_sensitive=true)|length
([ns.s, ns.s ~ ''] * 40000)|unique(case_sensitive=true)|list|length
([ns.s, ns.s ~ ''] * 40000)|max(case_sensitive=true)|length
([ns.s] * 40000).count(ns.s ~ '')
(ns.s ~ '') in ([ns.s ~ 'b'] * 40000)
ns.s.startswith((ns.s ~ 'b',) * 99999)
([ns.s] * 99999)|map('upper')|list|length
([ns.s] * 99999)|join|length
([ns.s] * 99999)|tojson|length
([ns.s] * 99999)|string|length
ns.s|wordcount
ns.s|title|length
ns.s|replace('', ns.s)|length
"""

OFTEN = r"""
range(99999)|join|length
range(99999)|sum
range(99999)|map('string')|list|length
range(99999)|sort|first
range(99999)|max
range(99999)|unique|list|length
-5 in range(99999)|list
-5 in range(99999)
range(99999)|batch(1)|list|length
cycler(*range(99999)).next()
'a' * 100
'a' * 1000000
"""

OFTEN_LONG = r"""
'b' in ns.s
ns.s == ns.s ~ ''
ns.s == ns.t
ns.s < ns.t
ns.s|upper|length
ns.s[::-1]|length
ns.s.isalpha()
ns.s|int
{ns.s: 1}[ns.t]
"""

GROWN = r"""
ns.x + ns.x
ns.x ~ ns.x
ns.x.replace('a', ns.x)
ns.x|replace('', ns.x)
ns.x.join([ns.x, ns.x, ns.x])
[ns.x, ns.x]|join(ns.x)
'%s%s' % (ns.x, ns.x)
'{0}{0}'.format(ns.x)
(ns.x ~ '&')|e|e|e|e|e|e|e
ns.x|indent(1 + ns.x|length, true)
"""

SHARED = r"""
ns.l
ns.l|tojson
ns.l|string|length
ns.l|tojson(indent=4)
ns.l == ns.m
ns.l in [ns.m]
[ns.m].count(ns.l)
{ns.l: 1}
[ns.l, ns.m]|sort
[ns.l, ns.m]|unique|list
ns.l < ns.m
'%s' % [ns.l]
"""

STATEMENTS = [
    "{% include '/etc/passwd' %}",
    "{% if %}",
    "{% call(x) nothing() %}{% endcall %}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{% if n < 99 %}{{ m(n+1) }}{{ m(n+1) }}{% endif %}{% endmacro %}{{ m(0) }}",
    "{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns|tojson }}",
    "{% set j = joiner('x' * 10**6) %}" + often("j()"),
    "{% macro m() %}{{ caller() }}{% endmacro %}{% for i in range(99999) %}{% call m() %}"
    + "{{ a }}" * 20000
    + "{% endcall %}{% endfor %}",
    grown("ns.x + ns.x", "[1]"),
    grown("ns.x + [i]", "[]", 99999),
    grown("[ns.x]", "[1]", 99999) + "{{ ns.x }}",
    grown("[ns.x]", "[1]", 99999) + "{{ ns.x|tojson }}",
    grown("[ns.x, i, i|string, {'a': i}]", "[]", 99999),
    grown("dict(ns.x, **{i|string: i})", "{}", 99999),
    grown("ns.x * ns.x", "3", 99),
    shared("ns.l|tojson(indent=4)", "{{'a': {0}, 'b': {0}}}"),
    shared("ns.l == ns.m", "({0}, {0})"),
]

SYNTAX = [
    *(f"{{{{ {text} }}}}" for text in ("(" * 50000 + "1" + ")" * 50000, "[" * 50000 + "]" * 50000)),
    *(f"{{{{ {text}1 }}}}" for text in ("-" * 90000, "not " * 40000)),
    *(f"{{{{ a{text} }}}}" for text in ("+1" * 30000, "~'a'" * 20000, "|abs" * 20000)),
    *(f"{{{{ a{text} }}}}" for text in (".b" * 30000, "[0]" * 20000, " if 1 else 1" * 15000)),
    *(f"{{{{ {text} }}}}" for text in ("9" * 100000, "0x" + "f" * 100000)),
    "{% if 1 %}" * 15000 + "{% endif %}" * 15000,
    "{% for a in [1] %}" * 8000 + "{% endfor %}" * 8000,
    "{% if 1 %}" + "{% elif 1 %}" * 7000 + "{% endif %}",
    *("{{ {" * 40000, "{#" * 90000, "{% raw %}" * 20000, "{{" * 90000, "'" * 190000),
    *("x" * 10**6, "{{ 1 }}" * 14000, " \n" * 100000, "{%- if 1 -%}\n" * 10000),
    "{{ '" + "a" * 190000 + "'|replace('a', '" + "a" * 900 + "')|length }}",
    "{{ [{'k': 1}]|map(attribute='" + "k." * 90000 + "k')|list|length }}",
]


def lines(table: str) -> list[str]:
    return table.strip().split("\n")


TEMPLATES = [
    *(f"{{{{ {each} }}}}" for each in lines(EXPRESSIONS)),
    *(f"{LONG}{{{{ {each} }}}}" for each in lines(OF_LONG)),
    *map(often, lines(OFTEN)),
    *(often(each, LONG + "{% set ns.t = ns.s ~ '' %}") for each in lines(OFTEN_LONG)),
    *map(grown, lines(GROWN)),
    *map(shared, lines(SHARED)),
    *STATEMENTS,
    *SYNTAX,
]


def main(headroom: int) -> None:
    """Render all; print [seconds, error or None] of each, then the bytes that were added."""
    from mlx_cerebrum.errors import CerebrumError
    from mlx_cerebrum.tokenizer import template

    unit = 1 if sys.platform == "darwin" else 1024

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    if sys.platform == "linux":
        pages = Path("/proc/self/statm").read_text().split()[0]
        size = int(pages) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + headroom, size + headroom))
    before, found = peak(), []
    for source in TEMPLATES:
        started, error = time.thread_time(), None
        try:
            template.ChatTemplate(source, {}, {}).render([{"role": "user", "content": "hello"}])
        except CerebrumError as caught:
            error = str(caught)
        found.append([round(time.thread_time() - started, 2), error])
    print(json.dumps([found, peak() - before]))


if __name__ == "__main__":
    from mlx_cerebrum.tokenizer import template

    template.STEPS = int(sys.argv[2])
    main(int(sys.argv[1]))
