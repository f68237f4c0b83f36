"""Text from a results file, made safe to put into a page.

Results come from anyone who sends them, so their strings must stay text: no HTML, no link, no
image that tells someone who reads the page, no cell or block of ours broken up, no fence, heading
or formula begun.
"""

import getpass
import html
import platform
import re
from typing import Any

_ENTITIES = str.maketrans({c: f"&#{ord(c)};" for c in "|[]\\`~#$"})
# Where a path of the sender's machine begins; "tokens/s" and "ours / theirs" are none.
_PATH = re.compile(r"""(?:^|[\s'"=(,:])(?:~?/[\w.-]+/|~/\w|\.\./|[A-Za-z]:\\)""")


def escape(text: str) -> str:
    """One line of Markdown that shows `text` and nothing else, also in a table's cell."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    shown = html.escape(" ".join(shown.split()), quote=False).translate(_ENTITIES)
    return shown.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def code(text: str) -> str:
    """One line of code, where nothing but a backtick means anything."""
    shown = "".join(c if c.isprintable() else " " for c in text).replace("`", "'").strip()
    return f"`{shown or '?'}`"


def safe(value: Any) -> Any:
    """Plain data with every string in it escaped, keys too."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {escape(str(key)): safe(one) for key, one in value.items()}
    if isinstance(value, list):
        return [safe(one) for one in value]
    return value


def picture(name: str, alt: str, folder: str = "") -> str:
    """The picture `name` as `bench.plots.save` wrote it."""
    text = html.escape(" ".join(alt.split()))
    return f'<img alt="{text}" src="{folder}{name}.svg">'


def private(value: Any) -> list[str]:
    """Strings of plain data that name a path, this machine or its user: nobody else's business."""
    if isinstance(value, dict):
        return [found for pair in value.items() for one in pair for found in private(one)]
    if isinstance(value, list):
        return [found for one in value for found in private(one)]
    if not isinstance(value, str):
        return []
    names = {platform.node(), platform.node().partition(".")[0], getpass.getuser()} - {"", "root"}
    named = any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", value) for name in names)
    return [value] if named or _PATH.search(value) else []
