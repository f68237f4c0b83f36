"""The call of a function, taken apart as it comes."""

import json
from typing import Any

from conftest import slow
from hypothesis import given
from hypothesis import strategies as st

from mlx_cerebrum.decoding.calls import CallText

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    arguments=st.dictionaries(st.text(), VALUES, max_size=3),
    indent=st.none() | st.just(2),
    cuts=st.lists(st.integers(0, 200), max_size=9),
    length=st.integers(0, 400),
)
@slow
def test_any_call_in_any_pieces(
    arguments: dict[str, Any], indent: int | None, cuts: list[int], length: int
) -> None:
    head, written = '{"name": "get_it", "arguments": ', json.dumps(arguments, indent=indent)
    text = (head + written + "}")[:length]  # it may run out of tokens anywhere
    split, found = CallText(), []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True):
        found.append(split.add(text[start:end]))
    assert split.name == ("get_it" if len(text) >= len(head) else None)
    assert "".join(found) == written[: max(0, len(text) - len(head))]
