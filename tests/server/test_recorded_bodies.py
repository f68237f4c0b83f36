"""Requests as programs send them that are no Python or Node package to run here.

`recorded_bodies.json` says of each where its fields were read: a repository and its files, or what
the running program sent, its texts shortened. `told` is what the answer says was not used.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import server_room
from server_room import Running, events, fake, post

BODIES = json.loads((Path(__file__).parent / "recorded_bodies.json").read_text(encoding="utf-8"))
CALL = '{"name": "search", "arguments": {"query": "x"}}'


tokenizer, one_server, server = server_room.tokenizer, server_room.one_server, server_room.server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sent", BODIES, ids=[sent["program"] for sent in BODIES])
def test_what_programs_send_is_answered(server: Running, sent: Any, stream: bool) -> None:
    calls = sent["body"].get("tool_choice") == "required"
    fake(server).reset()
    if calls:
        fake(server).script = fake(server).say(CALL)
    answer = post(server, sent["path"], **sent["body"] | {"stream": stream})
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-ignored-parameters") == sent["told"]
    if not stream:
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
        return
    *chunks, done = events(answer)
    assert done == "[DONE]"
    ended = [choice["finish_reason"] for one in chunks for choice in one["choices"]]
    assert ended[-1] == ("tool_calls" if calls else "stop")
