"""The page's Markdown: what it draws, that nothing in it runs, and that it stays quick."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import slow
from page_room import browser, stand_in, visit
from playwright.sync_api import Page

DRAW = """async ({ text, cuts }) => {
    const { Rendering } = await import("/markdown.js");
    const into = document.createElement("div");
    const rendering = new Rendering(into);
    for (const cut of cuts) rendering.update(text.slice(0, cut));
    rendering.update(text);
    return into.innerHTML;
}"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with stand_in() as room, browser() as launched, visit(launched, room.url) as page:
        # What is drawn before the server has answered; test_page_maths.py has the rest.
        page.route("**/typeset", lambda route: route.fulfill(status=503))
        yield page


def draw(page: Page, text: str, cuts: list[int] | None = None) -> str:
    html: str = page.evaluate(DRAW, {"text": text, "cuts": cuts or []})
    return html


CASES = "\\begin{cases}\n  a*b \\\\\n- 2\n\\end{cases}"


def maths(source: str) -> str:
    """A formula before the server has set it."""
    return f'<span class="maths">{source}</span>'


def link(url: str, text: str, more: str = "") -> str:
    return (
        f'<a href="{url}" target="_blank" rel="noopener noreferrer" '
        f'referrerpolicy="no-referrer"{more} title="{url}">{text}</a>'
    )


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain", "<p>plain</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("one\r\ntwo\r\n\r\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# Title #\n## `x` below", "<h3>Title</h3><h4><code>x</code> below</h4>"),
        ("#hashtag", "<p>#hashtag</p>"),
        ("####### seven", "<p>####### seven</p>"),
        ("## First\n#### Deep", '<h4 aria-level="3">First</h4><h6 aria-level="4">Deep</h6>'),
        (
            "A title\n===\nb\n\nAnother\n-----\nc",
            "<h3>A title</h3><p>b</p><h4>Another</h4><p>c</p>",
        ),
        ("A sentence.\n---\nb", "<p>A sentence.</p><hr><p>b</p>"),
        ("two = 1 + 1\n---\nb", "<p>two = 1 + 1</p><hr><p>b</p>"),
        ("one\ntwo\n---", "<p>one<br>two</p><hr>"),
        ("*em* **strong** ***both*** ~~gone~~", None),
        ("a\n---\nb", "<p>a</p><hr><p>b</p>"),
        ("a*b*c 2 * 3 * 4 snake_case_name", "<p>a*b*c 2 * 3 * 4 snake_case_name</p>"),
        ("_under_ __both__", "<p><em>under</em> <strong>both</strong></p>"),
        ("*foo**bar**baz*", "<p><em>foo<strong>bar</strong>baz</em></p>"),
        ("**open _crossed** over_", "<p><strong>open _crossed</strong> over_</p>"),
        ("about ~5 and ~6", "<p>about ~5 and ~6</p>"),
        ("``a ` b`` `*x*`", "<p><code>a ` b</code> <code>*x*</code></p>"),
        ("`open", "<p>`open</p>"),
        (r"\*not\* \q", r"<p>*not* \q</p>"),
        (
            "&lt;b&gt; &amp; &#65; &#x1F600; &#0; &nope;",
            "<p>&lt;b&gt; &amp; A 😀 \ufffd &amp;nope;</p>",
        ),
        ("<b>bold</b>", "<p>&lt;b&gt;bold&lt;/b&gt;</p>"),
        (
            "- a\n- b\n  - c\n  - d\n- e",
            "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>",
        ),
        ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
        ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("- a\nlazy\n\nafter", "<ul><li>a<br>lazy</li></ul><p>after</p>"),
        ("* a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("in\n1984. It was", "<p>in<br>1984. It was</p>"),
        ("text\n- a", "<p>text</p><ul><li>a</li></ul>"),
        ("- [ ] to do\n- [x] done", "<ul><li>☐ to do</li><li>☑ done</li></ul>"),
        (
            "> a\n> > b\n>\n> c",
            "<blockquote><p>a</p><blockquote><p>b</p></blockquote><p>c</p></blockquote>",
        ),
        ("-5 degrees", "<p>-5 degrees</p>"),
        ("2*3*4, x**2 + y**2, 2**3**4", "<p>2*3*4, x**2 + y**2, 2**3**4</p>"),
        ("**a*b*c** *x*2", "<p><strong>a*b*c</strong> *x*2</p>"),
        ("**1**st un**believ**able", "<p><strong>1</strong>st un<strong>believ</strong>able</p>"),
        ("中文**加粗**中文*斜*体", "<p>中文<strong>加粗</strong>中文<em>斜</em>体</p>"),
        (
            "1. a\n1. b\n\ntext\n\n3. c",
            '<ol><li>a</li><li>b</li></ol><p>text</p><ol start="3"><li>c</li></ol>',
        ),
        (
            "toString\n\nconstructor\n\n__proto__",
            "<p>toString</p><p>constructor</p><p><strong>proto</strong></p>",
        ),
        ("one\\\ntwo<br>three<BR />four", "<p>one<br>two<br>three<br>four</p>"),
        (
            r"\(a_1 * b_1 * c\) and \[x_{i}\]",
            "<p>" + maths(r"\(a_1 * b_1 * c\)") + " and " + maths(r"\[x_{i}\]") + "</p>",
        ),
        (
            r"$a^{2}_{i} + b^{2}_{i}$, $5 *or* $6",
            f'<p><span class="joined">{maths("$a^{2}_{i} + b^{2}_{i}$")},</span>'
            " $5 <em>or</em> $6</p>",
        ),
        (
            r"\(555\) and \[1\] \\ \{\$5\}",
            "<p>" + maths(r"\(555\)") + " and " + maths(r"\[1\]") + r" \\ \{$5\}</p>",
        ),
        (
            f"*so* {CASES} *on*",
            f"<p><em>so</em> {maths(CASES)} <em>on</em></p>",
        ),
        ("\\begin{align}\n- a*b*(c)\n\n*on*", None),
        ("\\[\nx_1\n- 2\n\\]\n*y*", '<p class="formula">\\[\nx_1\n- 2\n\\]</p><p><em>y</em></p>'),
        (
            "so\n$$\na_b*c\n\nand *on*",
            '<p>so</p><p class="formula">$$\na_b*c</p><p>and <em>on</em></p>',
        ),
    ],
)
@slow
def test_blocks_and_spans(page: Page, text: str, html: str | None) -> None:
    if text.startswith("\\begin"):  # not closed yet, or never
        html = '<p class="formula">\\begin{align}\n- a*b*(c)</p><p><em>on</em></p>'
    html = html or (
        "<p><em>em</em> <strong>strong</strong> <em><strong>both</strong></em> <del>gone</del></p>"
    )
    assert draw(page, text) == html


def test_a_code_block_has_its_language_and_a_button(page: Page) -> None:
    html = draw(page, "```python title\nif a < b:\n\n    *x*\n```\nafter")
    assert html == (
        '<div class="code"><div class="code-head"><span>python</span>'
        '<button type="button" class="quiet">Copy</button></div>'
        '<pre tabindex="0"><code>if a &lt; b:\n\n    *x*</code></pre></div><p>after</p>'
    )


def code(text: str, language: str = "text") -> str:
    return (
        f'<div class="code"><div class="code-head"><span>{language}</span>'
        '<button type="button" class="quiet">Copy</button></div>'
        f'<pre tabindex="0"><code>{text}</code></pre></div>'
    )


def test_indented_code_keeps_its_indentation(page: Page) -> None:
    assert draw(page, "So:\n\n    def f():\n        x\n\n    y\n\nafter") == (
        f"<p>So:</p>{code('def f():' + chr(10) + '    x' + chr(10) * 2 + 'y')}<p>after</p>"
    )
    assert draw(page, "\ta\n\t\tb") == code("a\n\tb")
    # It interrupts no paragraph, and what models indent without meaning code is none.
    assert draw(page, "a\n    b") == "<p>a<br>b</p>"
    assert draw(page, "a\n\n    - b") == "<p>a</p><ul><li>b</li></ul>"
    assert draw(page, "    **b**") == "<p><strong>b</strong></p>"
    assert draw(page, "    \\[x\\]") == "<p>" + maths("\\[x\\]") + "</p>"
    html = draw(page, "- a\n\n      code\n- b")
    assert code("code") in html
    assert html.count("<li>") == 2


def test_links_by_reference(page: Page) -> None:
    url = "https://example.org/a"
    known = f"\n\n[One]: {url} 'title'\n[two words]: <https://example.org/b>"
    html = draw(page, f"see [text][one], [one][], [ONE], [Two\nWords] and [three]{known}")
    assert html.count(f'href="{url}"') == 4  # and where it is defined: nothing is hidden
    assert html.count('href="https://example.org/b"') == 2
    assert "[three]" in html
    assert html.count('<p class="definition">') == 2
    assert link(url, "text") in html
    # One that may not be an address defines nothing.
    assert "<a" not in draw(page, "[x] and [y][x]\n\n[x]: javascript:alert(1)")
    assert draw(page, "[2](3)\n\n[4]: https://example.org/").count("<a ") == 1


def test_footnotes(page: Page) -> None:
    text = (
        "A[^1] b[^n] c[^none].\n\n[^1]: The *first*.\n  Its line.\n\n    And more.\n[^n]: Second."
    )
    html = draw(page, text)
    mark = (
        '<sup><button type="button" class="ref" data-label="1" aria-label="Footnote 1">1</button>'
    )
    assert mark in html
    assert "c[^none]." in html
    assert html.count('<div class="footnote"') == 2
    assert "<p>The <em>first</em>.<br>Its line.</p><p>And more.</p>" in html


def test_a_footnote_and_its_mark_lead_to_each_other(page: Page) -> None:
    focused = page.evaluate(
        """async () => {
            const { Rendering } = await import("/markdown.js");
            const into = document.createElement("div");
            into.className = "markdown";
            document.body.append(into);
            new Rendering(into).update("A[^x].\\n\\n[^x]: Note");
            const found = [];
            into.querySelector(".ref").click();
            found.push(document.activeElement.className);
            document.activeElement.click();
            found.push(document.activeElement.className);
            into.remove();
            return [...found, location.hash];
        }"""
    )
    assert focused == ["ref-back", "ref", ""]


def test_what_is_defined_later_is_drawn_then(page: Page) -> None:
    """Also in blocks that were final; and nothing else of them is made anew."""
    found = page.evaluate(
        """async () => {
            const { Rendering } = await import("/markdown.js");
            const into = document.createElement("div");
            const rendering = new Rendering(into);
            const text = "plain\\n\\nsee [one]\\n\\nmore\\n\\n";
            rendering.update(text + "and");
            const [plain] = into.children;
            const before = into.querySelectorAll("a").length;
            rendering.update(text + "and\\n\\n[one]: https://example.org/\\n");
            return [before, into.children[1].querySelectorAll("a").length,
                    into.children[0] === plain];
        }"""
    )
    assert found == [0, 1, True]


def test_lists_and_quotes_of_right_to_left_scripts_begin_on_the_right(page: Page) -> None:
    html = draw(
        page, "- \u0645\u0631\u062d\u0628\u0627 x\n\n> \u05e9\u05dc\u05d5\u05dd\n\n- abc \u0645"
    )
    assert '<ul dir="rtl">' in html
    assert '<blockquote dir="rtl">' in html
    assert html.count("dir=") == 2


def test_a_code_block_within_a_list_keeps_its_indentation(page: Page) -> None:
    html = draw(page, "1. first\n   ```sh\n   ls\n     -l\n   ```\n2. second")
    assert "<code>ls\n  -l</code>" in html
    assert html.count("<li>") == 2
    # Even where it is not indented as the list is, or looks like something else.
    html = draw(page, "1. first\n   ```py\n# note\n- x\n\ny = 1\n   ```\n2. second")
    assert "<code># note\n- x\n\ny = 1</code>" in html
    assert html.count("<li>") == 2
    html = draw(page, "- a\n  - ```sh\n    ls\n    ```\n- b")
    assert "<code>ls</code>" in html
    assert html.count("<li>") == 3


def test_a_longer_fence_holds_a_shorter_one_and_an_open_one_runs_to_the_end(page: Page) -> None:
    assert "<code>```\nx\n```</code>" in draw(page, "````\n```\nx\n```\n````")
    assert "<code>x\ny</code>" in draw(page, "~~~\nx\ny")


def test_tables(page: Page) -> None:
    html = draw(page, "| a | b \\| c |\n|:--|--:|\n| *1* | 2 | 3 |\n| 4 |\n\nafter")
    assert html == (
        '<div class="table" tabindex="0"><table><thead><tr><th class="left">a</th>'
        '<th class="right">b | c</th></tr></thead><tbody><tr><td class="left"><em>1</em></td>'
        '<td class="right">2</td></tr><tr><td class="left">4</td></tr></tbody></table></div>'
        "<p>after</p>"
    )
    assert draw(page, "a | b\n---") == "<p>a | b</p><hr>"


def test_links_open_elsewhere_and_only_to_addresses_that_cannot_run(page: Page) -> None:
    assert draw(page, "[a *b*](https://example.org/x_(y) 'title')!") == (
        f"<p>{link('https://example.org/x_(y)', 'a <em>b</em>')}!</p>"
    )
    assert draw(page, "see https://example.org/a_b_c.") == (
        f"<p>see {link('https://example.org/a_b_c', 'https://example.org/a_b_c')}.</p>"
    )
    assert draw(page, "(https://example.org/)") == (
        f"<p>({link('https://example.org/', 'https://example.org/')})</p>"
    )
    assert draw(page, "(see https://example.org/x_(y))").count("x_(y)</a>)") == 1
    assert draw(page, "<mailto:a@example.org>") == (
        f"<p>{link('mailto:a@example.org', 'a@example.org')}</p>"
    )


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "java&#10;script:alert(1)",
        "&#106;avascript:alert(1)",
        "\x01javascript:alert(1)",
        "data:text/html,<script>window.ran=1</script>",
        "vbscript:x",
        "file:///etc/passwd",
        "blob:x",
        "//example.org/",
        "/v1/models",
        "#here",
        "<javascript:alert(1)>",
    ],
)
def test_other_addresses_stay_text(page: Page, url: str) -> None:
    text = f"[x]({url}) and ![x]({url}) and <{url}>"
    html = draw(page, text)
    assert "<a" not in html
    assert "<img" not in html


def test_an_image_is_a_link_to_it(page: Page) -> None:
    more = ' class="image"'
    assert draw(page, "![a cat](https://example.org/cat.png)") == (
        f"<p>{link('https://example.org/cat.png', 'a cat', more)}</p>"
    )
    # And within a link there is no second one.
    html = draw(page, "[![i](https://a.example/i)](https://b.example/)")
    assert html.count("<a ") == 1


HOSTILE = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<svg onload=window.ran=1>",
    "[x](javascript:window.ran=1) [y](data:text/html,<script>window.ran=1</script>)",
    '[x](https://example.org/"onmouseover="window.ran=1)',
    "</textarea></div></body><iframe srcdoc='<script>parent.ran=1</script>'>",
    "```html\n<script>window.ran = 1</script>\n```",
    '```"><script>window.ran=1</script>\nx\n```',
    "| <script>window.ran=1</script> | b |\n|---|---|\n| <img src=x onerror=window.ran=1> | c |",
    "[a][x] [^<b>] [x]\n\n[x]: javascript:window.ran=1\n[^<b>]: <img src=x onerror=window.ran=1>",
    '[^y]\n\n[^y]: <script>window.ran=1</script>\n[z]: https://example.org/"onclick=window.ran=1\n[z]',
    "&lt;script&gt;window.ran=1&lt;/script&gt;",
    "<style>* { display: none }</style><meta http-equiv=refresh content=0;url=/x>",
]
ALLOWED = {
    "a",
    "blockquote",
    "br",
    "button",
    "code",
    "del",
    "div",
    "em",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "li",
    "ol",
    "p",
    "pre",
    "span",
    "strong",
    "sup",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_an_answer_becomes_more_than_text(page: Page, text: str) -> None:
    tags: list[list[Any]] = page.evaluate(
        """async (text) => {
            const { Rendering } = await import("/markdown.js");
            const into = document.createElement("div");
            document.body.append(into);
            new Rendering(into).update(text);
            const names = (one) => [one.localName, one.getAttributeNames()];
            const found = [...into.querySelectorAll("*")].map(names);
            into.remove();
            return found;
        }""",
        text,
    )
    assert {tag for tag, _ in tags} <= ALLOWED
    known = {
        "href",
        "target",
        "rel",
        "referrerpolicy",
        "title",
        "class",
        "type",
        "tabindex",
        "start",
        "dir",
        "aria-label",
        "aria-level",
        "data-label",
    }
    assert {name for _, names in tags for name in names} <= known
    assert page.evaluate("window.ran") is None


DOCUMENT = """# A title
See [the one], [it][the one] and a note[^1].

Underlined
==========
Also underlined
---

    indented
      code

    of two parts

[the one]: https://example.org/one "One"
[^1]: A note
  of two lines.

    And a second paragraph.

Some *words* and `code` and **more
over two lines**.
#hash and
- a list
- of two
  1. nested
  2. items

     with a paragraph

> a quote
> over lines
and after it

| a | b |
|---|--:|
| 1 | 2 |
- x
```python
def f():

    return "```"
```
***
last https://example.org/path [and](https://example.org/) end
a | b
--|--
1 | 2

- loose

- items

text
-
#
1) one
2) two
* * *
\\[
x_1
- 2
\\]
- a
  ```
b

  ```
- c \\(d_e*f*\\)<br>g
"""


@slow
def test_a_text_that_grows_ends_as_one_drawn_at_once(page: Page) -> None:
    whole = draw(page, DOCUMENT)
    assert draw(page, DOCUMENT, list(range(1, len(DOCUMENT)))) == whole
    assert draw(page, DOCUMENT, list(range(0, len(DOCUMENT), 7))) == whole
    windows = DOCUMENT.replace("\n", "\r\n")
    assert draw(page, windows, list(range(1, len(windows)))) == draw(page, windows)


def test_every_beginning_of_a_text_is_drawn_as_if_it_were_all(page: Page) -> None:
    same = page.evaluate(
        """async (text) => {
            const { Rendering } = await import("/markdown.js");
            const [grown, fresh] = [0, 0].map(() => document.createElement("div"));
            const rendering = new Rendering(grown);
            for (let cut = 1; cut <= text.length; cut += 1) {
                rendering.update(text.slice(0, cut));
                new Rendering(fresh).update(text.slice(0, cut));
                if (grown.innerHTML !== fresh.innerHTML) return text.slice(0, cut);
                fresh.replaceChildren();
            }
            return null;
        }""",
        DOCUMENT,
    )
    assert same is None


# Lines that are something else after some, or before some.
LINES = """a
Title
===
---
-
- item
  - sub
    code
      deeper

[x]: https://example.org/a
[x]
[^1]
[^1]: note
  goes on
[t][x] and [y][]
> q
> [x]: https://example.org/q
```py
```
x = 1
## H
#### D
| a | b |
|---|---|
\\[
\\]
$$
1. one
1) two
    **b**
> [^1]
* * *
[y]: <https://example.org/y> 'T'
\u0645\u0631
"""


@slow
def test_random_texts_grow_as_if_drawn_at_once(page: Page) -> None:
    chance = random.Random(7)
    texts = [
        "\n".join(chance.choices(LINES.splitlines(), k=chance.randint(3, 25))) for _ in range(100)
    ]
    differs = page.evaluate(
        """async (texts) => {
            const { Rendering } = await import("/markdown.js");
            const [grown, fresh] = [0, 0].map(() => document.createElement("div"));
            for (const text of texts) {
                const rendering = new Rendering(grown);
                for (let cut = 1; cut <= text.length; cut += 3) {
                    rendering.update(text.slice(0, cut));
                    new Rendering(fresh).update(text.slice(0, cut));
                    if (grown.innerHTML !== fresh.innerHTML) return text.slice(0, cut);
                }
            }
            return null;
        }""",
        texts,
    )
    assert differs is None


def test_what_is_final_is_not_drawn_again(page: Page) -> None:
    kept = page.evaluate(
        """async () => {
            const { Rendering } = await import("/markdown.js");
            const into = document.createElement("div");
            const rendering = new Rendering(into);
            rendering.update("first\\n\\n```\\nco");
            const [first, code] = into.children;
            const text = code.querySelector("code").firstChild;
            rendering.update("first\\n\\n```\\ncode that\\ngrows");
            return [into.children[0] === first, into.children[1] === code,
                    code.querySelector("code").firstChild === text, text.data];
        }"""
    )
    assert kept == [True, True, True, "code that\ngrows"]
