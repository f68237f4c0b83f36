"""The clients of a load, each a thread that asks one request after another, and their tally."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from bench.server_answers import Count, Heard, Question, hear
from bench.server_client import Address, Manner, Reply, ask
from bench.server_mix import Fixed, Mix, chat, user

TURN_TOKENS = 24
_NO_ANSWER = 120.0  # seconds a malformed body may stay without one


@dataclass
class Tally:
    """What all clients saw. Guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: Counter[str] = field(default_factory=Counter)  # by kind
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and fault
    busy: int = 0  # answers of 429
    given_up: int = 0  # requests that were still refused when the time was over
    tokens: Counter[str] = field(default_factory=Counter)  # prompt, cached, completion
    finishes: Counter[str] = field(default_factory=Counter)
    firsts: list[tuple[int, float]] = field(default_factory=list)  # prompt tokens, seconds
    gaps: list[float] = field(default_factory=list)
    same: Counter[str] = field(default_factory=Counter)  # fixed questions, by name
    differing: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    left: Counter[str] = field(default_factory=Counter)  # before its first event, or within
    refusals: Counter[int] = field(default_factory=Counter)  # malformed bodies, by status


@dataclass
class Load:
    """Clients of one server until `until`, on the clock of `time.monotonic`."""

    address: Address
    models: Sequence[str]
    fixed: Sequence[Fixed]
    expected: dict[str, list[str]]  # a fixed question's texts, asked alone
    count: Count | None
    until: float
    seed: int = 0
    timeout: float = 600.0
    tally: Tally = field(default_factory=Tally)

    def run(self, clients: int) -> None:
        """Returns when the time is over and every polite client has its answer."""
        crashed: list[BaseException] = []

        def one(number: int) -> None:
            try:
                self._client(Mix(self.models, self.fixed, 10_000 * self.seed + number))
            except BaseException as error:  # a fault of the bench: not to be lost in a thread
                crashed.append(error)

        threads = [
            threading.Thread(target=one, args=(number,), daemon=True) for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if crashed:
            raise crashed[0]

    def _client(self, mix: Mix) -> None:
        while self._on():
            kind = mix.kind()
            if kind == "leaving":
                self._leave(*mix.leaving())
            elif kind == "malformed":
                self._refused(*mix.malformed())
            elif kind == "conversation":
                self._converse(*mix.conversation())
            elif kind == "fixed":
                self._fixed(mix.fixed())
            elif kind == "slow reader":
                asked, manner = mix.slow()
                self.polite(kind, asked, replace(manner, timeout=self.timeout))
            elif kind == "whole":
                self.polite(kind, mix.whole())
            elif kind == "completion":
                self.polite(kind, mix.completion())
            else:
                self.polite(kind, mix.streaming())

    def _on(self) -> bool:
        return time.monotonic() < self.until

    def _still_there(self, reply: Reply) -> None:
        """Where nobody listens any more, the load is over: no client asks on."""
        if reply.broken is not None and reply.broken.startswith("ConnectionRefused"):
            self.until = 0.0

    def polite(self, kind: str, asked: Question, manner: Manner | None = None) -> Heard | None:
        """Ask, again after 429 as long as that server says. None where it never was taken."""
        began, manner = time.perf_counter(), manner or Manner(self.timeout)
        while (reply := ask(self.address, asked.path, asked.body, manner)).status == 429:
            with self.tally.lock:
                self.tally.busy += 1
            pause = max(0.1, reply.retry_after or 1.0)
            left = self.until - time.monotonic()
            time.sleep(max(0.0, min(pause, left)))
            if left < pause:
                with self.tally.lock:
                    self.tally.given_up += 1
                return None
        self._still_there(reply)
        heard = hear(asked, reply, self.count)
        if asked.streams and not heard.faults and reply.kind != "text/event-stream":
            heard.faults.append(f"a stream of type {reply.kind}")
        self._note(kind, asked, heard, began, paced=bool(manner.pause))
        return heard

    def _note(self, kind: str, asked: Question, heard: Heard, began: float, paced: bool) -> None:
        tally = self.tally
        with tally.lock:
            tally.requests[kind] += 1
            tally.faults.update((kind, fault) for fault in set(heard.faults))
            tally.finishes.update(str(choice.finish) for choice in heard.choices)
            for key in ("prompt", "completion"):
                tally.tokens[key] += heard.usage_of(f"{key}_tokens")
            tally.tokens["cached"] += heard.cached
            if heard.first is not None:
                prompt = heard.usage_of("prompt_tokens")
                if not prompt and self.count is not None:
                    prompt = self.count(asked) or 0
                tally.firsts.append((prompt, heard.first - began))
            if not paced:  # a slow reader sees its own pauses
                tally.gaps += heard.gaps

    def _fixed(self, fixed: Fixed) -> None:
        heard = self.polite("fixed", fixed.question)
        if heard is None or heard.faults:
            return
        texts, expected = [choice.text for choice in heard.choices], self.expected[fixed.name]
        with self.tally.lock:
            if texts == expected:
                self.tally.same[fixed.name] += 1
            else:
                self.tally.differing[fixed.name].append(first_difference(texts, expected))

    def _converse(self, model: str, said: list[str]) -> None:
        messages: list[dict[str, str]] = []
        for text in said:
            if messages and not self._on():
                return
            messages += user(text)
            asked = chat(model, list(messages), TURN_TOKENS, stream=True, temperature=0)
            heard = self.polite("conversation", asked)
            if heard is None or heard.faults:
                return
            messages.append({"role": "assistant", "content": heard.choices[0].text})

    def _leave(self, asked: Question, manner: Manner) -> None:
        reply = ask(self.address, asked.path, asked.body, manner)
        self._still_there(reply)
        with self.tally.lock:
            self.tally.requests["leaving"] += 1
            if reply.broken is not None or reply.status not in (0, 200, 429):
                fault = reply.broken or f"status {reply.status}"
                self.tally.faults["leaving", fault] += 1
            elif reply.left:
                self.tally.left["within" if reply.events else "before its first event"] += 1
            else:
                self.tally.left["at 429" if reply.status == 429 else "after its end"] += 1

    def _refused(self, path: str, body: bytes) -> None:
        """A body that is refused is answered with a 4xx and an error in OpenAI's shape."""
        reply = ask(self.address, path, body, Manner(_NO_ANSWER))
        self._still_there(reply)
        with self.tally.lock:
            self.tally.requests["malformed"] += 1
            self.tally.refusals[reply.status] += 1
            if fault := refusal_fault(reply):
                self.tally.faults["malformed", f"{fault} for {body[:60]!r}"] += 1


def refusal_fault(reply: Reply) -> str | None:
    """What is wrong with the refusal of a malformed body."""
    if reply.broken is not None:
        return reply.broken
    if not 400 <= reply.status < 500:
        return f"status {reply.status}"
    with suppress(TypeError, LookupError):
        if isinstance(reply.body["error"]["message"], str) and reply.body["error"]["type"]:
            return None
    return f"status {reply.status} without an error's message and type"


def first_difference(texts: Sequence[str], expected: Sequence[str]) -> int:
    """The first character at which any of the texts is another."""
    places = []
    for text, wanted in zip(texts, expected, strict=True):
        if text != wanted:
            pairs = enumerate(zip(text, wanted, strict=False))
            short = min(len(text), len(wanted))
            places.append(next((place for place, (a, b) in pairs if a != b), short))
    return min(places)


def all_at_once(address: Address, questions: Sequence[Question], seconds: float) -> None:
    """Ask all of them together, and hang up on all of them after so many seconds."""
    manner = Manner(leave_within=seconds)
    threads = [
        threading.Thread(target=ask, args=(address, asked.path, asked.body, manner), daemon=True)
        for asked in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
