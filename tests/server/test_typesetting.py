"""The route that sets the page's formulas and code."""

import httpx
import pytest
import server_room
from server_room import FakeEngine, Running, serving

from mlx_cerebrum.server import typesetting
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

tokenizer, one_server, server = server_room.tokenizer, server_room.one_server, server_room.server


def post(server: Running, body: object) -> httpx.Response:
    return server.client.post("/typeset", json=body)


def test_answers_come_in_the_order_of_the_jobs(server: Running) -> None:
    jobs = [["tex", "$x$"], ["code", "python", "1"], ["tex", "$\\foo$"], ["code", "none", "1"]]
    answer = post(server, {"jobs": jobs})
    assert answer.status_code == 200
    assert answer.json() == {
        "answers": [["math", {}, [["mi", {}, ["x"]]]], [["number", "1"]], None, None]
    }
    assert post(server, {"jobs": []}).json() == {"answers": []}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"jobs": 1},
        {"jobs": [["tex"]]},
        {"jobs": [["tex", 1]]},
        {"jobs": [["tex", "$x$", "more"]]},
        {"jobs": [["file", "/etc/passwd"]]},
        {"jobs": [["code", "python"]]},
        {"jobs": [["tex", "$x$"]] * (typesetting.MOST + 1)},
        [],
    ],
)
def test_other_bodies_are_refused(server: Running, body: object) -> None:
    answer = post(server, body)
    assert answer.status_code == 400
    assert "\n" not in answer.json()["error"]["message"]


def test_a_request_takes_bounded_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typesetting, "SECONDS", 0.0)
    assert post(server, {"jobs": [["tex", "$x$"]] * 3}).json() == {"answers": [None] * 3}


def test_it_needs_the_key_and_is_for_this_page_alone(tokenizer: Tokenizer) -> None:
    with serving(FakeEngine(tokenizer), tokenizer, api_key="a-key-of-ours") as locked:
        assert post(locked, {"jobs": []}).status_code == 401
    with serving(FakeEngine(tokenizer), tokenizer) as running:
        headers = {"Origin": "https://example.org"}
        answer = running.client.post("/typeset", json={"jobs": []}, headers=headers)
        assert answer.status_code == 403
