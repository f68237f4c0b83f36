"""The page's Markdown at its limits: no text takes long, or nests deep."""

from collections.abc import Iterator

import pytest
from page_room import browser, stand_in, visit
from playwright.sync_api import Page


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with stand_in() as room, browser() as launched, visit(launched, room.url) as page:
        yield page


SIZE = 200_000
LONG = {
    "stars": "*" * SIZE,
    "open emphasis": "*a " * (SIZE // 3),
    "nested emphasis": "*a " * (SIZE // 6) + "a* " * (SIZE // 6),
    "both": "*a_ " * (SIZE // 4),
    "underscores": "_a" * (SIZE // 2),
    "tildes": "~~a" * (SIZE // 3),
    "brackets": "[" * SIZE,
    "images": "![" * (SIZE // 2),
    "closed brackets": "[a]" * (SIZE // 3),
    "half links": "[a](" * (SIZE // 4),
    "links": "[a](b" * (SIZE // 5),
    "angle links": "[a](<b" * (SIZE // 6),
    "titles": '[a](b "' * (SIZE // 7),
    "parentheses": "[a]" + "(" * SIZE,
    "backquotes": "`" * SIZE,
    "runs of backquotes": "".join("`" * (n % 600) + " " for n in range(650)),
    "quotes": ">" * SIZE,
    "quotes with spaces": "> " * (SIZE // 2),
    "lines of quotes": "> a\n" * (SIZE // 4),
    "lists in lists": "- " * (SIZE // 2) + "a",
    "numbers in numbers": "1. " * (SIZE // 3) + "a",
    "deeper lists": "".join("  " * n + "- a\n" for n in range(440)),
    "items": "- a\n" * (SIZE // 4),
    "loose items": "- a\n\n" * (SIZE // 5),
    "pipes": "|" * SIZE,
    "wide table": "|a" * 50_000 + "|\n" + "|-" * 50_000 + "|\n",
    "long table": "a|b\n-|-\n" + "1|2\n" * (SIZE // 8),
    "tables that are none": "a|b\n" * (SIZE // 4),
    "headings": "# a\n" * (SIZE // 8),
    "hashes": "#" * SIZE,
    "heading that ends in spaces": "# a" + " " * SIZE + "b",
    "rule that is none": "- " * (SIZE // 2) + "x",
    "dashes and spaces": "---" + " " * SIZE + "x",
    "row of spaces": "a|b\n" + "-" + " " * SIZE + "|-x",
    "fence and spaces": "```" + " " * SIZE + "`",
    "ampersands": "&" * SIZE,
    "entities": "&#1" * (SIZE // 3),
    "less": "<" * SIZE,
    "half addresses": "<https:" * (SIZE // 7),
    "addresses that are none": "http://^" * (SIZE // 8),
    "formulas": "\\(a_b\\)" * (SIZE // 7),
    "open formulas": "\\(" * (SIZE // 2),
    "formulas that end far away": "\\( " * (SIZE // 3) + "\\)",
    "dollars": "$a_ " * (SIZE // 4),
    "dollars and braces": "$x{" * (SIZE // 3),
    "formulas in dollars": "$x_1$ " * (SIZE // 6),
    "other formulas": "".join(f"$x_{n}$ " for n in range(SIZE // 9)),
    "half boxes": "\\boxed{" * (SIZE // 7),
    "boxes": "\\boxed{x}" * (SIZE // 9),
    "boxes in boxes": "\\boxed{" * (SIZE // 8) + "}" * (SIZE // 8),
    "matrices": "\\begin{matrix}" * (SIZE // 14),
    "half tables": "$$\\begin{matrix}" + "a & b \\\\ " * (SIZE // 10),
    "blocks of code": "```python\nx = 1\n```\n" * (SIZE // 20),
    "breaks": "<br>" * (SIZE // 4),
    "half breaks": "<br " * (SIZE // 4),
    "break with spaces": "<br" + " " * SIZE,
    "lines of code in a list": "- ```\n" + "a\n" * (SIZE // 2),
    "formula of lines": "\\[\n" + "a\n" * (SIZE // 2),
    "addresses": "http://a " * (SIZE // 9),
    "one address": "http://" + "a." * (SIZE // 2),
    "address and dots": "http://a" + "." * SIZE,
    "address and brackets": "http://a" + ")" * SIZE,
    "slashes": "https://" * (SIZE // 8),
    "definitions": "[a]: http://a\n" * (SIZE // 14),
    "other definitions": "".join(f"[{n}]\n\n[{n}]: http://a\n" for n in range(SIZE // 24)),
    "half definitions": "[a]: " * (SIZE // 5),
    "references": "[a][b]" * (SIZE // 6),
    "references in references": "[" * (SIZE // 2) + "a" + "]" * (SIZE // 2),
    "footnotes": "a[^1]\n\n[^1]: b\n" * (SIZE // 16),
    "footnotes in footnotes": "".join("  " * n + "[^1]: a\n" for n in range(440)),
    "half footnotes": "[^" * (SIZE // 2),
    "footnotes in references": "[^" * (SIZE // 6) + "][a]" * (SIZE // 6),
    "lines under lines": "Title\n---\n" * (SIZE // 10),
    "indented lines": "    a\n" * (SIZE // 6),
    "deeper lines": "".join(" " * n + "a\n" for n in range(600)),
    "indented blocks": "    a\n\nb\n\n" * (SIZE // 10),
    "equals": "=" * SIZE,
    "lines of equals": "a\n" + "===\n" * (SIZE // 4),
    "right to left": "\u0645- " * (SIZE // 3),
    "backslashes": "\\" * SIZE,
    "newlines": "\n" * SIZE,
    "lines": "a\n" * (SIZE // 2),
    "spaces": " " * SIZE + "a",
    "tabs": "\t" * SIZE + "- a",
    "one word": "a" * SIZE,
    "surrogates": "😀*" * (SIZE // 3),
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.one_in(16)
def test_no_text_takes_long_or_nests_deep(page: Page, kind: str) -> None:
    # The bound is far above what any of them takes, far below what a quadratic one would.
    seconds, depth, text = page.evaluate(
        """async (text) => {
            const { Rendering } = await import("/markdown.js");
            const into = document.createElement("div");
            const began = performance.now();
            new Rendering(into).update(text);
            const seconds = (performance.now() - began) / 1000;
            let depth = 0;
            const levels = [[into, 0]];
            while (levels.length) {
                const [one, level] = levels.pop();
                depth = Math.max(depth, level);
                for (const child of one.children) levels.push([child, level + 1]);
            }
            return [seconds, depth, into.textContent.length];
        }""",
        LONG[kind],
    )
    print(kind, round(seconds, 3), depth, text)
    assert seconds < 10
    assert depth < 50
